"""What a rank really holds and allocates: static bytes, bytes saved for the backward pass, the allocator's peak.

Everything is counted while the real model trains on the CPU: static memory from the tensors themselves, saved
activations with torch's saved-tensor hooks (each storage once), the peak from the allocator's events in its profiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch

from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Batch, Encoded
from mindspeed_mm.models.media import Media


class Work(NamedTuple):
    """One run: the model.json, the flags, and what each sample of the batch looks like."""

    model: dict
    flags: str
    world_size: int = 1
    tokens: int = 192
    """Positions of a sample, image positions included."""
    supervised: int = 64
    packed: int = 0
    """Samples that share a row; 0: one a row."""
    half_products: bool = True
    """Whether the processor is one with instructions for bfloat16."""
    short_single: bool = False
    """Whether it is one that attends to all but the largest sequences faster in float32."""


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    optimizer: int
    saved: int
    """Storages kept for the backward pass of one micro-batch at the end of its forward pass, parameters left out."""
    peak: int
    """Highest sum of what the allocator gave out during one step, above what was allocated before it."""


def measure(work: Work) -> Measured:
    """Build, train some steps on this rank of the process group, and count."""
    with as_processor(work):
        return _measure(work)


@contextmanager
def as_processor(work: Work) -> Iterator[None]:
    """Let products and attention run as on the processor of `work`, whatever this one is."""
    from mindspeed_mm.platform import host_products

    tables = {dtype: table_of(dtype, work) for dtype in host_products.DTYPES}
    with (
        mock.patch.object(host_products, "has_half_products", lambda _dtype: work.half_products),
        mock.patch.object(host_products, "table", tables.__getitem__),
        mock.patch.object(host_products, "settle", lambda: None),
    ):
        yield


def table_of(dtype: torch.dtype, work: Work) -> dict[str, str]:
    """The kernels that the processor of `work` has measured for a data type."""
    from mindspeed_mm.platform import host_products

    slow = dtype in host_products.HALVES and not work.half_products
    table = dict.fromkeys(host_products.classes(), host_products.SINGLE if slow else host_products.PLAIN)
    if dtype in host_products.HALVES and work.short_single:
        table |= {f"{host_products.ATTENTION}, {size}": host_products.SINGLE for size in ("tiny", "small", "medium")}
    return table


def _measure(work: Work) -> Measured:
    from mindspeed_mm.platform import get_platform

    platform = get_platform("cpu")
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron.driver import arguments, initialize, setup
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.objectives.sft import OBJECTIVE

    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    line = f"--lr 1e-4 --train-iters 9 --seq-length {work.tokens * max(1, work.packed)} {work.flags}"
    args = arguments.from_namespace(parser.parse_args(line.split()), world_size=work.world_size)
    runtime = Runtime(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
    )
    spec = load_model_spec(work.model)
    initialize.initialize(args, platform)

    def provide(pre_process: bool, post_process: bool):
        return build_vlm(spec, runtime, torch.device("cpu"), pre_process=pre_process, post_process=post_process)[0]

    state = setup.setup(args, provide, platform)
    batches = batches_of(work, spec, args.micro_batch_size, runtime.sequence_multiple)
    saved = _SavedBytes({p.untyped_storage().data_ptr() for m in state.modules for p in m.parameters()})

    def counted_step(iterator, model):
        with saved:
            return OBJECTIVE.forward_step(iterator, model)

    def step(forward):
        for chunk in state.model:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=batches,
            model=state.model,
            num_microbatches=get_num_microbatches(),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        state.optimizer.step()

    step(counted_step)
    peaks = []
    for _ in range(3):  # a neighbour that is late makes buffers of collectives live longer: the least is the step's own
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(OBJECTIVE.forward_step)
        peaks.append(_peak(profile))
    return Measured(*_static_bytes(state), saved.largest, min(peaks))


def _static_bytes(state) -> tuple[int, int, int]:
    (module,) = state.modules
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in state.model[0].buffers)
    inner = state.optimizer.optimizer
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    masters = [m for group in inner.param_groups for m in group["params"]]
    optimizer = sum(m.numel() * m.element_size() for m in masters if m.untyped_storage().data_ptr() not in own)
    for values in inner.state.values():
        optimizer += sum(v.numel() * v.element_size() for name, v in values.items() if name != "step")
    if state.average is not None:
        optimizer += sum(average.nbytes for average in state.average._averages)
    return parameters, gradients, optimizer


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the storages that one forward pass saves; `largest` over the passes."""

    def __init__(self, left_out: set[int]) -> None:
        self.largest, self._left_out = 0, left_out
        super().__init__(self._pack, lambda kept: kept)

    def __enter__(self):
        self._storages: dict[int, torch.UntypedStorage] = {}
        return super().__enter__()

    def __exit__(self, *error):
        self.largest = max(self.largest, sum(storage.nbytes() for storage in self._storages.values()))
        self._storages = {}  # ends the life of what was held for counting
        return super().__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._left_out:
            self._storages[storage.data_ptr()] = storage
        return tensor


def _peak(profile: torch.profiler.profile) -> int:
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def image_of(spec) -> Media:
    """The image that plans are made with, black."""
    encoder = spec.vision_encoder
    if spec.model_id == "qwen2_5_vl":
        rows = round(spec.family.planned_image(spec).rows)
        pixels = torch.zeros(rows, encoder.patch_channels)
        return Media(pixels, (rows,), torch.tensor([encoder.planned_grid]), torch.zeros(1, 2).long())
    side = encoder.image_size
    if spec.model_id == "llava_next":
        sizes = torch.tensor([[2 * side, side]])
        return Media(torch.zeros(3, 3, side, side), (3,), torch.tensor([[1, 2, 1]]), sizes)
    return Media.of_images(torch.zeros(1, 3, side, side))


def batches_of(work: Work, spec, micro_batch: int, multiple: int) -> Iterator[Batch]:
    """Endless equal micro-batches: one image a sample, then text, the last positions supervised."""
    images = round(spec.family.planned_image(spec).tokens)
    ids = [-200] * images + [5] * (work.tokens - images)
    labels = [-100] * (work.tokens - work.supervised) + ids[work.tokens - work.supervised :]
    media = image_of(spec)
    positions = None
    if spec.family.multimodal_positions:
        positions = spec.family.positions(spec, torch.tensor(ids), media.grid)
    sample = Encoded("row", ids, labels, (media,), positions=positions)
    length = work.packed * work.tokens if work.packed else None
    collate = Collator(0, pad_multiple=multiple, row_length=length)
    row = [sample] * work.packed if work.packed else sample
    while True:
        yield collate([row] * micro_batch)
