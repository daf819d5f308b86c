"""Flamingo in plain torch around transformers' CLIP and Llama, under Otter's names, as the papers describe it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn

from tests.helpers.tiny_llava import IMAGE_ID, clip, decoder_config, fixed_processor, randomised, words

HEADS, CHANNELS = 8, 64


def feed_forward(width: int) -> nn.Sequential:
    inner = 4 * width
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
    )


def attend(query: torch.Tensor, pair: torch.Tensor, sees: torch.Tensor | None = None) -> torch.Tensor:
    """[B, S, N * D], [B, K, 2 * N * D] -> [B, S, N * D]; `sees` [B, S, K], rows of nothing give zeros."""
    key, value = pair.chunk(2, dim=-1)
    query, key, value = (x.unflatten(-1, (HEADS, CHANNELS)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * CHANNELS**-0.5
    if sees is not None:
        scores = scores.masked_fill(~sees[:, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2).flatten(2)


class PerceiverBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        size = HEADS * CHANNELS
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, size, bias=False), nn.Linear(width, 2 * size, bias=False)
        self.to_out = nn.Linear(size, width, bias=False)
        self.feed_forward = feed_forward(width)

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        normed = self.norm_latents(latents)
        pair = self.to_kv(torch.cat((self.norm_media(media), normed), dim=1))
        latents = latents + self.to_out(attend(self.to_q(normed), pair))
        return latents + self.feed_forward(latents)


class Resampler(nn.Module):
    def __init__(self, width: int, latents: int, depth: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.layers = nn.ModuleList(PerceiverBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, media: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(len(media), -1, -1)
        for layer in self.layers:
            latents = layer(media, latents)
        return self.norm(latents)


class MaskedAttention(nn.Module):
    def __init__(self, width: int, memory: int) -> None:
        super().__init__()
        size = HEADS * CHANNELS
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, size, bias=False), nn.Linear(memory, 2 * size, bias=False)
        self.to_out = nn.Linear(size, width, bias=False)


class GatedBlock(nn.Module):
    def __init__(self, width: int, memory: int) -> None:
        super().__init__()
        self.attn, self.feed_forward = MaskedAttention(width, memory), feed_forward(width)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, hidden: torch.Tensor, memory: torch.Tensor | None, sees: torch.Tensor | None) -> torch.Tensor:
        if memory is not None:
            inner = self.attn
            found = attend(inner.to_q(inner.norm(hidden)), inner.to_kv(memory), sees)
            hidden = hidden + inner.to_out(found) * self.attn_gate.tanh()
        return hidden + self.feed_forward(hidden) * self.ff_gate.tanh()


class FlamingoLayer(nn.Module):
    def __init__(self, layer: nn.Module, cross: GatedBlock | None) -> None:
        super().__init__()
        self.decoder_layer = layer
        if cross is not None:
            self.gated_cross_attn_layer = cross
        self.seen: tuple = (None, None)

    def forward(self, hidden_states: torch.Tensor, **options):
        cross = getattr(self, "gated_cross_attn_layer", None)
        hidden_states = hidden_states if cross is None else cross(hidden_states, *self.seen)
        return self.decoder_layer(hidden_states, **options)


class FlamingoReference(nn.Module):
    """One row at a time; a token sees the latest image alone."""

    def __init__(self, every: int = 2, latents: int = 5, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(2)  # of one in which every image has an answer of its own (test_flamingo_answers)
        self.every = every
        self.vision_encoder = transformers.CLIPVisionModel(clip())
        width = self.vision_encoder.config.hidden_size
        self.perceiver = Resampler(width, latents, depth)
        self.lang_encoder = transformers.LlamaForCausalLM(decoder_config("llama", num_hidden_layers=4))
        hidden = self.lang_encoder.config.hidden_size
        for number, layer in enumerate(self.lang_encoder.model.layers):
            cross = GatedBlock(hidden, width) if (number + 1) % every == 0 else None
            self.lang_encoder.model.layers[number] = FlamingoLayer(layer, cross)
        randomised(self)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("_gate"):
                    parameter.fill_(0.7)

    def forward(self, input_ids, pixel_values=None, labels=None, prompt: int | None = None, frames: int = 1):
        """`prompt`: an `<image>` behind so many tokens was generated, and is none. `frames` of each item in a row."""
        memory, sees = None, None
        if pixel_values is not None:
            media = self.vision_encoder(pixel_values).last_hidden_state[:, 1:]
            features = self.perceiver(media.unflatten(0, (-1, frames)).flatten(1, 2))
            memory = features.flatten(0, 1)[None]
            number = torch.arange(1, len(features) + 1).repeat_interleave(features.shape[1])
            places = input_ids == IMAGE_ID
            places[:, prompt or places.shape[1] :] = False
            sees = places.cumsum(1)[..., None] == number
        for layer in self.lang_encoder.model.layers:
            layer.seen = (memory, sees)
        logits = self.lang_encoder(input_ids, use_cache=False).logits
        loss = None if labels is None else F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
        return SimpleNamespace(logits=logits, loss=loss)


def save(model: FlamingoReference, folder: Path, **config) -> Path:
    """The folder of a model in Otter's layout."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    own = {
        "model_type": "otter",
        "architectures": ["OtterForConditionalGeneration"],
        "cross_attn_every_n_layers": model.every,
        "text_config": json.loads(model.lang_encoder.config.to_json_string(use_diff=False)),
        "vision_config": json.loads(model.vision_encoder.config.to_json_string(use_diff=False)),
        "use_media_placement_augmentation": True,
        "tie_word_embeddings": False,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(own))
    words().save_pretrained(folder)
    fixed_processor("clip").save_pretrained(folder)
    return folder
