"""`doctor --parity` tells a kernel that sums in bfloat16 from one that rounds its result."""

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.doctor.parity import rounding, worker
from mindspeed_mm.doctor.parity.verdict import Collected, compare, is_equal
from mindspeed_mm.platform import get_platform
from mindspeed_mm.platform.cpu import CpuPlatform

HALF = torch.bfloat16
KINDS = {"rounding", "row scale"}


def collected(dtype, operator=""):
    """Values of the cases of rounding.py on the CPU, of all operators or one."""
    values = {}
    for case, function in rounding.compute(get_platform("cpu"), worker.DTYPES[dtype]):
        if operator in case:
            values |= {f"{dtype}: {name}": value for name, value in function().items()}
    return values


@pytest.fixture(scope="module")
def cpu():
    return Collected(collected("fp32") | collected("bf16"))


def scores_of(query, key, scale, mask, causal):
    """Float32 [B, H, S, K] of bfloat16 queries and keys."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.float() @ key.float().transpose(2, 3) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def by(weigh):
    """An attention that makes (weights, their sum) of the scores, and everything else as a good kernel does."""

    def attention(original, self, query, key, value, *, mask, causal, scale, dropout, window=None, soft_cap=None):
        if query.dtype != HALF:
            options = {"dropout": dropout, "window": window, "soft_cap": soft_cap}
            return original(self, query, key, value, mask=mask, causal=causal, scale=scale, **options)
        weights, total = weigh(scores_of(query, key, scale, mask, causal))
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (weights.float() @ value.float() / total.float()).to(HALF)

    return attention


def exponentials(scores):
    return (scores - scores.amax(-1, keepdim=True)).exp()


def wholly_bfloat16(scores):
    """Scores, softmax and weights in bfloat16, as an eager attention without a cast has them."""
    return scores.to(HALF).softmax(-1), torch.ones(())


def running_sum(scores, block=512):
    """Exponentials added up in bfloat16, block after block."""
    weights = exponentials(scores).to(HALF)
    total = torch.zeros_like(weights[..., :1])
    for part in weights.split(block, dim=-1):
        total = total + part.sum(-1, keepdim=True)
    return weights, total


def rounded_sum(scores):
    """Added up in float32, divided by a sum in bfloat16."""
    weights = exponentials(scores)
    return weights.to(HALF), weights.sum(-1, keepdim=True).to(HALF)


def flash(scores):
    """Weights in bfloat16, their sum in float32: what fused kernels do."""
    weights = exponentials(scores)
    return weights.to(HALF), weights.sum(-1, keepdim=True)


def eager(scores):
    """Softmax in float32, then cast: what transformers does."""
    return scores.softmax(-1).to(HALF), torch.ones(())


def norm_by(change):
    def norm(original, self, x, weight, eps):
        return original(self, x, weight, eps) if x.dtype != HALF else change(x, weight, eps)

    return norm


def norm_in_bfloat16(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def squares_by_pairs(x, weight, eps):
    """Added up in bfloat16 by a tree, as vectors add."""
    total = x.square()
    while total.shape[-1] > 1:
        total = total[..., ::2] + total[..., 1::2]
    return (x.float() * ((total / x.shape[-1]).float() + eps).rsqrt() * weight.float()).to(HALF)


def norm_then_weight(x, weight, eps):
    """transformers' order: rounded before the weight as well."""
    values = x.float()
    return (values * (values.square().mean(-1, keepdim=True) + eps).rsqrt()).to(HALF) * weight


def layer_norm_in_bfloat16(x, shape, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


FAULTS = {
    "attention in bfloat16": ("attention", by(wholly_bfloat16), "rounding"),
    "running sum in bfloat16": ("attention", by(running_sum), "row scale"),
    "rounded sum": ("attention", by(rounded_sum), "row scale"),
    "norm in bfloat16": ("rms_norm", norm_by(norm_in_bfloat16), "row scale"),
    "squares in bfloat16": ("rms_norm", norm_by(squares_by_pairs), "row scale"),
}
GOOD = {
    "flash": ("attention", by(flash)),
    "eager": ("attention", by(eager)),
    "norm, then weight": ("rms_norm", norm_by(norm_then_weight)),
}


def verdicts(monkeypatch, cpu, name, change):
    """Rows of the operator's cases in bfloat16, on a CPU whose method `name` is changed."""
    original = getattr(CpuPlatform, name)
    monkeypatch.setattr(CpuPlatform, name, lambda *args, **options: change(original, *args, **options))
    rows = compare(cpu, Collected(cpu.values | collected("bf16", name)))
    return [row for row in rows if row.dtype == "bf16" and name in row.case]


@pytest.mark.parametrize("name", FAULTS)
def test_sums_in_bfloat16_are_found(monkeypatch, cpu, name):
    method, change, kind = FAULTS[name]
    rows = [row for row in verdicts(monkeypatch, cpu, method, change) if row.kind == kind]
    # Small scores are rounded by little, and weights hardly change by it.
    rows = [row for row in rows if kind == "row scale" or "large scores" in row.case]
    assert len(rows) == (8 if method == "attention" else 4) and not any(is_equal([row]) for row in rows)


@pytest.mark.parametrize("name", GOOD)
def test_kernels_that_sum_in_float32_are_equal(monkeypatch, cpu, name):
    rows = verdicts(monkeypatch, cpu, *GOOD[name])
    assert len(rows) > 7 and is_equal(rows)


def test_a_layer_norm_in_bfloat16_is_found(monkeypatch, cpu):
    real = F.layer_norm
    monkeypatch.setattr(
        rounding.F, "layer_norm", lambda x, *rest: (layer_norm_in_bfloat16 if x.dtype == HALF else real)(x, *rest)
    )
    rows = compare(cpu, Collected(cpu.values | collected("bf16", "layer_norm")))
    assert {(row.kind, row.case.split(":")[0]) for row in rows if not is_equal([row])} == {("row scale", "layer_norm")}


def test_the_cpu_equals_itself(cpu):
    assert is_equal(compare(cpu, cpu))


def test_an_error_is_told_of_both_measures(cpu):
    errors = {"bf16: rounding: rms_norm": "RuntimeError: aclnnRmsNorm failed"}
    left = {name: value for name, value in cpu.values.items() if not name.startswith("bf16") or "rms_norm" not in name}
    rows = [row for row in compare(cpu, Collected(left, errors)) if row.case.startswith("rms_norm")]
    failed = [row for row in rows if row.verdict == "failed"]
    assert {row.kind for row in failed} == KINDS and {row.note for row in failed} == set(errors.values())
