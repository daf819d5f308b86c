"""Preference training of adapters on a quantized decoder."""

import json

import pytest

from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.sources import open_source
from tests.helpers.golden_training import records
from tests.helpers.tiny_decoders import make
from tests.helpers.tiny_pairs import train_pairs, write_pairs
from tests.parallel.test_command import LAYOUTS

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture
def folder(golden, tmp_path):
    """Pairs, and a model whose decoder is stored and read in NF4."""
    write_pairs(golden, tmp_path)
    make("llama", **SIZES | {"vocab_size": 1000, "max_position_embeddings": 256}).save_pretrained(tmp_path / "llama")
    model = json.loads((tmp_path / "model.json").read_text())
    text = describe_part(open_source(tmp_path / "llama").part("text_decoder"))
    block = text.model_dump(mode="json", exclude_defaults=True) | {"ckpt_path": str(tmp_path / "llama")}
    lora = {"r": 3, "alpha": 7, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
    model["text_decoder"] = block | {"quantize": "nf4", "lora": lora}
    projector = {"hidden_size": 128, "ffn_hidden_size": 128, "ckpt_path": None, "fresh": True}
    model["image_encoder"]["vision_projector"] |= projector
    (tmp_path / "model.json").write_text(json.dumps(model))
    return tmp_path


def test_a_block_behind_a_quantized_decoder(ranks, folder):
    """Adapters and a new post-interaction block, which is the identity at the start."""
    model = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(model | {"interaction": {}}))
    assert ranks(1).run(train_pairs, str(folder), "block", "") == [0]
    rows = records(folder / "block")
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and rows[-1]["loss"] < rows[0]["loss"]


def test_adapters_on_a_quantized_decoder(ranks, folder):
    """The reference is the same quantized decoder, which lies in memory once."""
    assert ranks(1).run(train_pairs, str(folder), "one", f"--pref-cache {folder}/cache") == [0]
    rows = records(folder / "one")
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and rows[0]["rewards/margins"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert ranks(2).run(train_pairs, str(folder), "two", LAYOUTS["DP2"]) == [0, 0]
    for row, other in zip(records(folder / "two"), rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
