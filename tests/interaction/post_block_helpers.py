"""Post-interaction blocks at random values beside the golden model, and the original's formulas in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.helpers.golden_model import model_json

WIDTH, FEATURES, INNER, HEADS = 96, 64, 176, 6


def tensors(
    *, depth: int = 1, align: str = "mlp", cross: bool = True, text: bool = False, features: int = FEATURES
) -> dict:
    """A block's tensors under the original's names, none of them zero; `text`: self-attention for cross-attention."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, around: float = 0.0, scale: float = 0.1) -> torch.Tensor:
        return around + scale * torch.randn(shape, generator=generator)

    found = {}
    sizes = [(features, INNER), (INNER, WIDTH)] if align == "mlp" else [(features, WIDTH)]
    for number, (inputs, outputs) in enumerate(sizes if cross else [], start=1):
        name = f"align.fc{number}" if align == "mlp" else "align"
        found |= {f"{name}.weight": draw(outputs, inputs), f"{name}.bias": draw(outputs)}
    norms = ["image_norm"] if cross else []
    for layer in range(depth):
        own = f"blocks.{layer}."
        norms += [own + "layer_norm1", own + "layer_norm2"] if cross or text else [own + "layer_norm1"]
        for kind in ["cross"] * cross + ["self"] * text:
            found |= {f"{own}{kind}_attn.{name}_proj.weight": draw(WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
        found |= {own + "mlp.fc1.weight": draw(INNER, WIDTH), own + "mlp.fc2.weight": draw(WIDTH, INNER)}
    for norm in norms:
        found |= {f"{norm}.weight": draw(WIDTH, around=1.0), f"{norm}.bias": draw(WIDTH)}
    return found


def write_block(path: Path, **changes) -> Path:
    """Those tensors in a file, as they stand beside a LLaVA's."""
    torch.save({f"post_interaction_block.{name}": tensor for name, tensor in tensors(**changes).items()}, path)
    return path


def with_block(golden: Path, trained: tuple[str, ...] = (), **block) -> dict:
    """The golden model.json with an interaction."""
    return model_json(golden, trained=trained) | {"interaction": block}


def write_model(folder: Path, model: dict) -> None:
    (folder / "model.json").write_text(json.dumps(model))


def formulas(own: dict, hidden: torch.Tensor, images: torch.Tensor | None, *, doubled: bool = False) -> torch.Tensor:
    """What the original computes for positions [n, H] of a text whose image has features [P, W] (None: no image),
    layer by layer: its loop over several layers feeds each with the same input, which is not done here. A block with
    self-attention takes the positions for the text from its beginning on."""
    cross, text = "image_norm.weight" in own, "blocks.0.self_attn.q_proj.weight" in own

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), own[f"{name}.weight"], own[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, own[f"{name}.weight"], own.get(f"{name}.bias"))

    memory = images
    if cross and images is not None:
        if "align.weight" in own:
            memory = linear(images, "align")
        else:
            memory = linear(F.gelu(linear(images, "align.fc1")), "align.fc2")
        memory = norm(memory, "image_norm")
    x, layer = hidden, 0
    while f"blocks.{layer}.mlp.fc1.weight" in own:
        block = f"blocks.{layer}."
        if text or (cross and memory is not None):
            attention = block + ("self_attn." if text else "cross_attn.")
            names = [f"{attention}{name}_proj" for name in "qkv"]
            asking = norm(x, block + "layer_norm1")
            states = (asking, asking, asking) if text else (asking, memory, memory)
            query, key, value = (
                linear(state, name).unflatten(-1, (HEADS, -1)).transpose(0, 1)
                for state, name in zip(states, names, strict=True)
            )
            scores = query @ key.transpose(1, 2) * (WIDTH // HEADS) ** -0.5
            if text:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            x = x + linear((scores.softmax(-1) @ value).transpose(0, 1).flatten(1), f"{attention}out_proj")
        last = block + ("layer_norm2" if cross or text else "layer_norm1")
        x = x + linear(F.silu(linear(norm(x, last), block + "mlp.fc1")), block + "mlp.fc2")
        layer += 1
    return x + hidden if doubled else x
