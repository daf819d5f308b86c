"""Bytes that one micro-batch keeps for its backward pass, operation by operation as our layers run them.

What an operation saves follows from its derivative; which tensors share memory (a tensor saved twice counts once) was
read off the running model with torch's saved-tensor hooks, which the tests repeat. Korthikanti et al. 2022 count the
same for a GPT layer. Frozen linears save no input.

Legend: n tokens on this rank, m tokens where sequence parallelism splits norms and residuals, e bytes of an element,
H width, h heads, g key/value heads, D head size, F MLP width, T tensor-, C context-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_mm.models.operations import LayerShape
from mindspeed_mm.models.part import PartSpec
from mindspeed_mm.planning.job import TrainingJob
from mindspeed_mm.planning.kernels import Kernels, kernels_of
from mindspeed_mm.planning.parameters import held_numbers
from mindspeed_mm.platform.capped import BLOCK_SCORES
from mindspeed_mm.weights.blockwise import MADE

INDEX = 8
"""Bytes of an int64."""
SINGLE = 4
"""Bytes of a float32."""
HEAD_CHUNK = 2048
"""Supervised positions that go through the head at a time (models/loss.py)."""


@dataclass(frozen=True)
class LayerSizes:
    """What the formulas below need to know of a layer and its input on one rank."""

    part: PartSpec
    tokens: float
    norm_tokens: float
    element: int
    tensor: int
    context: int
    trained: bool
    kernels: Kernels
    sequences: int = 1
    """Sequences that stand one behind the other in the row; attention puts its outputs for them together."""
    lengths: tuple[float, ...] = (0.0,)
    """Positions of the sequences, of each kind at least one."""

    @property
    def shape(self) -> LayerShape:
        """What the part states of a layer."""
        return self.part.layer

    @property
    def single(self) -> float:
        """Share of the positions whose attention takes float32 copies (platform/cpu.py)."""
        channels = self.shape.kv_channels
        taken = sum(length for length in self.lengths if self.kernels.single_attention(length, channels))
        total = sum(self.lengths)
        return taken / total if total else 0.0  # an encoder without images

    @property
    def width(self) -> int:
        """Bytes of H elements."""
        return self.element * self.shape.hidden_size


def norm(sizes: LayerSizes) -> float:
    """RMSNorm or LayerNorm, m rows: the input and the statistics."""
    return sizes.norm_tokens * (sizes.width + sizes.shape.norm_statistics * SINGLE)


def head_norms(sizes: LayerSizes) -> float:
    """Norms of queries and keys: the projection before them and the statistics of each head."""
    shape, tensor = sizes.shape, sizes.tensor
    if not shape.qk_norm:
        return 0.0
    heads, groups = shape.num_attention_heads / tensor, shape.num_query_groups / tensor
    return sizes.tokens * (sizes.element * shape.kv_channels * (heads + 2 * groups) + SINGLE * (heads + groups))


def attention_core(sizes: LayerSizes) -> float:
    """softmax(QK^T)V: the output and the log-sum of each row and head. What it takes: `attention_inputs`."""
    heads = sizes.shape.num_attention_heads / sizes.tensor
    element = sizes.single * SINGLE + (1 - sizes.single) * sizes.element
    return sizes.tokens * heads * (element * sizes.shape.kv_channels + SINGLE)


def attention_inputs(sizes: LayerSizes, *, single: float) -> float:
    """Query, key and value as the kernel takes them.

    All three are views of the (rotated) fused projection, but for queries that share keys, which are copied together.
    Context parallelism sends copies of all three. Of the share `single` the kernel takes copies in float32.
    """
    shape, tokens = sizes.shape, sizes.tokens
    heads, groups = shape.num_attention_heads / sizes.tensor, shape.num_query_groups / sizes.tensor
    channels = (single * SINGLE + (1 - single) * sizes.element) * shape.kv_channels
    if sizes.context > 1:
        groups *= sizes.context // math.gcd(int(groups), sizes.context)
        return tokens * channels * (heads + 2 * groups)
    copied = (1 - single) * sizes.element * shape.kv_channels * (heads if heads != groups else 0)
    return tokens * (channels * (heads + 2 * groups) + copied)


def capped_scores(sizes: LayerSizes) -> float:
    """Beside what is kept, while attention with a soft cap runs backwards: four tensors of a block of scores, of which
    platform/capped.py says how large it is."""
    if not sizes.shape.soft_cap:
        return 0.0
    scores = sizes.tokens * sizes.shape.num_attention_heads / sizes.tensor * max(sizes.lengths)
    return 4 * SINGLE * min(scores, BLOCK_SCORES)


def whole_weight(sizes: LayerSizes) -> float:
    """The largest of the layer's stored weights, while it is made whole."""
    shape = sizes.shape
    if sizes.part.quantize is None:
        return 0.0
    heads = shape.num_attention_heads + 2 * shape.num_query_groups
    outputs = max(heads * shape.kv_channels, shape.ffn_hidden_size * (2 if shape.gated else 1))
    return MADE * outputs * shape.hidden_size / sizes.tensor


def mlp(sizes: LayerSizes) -> float:
    """Between the two linears: gated, gate and up in one tensor; plain, what the activation saves. The second linear's
    input comes on top where it is trained."""
    inner = sizes.element * sizes.shape.ffn_hidden_size / sizes.tensor * sizes.tokens
    return inner * (sizes.shape.activation_saves + sizes.trained)


def layer(sizes: LayerSizes, *, without_core: bool = False) -> float:
    """One transformer layer; `without_core`: the attention kernel is run again instead (selective recomputation)."""
    input_rows = sizes.tokens if sizes.kernels.keeps_gathered else sizes.norm_tokens
    linear_inputs = 2 * input_rows * sizes.width if sizes.trained else 0
    shape = sizes.shape
    own_output = sizes.tokens * sizes.element * shape.num_attention_heads * shape.kv_channels / sizes.tensor
    single = 0.0 if without_core else sizes.single
    core = attention_core(sizes)
    if without_core:
        core = own_output if sizes.trained else 0
    elif sizes.trained:
        # What was put together, rounded, turned or came back from the exchange of slices is the output linear's.
        core += own_output * (1 if sizes.context > 1 or sizes.sequences > 1 or shape.soft_cap else single)
    norms = shape.norms * norm(sizes) + head_norms(sizes)
    return norms + linear_inputs + attention_inputs(sizes, single=single) + core + mlp(sizes)


def asked_alone(sizes: LayerSizes) -> float:
    """What of a last layer is kept of the positions alone that the head is asked about: MLP and its norms."""
    linear_input = sizes.tokens * sizes.width if sizes.trained else 0.0
    return sizes.shape.norms / 2 * norm(sizes) + linear_input + mlp(sizes)


def decoder_sizes(job: TrainingJob) -> LayerSizes:
    """The text decoder's layers."""
    return LayerSizes(
        part=job.spec.text_decoder,
        tokens=job.tokens,
        norm_tokens=job.sequence_tokens,
        element=job.element,
        tensor=job.tensor,
        context=job.context,
        trained=job.linears.layers,
        kernels=kernels_of(job.device, job.runtime.params_dtype),
        sequences=job.joined_sequences,
        lengths=job.row.lengths if job.joined_sequences > 1 else (job.positions,),
    )


def vision_encoder_sizes(job: TrainingJob) -> LayerSizes:
    """The vision encoder's layers, on the images of this rank, without sequence parallelism."""
    vision_encoder, tokens = job.spec.vision_encoder, job.encoded.positions
    return LayerSizes(
        part=vision_encoder,
        tokens=tokens,
        norm_tokens=tokens,
        element=job.element,
        tensor=job.tensor,
        context=1,
        trained=job.trained("vision_encoder"),
        kernels=kernels_of(job.device, job.runtime.params_dtype),
        sequences=2 if vision_encoder.layer.segments else 1,
        lengths=(job.encoded.pairs / max(tokens, 1.0) / vision_encoder.num_built_layers,),
    )


def cross(job: TrainingJob) -> float:
    """One block of gated cross-attention in front of a decoder layer.

    Both norms; query, keys and values; the attention's output, log-sums and its mask as scores; outputs in front of
    both gates; what GELU takes. The inputs of the linears on top where these are trained.
    """
    crossing, sizes = job.crossing, decoder_sizes(job)
    shape, tokens, element = crossing.shape, sizes.tokens, sizes.element
    heads = shape.heads / job.tensor
    inner = heads * shape.head_size
    at_core = SINGLE if sizes.kernels.single_attention(crossing.features, shape.head_size) else element
    taken = (tokens + 2 * crossing.rows * crossing.features) * inner * at_core
    output = tokens * (inner * at_core + heads * SINGLE)
    mask = tokens * (crossing.features * at_core + 1)
    norms = 2 * sizes.norm_tokens * (sizes.width + 2 * SINGLE)
    gates = 2 * sizes.norm_tokens * sizes.width
    activated = tokens * shape.ffn_hidden_size / job.tensor * element
    kept = taken + output + mask + norms + gates + activated
    if job.linears.cross:
        rows = tokens if sizes.kernels.keeps_gathered else sizes.norm_tokens
        kept += 2 * rows * sizes.width + tokens * inner * element + activated
    return kept


def beside(job: TrainingJob) -> float:
    """Features beside the text, and who sees what of them: once for all blocks of a stage."""
    crossing = job.crossing
    return 0.0 if crossing is None else crossing.memory * job.element


@dataclass(frozen=True)
class Stack:
    """Bytes of a stack of layers under its recomputation."""

    kept: float
    at_work: float
    """More in the backward pass of a layer: the gradients inside it, and what is run again for it."""


def stack(sizes: LayerSizes, further: Sequence[float], asked: float = 1.0) -> Stack:
    """Layers with the spec's recompute_* applied; `further` has for each what stands in front of it keeps, `asked` is
    the share of positions that the last one's MLP runs on."""
    spec, shape = sizes.part, sizes.shape
    if not further:
        return Stack(0.0, 0.0)
    boundary = sizes.norm_tokens * sizes.width
    # Once for the stack: cosines and sines of half a head each.
    angles = sizes.tokens * sizes.element * shape.kv_channels if shape.rotary else 0.0
    one = layer(sizes, without_core=spec.recompute_granularity == "selective")
    kept = [one + more for more in further]
    kept[-1] -= (1 - asked) * asked_alone(sizes)
    whole, last = gradients(sizes), gradients(sizes, asked)
    # The last layer comes first in the backward pass. What it kept is free by the time of those in front of it.
    inside = max(last, whole - kept[-1]) if len(kept) > 1 else last
    if spec.recompute_granularity != "full":
        return Stack(sum(kept) + angles, inside)
    # Full: the layer's input.
    if spec.recompute_method == "uniform":
        groups = [
            kept[start : start + spec.recompute_num_layers] for start in range(0, len(kept), spec.recompute_num_layers)
        ]
        again = sum(groups[-1]) + (inside if len(groups[-1]) > 1 else last)
        for behind, group in enumerate(reversed(groups[:-1]), start=1):
            again = max(again, sum(group) + whole - behind * boundary)
        return Stack(len(groups) * boundary + angles, again)
    # The layers that are not run again come first in the backward pass: their memory is free by then.
    again = min(spec.recompute_num_layers, len(kept))
    others = sum(kept[again:])
    return Stack(again * boundary + angles + others, max(inside, max(kept[:again]) + whole - others))


def gradients(sizes: LayerSizes, asked: float = 1.0) -> float:
    """More in the backward pass of a layer whose MLP runs on the share `asked` of the positions: the gated product and
    the first linear's output have gradients, as has the residual, while what is no longer needed of the forward pass is
    given back. Where products run in float32, the operands of the first linear's are the most."""
    inner = sizes.shape.ffn_hidden_size / sizes.tensor * sizes.tokens
    most = sizes.element * inner * (2 if sizes.trained else 3)
    if sizes.kernels.single_products:
        outputs = 2 if sizes.shape.gated else 1
        most = max(most, inner * (outputs * SINGLE - sizes.element * sizes.trained))
    return max(asked * most, capped_scores(sizes)) + sizes.norm_tokens * sizes.width + whole_weight(sizes)


def decoder(job: TrainingJob, stage: int) -> Stack:
    """The text decoder's layers on a pipeline stage, with cross-attention in front of some."""
    numbers, shape = held_numbers(job, stage), job.spec.text_decoder.cross_shape
    further = [0.0 if shape is None else shape.on([number]) * cross(job) for number in numbers]
    found = stack(decoder_sizes(job), further, job.asked if stage == job.pipeline - 1 else 1.0)
    return Stack(found.kept + beside(job), found.at_work)


def vision_encoder(job: TrainingJob) -> Stack:
    """A trained vision encoder; a frozen one runs without autograd and keeps nothing."""
    if not job.trained("vision_encoder"):
        return Stack(0.0, 0.0)
    spec, sizes = job.spec.vision_encoder, vision_encoder_sizes(job)
    layers = stack(sizes, [0.0] * spec.num_built_layers)
    pixels = job.encoded.pixels * job.element
    if spec.recompute_granularity == "full":
        pixels += sizes.tokens * spec.carried_size * job.element
    return Stack(layers.kept + pixels + spec.outer_norms * norm(sizes), layers.at_work)


def projector(job: TrainingJob) -> float:
    """What its linears take, as far as they are trained, and what is activated before them; of its attention what it
    takes, and the output where that is float32."""
    if not job.gradients_flow("vision_projector"):
        return 0.0
    spec, kernels = job.spec.vision_projector, kernels_of(job.device, job.runtime.params_dtype)
    trained = job.trained("vision_projector")
    total = 0.0
    for product in spec.products(job.projected):
        own = product.kept if trained and not (product.shared and product.activated) else 0.0
        if own and product.keys and kernels.single_attention(product.keys, spec.kv_channels):
            own = (own + product.rows * product.outputs / 2) * SINGLE / job.element
        total += (product.activated + own) / (job.tensor if product.split else 1)
    return job.element * total


def embedding(job: TrainingJob) -> float:
    """Ids of the embedding's gradient, and the places that image features take."""
    ids = job.micro_batch_size * job.positions * INDEX if job.trained("text_decoder") else 0
    return ids + job.images.tokens * 2 * INDEX


def interaction(job: TrainingJob) -> float:
    """What stands in front of the head keeps of the positions on which it runs, and of all features it looks at."""
    own = job.spec.interaction
    if own is None:
        return 0.0
    lengths = [length / job.context for length in job.row.lengths] * job.micro_batch_size
    products = own.head_products(job.supervised, job.images.features, lengths)
    return job.element * sum(
        (product.activated + product.kept) / (job.tensor if product.split else 1) for product in products
    )


@dataclass(frozen=True)
class Head:
    """Bytes of the head and the loss, which run on supervised positions alone."""

    kept: float
    forward: float
    """More at the end of the forward pass: the logits in the type of the model beside those in float32."""
    backward: float
    """More, or less, in the first moments of the backward pass: gradients of logits and of the head's weight."""


def head(job: TrainingJob) -> Head:
    """Final norm, interaction, head, and cross-entropy."""
    own = job.spec.interaction
    if not job.gradients_flow("text_decoder" if own is None else "interaction"):
        return Head(0.0, 0.0, 0.0)
    sizes, decoder = decoder_sizes(job), job.spec.text_decoder
    vocabulary = decoder.language_vocab_size / job.tensor
    rows = min(job.supervised, HEAD_CHUNK)
    softmax = rows * vocabulary * SINGLE
    kept = (
        (job.asked * norm(sizes) if job.gradients_flow("text_decoder") else 0.0)
        + job.supervised * INDEX
        + interaction(job)
    )
    logits = rows * vocabulary * job.element if job.mixed else 0.0
    # A bound of the logits keeps its tanh.
    softmax += rows * vocabulary * job.element if decoder.traits.final_soft_cap is not None else 0.0
    weight = vocabulary * decoder.hidden_size * job.element if job.linears.head else 0.0
    gradients = logits + weight - (softmax if job.mixed else 0.0)
    if job.supervised > HEAD_CHUNK:  # chunks keep the hidden states that they are run again from
        return Head(kept + job.supervised * sizes.width, logits + softmax, gradients + softmax)
    return Head(kept + softmax + (rows * sizes.width if job.linears.head else 0), logits, gradients)
