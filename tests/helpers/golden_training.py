"""The golden training run at any parallel layout, through the driver, with what it leaves in its save folder."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Batch, Encoded
from tests.helpers.golden_model import model_json, training_samples

TRAINED = {
    "a": ("vision_projector",),
    "b": ("text_decoder", "vision_encoder", "vision_projector"),
    "c": ("text_decoder", "vision_projector"),
}
FLAGS = {
    "a": "--lr-decay-style constant --clip-grad 0",
    "b": "--lr-decay-style constant --clip-grad 0",
    "c": "--lr-decay-style cosine --lr-warmup-fraction 0.03 --clip-grad 1.0 --lr-decay-iters 8",
}
STEPS = 5

GROUPED = {
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 12,
    "language_vocab_size": 1001,
    "share_embeddings_and_output_weights": True,
    "ckpt_path": None,
    "fresh": True,
}
"""A decoder with grouped queries, a tied head and a vocabulary that no layout divides, at random weights."""


class GoldenLayout(NamedTuple):
    """How a run is spread."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    virtual: int | None = None
    data: int = 1
    flags: str = ""
    micro_batch: int = 1
    trained: str = "b"
    decoder: tuple[tuple[str, Any], ...] = ()
    """Keys of the text_decoder block."""
    vision_encoder: tuple[tuple[str, Any], ...] = ()
    grouped: bool = False
    """GROUPED instead of the golden weights."""
    packed: bool = False
    """Two rows of two samples each, instead of four rows."""
    text_steps: bool = False
    """Every second step has no image at all."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


def train_golden(golden: Path, layout: GoldenLayout, save: str, flags: str = "", steps: int = STEPS) -> int:
    """Train golden steps on this rank into `save`; the iteration that was reached."""
    state, args, batches, hooks = begin(golden, layout, f"--save {save} {flags}", steps)
    from megatron.driver import loop
    from mindspeed_mm.objectives.sft import OBJECTIVE

    return loop.train(state, args, OBJECTIVE.forward_step, batches, hooks).iteration


def validate_golden(golden: Path, layout: GoldenLayout, batches: int) -> float:
    """Loss of the first golden batches, without training."""
    state, args, data, hooks = begin(golden, layout, "", STEPS)
    from megatron.driver import validation
    from mindspeed_mm.objectives.sft import OBJECTIVE

    return validation.evaluate(state, args, OBJECTIVE.forward_step, data, batches, hooks)


def begin(golden: Path, layout: GoldenLayout, flags: str, steps: int) -> tuple:
    """(state, args, micro-batches of this rank from the state's step on, hooks)."""
    from mindspeed_mm.platform import current_platform

    platform = current_platform()  # of the pool that this rank belongs to
    from megatron.driver import initialize, setup
    from megatron.driver.state import Hooks
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.parallel import layout_problems
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.objectives._batches import pad_to_one_length

    args = driver_arguments(layout, f"{FLAGS[layout.trained]} {flags}", steps)
    runtime = Runtime(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        virtual_pipeline_model_parallel_size=layout.virtual,
        sequence_parallel=args.sequence_parallel,
    )
    spec = load_model_spec(description(golden, layout))
    assert not layout_problems(spec, runtime)
    initialize.initialize(args, platform)

    def provide(pre_process: bool, post_process: bool, vp_stage: int | None = None):
        stage = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
        return build_vlm(spec, runtime, torch.device("cpu"), **stage)[0]

    state = setup.setup(args, provide, platform)
    batches = micro_batches(golden, layout, state.data_parallel_rank, runtime.sequence_multiple, state.iteration)
    return state, args, batches, Hooks(pad_to_one_length=lambda batches: pad_to_one_length(batches, 0))


def driver_arguments(layout: GoldenLayout, flags: str, steps: int):
    """DriverArguments of a layout."""
    from megatron.driver import arguments

    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    line = (
        f"--lr 1e-3 --train-iters {steps} --weight-decay 0 --micro-batch-size {layout.micro_batch} "
        f"--global-batch-size {2 if layout.packed else 4} --seq-length 256 "
        f"--tensor-model-parallel-size {layout.tensor} --pipeline-model-parallel-size {layout.pipeline} "
        f"--context-parallel-size {layout.context} {layout.flags} {flags}"
        + (f" --num-virtual-stages-per-pipeline-rank {layout.virtual}" if layout.virtual else "")
    )
    return arguments.from_namespace(parser.parse_args(line.split()), world_size=layout.ranks)


def description(golden: Path, layout: GoldenLayout) -> dict[str, Any]:
    """The golden model.json with the layout's changes."""
    model = copy.deepcopy(model_json(golden, trained=TRAINED[layout.trained]))
    model["text_decoder"] |= (GROUPED if layout.grouped else {}) | dict(layout.decoder)
    model["image_encoder"]["vision_encoder"] |= dict(layout.vision_encoder)
    return model


def micro_batches(golden: Path, layout: GoldenLayout, rank: int, multiple: int, first_step: int = 0) -> Iterator[Batch]:
    """The micro-batches of one data-parallel rank; their lengths differ, and some have no image."""
    collate = Collator(0, pad_multiple=multiple, row_length=256 if layout.packed else None)
    for number, samples in enumerate(training_samples(golden)[first_step:], first_step):
        if layout.text_steps and number % 2:
            samples = [without_images(sample) for sample in samples]
        if layout.packed:
            samples = [samples[:2], samples[2:]]
        for start in range(0, len(samples), layout.micro_batch * layout.data):
            first = start + rank * layout.micro_batch
            yield collate(samples[first : first + layout.micro_batch])


def without_images(sample: Encoded) -> Encoded:
    """The sample's text alone."""
    kept = [place for place, token in enumerate(sample.input_ids) if token != IMAGE_TOKEN_INDEX]
    ids, labels = [sample.input_ids[place] for place in kept], [sample.labels[place] for place in kept]
    return Encoded(sample.sample_id, ids, labels)


def records(save: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a save folder."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def full_tensors(save: Path) -> dict[str, torch.Tensor]:
    """All model tensors of the newest checkpoint, whole."""
    from megatron.driver.checkpoint.reading import read_checkpoint

    checkpoint = read_checkpoint(save)
    return {name: checkpoint.get(name) for name in checkpoint.names}
