"""Shared by the weight tests: the golden folder, and small random checkpoints in public layouts."""

import json

import pytest
from safetensors.torch import save_file

from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.part import find_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.text_decoder import llama
from tests.weights.weight_helpers import random_hf_state

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture
def golden_models(golden):
    """The folder with one model in every public layout."""
    return golden / "models"


@pytest.fixture
def golden_spec(golden_models):
    """ModelSpec of the goldens with 1000 rows (all layouts but llava-hf)."""
    return describe_model(open_source(golden_models / "llava_original"))


@pytest.fixture
def golden_hf_spec(golden_models):
    """ModelSpec of the llava-hf golden, with 1024 rows."""
    return describe_model(open_source(golden_models / "llava_hf"))


@pytest.fixture
def tiny_llama(tmp_path):
    """(folder, spec, HF tensors) of a tiny Llama with grouped queries and an odd vocabulary, one safetensors file."""
    spec = llama.from_hf(TINY_LLAMA)
    state = random_hf_state(spec)
    folder = tmp_path / "llama"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return folder, spec, state


@pytest.fixture
def llama_part():
    """The Llama part."""
    return find_part("text_decoder", "llama")
