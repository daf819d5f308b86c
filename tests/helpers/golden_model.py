"""The golden tiny model in every layout, and its training batches (see README.md of the golden folder)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.expand import expand_images
from mindspeed_mm.data.sample import Batch, Encoded

TEXT = {
    "num_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "ffn_hidden_size": 176,
    "language_vocab_size": 1000,
    "max_position_embeddings": 2048,
}
VISION = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 128,
    "patch_size": 14,
    "image_size": 56,
}
PROJECTOR = {"input_size": 64, "hidden_size": 96}
IMAGE_TOKENS = 16


def model_json(
    golden: Path,
    *,
    text_decoder: str = "vicuna",
    vision_encoder: str = "clip_hf",
    vision_projector: str = "mm_projector.bin",
    trained: tuple[str, ...] = (),
) -> dict:
    """A model.json whose parts come from the named golden weights; all but `trained` are frozen."""
    models = golden / "models"

    def block(kind: str, shape: dict, weights: str) -> dict:
        return shape | {"ckpt_path": str(models / weights), "freeze": kind not in trained}

    return {
        "text_decoder": block("text_decoder", TEXT, text_decoder),
        "image_encoder": {
            "vision_encoder": block("vision_encoder", VISION, vision_encoder),
            "vision_projector": block("vision_projector", PROJECTOR, vision_projector),
        },
    }


def training_samples(golden: Path) -> list[list[Encoded]]:
    """The samples of the golden training run, expanded: one list of four for each step."""
    arrays = load_file(golden / "training" / "batches.safetensors")
    pool = json.loads((golden / "training" / "meta.json").read_text())["image_pool"]
    images = load_file(golden / "images" / "preprocessed.safetensors")
    steps = []
    for step in range(arrays["input_ids"].shape[0]):
        row = []
        for sample in range(arrays["input_ids"].shape[1]):
            length = int(arrays["lengths"][step, sample])
            ids, labels = expand_images(
                arrays["input_ids"][step, sample, :length].tolist(),
                arrays["labels"][step, sample, :length].tolist(),
                IMAGE_TOKENS,
            )
            shown = [images[pool[i]] for i in arrays["image_index"][step, sample].tolist() if i >= 0]
            row.append(Encoded(f"{step}.{sample}", ids, labels, tuple(shown)))
        steps.append(row)
    return steps


def collate(samples: list[Encoded]) -> Batch:
    """A batch as the loader makes it."""
    return Collator(pad_token_id=0, image_size=(56, 56))(samples)


def load_expected(golden: Path, case: str) -> dict[str, torch.Tensor]:
    """Tensors of one case of the golden folder `expected`."""
    return load_file(golden / "expected" / f"{case}.safetensors")
