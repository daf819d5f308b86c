"""Tiny MiniGPT-4 models from transformers' parts, saved under MiniGPT-4's names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers.tiny_blip import QUERIES, blip2, square_processor
from tests.helpers.tiny_llava import words

VIT = {
    r"embeddings\.class_embedding": "cls_token",
    r"embeddings\.position_embedding": "pos_embed",
    r"embeddings\.patch_embedding\.": "patch_embed.proj.",
    r"encoder\.layers\.(\d+)\.layer_norm([12])\.": r"blocks.\1.norm\2.",
    r"encoder\.layers\.(\d+)\.self_attn\.projection\.": r"blocks.\1.attn.proj.",
    r"encoder\.layers\.(\d+)\.self_attn\.qkv\.": r"blocks.\1.attn.qkv.",
    r"encoder\.layers\.(\d+)\.mlp\.": r"blocks.\1.mlp.",
}
QFORMER = {
    r"^qformer\.layernorm\.": "Qformer.bert.embeddings.LayerNorm.",
    r"^qformer\.(encoder\.layer\.\d+\.(attention|crossattention)\.)attention\.": r"Qformer.bert.\1self.",
    r"^qformer\.": "Qformer.bert.",
    r"^language_projection\.": "llama_proj.",
    r"^vision_model\.post_layernorm\.": "ln_vision.",
}


def vit_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vision encoder of a Blip2 model under the names of eva_vit_g.pth."""
    found = {}
    for name, tensor in state.items():
        short = name.removeprefix("vision_model.")
        if short == name or short.startswith("post_layernorm."):
            continue
        for old, new in VIT.items():
            short = re.sub(old, new, short)
        if short.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            place = short.removesuffix("qkv.bias")
            found |= {place + "q_bias": query.clone(), place + "v_bias": value.clone()}
        else:
            found[short] = tensor.clone()
    return found


def bridge_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norm, queries, Q-Former and linear under the names of MiniGPT-4."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(("qformer.", "language_projection.", "query_tokens", "vision_model.post_layernorm.")):
            for old, new in QFORMER.items():
                name = re.sub(old, new, name)
            found[name] = tensor.clone()
    return found


def text_config(model) -> dict:
    return json.loads(model.config.text_config.to_json_string(use_diff=False))


def save(folder: Path, model, tensors: dict[str, torch.Tensor], **config) -> Path:
    """A whole model's folder: the decoder and vision encoder of a Blip2 model, the bridge as given."""
    state = model.state_dict()
    whole = {"visual_encoder." + name: tensor for name, tensor in vit_tensors(state).items()} | tensors
    whole |= {
        name.replace("language_model.", "llama_model."): tensor.clone()
        for name, tensor in state.items()
        if name.startswith("language_model.")
    }
    folder.mkdir(exist_ok=True)
    save_file(whole, folder / "model.safetensors")
    own = {
        "model_type": "minigpt4",
        "vision_config": model.config.vision_config.to_dict(),
        "text_config": text_config(model),
        "vision_norm_eps": model.config.vision_config.layer_norm_eps,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(own))
    words().save_pretrained(folder)
    square_processor().save_pretrained(folder)
    return folder


def with_qformer(folder: Path):
    """(transformers' Blip2 with a Llama, the folder). MiniGPT-4's names hold no biases of keys."""
    theirs = blip2("llama")
    for layer in theirs.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data.view(3, -1)[1] = 0
    own = {"qformer_config": theirs.config.qformer_config.to_dict(), "num_query_tokens": QUERIES}
    return theirs, save(folder, theirs, bridge_tensors(theirs.state_dict()), has_qformer=True, **own)


class Concatenated(torch.nn.Module):
    """MiniGPT-4 without a Q-Former: transformers' vision encoder and decoder, and a linear on four patches.

    The versions of transformers that the guide was made with multiply what comes as inputs_embeds by Gemma's factor;
    the one here multiplies words alone. `scale` stands for the first.
    """

    def __init__(self, decoder: str, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.blip = blip2(decoder)
        config = self.blip.config
        self.linear = torch.nn.Linear(4 * config.vision_config.hidden_size, config.text_config.hidden_size)
        torch.nn.init.normal_(self.linear.weight, std=0.1)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V]; image positions hold -200."""
        vision = self.blip.vision_model
        hidden = vision.encoder(vision.embeddings(pixel_values)).last_hidden_state
        features = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-5)[:, 1:]
        features = self.linear(features.reshape(len(features), -1, self.linear.in_features)) * self.scale
        places = input_ids == -200
        decoder = self.blip.language_model
        embeddings = decoder.get_input_embeddings()(input_ids.masked_fill(places, 0))
        embeddings = embeddings.masked_scatter(places[..., None], features)
        return decoder(inputs_embeds=embeddings, attention_mask=torch.ones_like(input_ids)).logits


def concatenated(folder: Path, decoder: str = "llama", **config):
    """(the model above, its folder)."""
    theirs = Concatenated(decoder, config.get("feature_scale") or 1.0).eval()
    linear = {f"llama_proj.{name}": tensor.detach().clone() for name, tensor in theirs.linear.named_parameters()}
    own = {"has_qformer": False, "vision_norm_eps": 1e-5} | config
    return theirs, save(folder, theirs.blip, linear, **own)


def decoder_folder(model, folder: Path) -> Path:
    """The decoder's own folder, with the tokenizer."""
    model.language_model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder
