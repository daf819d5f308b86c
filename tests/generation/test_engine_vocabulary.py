"""Ids that the embedding does not have."""

import pytest

import mindspeed_mm as mm
from mindspeed_mm.errors import DataError


def test_tokenizer_larger_than_the_model_is_named(golden):
    vlm = mm.load(golden / "models" / "llava_original", device="cpu", tokenizer=golden / "tokenizer_chatml")
    from mindspeed_mm.generation.engine import GenerationRequest

    engine = vlm.engine()
    with pytest.raises(DataError, match="the tokenizer gives id 100[01], the model has 1000"):
        engine.prepare(GenerationRequest("a", prompt="<|im_start|>user"))
