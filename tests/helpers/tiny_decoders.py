"""Tiny random decoders of every family, made and saved by transformers, and our model around them.

A decoder stands in a whole model: behind it a vision encoder and a projector at random weights, which text alone does
not touch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 7
"""Shorter than the rows of the tests."""

SHORT = tuple(1.0 + 0.25 * pair for pair in range(3))
LONG = tuple(2.0 + 0.5 * pair for pair in range(3))
LONGROPE = {"rope_type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG)}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}


class TinyDecoder(NamedTuple):
    """A decoder's classes in transformers, and the keys of its tiny config."""

    config: str
    model: str
    keys: dict[str, Any] = {}


FAMILIES = {
    "llama": TinyDecoder("LlamaConfig", "LlamaForCausalLM"),
    "mistral": TinyDecoder("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW, "head_dim": 10}),
    "qwen2": TinyDecoder("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": TinyDecoder("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 10}),
    "gemma": TinyDecoder("GemmaConfig", "GemmaForCausalLM", {"head_dim": 14}),
    "gemma2": TinyDecoder(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 10,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": TinyDecoder("Phi3Config", "Phi3ForCausalLM", {"sliding_window": WINDOW, "partial_rotary_factor": 0.75}),
    "internlm2": TinyDecoder("LlamaConfig", "LlamaForCausalLM"),
    "mpt": TinyDecoder("MptConfig", "MptForCausalLM"),
}
"""internlm2 is a Llama that is saved under InternLM2's names: transformers has no class for it."""

QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2 window": ("qwen2", {**QWEN_WINDOW, "tie_word_embeddings": False}),
    "qwen3 window": ("qwen3", QWEN_WINDOW),
    "gemma of one group": ("gemma", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "phi3 longrope": (
        "phi3",
        {"rope_parameters": {**LONGROPE, "rope_theta": 1e4, "partial_rotary_factor": 0.75}}
        | {"original_max_position_embeddings": 32, "sliding_window": None},
    ),
}

VISION = {
    "model_id": "clip",
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 16,
    "image_size": 28,
    "patch_size": 14,
    "select_layer": -1,
    "freeze": True,
    "fresh": True,
}


def make(name: str, *, seed: int = 5, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of a family; norms and biases are random, too."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    keys = TEXT | family.keys | changes
    if name == "mpt":
        keys = _mpt_keys(keys)
    config = getattr(transformers, family.config)(**keys)
    model = getattr(transformers, family.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _mpt_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Those of MPT's config: every head has its own keys, and its class makes MLPs of four times the width."""
    own = {"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
    own |= {"max_position_embeddings": "max_seq_len", "rms_norm_eps": "layer_norm_epsilon"}
    dropped = ("num_key_value_heads", "intermediate_size")
    return {own.get(key, key): value for key, value in keys.items() if key not in dropped}


def save(model: transformers.PreTrainedModel, name: str, folder: Path, **decoder: Any) -> Path:
    """Save a model in `folder`/hf and the model.json around it, whose path is returned. `decoder` are further keys of
    its text_decoder block."""
    from mindspeed_mm.models.describe import describe_part
    from mindspeed_mm.models.sources import open_source

    model.save_pretrained(folder / "hf")
    if name == "internlm2":
        as_internlm2(folder / "hf")
    text = describe_part(open_source(folder / "hf").part("text_decoder"))
    block = text.model_dump(mode="json", exclude_defaults=True)
    block |= {"model_id": name, "ckpt_path": str(folder / "hf"), "params_dtype": "fp32", **decoder}
    projector = {"num_layers": 1, "input_size": 16, "hidden_size": text.hidden_size, "freeze": True, "fresh": True}
    image_encoder = {"vision_encoder": VISION, "vision_projector": projector | {"ffn_hidden_size": text.hidden_size}}
    path = folder / "model.json"
    path.write_text(json.dumps({"text_decoder": block, "image_encoder": image_encoder}))
    return path


INTERNLM2_NAMES = {
    r"model\.embed_tokens\.": "model.tok_embeddings.",
    r"lm_head\.": "output.",
    r"\.self_attn\.o_proj\.": ".attention.wo.",
    r"\.mlp\.gate_proj\.": ".feed_forward.w1.",
    r"\.mlp\.up_proj\.": ".feed_forward.w3.",
    r"\.mlp\.down_proj\.": ".feed_forward.w2.",
    r"\.input_layernorm\.": ".attention_norm.",
    r"\.post_attention_layernorm\.": ".ffn_norm.",
}


def as_internlm2(folder: Path, prefix: str = "") -> None:
    """Rename a Llama to InternLM2: its config says bias false, and wqkv holds each group's queries, key and value.

    `prefix` is that of the decoder's names where it is the decoder of a LLaVA, whose config is `text_config` then.
    """
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] if prefix else config
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        own = name.startswith(prefix)
        if own and ".self_attn." in name and "o_proj" not in name:
            continue
        for old, new in INTERNLM2_NAMES.items() if own else ():
            name = re.sub(old, new, name)
        renamed[name] = tensor
    for layer in range(text["num_hidden_layers"]):
        parts = [tensors[f"{prefix}model.layers.{layer}.self_attn.{kind}_proj.weight"] for kind in "qkv"]
        grouped = [part.view(text["num_key_value_heads"], -1, text["hidden_size"]) for part in parts]
        renamed[f"{prefix}model.layers.{layer}.attention.wqkv.weight"] = torch.cat(grouped, dim=1).flatten(0, 1)
    save_file(renamed, folder / "model.safetensors")
    kept = {key: value for key, value in text.items() if key not in ("attention_bias", "mlp_bias", "head_dim")}
    kept |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": kept} if prefix else kept))


def rows(count: int = 2, length: int = 23, seed: int = 3) -> torch.Tensor:
    """[count, length] ordinary ids."""
    return torch.randint(3, 131, (count, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: transformers.PreTrainedModel, ids: list[int], new: int) -> list[int]:
    """New ids of transformers' generate."""
    row = torch.tensor([ids])
    config = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=[10**6])
    out = model.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=config)
    return out[0, len(ids) :].tolist()
