"""Compares two runs, or a run with transformers' golden one: losses, gradient norms, parameters."""

import json

import pytest
from safetensors.torch import load_file

from tests.helpers.golden_training import STEPS

HUB_NAMES = {
    "language_model.model.norm.weight": "text_decoder.decoder.final_layernorm.weight",
    "multi_modal_projector.linear_1.weight": "image_encoder.projector.encoder.linear_fc1.weight",
    "multi_modal_projector.linear_1.bias": "image_encoder.projector.encoder.linear_fc1.bias",
    "multi_modal_projector.linear_2.weight": "image_encoder.projector.encoder.linear_fc2.weight",
    "multi_modal_projector.linear_2.bias": "image_encoder.projector.encoder.linear_fc2.bias",
    "vision_tower.vision_model.embeddings.class_embedding": "image_encoder.encoder.class_token",
    "vision_tower.vision_model.pre_layrnorm.bias": "image_encoder.encoder.ln_pre.bias",
}
"""Golden final tensors that are ours under another name; the others are slices of ours."""


def names(layouts, *, slow=()):
    """The names of layouts as test cases; `slow` are those whose parts other cases have, too."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in layouts]


def relative(name, found, wanted):
    """Norm of the difference over the norm. The vision encoder's key biases are left out: softmax does not see them, so
    their gradient is rounding noise, which Adam scales up to whole steps."""
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


def compare_with_transformers(golden, found, mode):
    """Records of a run from the first step on, with those of transformers."""
    meta = json.loads((golden / "training" / "meta.json").read_text())
    for ours, transformers in zip(found, meta["modes"][mode]["per_step"], strict=False):
        assert ours["loss"] == pytest.approx(transformers["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(transformers["grad_norm"], rel=1e-4)
        assert ours["learning_rate"] == pytest.approx(transformers["lr"], abs=1e-9)


def compare_final_with_transformers(golden, tensors, mode):
    """All golden final tensors of a mode that have a name in HUB_NAMES, after the last golden step."""
    final = load_file(golden / "training" / "final_weights.safetensors")
    found = {hub: final[f"{mode}.final.{hub}"] for hub in HUB_NAMES if f"{mode}.final.{hub}" in final}
    assert len(found) >= 4
    for hub, wanted in found.items():
        ours = tensors[HUB_NAMES[hub]].flatten()
        assert relative(hub, ours, wanted.flatten()) < 1e-4, hub
