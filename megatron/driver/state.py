"""What a training run consists of, and what its caller brings along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron.driver.arguments import DriverArguments
from megatron.driver.averaging import WeightAverage
from megatron.driver.part_gradients import PartGradients
from mindspeed_mm.platform import Platform


class BatchFacts(NamedTuple):
    """What the driver logs about a micro-batch."""

    sample_ids: Sequence[str]
    tokens: int
    """Real positions, padding not counted."""
    supervised: int
    """Positions with a label."""
    positions: int
    """All positions, with padding."""
    flops: float = 0.0
    """Floating-point operations of forward and backward over the whole model; 0 where they are not known."""
    gradient_expected: bool = True
    """False where no trained parameter takes part: a text-only batch while only the projector is trained."""


def describe_batch(batch: Any) -> BatchFacts:
    """Read the facts from attributes of the same names; input_ids [B, S] counts the positions."""
    return BatchFacts(batch.sample_ids, int(batch.tokens), int(batch.supervised), batch.input_ids.numel())


@dataclass(frozen=True)
class Hooks:
    """The caller's part of logging and checkpoints."""

    describe: Callable[[Any], BatchFacts] = describe_batch
    extra: Callable[[], dict[str, Any]] = dict
    """JSON-able; kept as run.json["extra"] of each checkpoint."""
    compare: Callable[[dict[str, Any]], list[str]] = lambda saved_extra: []
    """One line per field in which the architecture of a checkpoint differs from the running one."""
    added: Callable[[str], bool] = lambda name: False
    """Whether a parameter is one that the model adds to given weights: a checkpoint whose weights alone are taken may
    lack it."""
    pad_to_one_length: Callable[[list[Any]], list[Any]] = lambda batches: batches
    """Micro-batches of one step -> the same, padded to one length: asked for where the run has virtual stages."""
    prepare: Callable[[TrainState, list[Any]], list[Any]] = lambda state, batches: batches
    """Micro-batches of a step (or of a validation pass) -> what goes through the model; called on every rank before
    the step's forward pass, so that it may run one of its own."""
    loss_name: str = "lm loss"
    """What the log calls the loss."""
    metrics: Sequence[str] = ()
    """Further keys that loss_func reports, each as (sum, number); logged as the mean over the global batch."""
    after_step: Callable[[TrainState], None] = lambda state: None
    """Called on every rank when a step has been counted, before a checkpoint of it is written."""
    finished: Callable[[], bool] = lambda: False
    """Whether the run ends before its last step, with a checkpoint; alike on every rank, asked after each step."""


@dataclass
class TrainState:
    """A run between two steps."""

    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    platform: Platform
    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    frozen_id: str | None = field(default=None)
    """Hash of the frozen parameters once it is known; they do not change during a run."""
    part_gradients: PartGradients | None = field(default=None)
    """Gradient norms of the model's parts are logged where it is there."""
    average: WeightAverage | None = field(default=None)
    """Of the trained weights, with --ema-decay."""

    @property
    def modules(self) -> list[MegatronModule]:
        """The bare model chunks, without the wrappers."""
        return [unwrap(chunk) for chunk in self.model]

    @property
    def data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()


def unwrap(chunk: DistributedDataParallel) -> MegatronModule:
    """The module inside DistributedDataParallel and, where there is one, Float16Module."""
    module = chunk.module
    return module.module if isinstance(module, Float16Module) else module


def compute_dtype(args: DriverArguments) -> torch.dtype:
    """The type that the model computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
