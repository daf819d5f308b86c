"""What is planned: a layout, a batch, and the shape of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from mindspeed_mm.models.operations import CrossShape, EncoderWork
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.trainable import TrainedLinears, trained_linears


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """A row of a micro-batch: its positions, and the samples that share it."""

    positions: int
    """Length of the row, padding included."""
    lengths: tuple[float, ...]
    """Real positions of each sample in it, image positions included."""
    images: float = 1.0
    """Images in the row, of the size that the model's family plans with."""
    work: EncoderWork | None = None
    """The work on the images of the row, where data says how large they are; `images` is not looked at then."""
    supervised: float | None = None
    """Positions with a label; None: all real ones that are no image position."""

    @property
    def packed(self) -> bool:
        """Whether several samples share the row."""
        return len(self.lengths) > 1


@dataclass(frozen=True)
class Crossing:
    """Cross-attention of a micro-batch to features beside its text."""

    shape: CrossShape
    rows: int
    """Rows of the micro-batch, once samples stand one behind the other."""
    features: float
    """Features beside each of them, those of all its images, or of a blank one."""

    @property
    def memory(self) -> float:
        """Values of the features of all rows."""
        return self.rows * self.features * self.shape.memory_size


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training run as the planner sees it."""

    spec: ModelSpec
    runtime: Runtime
    data_parallel_size: int = 1
    micro_batch_size: int = 1
    num_micro_batches: int = 1
    """Micro-batches of a step on each data-parallel rank."""
    use_distributed_optimizer: bool = False
    muon: bool = False
    """Muon moves the matrices of linears, whose state is one float32 value less than AdamW's."""
    averaged: bool = False
    """A moving average of the trained weights is kept."""
    row: PlannedRow
    device: str = "cuda"
    """cuda, npu or cpu: its kernels decide what is kept for the backward pass."""
    num_workers: int = 2
    prefetch_factor: int = 2

    @property
    def element(self) -> int:
        """Bytes of an element in the type that the model computes in."""
        return self.runtime.params_dtype.itemsize

    @property
    def mixed(self) -> bool:
        """Whether the optimizer keeps float32 copies of the parameters."""
        return self.runtime.params_dtype != torch.float32

    @property
    def tensor(self) -> int:
        """Tensor-parallel size."""
        return self.runtime.tensor_model_parallel_size

    @property
    def pipeline(self) -> int:
        """Pipeline-parallel size."""
        return self.runtime.pipeline_model_parallel_size

    @property
    def context(self) -> int:
        """Context-parallel size."""
        return self.runtime.context_parallel_size

    @property
    def virtual(self) -> int:
        """Chunks of layers on each stage."""
        return self.runtime.virtual_pipeline_model_parallel_size or 1

    @property
    def world_size(self) -> int:
        """Devices of the run."""
        return self.tensor * self.pipeline * self.context * self.data_parallel_size

    @property
    def sharing_ranks(self) -> int:
        """Ranks whose gradients are summed, and which share optimizer state under the distributed optimizer."""
        return self.data_parallel_size * self.context

    @property
    def global_batch_size(self) -> int:
        """Rows of a step."""
        return self.micro_batch_size * self.num_micro_batches * self.data_parallel_size

    @property
    def positions(self) -> int:
        """Positions of a row as the model sees it: padded so that every rank gets an equal slice."""
        multiple = self.runtime.sequence_multiple
        return -(-self.row.positions // multiple) * multiple

    @property
    def tokens(self) -> float:
        """Positions of a micro-batch on one rank (a slice of each row under context parallelism)."""
        return self.micro_batch_size * self.positions / self.context

    @property
    def sequence_tokens(self) -> float:
        """The same where norms and residuals are; sequence parallelism splits those once more."""
        return self.tokens / (self.tensor if self.runtime.sequence_parallel else 1)

    @property
    def joined_sequences(self) -> int:
        """Sequences that one row of a micro-batch holds, once its rows stand one behind the other; 1 where rows stay
        rows, since each is one sequence without padding."""
        full = not self.row.packed and self.row.lengths[0] == self.positions
        return 1 if full else self.micro_batch_size * len(self.row.lengths)

    @property
    def row_work(self) -> EncoderWork:
        """The work on the images of a row."""
        work = self.row.work
        return self.spec.family.planned_image(self.spec).times(self.row.images) if work is None else work

    @property
    def images(self) -> EncoderWork:
        """The work on all images of a micro-batch."""
        return self.row_work.times(self.micro_batch_size)

    @property
    def encoded(self) -> EncoderWork:
        """What one rank encodes of it: context-parallel ranks share rows of pixels, where each is encoded by itself,
        blank ones filling up."""
        images = self.images
        if self.context == 1 or not images.rows or not self.spec.vision_encoder.independent_rows:
            return images
        return images.times(math.ceil(images.rows / self.context) / images.rows)

    @property
    def projected(self) -> EncoderWork:
        """What one rank projects of it; features that depend on one another are projected by every rank."""
        return self.encoded if self.spec.vision_projector.independent_rows else self.images

    @property
    def row_supervised(self) -> float:
        """Labels of a row: given, or everything that is text."""
        if self.row.supervised is not None:
            return self.row.supervised
        return max(0.0, sum(self.row.lengths) - self.row_work.tokens)

    @property
    def asked(self) -> float:
        """Share of this rank's positions on which the last layer's MLP and the final norm run
        (models/kit/asked_rows.py)."""
        if self.runtime.sequence_parallel or not self.spec.asks_early:
            return 1.0
        return min(1.0, self.supervised / self.tokens) or 1.0

    @property
    def supervised(self) -> float:
        """Labels of a micro-batch on the rank that has most of them (labels stand at the end of a row)."""
        return self.micro_batch_size * min(self.row_supervised, self.positions / self.context)

    def gradients_flow(self, kind: str) -> bool:
        """Whether the backward pass goes through a part: it is trained, or stands behind a trained one."""
        order = ("vision_encoder", "vision_projector", "text_decoder", "interaction")
        return any(self.spec.part(before).trains for before in order[: order.index(kind) + 1])

    def trained(self, kind: str) -> bool:
        """Whether a part's weights are trained."""
        return self.spec.part(kind).trains

    @cached_property
    def linears(self) -> TrainedLinears:
        """Which linears of the decoder keep their inputs: those that are trained, or that have adapters."""
        spec = self.spec.text_decoder
        found = trained_linears(self.spec.parts()["text_decoder"], spec)
        return found._replace(layers=found.layers or spec.lora is not None)

    @property
    def crossing(self) -> Crossing | None:
        """Cross-attention of a micro-batch on one rank; None where the decoder has none."""
        shape = self.spec.text_decoder.cross_shape
        if shape is None:
            return None
        rows = 1 if self.joined_sequences > 1 else self.micro_batch_size
        features = max(1.0, self.images.items / rows) * self.spec.vision_projector.num_latents
        return Crossing(shape, rows, features)
