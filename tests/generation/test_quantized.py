"""The decoder's linears in 8 and 4 bits at generation: every layout, adapters on top, what is held."""

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.weights.blockwise import KINDS, dequantize, quantize
from tests.helpers.tiny_decoders import make, rows, save
from tests.models.test_transformers_parity import batch, save_random_llava

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


def stored_by_hand(theirs, kind):
    """The model of transformers with what its layers' linears are in fewer bits."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".layers." in name and parameter.dim() == 2:
                parameter.copy_(dequantize(quantize(parameter, kind), kind, torch.float32))
    return theirs


def test_refused(golden):
    model = golden / "models" / "llava_hf"
    with pytest.raises(ConfigError, match="quantize 'int3' is not known: expected one of nf4, fp4, int8"):
        mm.load(model, device="cpu", quantize="int3")
    with pytest.raises(ConfigError, match="double_quant stores the scales of quantised weights: give quantize"):
        mm.load(model, device="cpu", double_quant=True)
    with pytest.raises(ConfigError, match="linear_proj has 96 columns on a rank; expected a multiple of 64"):
        mm.load(model, device="cpu", quantize="int8")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_stored_values(kind, tmp_path):
    """Biases and Gemma's norms included."""
    name = {"nf4": "gemma2", "fp4": "llama", "int8": "qwen2"}[kind]
    theirs = make(name, **SIZES)
    path = save(theirs, name, tmp_path)
    exact, small = (mm.load(path, device="cpu", quantize=value) for value in (None, kind))
    ids = rows()
    with torch.no_grad():
        expected = stored_by_hand(theirs, kind)(input_ids=ids).logits
    torch.testing.assert_close(small.logits(ids), expected, atol=2e-5, rtol=1e-4)
    before, after = (
        sum(p.nbytes for p in vlm.model.text_decoder.decoder.layers.parameters()) for vlm in (exact, small)
    )
    assert after < before / (3.5 if kind == "int8" else 6)


def test_a_whole_model_generates(tmp_path):
    save_random_llava(tmp_path, {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4})
    exact, small, smaller = (
        mm.load(tmp_path, device="cpu", quantize=kind, double_quant=double)
        for kind, double in ((None, False), ("nf4", False), ("nf4", True))
    )
    ids, pixels = batch()
    expected, found, again = (vlm.logits(ids, None, pixels) for vlm in (exact, small, smaller))
    # The error of a linear is 0.09; this random model amplifies it four to five times (measured).
    assert 0 < (found - expected).norm() < 0.6 * expected.norm()
    assert 0 < (again - found).norm() < 0.02 * found.norm()
    assert len(small.generate(input_ids=ids, images=pixels, max_new_tokens=4, eos_token_id=-1)[0]) == 4


def answers(path, tensor, pipeline, kind):
    """What this rank generates."""
    vlm = mm.load(
        path,
        device="cpu",
        quantize=kind,
        double_quant=kind == "nf4",
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
    )
    return vlm.generate(input_ids=rows()[:2].tolist(), max_new_tokens=8, eos_token_id=-1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A decoder of 128 columns."""
    return save(make("llama", **SIZES, num_hidden_layers=4), "llama", tmp_path_factory.mktemp("quantised"))


@pytest.mark.parametrize(("tensor", "pipeline", "kind"), [(2, 1, "nf4"), (1, 2, "int8")])
def test_ranks_generate_what_one_process_does(ranks, model, tensor, pipeline, kind):
    single = ranks(1).run(answers, model, 1, 1, kind)[0]
    assert ranks(2).run(answers, model, tensor, pipeline, kind) == [single, single]
