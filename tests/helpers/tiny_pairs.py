"""Preference records over a few images, and runs of `train` on them."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.helpers.golden_model import model_json
from tests.parallel.test_command import COMMON, train

LORA = "--lora-r 3 --lora-alpha 7 --lora-target-modules q_proj v_proj o_proj gate_proj down_proj"
SIZES = "--objective dpo --train-iters 3 --lr 1e-2"
COLOURS = ("red", "green", "blue", "white")


def pair_records() -> list[dict]:
    """Twelve pairs of unequal lengths, eight of them with an image."""
    rows = []
    for number in range(12):
        words = " ".join(["Hi"] * (1 + 3 * number % 5))
        row = {
            "id": str(number),
            "prompt": f"What is it, {words}?",
            "chosen": "Ho ho. " * (1 + number % 3),
            "rejected": "He is a dog. " * (1 + number % 4),
        }
        if number % 3:
            row |= {"prompt": "<image>\n" + row["prompt"], "images": [f"{COLOURS[number % 4]}.png"]}
        rows.append(row)
    return rows


def write_pairs(
    golden: Path, folder: Path, *, rows: list[dict] | None = None, trained=("text_decoder",), **data
) -> None:
    """model.json, data.json, the records and their images."""
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (60, 40 + 10 * number), colour).save(folder / f"{colour}.png")
    (folder / "rows.json").write_text(json.dumps(pair_records() if rows is None else rows))
    (folder / "model.json").write_text(json.dumps(model_json(golden, trained=trained)))
    parameters = {
        "dataset_type": "preference",
        "basic_parameters": {"data_path": str(folder / "rows.json"), "data_folder": str(folder)},
        "preprocess_parameters": {"image_processer_path": str(golden / "models" / "clip_hf")},
        "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
    }
    (folder / "data.json").write_text(json.dumps({"dataset_param": parameters} | data))


def train_pairs(folder: str, name: str, flags: str) -> int:
    """`mindspeed-mm train --objective dpo` on this rank; its exit code."""
    return train(folder, name, f"{SIZES} {flags}")


def train_alone(folder: Path, name: str, flags: str) -> int:
    """As `train_pairs` in this process, whose output a test can read; without an objective of its own."""
    from mindspeed_mm.cli.main import main

    files = ["--mm-model", f"{folder}/model.json", "--mm-data", f"{folder}/data.json", "--save", f"{folder}/{name}"]
    return main(["train", *files, *COMMON.split(), *flags.split()])
