"""Rotary positions against transformers' own tables, for every scaling and for positions of three numbers."""

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding as TheirMultimodal
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.kit.rotary import RotaryEmbedding, attention_factor, inverse_frequencies
from mindspeed_mm.platform import fused
from mindspeed_mm.platform.segments import Segments

CHANNELS, LONGEST = 12, 96
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5],
    "original_max_position_embeddings": 32,
}
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": YARN,
    "yarn, own ramp": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, attention factor": {**YARN, "attention_factor": 0.9},
    "longrope": LONGROPE,
    "longrope, factor": {**LONGROPE, "factor": 5.0},
    "longrope, attention factor": {**LONGROPE, "attention_factor": 1.2},
}


def theirs(scaling, positions, base=1000.0):
    """Cosines and sines of transformers, [2, B, S, CHANNELS / 2]."""
    config = transformers.LlamaConfig(
        hidden_size=4 * CHANNELS,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_theta": base, **(scaling or {"rope_type": "default"})},
    )
    tables = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    return torch.stack(tables)[..., : CHANNELS // 2]


def ours(scaling, positions, long=False):
    rotary = RotaryEmbedding(CHANNELS, 1000.0, scaling, max_positions=LONGEST)
    return rotary.cos_sin(positions, torch.float32, long)[:, :, :, 0, 0].transpose(1, 2)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_transformers(name):
    positions = torch.arange(32).unsqueeze(0)
    torch.testing.assert_close(ours(SCALINGS[name], positions), theirs(SCALINGS[name], positions), atol=1e-5, rtol=0)


def test_scalings_differ():
    positions = torch.arange(32).unsqueeze(0)
    tables = [ours(scaling, positions) for name, scaling in SCALINGS.items() if name not in ("none", "dynamic")]
    plain = ours(None, positions)
    assert all((table - plain).abs().max() > 1e-2 for table in tables)


def test_long_sequences_take_the_long_factors():
    rotary = RotaryEmbedding(CHANNELS, 1000.0, LONGROPE, max_positions=LONGEST)
    positions = torch.arange(40).unsqueeze(0)
    assert rotary.long_positions(32, None) is False and rotary.long_positions(40, None) is True
    torch.testing.assert_close(ours(LONGROPE, positions, True), theirs(LONGROPE, positions), atol=1e-5, rtol=0)


def test_each_segment_takes_its_own_factors():
    rotary = RotaryEmbedding(CHANNELS, 1000.0, LONGROPE, max_positions=LONGEST)
    lengths = (33, 4)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    long = rotary.long_positions(37, Segments.of_lengths(lengths, torch.device("cpu")))
    found = rotary.cos_sin(positions, torch.float32, long)[:, :, 0, 0, 0]
    wanted = [theirs(LONGROPE, torch.arange(length).unsqueeze(0))[:, 0] for length in lengths]
    torch.testing.assert_close(found, torch.cat(wanted, dim=1), atol=1e-5, rtol=0)


def test_dynamic_scaling_ends_with_the_models_own_length():
    rotary = RotaryEmbedding(CHANNELS, 1000.0, SCALINGS["dynamic"], max_positions=LONGEST)
    assert rotary.longest == LONGEST and rotary.long_positions(LONGEST, None) is False
    with pytest.raises(DataError, match="more than 96 positions, from where on the model's rope_scaling dynamic"):
        rotary.long_positions(LONGEST + 1, None)


def test_an_unknown_scaling():
    with pytest.raises(ValueError, match="rope_scaling type 'ntk' is not supported"):
        inverse_frequencies(8, 1e4, {"rope_type": "ntk"})
    assert attention_factor(None, 96) == 1.0


def test_positions_of_time_height_and_width():
    sections, rows, length = (1, 2, 3), 2, 9
    torch.manual_seed(0)
    positions = torch.randint(0, 50, (3, rows, length))
    config = transformers.Qwen2VLTextConfig(
        hidden_size=4 * CHANNELS,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "mrope_section": list(sections)},
    )
    query, key = torch.randn(rows, 4, length, CHANNELS), torch.randn(rows, 2, length, CHANNELS)
    cos, sin = TheirMultimodal(config)(query, positions)
    wanted = apply_rotary_pos_emb(query, key, cos, sin)
    rotary = RotaryEmbedding(CHANNELS, 1000.0, None, max_positions=LONGEST, sections=sections)
    grouped = torch.cat((query.view(rows, 2, 2, length, CHANNELS), key[:, :, None], key[:, :, None]), dim=2)
    qkv = grouped.permute(3, 0, 1, 2, 4).flatten(2)
    turned = fused.RotateQK.apply(qkv, *rotary.cos_sin(positions, torch.float32), 2)
    turned = turned.view(length, rows, 2, 4, CHANNELS).permute(1, 2, 3, 0, 4)
    torch.testing.assert_close(turned[:, :, :2].flatten(1, 2), wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned[:, :, 2], wanted[1], atol=1e-5, rtol=1e-5)
    text = torch.arange(length).expand(rows, length)
    equal = rotary.cos_sin(text.expand(3, -1, -1), torch.float32)
    torch.testing.assert_close(equal, rotary.cos_sin(text, torch.float32))
