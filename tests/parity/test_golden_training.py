"""The three golden training trajectories through the driver: loss, gradient norm, learning rate, final weights."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.golden_model import collate, model_json, training_samples

TRAINED = {
    "a": ("vision_projector",),
    "b": ("text_decoder", "vision_encoder", "vision_projector"),
    "c": ("text_decoder", "vision_projector"),
}
FLAGS = {
    "a": "--lr-decay-style constant --clip-grad 0",
    "b": "--lr-decay-style constant --clip-grad 0",
    "c": "--lr-decay-style cosine --lr-warmup-fraction 0.03 --clip-grad 1.0",
}
PREFIXES = {
    "language_model.": ("text_decoder", "hf"),
    "vision_tower.vision_model.": ("vision_encoder", "hf"),
    "multi_modal_projector.": ("vision_projector", "hf"),
}


def run_mode(golden, mode: str, micro_batch: int) -> SimpleNamespace:
    """Train the 8 golden steps; returns per-step metrics and the final tensors under their hub names."""
    from mindspeed_mm.platform import get_platform

    platform = get_platform("cpu")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    import argparse

    from megatron.driver import arguments, initialize, loop, setup
    from megatron.driver.checkpoint.saver import Saver
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.objectives.sft import OBJECTIVE

    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    line = f"--lr 1e-3 --train-iters 8 --weight-decay 0 --micro-batch-size {micro_batch} --global-batch-size 4"
    args = arguments.from_namespace(parser.parse_args(f"{line} {FLAGS[mode]}".split()), world_size=ranks)
    spec = load_model_spec(model_json(golden, trained=TRAINED[mode]))
    initialize.initialize(args, platform)
    state = setup.setup(args, lambda *_: build_vlm(spec, Runtime(), torch.device("cpu"))[0], platform)
    batches = iter(_micro_batches(training_samples(golden), micro_batch, rank, ranks))
    data = loop.MeteredIterator(batches, loop.Hooks().describe)
    steps = []
    with loop.StopRequest() as stop, Saver(state, args, loop.Hooks()) as saver:
        for _ in range(8):
            metrics, _ = loop.train_step(state, args, OBJECTIVE.forward_step, data, stop, saver)
            steps.append((metrics.loss, metrics.grad_norm, metrics.learning_rate, metrics.supervised))
    return SimpleNamespace(steps=steps, weights=_hub_weights(state.modules[0], spec))


def _micro_batches(steps, micro_batch: int, rank: int, ranks: int):
    for samples in steps:
        for start in range(0, len(samples), micro_batch * ranks):
            first = start + rank * micro_batch
            yield collate(samples[first : first + micro_batch])


def _hub_weights(vlm, spec) -> dict[str, torch.Tensor]:
    weights = {}
    for prefix, (kind, dialect) in PREFIXES.items():
        state = {n: t.detach() for n, t in vlm.parts()[kind].state_dict().items() if t is not None}
        state = {n: t for n, t in state.items() if not n.endswith("_extra_state")}
        exported = spec.parts()[kind].rules[dialect].export(state, spec.part_specs()[kind].geometry)
        weights |= {prefix + name: tensor for name, tensor in exported.items()}
    return weights


def check(golden, mode: str, result: SimpleNamespace) -> None:
    meta = json.loads((golden / "training" / "meta.json").read_text())
    for found, wanted in zip(result.steps, meta["modes"][mode]["per_step"], strict=True):
        assert found[0] == pytest.approx(wanted["loss"], abs=2e-4)
        assert found[1] == pytest.approx(wanted["grad_norm"], rel=1e-3)
        assert found[2] == pytest.approx(wanted["lr"], abs=1e-9)
        assert found[3] == wanted["supervised_tokens"]
    final = load_file(golden / "training" / "final_weights.safetensors")
    names = [name for name in final if name.startswith(f"{mode}.final.")]
    assert names
    for name in names:
        difference = (result.weights[name.removeprefix(f"{mode}.final.")] - final[name]).abs().max()
        assert difference < 1e-4, name


@pytest.mark.parametrize("mode", TRAINED)
def test_trajectory_equals_transformers(ranks, golden, mode):
    check(golden, mode, ranks(1).run(run_mode, golden, mode, 4)[0])


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_trajectory_does_not_depend_on_micro_batches(ranks, golden, micro_batch):
    check(golden, "c", ranks(1).run(run_mode, golden, "c", micro_batch)[0])


@pytest.mark.parametrize(
    "mode", [pytest.param("a", marks=pytest.mark.slow), pytest.param("b", marks=pytest.mark.slow), "c"]
)
def test_trajectory_does_not_depend_on_data_parallel_ranks(ranks, golden, mode):
    for result in ranks(2).run(run_mode, golden, mode, 1):
        check(golden, mode, result)
