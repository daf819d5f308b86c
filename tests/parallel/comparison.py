"""Compares two runs: losses, gradient norms, parameters."""

import pytest

from tests.helpers.golden_training import STEPS


def relative(name, found, wanted):
    """Norm of the difference over the norm. The tower's key biases are left out: softmax does not see them, so their
    gradient is rounding noise, which Adam scales up to whole steps."""
    if name.endswith("linear_qkv.bias"):
        found, wanted = (tensor.view(4, 3, 16)[:, ::2] for tensor in (found, wanted))
    return (found - wanted).norm().item() / wanted.norm().item()


def compare(found, wanted):
    """Two runs, each (records, tensors)."""
    assert len(found[0]) == STEPS
    for ours, theirs in zip(found[0], wanted[0], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["supervised"] == theirs["supervised"]
        assert ours["samples"] == theirs["samples"]
    assert found[1].keys() == wanted[1].keys()
    for name, tensor in wanted[1].items():
        rows = min(len(tensor), len(found[1][name]))  # the vocabulary is padded for tensor parallelism
        assert relative(name, found[1][name][:rows], tensor[:rows]) < 1e-4, name
