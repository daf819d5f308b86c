"""Time of a step, from operation counts, traffic, and a device's figures.

A stage takes, for each micro-batch, its operations over the rate that matrix products reach, its element-wise traffic
over the memory bandwidth, and the communication that nothing hides. A step is (m + (P-1)/V) times the slowest stage
(Narayanan et al. 2021; m micro-batches, P stages, V chunks each), the gradients' reduction and the optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mindspeed_mm.planning import activations
from mindspeed_mm.planning.communication import stage_traffic
from mindspeed_mm.planning.hardware import Hardware
from mindspeed_mm.planning.job import TrainingJob
from mindspeed_mm.planning.parameters import held_blocks, held_layers, stage_parameters
from mindspeed_mm.trainer.flops import forward_flops, step_flops

PASSES_OVER_ACTIVATIONS = 5
"""What a layer keeps is written and read in the forward pass, read in the backward pass, and its gradient written and
read: without fusion five times its bytes."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest rank, by cause; they add up."""

    matrix: float
    elementwise: float
    communication: float
    bubble: float
    optimizer: float
    model_flops: float
    """Forward and backward operations of the global batch, recomputation not counted."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.matrix + self.elementwise + self.communication + self.bubble + self.optimizer


def model_flops(job: TrainingJob) -> float:
    """Operations of a global batch as the log's TFLOP/s counts them."""
    rows = job.global_batch_size
    one = step_flops(job.spec, lengths=job.row.lengths, work=job.row_work, supervised=job.row_supervised)
    return rows * one


def stage_flops(job: TrainingJob, stage: int) -> float:
    """Operations that a rank of a stage runs for a micro-batch, recomputation included."""
    # Padding is computed like anything else.
    padding = job.positions / max(1.0, sum(job.row.lengths))
    lengths = [length * padding for length in job.row.lengths]
    forward = forward_flops(
        job.spec,
        lengths=lengths,
        work=job.encoded.times(1 / job.micro_batch_size),
        supervised=job.row_supervised,
        projected=job.projected.times(1 / job.micro_batch_size),
    )
    flow = {kind: job.gradients_flow(kind) for kind in job.spec.part_specs()}
    trained = {kind: job.trained(kind) for kind in job.spec.part_specs()}
    share = held_layers(job, stage) / job.spec.text_decoder.num_layers
    linears, back, again = job.linears, flow["text_decoder"], _again(job, "text_decoder", stage)
    decoder = forward.decoder * (1 + back + linears.layers + again)
    decoder += forward.scores * (back - linears.layers + _scores_again(job))
    total = share * decoder / job.context
    if job.crossing is not None:
        cross = forward.cross * (1 + back + linears.cross + again) + forward.cross_scores * (1 + 2 * back + again)
        total += held_blocks(job, stage) / job.crossing.shape.blocks * cross / job.context
    if stage == 0:
        again = _again(job, "vision_encoder", 0)
        image = (forward.vision_encoder + forward.patches) * (3 + again if trained["vision_encoder"] else 1)
        # megatron.core's linears compute the gradient of their input, whether it is needed or not.
        image += forward.projector * (1 + flow["vision_projector"] + trained["vision_projector"])
        total += image
    if stage == job.pipeline - 1:
        back = "interaction" if "interaction" in flow else "text_decoder"
        total += forward.head * (1 + flow[back] + linears.head) / job.context
        total += forward.interaction * (1 + flow[back] + trained.get("interaction", False)) / job.context
    return job.micro_batch_size * total / job.tensor


def _again(job: TrainingJob, kind: str, stage: int) -> float:
    """Share of a part's forward pass that full recomputation runs again."""
    part = job.spec.part(kind)
    if part.recompute_granularity != "full" or not job.gradients_flow(kind):
        return 0.0
    layers = held_layers(job, stage) if kind == "text_decoder" else part.num_built_layers
    if part.recompute_method == "uniform":
        return 1.0
    return min(1.0, part.recompute_num_layers / max(1, layers))


def _scores_again(job: TrainingJob) -> bool:
    """Whether selective recomputation runs the decoder's attention again."""
    return job.spec.text_decoder.recompute_granularity == "selective" and job.gradients_flow("text_decoder")


def step_time(job: TrainingJob, hardware: Hardware) -> StepTime:
    """Predicted seconds of a step. `hardware.times_known` must be true."""
    rate = hardware.peak_flops * hardware.efficiency
    stages = range(job.pipeline)
    matrix = [stage_flops(job, stage) / rate for stage in stages]
    # A measured rate is that of whole steps: everything that memory bandwidth limits is in it.
    bandwidth = math.inf if hardware.measured else hardware.memory_bandwidth
    elementwise = [_elementwise(job, stage) / bandwidth for stage in stages]
    inner, outer = zip(*(_communication(job, stage, hardware) for stage in stages), strict=True)
    slowest = max(stages, key=lambda stage: matrix[stage] + elementwise[stage] + inner[stage])
    count = job.num_micro_batches
    bubble = (job.pipeline - 1) / job.virtual * (matrix[slowest] + elementwise[slowest] + inner[slowest])
    return StepTime(
        matrix=count * matrix[slowest],
        elementwise=count * elementwise[slowest],
        communication=count * inner[slowest] + max(outer),
        bubble=bubble,
        optimizer=max(_optimizer(job, stage) for stage in stages) / bandwidth,
        model_flops=model_flops(job),
    )


def _elementwise(job: TrainingJob, stage: int) -> float:
    """Bytes that norms, activations, residuals and rotations move for a micro-batch."""
    total = 0.0
    if job.gradients_flow("text_decoder"):
        total += held_layers(job, stage) * activations.layer(activations.decoder_sizes(job))
        total += held_blocks(job, stage) * activations.cross(job) if job.crossing is not None else 0.0
    if stage == 0:
        layers = job.spec.vision_encoder.num_built_layers * activations.layer(activations.vision_encoder_sizes(job))
        total += layers if job.trained("vision_encoder") else layers * 2 / PASSES_OVER_ACTIVATIONS
    return PASSES_OVER_ACTIVATIONS * total


def _optimizer(job: TrainingJob, stage: int) -> float:
    """Bytes that AdamW moves: gradient, copy and moments read, copy, moments and parameter written."""
    trained = stage_parameters(job, stage).trained
    share = trained / (job.sharing_ranks if job.use_distributed_optimizer else 1)
    return share * (4 + 12 + 12 + job.element) + 4 * trained


def _communication(job: TrainingJob, stage: int, hardware: Hardware) -> tuple[float, float]:
    """(seconds of a micro-batch, seconds once a step), none of it hidden behind computation.

    Ranks that follow each other share a host: tensor parallelism first, then context, data and pipeline.
    """
    traffic, host = stage_traffic(job, stage), hardware.devices_per_host
    tensor, context = job.tensor, job.tensor * job.context
    data = context * job.data_parallel_size

    def seconds(size: float, span: int) -> float:
        inside = span <= host or hardware.network is None
        bandwidth = hardware.interconnect if inside else hardware.network
        return 0.0 if size == 0 or bandwidth is None else size / bandwidth

    count = job.num_micro_batches
    inner = seconds(traffic.tensor, tensor) + seconds(traffic.context, context)
    inner += seconds(traffic.pipeline, data * job.pipeline)
    return inner / count, seconds(traffic.gradients + traffic.parameters, data)
