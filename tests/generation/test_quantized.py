"""8-bit and 4-bit linears; the measurements need bitsandbytes."""

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError
from tests.helpers.tiny_decoders import make, rows, save
from tests.models.test_transformers_parity import batch, save_random_llava


def test_refused(golden, monkeypatch):
    model = golden / "models" / "llava_hf"
    with pytest.raises(ConfigError, match="quantize 'int3' is not known: expected one of int8, nf4, fp4"):
        mm.load(model, device="cpu", quantize="int3")
    with pytest.raises(ConfigError, match="quantize int8 works in one process"):
        mm.load(model, device="cpu", quantize="int8", tensor_model_parallel_size=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="quantize int8 needs bitsandbytes, which is not installed"):
        mm.load(model, device="cpu", quantize="int8")


def test_linears_with_bias_are_refused(golden, monkeypatch):
    from types import SimpleNamespace

    from mindspeed_mm.platform import get_platform

    get_platform("cpu")
    from mindspeed_mm.models.kit import quantized

    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: name)
    layer = SimpleNamespace(self_attention=SimpleNamespace(linear_qkv=torch.nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="found Linear as self_attention.linear_qkv"):
        quantized.quantize_decoder(SimpleNamespace(decoder=SimpleNamespace(layers=[layer])), "nf4")


LINEAR_ERRORS = {"int8": 0.02, "nf4": 0.12, "fp4": 0.16}
"""Relative error of one linear on normal values: 127 steps a row, 16 levels a block of 64."""


@pytest.mark.parametrize("kind", LINEAR_ERRORS)
def test_every_linear_stays_close_and_memory_shrinks(kind, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    save_random_llava(tmp_path, {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4})
    exact, small = (mm.load(tmp_path, device="cpu", quantize=value) for value in (None, kind))
    from mindspeed_mm.models.kit.quantized import LINEARS

    layers = [vlm.model.text_decoder.decoder.layers for vlm in (exact, small)]
    for before, after in zip(*layers, strict=True):
        for block, name in LINEARS:
            linear, quantized = (getattr(getattr(layer, block), name) for layer in (before, after))
            x = torch.randn(64, 1, linear.weight.shape[1])
            expected, found = linear(x)[0], quantized(x)[0]
            assert (found - expected).norm() < LINEAR_ERRORS[kind] * expected.norm(), (block, name)
    bytes_of = [sum(p.numel() * p.element_size() for p in stack.parameters()) for stack in layers]
    assert bytes_of[1] < bytes_of[0] / (3.5 if kind == "int8" else 6)


@pytest.mark.parametrize("kind", LINEAR_ERRORS)
def test_quantised_model_generates(kind, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    save_random_llava(tmp_path, {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4})
    exact, small = (mm.load(tmp_path, device="cpu", quantize=value) for value in (None, kind))
    ids, pixels = batch()
    expected, found = (vlm.logits(ids, None, pixels) for vlm in (exact, small))
    # This random model amplifies the error of a linear four to five times (measured for each kind).
    assert (found - expected).norm() < 6 * LINEAR_ERRORS[kind] * expected.norm()
    assert len(small.generate(input_ids=ids, images=pixels, max_new_tokens=4, eos_token_id=-1)[0]) == 4


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_biases_and_gemma_in_few_bits(name, kind, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    theirs = make(name, hidden_size=128, intermediate_size=256, num_attention_heads=4, head_dim=32)
    path = save(theirs, name, tmp_path)
    exact, small = (mm.load(path, device="cpu", quantize=value) for value in (None, kind))
    wanted, found = (vlm.logits(rows()) for vlm in (exact, small))
    assert 0 < (found - wanted).norm() < 0.8 * wanted.norm()
    assert len(small.generate(input_ids=rows()[0].tolist(), max_new_tokens=4, eos_token_id=-1)[0]) == 4
