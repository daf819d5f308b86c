"""Tiny whole models of any geometry in the liuhaotian layout, written without the code under test."""

import json
import shutil

import torch
from safetensors.torch import save_file

from mindspeed_mm.models.spec import find_part
from mindspeed_mm.models.text_decoder import llama
from mindspeed_mm.weights.sources import open_source
from tests.weights.weight_helpers import random_hf_state

KINDS = ("text_decoder", "vision_encoder", "vision_projector")

TEXT = {
    "model_type": "llava_llama",
    "vocab_size": 1003,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def clip_state(config, seed=1):
    """Random tensors of a CLIPVisionModel under HF names."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, config["patch_size"], config["patch_size"]),
        "embeddings.position_embedding.weight": ((config["image_size"] // config["patch_size"]) ** 2 + 1, width),
    }
    linears = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in linears.items():
            shapes[f"encoder.layers.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layers.{layer}.{name}.bias"] = shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{layer}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{name}.{kind}": (width,) for kind in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def projector_state(text, vision, seed=2, kind="mlp2x_gelu"):
    """Random tensors of a projector under LLaVA's names."""
    generator = torch.Generator().manual_seed(seed)
    wide, narrow = text["hidden_size"], vision["hidden_size"]
    names = [""] if kind == "linear" else [f"{2 * number}." for number in range(int(kind[3]))]
    shapes = {f"{name}weight": (wide, wide if number else narrow) for number, name in enumerate(names)}
    shapes |= {f"{name}bias": (wide,) for name in names}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_llava(folder, golden, *, text=None, vision=None, dtype=torch.float32, projector="mlp2x_gelu"):
    """A whole model in the liuhaotian layout with the golden tokenizer; returns its folder."""
    text, vision = TEXT | (text or {}), VISION | (vision or {})
    spec = llama.from_hf(text)
    state = random_hf_state(spec)
    if spec.share_embeddings_and_output_weights:
        state.pop("lm_head.weight", None)
    vision_encoder = "model.vision_tower.vision_tower.vision_model."
    state |= {vision_encoder + name: tensor for name, tensor in clip_state(vision).items()}
    linears = projector_state(text, vision, kind=projector)
    state |= {"model.mm_projector." + name: tensor for name, tensor in linears.items()}
    folder.mkdir(parents=True)
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, folder / "model.safetensors")
    config = text | {"mm_hidden_size": vision["hidden_size"], "mm_projector_type": projector}
    config |= {"mm_vision_tower": "vision_encoder", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vision_encoder").mkdir()
    save_file(clip_state(vision), folder / "vision_encoder" / "model.safetensors")
    (folder / "vision_encoder" / "config.json").write_text(json.dumps(vision))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(golden / "models" / "llava_original" / name, folder / name)
    return folder


def tensors(path):
    """All tensors of all parts under the dialect's names, as stored, without buffers that are dropped."""
    source = open_source(path)
    return {
        (kind, name): part.get(name)
        for kind, part in source.part_sources.items()
        for name in part.names
        if not name.endswith("inv_freq")
    }


def our_tensors(path, spec):
    """{(kind, our name): tensor} of the built tensors of a whole model."""
    source = open_source(path)
    result = {}
    for kind, part_spec in spec.part_specs().items():
        part, found = find_part(kind, part_spec.model_id), source.part(kind)
        for step in part.rules[found.dialect].match(found.names, part_spec.geometry).steps:
            if not step.unused:
                result[kind, step.target] = step.rule.to_ours([found.get(n) for n in step.sources], part_spec.geometry)
    return result


def assert_equal(left, right):
    """The same names, and each pair bit-equal with one type."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    different = [name for name in left if left[name].dtype != right[name].dtype or not left[name].equal(right[name])]
    assert not different, different
