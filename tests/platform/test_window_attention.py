"""Attention with a sliding window and with a soft cap, against the formula with a dense mask."""

import pytest
import torch

from mindspeed_mm.platform import base as platform_base
from mindspeed_mm.platform import capped, get_platform
from mindspeed_mm.platform.segments import Segments


@pytest.fixture
def cpu():
    return get_platform("cpu")


def plain(query, key, value, *, seen, scale, soft_cap=None):
    """softmax of the (capped) scores, hidden where `seen` is False."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    scores = scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def inputs(length, keys=None, rows=2, heads=6, groups=2, size=10):
    torch.manual_seed(length)
    keys = keys or length
    return [
        torch.randn(rows, heads, length, size, requires_grad=True),
        torch.randn(rows, groups, keys, size, requires_grad=True),
        torch.randn(rows, groups, keys, size, requires_grad=True),
    ]


def causal(length, window=None):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < (window or length))


def compare(found, wanted, leaves):
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    ours, theirs = (torch.autograd.grad(x, leaves, weights, retain_graph=True) for x in (found, wanted))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 7, 23, 40])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_causal(cpu, monkeypatch, window, soft_cap):
    monkeypatch.setattr(platform_base, "LEAST_BLOCK", 5)
    monkeypatch.setattr(capped, "BLOCK_SCORES", 2 * 6 * 23 * 4)  # 4 queries at a time
    leaves = inputs(23)
    options = {"mask": None, "causal": True, "scale": 0.4, "dropout": 0.0, "window": window, "soft_cap": soft_cap}
    wanted = plain(*leaves, seen=causal(23, window), scale=0.4, soft_cap=soft_cap)
    compare(cpu.attention(*leaves, **options), wanted, leaves)


def test_the_window_hides_something():
    leaves = inputs(23)
    near, far = (plain(*leaves, seen=causal(23, window), scale=0.4) for window in (7, None))
    assert (near[:, :, :7] - far[:, :, :7]).abs().max() < 1e-6 < 1e-2 < (near - far).abs().max()


def test_a_mask_with_a_soft_cap(cpu):
    leaves = inputs(4, keys=9)
    seen = torch.rand(2, 1, 4, 9) > 0.4
    seen[..., 0] = True
    found = cpu.attention(*leaves, mask=seen, causal=False, scale=0.4, dropout=0.0, soft_cap=1.5)
    compare(found, plain(*leaves, seen=seen, scale=0.4, soft_cap=1.5), leaves)


def test_all_keys_with_a_soft_cap(cpu):
    leaves = inputs(1, keys=9)
    found = cpu.attention(*leaves, mask=None, causal=False, scale=0.4, dropout=0.0, soft_cap=1.5)
    compare(found, plain(*leaves, seen=torch.ones(1, 9, dtype=torch.bool), scale=0.4, soft_cap=1.5), leaves)


@pytest.mark.parametrize(("window", "soft_cap"), [(5, None), (None, 1.5), (5, 1.5)])
def test_inside_segments(cpu, window, soft_cap):
    lengths = (11, 2, 8)
    leaves = inputs(sum(lengths), rows=1)
    blocks = torch.block_diag(*(causal(length, window).float() for length in lengths)).bool()
    rows = [x[0].transpose(0, 1) for x in leaves]
    segments = Segments.of_lengths(lengths, torch.device("cpu"))
    found = cpu.segment_attention(*rows, segments, scale=0.4, dropout=0.0, window=window, soft_cap=soft_cap)
    wanted = plain(*leaves, seen=blocks, scale=0.4, soft_cap=soft_cap)
    compare(found.transpose(0, 1).unsqueeze(0), wanted, leaves)


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (5, None), (None, 1.5), (5, 1.5)])
def test_behind_what_sequences_begin_with(cpu, window, soft_cap):
    new, whole = (4, 1, 8, 3), (11, 6, 8, 4)
    query, key, value = inputs(sum(new), keys=sum(whole), rows=1)
    spans = zip(new, whole, strict=True)
    seen = torch.block_diag(*(causal(end, window)[end - own :].float() for own, end in spans)).bool()
    segments = [Segments.of_lengths(lengths, torch.device("cpu")) for lengths in (new, whole)]
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    found = cpu.continued_attention(*rows, *segments, scale=0.4, window=window, soft_cap=soft_cap)
    wanted = plain(query, key, value, seen=seen, scale=0.4, soft_cap=soft_cap)
    compare(found.transpose(0, 1).unsqueeze(0), wanted, (query, key, value))


def test_half_precision_keeps_its_type(cpu):
    leaves = [x.detach().bfloat16().requires_grad_() for x in inputs(9)]
    found = cpu.attention(*leaves, mask=None, causal=True, scale=0.4, dropout=0.0, soft_cap=1.5, window=4)
    exact = plain(*(x.float() for x in leaves), seen=causal(9, 4), scale=0.4, soft_cap=1.5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=3e-2, rtol=3e-2)
    assert all(grad.dtype == torch.bfloat16 for grad in torch.autograd.grad(found.sum(), leaves))


def test_no_dropout_with_a_soft_cap(cpu):
    with pytest.raises(ValueError, match="a soft cap has no dropout: found attention_dropout, set it to 0"):
        cpu.attention(*inputs(3), mask=None, causal=True, scale=1.0, dropout=0.1, soft_cap=1.5)
