"""Bytes that each rank sends in one step, by kind.

A ring sends (N-1)/N of the tensor in a reduce-scatter or all-gather over N ranks and twice that in an all-reduce
(Thakur et al. 2005); all-to-all sends (N-1)/N of what a rank holds. Layers follow megatron.core's parallel linears:
forward two all-reduces, or two all-gathers and two reduce-scatters under sequence parallelism, and as many backward,
where sequence parallelism gathers the inputs of trained linears once more.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mindspeed_mm.models.part import PartSpec
from mindspeed_mm.planning.activations import beside
from mindspeed_mm.planning.job import TrainingJob
from mindspeed_mm.planning.parameters import held_blocks, held_layers, stage_parameters

SINGLE = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step."""

    tensor: float
    """All-reduces, or all-gathers and reduce-scatters, of tensor and sequence parallelism."""
    pipeline: float
    """Hidden states and their gradients to the neighbouring stages."""
    context: float
    """Heads exchanged for sequence and back."""
    gradients: float
    """Sums of gradients over the ranks that share parameters (all-reduce, or reduce-scatter)."""
    parameters: float
    """All-gather of updated parameters under the distributed optimizer."""

    @property
    def total(self) -> float:
        """All kinds."""
        return sum(asdict(self).values())


def stage_traffic(job: TrainingJob, stage: int) -> Traffic:
    """Traffic of a rank of a pipeline stage."""
    count = job.num_micro_batches
    tensor, context = _decoder_traffic(job, stage)
    if stage == 0:
        context += _shared_images(job)
        tensor += _image_traffic(job) + _embedding_traffic(job)
    if stage == job.pipeline - 1:
        tensor += _head_traffic(job)
    gradients, parameters = _data_traffic(job, stage)
    return Traffic(
        tensor=count * tensor,
        pipeline=count * _pipeline_traffic(job, stage),
        context=count * context,
        gradients=gradients,
        parameters=parameters,
    )


def ring(size: float, ranks: int) -> float:
    """Bytes that each of `ranks` sends in a reduce-scatter or all-gather of `size` bytes."""
    return size * (ranks - 1) / ranks


def _passes(part: PartSpec, flow: bool) -> float:
    """Forward passes of a part's layers, those of full recomputation included."""
    if not flow or part.recompute_granularity != "full":
        return 1.0
    if part.recompute_method == "uniform":
        return 2.0
    return 1.0 + min(1.0, part.recompute_num_layers / part.num_layers)


def _decoder_traffic(job: TrainingJob, stage: int) -> tuple[float, float]:
    """(tensor-parallel, context-parallel) bytes of a micro-batch through the decoder's layers of a stage."""
    spec, layers = job.spec.text_decoder, held_layers(job, stage)
    flow, trained = job.gradients_flow("text_decoder"), job.trained("text_decoder")
    passes = _passes(spec, flow)
    hidden = job.tokens * spec.hidden_size * job.element
    # Two sums over the ranks in each direction; one is a reduce-scatter and an all-gather.
    sums = 2 * passes + (2 if flow else 0)
    once_more = 1.0 if job.runtime.sequence_parallel and flow and trained else 0.0
    blocks, crossing = held_blocks(job, stage), job.crossing
    tensor = (layers + blocks) * (2 * sums + 2 * once_more) * ring(hidden, job.tensor)
    if crossing is not None and job.gradients_flow("vision_projector"):  # keys and values sum the features' gradients
        tensor += 2 * blocks * ring(crossing.memory * job.element, job.tensor)
    heads = (2 * spec.num_attention_heads + 2 * spec.num_query_groups) / job.tensor
    exchanged = job.tokens * heads * spec.kv_channels * job.element
    if spec.recompute_granularity == "selective":
        passes = 2.0
    context = layers * (passes + (1 if flow else 0)) * ring(exchanged, job.context)
    return tensor, context


def _image_traffic(job: TrainingJob) -> float:
    """Vision encoder (two sums a layer and direction) and projector (one for each pair of linears)."""
    vision_encoder, projector = job.spec.vision_encoder, job.spec.vision_projector
    flow = job.gradients_flow("vision_encoder")
    hidden = job.encoded.positions * vision_encoder.hidden_size * job.element
    sums = vision_encoder.num_built_layers * (2 * _passes(vision_encoder, flow) + (2 if flow else 0))
    products = [product for product in projector.products(job.projected) if product.split]
    summed = sum(product.rows * product.outputs for product in products) * job.element
    return 2 * (sums * ring(hidden, job.tensor) + ring(summed, job.tensor))


def _shared_images(job: TrainingJob) -> float:
    """What context-parallel ranks share of the images is gathered: features of the projector, or of the encoder where
    they depend on one another; their gradients, where some flow, are summed and scattered."""
    spec = job.spec
    if not spec.vision_encoder.independent_rows:
        return 0.0
    if spec.vision_projector.independent_rows:
        values, flow = job.encoded.features * spec.text_decoder.hidden_size, job.gradients_flow("vision_projector")
    else:
        values, flow = job.encoded.positions * spec.vision_encoder.feature_size, job.gradients_flow("vision_encoder")
    return (1 + flow) * ring(values * job.context * job.element, job.context)


def _embedding_traffic(job: TrainingJob) -> float:
    spec = job.spec.text_decoder
    return 2 * ring(job.micro_batch_size * job.positions * spec.hidden_size * job.element, job.tensor)


def _head_traffic(job: TrainingJob) -> float:
    """The hidden states gathered for the head, and the gradient of its input."""
    spec = job.spec.text_decoder
    gathered = job.tokens * spec.hidden_size * job.element if job.runtime.sequence_parallel else 0.0
    supervised = job.supervised * spec.hidden_size * job.element
    return ring(gathered, job.tensor) + 2 * ring(supervised, job.tensor)


def _pipeline_traffic(job: TrainingJob, stage: int) -> float:
    """To the next stage forwards, to the one before backwards, with the features beside a text; virtual stages close
    the ring."""
    if job.pipeline == 1:
        return 0.0
    hidden = job.sequence_tokens * job.spec.text_decoder.hidden_size * job.element + beside(job)
    last, wraps = stage == job.pipeline - 1, job.virtual - 1
    forwards = job.virtual if not last else wraps
    backwards = job.virtual if stage > 0 else wraps
    # No gradient goes back where nothing behind is trained.
    return hidden * (forwards + (backwards if job.gradients_flow("vision_projector") or _decoder_behind(job) else 0))


def _decoder_behind(job: TrainingJob) -> bool:
    return job.trained("text_decoder")


def _data_traffic(job: TrainingJob, stage: int) -> tuple[float, float]:
    """(gradients, parameters): once a step, over the data- and context-parallel ranks."""
    trained, ranks = stage_parameters(job, stage).trained, job.sharing_ranks
    reduced = ring(SINGLE * trained, ranks)
    if job.use_distributed_optimizer:
        return reduced, ring(job.element * trained, ranks)
    return 2 * reduced, 0.0
