"""A whole model of transformers trained on any parallel layout, and what it became in the names of a public layout."""

from __future__ import annotations

from itertools import cycle

import torch

from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.weights.layouts import OUR_MODEL
from mindspeed_mm.weights.layouts import Layout as NameLayout
from tests.helpers.golden_training import GoldenLayout, driver_arguments, full_tensors

ROW = 512
"""Positions of a packed row."""

STEP = 1e4
"""Learning rate of a step whose change shows the gradient exactly."""

ADAM = "--lr 1e-3"
GRADIENT = f"--lr {STEP * 1e8} --adam-beta1 0 --adam-beta2 0 --adam-eps 1e8"
"""AdamW that changes each value by STEP times its gradient."""


def train(
    path: str,
    layout: GoldenLayout,
    samples: list[Encoded],
    save: str,
    steps: int,
    optimizer: str,
    model: dict | None = None,
) -> None:
    """Train on this rank into the folder `save`: `steps` steps, each of all samples; weights from the folder `path`.
    Data-parallel ranks take the samples in turns. `model`: its model.json, where not all of it is trained."""
    from mindspeed_mm.platform import get_platform

    platform = get_platform("cpu")
    from megatron.driver import initialize, loop, setup
    from megatron.driver.state import Hooks
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.describe import describe_model
    from mindspeed_mm.models.parallel import layout_problems
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.sources import open_source
    from mindspeed_mm.models.spec import load_model_spec

    source = open_source(path)
    spec = describe_model(source) if model is None else load_model_spec(model)
    rows = [samples] if layout.packed else samples
    flags = f"--lr-decay-style constant --clip-grad 0 --seq-length {ROW} --global-batch-size {len(rows)}"
    args = driver_arguments(layout, f"{flags} --save {save} --no-save-optim {optimizer}", steps)
    runtime = Runtime(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=args.sequence_parallel,
    )
    assert not layout_problems(spec, runtime)
    initialize.initialize(args, platform)

    def provide(pre_process: bool, post_process: bool, vp_stage: int | None = None):
        stage = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
        sources = dict.fromkeys(source.parts, source)
        return build_vlm(spec, runtime, torch.device("cpu"), sources=sources, **stage)[0]

    state = setup.setup(args, provide, platform)
    collate = Collator(0, pad_multiple=runtime.sequence_multiple, row_length=ROW if layout.packed else None)
    batches = cycle([collate([row]) for row in rows[state.data_parallel_rank :: layout.data]])
    from mindspeed_mm.objectives.sft import OBJECTIVE

    hooks = Hooks(extra=lambda: {"model": spec.model_dump(mode="json")})
    loop.train(state, args, OBJECTIVE.forward_step, batches, hooks)


def trained(save, spec, names: NameLayout) -> dict[str, torch.Tensor]:
    """All tensors of a run in the names of a public layout."""
    tensors = full_tensors(save)
    split, _, unknown = OUR_MODEL.split(tensors)
    assert not unknown
    result = {}
    for slot, own in split.items():
        rules = spec.parts()[slot].rules[names.dialects[slot]]
        state = {short: tensors[name] for short, name in own.items()}
        exported = rules.export(state, spec.part(slot).geometry)
        result |= {names.written[slot] + name: tensor for name, tensor in exported.items()}
    return result


def stored(model, names: NameLayout) -> dict[str, torch.Tensor]:
    """The parameters of transformers' model under the names that `trained` gives."""
    split, _, unknown = names.split(dict(model.named_parameters()))
    assert not unknown
    parameters = dict(model.named_parameters())
    return {names.written[slot] + short: parameters[name] for slot, own in split.items() for short, name in own.items()}


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    """Each tensor that is built, by the norm of the difference over the norm. Key biases are left out: softmax does
    not see them, so that their gradient is rounding noise."""
    assert found.keys() <= wanted.keys()
    # One value is a sum in which nearly all may cancel (the gates of cross-attention): its size says nothing.
    single = max((float(wanted[name].detach().norm()) for name in found if found[name].numel() == 1), default=0.0)
    for name, tensor in found.items():
        if name.endswith(("k_proj.bias", ".key.bias")):
            continue
        rows = min(len(tensor), len(wanted[name]))  # the vocabulary is padded for tensor parallelism
        if name.endswith("self_attn.qkv.bias"):  # queries, keys and values in one
            tensor, other = (x.view(3, -1)[::2] for x in (tensor, wanted[name]))
        else:
            tensor, other = tensor[:rows], wanted[name][:rows]
        if not other.any():
            assert not tensor.any(), name
            continue
        error = (tensor - other).norm() / (single if other.numel() == 1 else other.norm())
        assert error < tolerance, (name, float(error))
