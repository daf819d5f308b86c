"""Bytes that each rank holds: parameters, gradients, optimizer state, activations, temporaries; and on the host."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from mindspeed_mm.planning import activations
from mindspeed_mm.planning.job import TrainingJob
from mindspeed_mm.planning.kernels import kernels_of
from mindspeed_mm.planning.parameters import Parameters, stage_parameters

SINGLE = 4
MUON_COPIES = 5
"""Float32 copies of a matrix while Muon makes it orthogonal: momentum, stand-in, product, result, and as stored."""
PROCESS_BYTES = 410 * 10**6
"""Resident memory of a rank that trains a model of 6,304 parameters on the CPU: 387 MiB in its log. What a
device's own libraries add is not known here."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of a pipeline stage."""

    stage: int
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass, over all micro-batches that are under way at once."""
    temporaries: float
    """What comes on top at the highest point of a step: logits, gradients under way, a layer that is run again, or the
    optimizer's buffers, whichever is highest."""
    batch: float
    """Ids and images of the micro-batches at hand."""

    @property
    def static(self) -> float:
        """What is held between two steps."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The highest sum during a step."""
        return self.static + self.activations + self.temporaries + self.batch

    def as_dict(self) -> dict[str, float]:
        """All figures, the sums included."""
        return asdict(self) | {"static": self.static, "peak": self.peak}


def rank_memory(job: TrainingJob, stage: int) -> RankMemory:
    """Memory of a rank of one pipeline stage."""
    counts = stage_parameters(job, stage)
    shared = job.sharing_ranks if job.use_distributed_optimizer else 1
    kept, forward, backward, again = _stage_activations(job, stage)
    under_way = micro_batches_under_way(job, stage)
    in_step = max(forward, backward, again)
    optimizer_buffers = _optimizer_buffers(job, counts) / shared
    # The optimizer runs when the activations are gone; what counts is which of the two moments is the higher.
    temporaries = max(in_step, optimizer_buffers - under_way * kept)
    return RankMemory(
        stage=stage,
        parameters=counts.bytes,
        gradients=counts.trained * SINGLE,
        optimizer=state_bytes(job, counts) / shared,
        activations=under_way * kept,
        temporaries=temporaries,
        batch=_batch_bytes(job),
    )


def state_bytes(job: TrainingJob, counts: Parameters) -> int:
    """Bytes of optimizer state of the trained ones among some parameters: for each a float32 copy, where it is not
    float32 itself, AdamW's two moments or Muon's momentum, and its moving average, where one is kept."""
    values = counts.trained * (2 + job.mixed + job.averaged)
    return SINGLE * (values - (counts.matrices if job.muon else 0))


def peak_memory(job: TrainingJob) -> RankMemory:
    """The rank that needs most."""
    return max((rank_memory(job, stage) for stage in range(job.pipeline)), key=lambda rank: rank.peak)


def micro_batches_under_way(job: TrainingJob, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once (Narayanan et al. 2021, plain and interleaved)."""
    behind = job.pipeline - stage - 1
    if job.virtual == 1:
        return min(behind + 1, job.num_micro_batches)
    chunks = 2 * behind + (job.virtual - 1) * job.pipeline + 1
    return min(chunks / job.virtual, job.num_micro_batches)


def _stage_activations(job: TrainingJob, stage: int) -> tuple[float, float, float, float]:
    """Kept for one micro-batch; more: at the forward pass's end, in the head's backward, while layers run again."""
    first, last = stage == 0, stage == job.pipeline - 1
    kept = again = forward = backward = 0.0
    if job.gradients_flow("text_decoder"):
        layers = activations.decoder(job, stage)
        kept, again = layers.kept, layers.at_work
    if first:
        vision_encoder = activations.vision_encoder(job)
        kept += vision_encoder.kept + activations.projector(job) + activations.embedding(job)
        again = max(again, vision_encoder.at_work)
    # Features beside the text go with the hidden states, and their copy is theirs.
    hidden = job.sequence_tokens * job.spec.text_decoder.hidden_size * job.element + activations.beside(job)
    # The schedule keeps what a stage sends; and what it receives, which the first norm keeps where gradients flow.
    kept += hidden * ((not last) + (not first and not job.gradients_flow("text_decoder")))
    if last:
        head = activations.head(job)
        kept, forward, backward = kept + head.kept, head.forward, head.backward
        again -= head.kept if again else 0.0  # the head's part is gone when the layers' turn comes
    return kept, forward, backward, again


def _optimizer_buffers(job: TrainingJob, counts: Parameters) -> float:
    """AdamW's denominator of all its parameters at once; the fused AdamW of the CPU needs no memory. Muon works on one
    matrix at a time, whole on every tensor-parallel rank."""
    adam = counts.trained - (counts.matrices if job.muon else 0)
    adam = adam if kernels_of(job.device, job.runtime.params_dtype).foreach_optimizer else 0
    return SINGLE * max(adam, MUON_COPIES * counts.largest * job.tensor if job.muon else 0)


def _batch_bytes(job: TrainingJob) -> float:
    """A micro-batch: three tensors of int64, and the images in float32. Every stage reads all of it."""
    ids = 3 * 8 * job.micro_batch_size * job.positions
    return ids + SINGLE * job.images.pixels


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory of one rank, beside the device's."""

    process: float
    batches: float
    """All micro-batches of a step, which are fetched before it begins, and what worker processes hold ready."""
    checkpoint: float
    """What this rank writes at a save, copied to the host first."""

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.process + self.batches + self.checkpoint


def host_memory(job: TrainingJob) -> HostMemory:
    """Host memory of a rank; worker processes count as one process each."""
    ready = job.num_micro_batches + job.num_workers * job.prefetch_factor
    # Copies of a parameter are written by one of the ranks that hold it; shared optimizer state by all of them.
    writers = job.world_size if job.use_distributed_optimizer else job.tensor * job.pipeline
    return HostMemory(
        process=PROCESS_BYTES * (1 + job.num_workers),
        batches=ready * _batch_bytes(job),
        checkpoint=checkpoint_bytes(job).each / writers,
    )


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes on the disk."""

    each: float
    """Every save: trained parameters and their optimizer state."""
    once: float
    """Frozen parameters, stored once for a run."""


def checkpoint_bytes(job: TrainingJob) -> CheckpointBytes:
    """Sizes of a run's checkpoints, whatever the layout."""
    whole = stage_parameters(on_one_rank(job), 0)
    each = job.element * whole.trained
    return CheckpointBytes(each + state_bytes(job, whole), whole.bytes - each)


def on_one_rank(job: TrainingJob) -> TrainingJob:
    """The job on one rank."""
    runtime = replace(
        job.runtime,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        sequence_parallel=False,
    )
    text = job.spec.text_decoder.model_copy(update={"pipeline_num_layers": None})
    spec = job.spec.model_copy(update={"text_decoder": text})
    return replace(job, runtime=runtime, spec=spec)
