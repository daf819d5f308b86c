"""ALiBi as further channels of queries and keys, against the bias written out; and what MPT's Spec refuses."""

import pytest
import torch
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.alibi import CHANNELS, Alibi, segment_places, slopes
from mindspeed_mm.models.text_decoder import mpt
from mindspeed_mm.platform.segments import BranchedSegments, Segments


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 32])
@pytest.mark.parametrize("bias_max", [8, 5])
def test_slopes_are_those_of_transformers(heads, bias_max):
    wanted = build_mpt_alibi_tensor(heads, 2, bias_max)[:, 0, 0]  # of the key one position back
    torch.testing.assert_close(-torch.tensor(slopes(heads, bias_max)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_keep_their_bias(dtype):
    """Differences of scores between neighbours of position 5000, where bfloat16 alone could not tell them apart."""
    heads, length, scale = 6, 5001, 0.25
    zeros = torch.zeros(1, heads, length, 16, dtype=dtype)
    query, key, value = Alibi(slopes(heads, 8), scale).extend(zeros[:, :, -1:], zeros, zeros)
    scores = scale * query.double() @ key.double().transpose(-1, -2)
    found = scores[0, :, 0, -4:] - scores[0, :, 0, -1:]
    wanted = torch.tensor(slopes(heads, 8)).double()[:, None] * torch.tensor([-3.0, -2.0, -1.0, 0.0])
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-7)
    assert value.shape[-1] == 16 + CHANNELS and not value.any()


def test_places_begin_anew_in_each_sequence_and_branches_continue():
    device = torch.device("cpu")
    assert segment_places(Segments.of_lengths([2, 3], device), device).tolist() == [0, 1, 0, 1, 2]
    branched = BranchedSegments.of_branches([(2, 1, 3), (0, 2)], device)
    assert segment_places(branched, device).tolist() == [0, 1, 2, 2, 3, 4, 0, 1]


BLOCK = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "ffn_hidden_size": 96,
    "language_vocab_size": 131,
    "params_dtype": "fp32",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_query_groups": 2}, "num_query_groups is 2; expected 6: every head of MPT has its own keys"),
        ({"kv_channels": 10}, "6 heads of 10 channels are not hidden_size 48, as MPT has it"),
        ({"lm_position_embedding_type": "rope"}, "MPT has ALiBi"),
    ],
)
def test_blocks_that_are_no_mpt(change, message):
    with pytest.raises(ConfigError, match=message):
        load_config(mpt.MptSpec, BLOCK | change, what="text_decoder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_config": {"clip_qkv": 6}}, "found attn_config.clip_qkv 6; expected ALiBi, no biases"),
        ({"attn_config": {"alibi": False}, "no_bias": False}, "found no_bias False and attn_config.alibi False"),
        ({"attn_config": {"qk_ln": True}}, "found attn_config.qk_ln True"),
        ({"logit_scale": 0.5}, "logit_scale"),
    ],
)
def test_configs_of_other_mpts(change, message):
    with pytest.raises(ConfigError, match=message):
        mpt.from_hf({"model_type": "mpt", **change})


def test_a_spec_survives_its_config():
    spec = load_config(mpt.MptSpec, BLOCK | {"alibi_bias_max": 5.5, "softmax_scale": 0.3}, what="text_decoder")
    again = mpt.from_hf(mpt.to_hf(spec, "fp32"))
    assert again == spec
    with pytest.raises(ConfigError, match="ffn_hidden_size 50 is no multiple of hidden_size 48"):
        mpt.to_hf(load_config(mpt.MptSpec, BLOCK | {"ffn_hidden_size": 50}, what="text_decoder"), "fp32")
