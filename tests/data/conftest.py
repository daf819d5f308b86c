"""Fixtures of the data tests: the golden tokenizers, and small data sets made on the spot."""

import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tokenizer(golden):
    from mindspeed_mm.data.tokenizer import load_tokenizer

    return load_tokenizer(golden / "tokenizer")


@pytest.fixture(scope="session")
def chat_tokenizer(golden):
    from mindspeed_mm.data.tokenizer import load_tokenizer

    return load_tokenizer(golden / "tokenizer_chatml")


@pytest.fixture
def image_folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20 + number, 10), colour).save(folder / f"{colour}.png")
    return folder


@pytest.fixture
def make_config(tmp_path, image_folder):
    """make_config(records, **dataset_param) -> DataConfig over a JSON file of these records, images 28 px."""
    from mindspeed_mm.data.config import DataConfig

    def make(records, **dataset_param):
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        pipeline = {"size": {"shortest_edge": 28}, "crop_size": 28, "pad2square": True}
        return DataConfig.load(
            {
                "dataset_param": {
                    "dataset_type": "multimodal",
                    "basic_parameters": {"data_path": str(path), "data_folder": str(image_folder)},
                    "preprocess_parameters": {"train_pipeline": pipeline},
                    "template_name": "v1",
                }
                | dataset_param
            }
        )

    return make
