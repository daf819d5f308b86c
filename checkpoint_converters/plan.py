"""What a conversion writes, tensor by tensor, before anything is read: names, shapes, types, and how to make each.

A job makes the tensors that belong together (the three of a merged QKV); it runs when its turn to be written comes, so
that a conversion holds one job's tensors at a time.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import describe_part, part_of_source
from mindspeed_mm.models.part import DTYPES, PartSpec
from mindspeed_mm.weights.files import Span
from mindspeed_mm.weights.loading import check_step, check_tied_copy
from mindspeed_mm.weights.rules import Geometry, Reshape, Step
from mindspeed_mm.weights.sources import PartSource

SHORTEST_RUN = 2**14
"""Bytes; rows in shorter runs are put together in memory."""


@dataclass(frozen=True)
class Output:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Job:
    """Tensors that are made and written together; `make` gives them in the order of `outputs`.

    `spans` says which bytes of the source each output consists of, where it holds nothing else.
    """

    outputs: tuple[Output, ...]
    make: Callable[[], list[Tensor]]
    spans: tuple[tuple[Span, ...], ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Wanted:
    """How one part is written.

    dialect, prefix: names; dtype: None keeps each tensor's own; rows: of the two vocabulary matrices, None keeps them
    (further rows are the mean row: the score of such a token is the mean of all scores and never the highest);
    built_only: leave out what our modules do not build (a vision encoder's layers behind the feature).
    """

    dialect: str
    prefix: str = ""
    dtype: torch.dtype | None = None
    rows: int | None = None
    built_only: bool = False


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A type by its name; None and "keep" mean each tensor's own. Raises WeightError for an unknown name."""
    if dtype is None or dtype == "keep" or isinstance(dtype, torch.dtype):
        return None if dtype == "keep" else dtype
    if dtype not in DTYPES:
        raise WeightError(f"found dtype {dtype!r}; expected one of {', '.join(DTYPES)}, keep.")
    return DTYPES[dtype]


def part_jobs(source: PartSource, spec: PartSpec, wanted: Wanted) -> tuple[list[Job], list[str]]:
    """(jobs of one part, our names of unused tensors that the source lacks and that are filled).

    Each source tensor is used exactly once or known to be dropped, each target tensor is made exactly once. For other
    layouts than ours, layers behind the feature and a final norm that the source lacks are filled so that they change
    nothing (zeros, norms of ones). Raises WeightError when the source is not what `spec` describes.
    """
    part, geometry = part_of_source(source), spec.geometry
    reading, writing = part.rules[source.dialect], part.rules[wanted.dialect]
    match = reading.match(source.names, geometry, where=f"{source.path} ({source.part})")
    check_tied_copy(reading, geometry, source)
    stored = describe_part(source).geometry if source.assumed else geometry
    steps = [step for step in writing.steps(geometry) if not (step.unused and wanted.built_only)]
    targets = {step.target: step for step in steps}
    jobs, made, shapes = [], set(), part.shapes(spec)
    for step in match.steps:
        check_shapes(source, step, shapes.get(step.target) or shapes[step.rule.target], geometry)
        if step.target in targets:
            jobs.append(_job(source, step, targets[step.target], geometry, stored, wanted))
            made.add(step.target)
    filled = [target for target in targets if target not in made and wanted.dialect != "ours"]
    meta = {step.target: step for step in match.steps}
    jobs += [_filling(source, targets[name], meta, geometry, wanted) for name in filled]
    return jobs, filled


def renamed(job: Job, old: str, new: str) -> Job:
    """A job whose names have another prefix."""
    return replace(job, outputs=tuple(replace(out, name=new + out.name.removeprefix(old)) for out in job.outputs))


def check_shapes(source: PartSource, step: Step, expected: tuple[int, ...], geometry: Geometry) -> None:
    """Raise WeightError for a source tensor whose shape is not the one that the config (or model.json) gives."""
    whole = torch.empty(expected, device="meta")
    for name, tensor in zip(step.sources, step.rule.to_theirs(whole, geometry), strict=True):
        found = source.shape(name)
        if found != tuple(tensor.shape):
            raise WeightError(
                f"{source.path}: tensor {source.stored_name(name)} has shape {list(found)}; expected "
                f"{list(tensor.shape)}, as the {source.part}'s config says. Config and weights are of two models, or "
                "the file is damaged."
            )


def our_tensor(step: Step, source: PartSource, geometry: Geometry, stored: Geometry) -> Tensor:
    """Our full tensor of one step, its heads grouped as `geometry` says."""
    full = step.rule.to_ours([source.get(name) for name in step.sources], geometry)
    return full if stored == geometry else step.rule.regroup(full, stored, geometry)


def total_bytes(jobs: Iterable[Job]) -> int:
    """Bytes of the tensors of all jobs."""
    return sum(job.nbytes for job in jobs)


def stored_dtype(jobs: Iterable[Job]) -> str:
    """The one type of all tensors as HF names it; float32 where they differ."""
    names = {str(output.dtype).removeprefix("torch.") for job in jobs for output in job.outputs}
    return names.pop() if len(names) == 1 else "float32"


def _job(source: PartSource, step: Step, target: Step, geometry: Geometry, stored: Geometry, wanted: Wanted) -> Job:
    full = check_step(step, source, geometry)
    same = step.sources == target.sources and type(step.rule) is type(target.rule) and stored == geometry

    def finish(tensors: list[Tensor]) -> list[Tensor]:
        if target.rule.padded and wanted.rows is not None:
            tensors = [_resize(tensor, wanted.rows) for tensor in tensors]
        return [tensor.to(wanted.dtype) if wanted.dtype else tensor for tensor in tensors]

    def make() -> list[Tensor]:
        if same:  # the same names on both sides: nothing to merge and split
            return finish([source.get(name) for name in step.sources])
        return finish(target.rule.to_theirs(our_tensor(step, source, geometry, stored), geometry))

    shapes = [source.meta(name) for name in step.sources] if same else target.rule.to_theirs(full, geometry)
    outputs = _outputs(target, finish(shapes), wanted)
    unchanged = [(out.shape, out.dtype) for out in outputs] == [(tuple(t.shape), t.dtype) for t in shapes]
    spans = _spans(source, step, target, geometry, same) if unchanged and stored == geometry else None
    return Job(outputs, make, spans)


def _spans(
    source: PartSource, step: Step, target: Step, geometry: Geometry, same: bool
) -> tuple[tuple[Span, ...], ...] | None:
    """Which bytes of the source the tensors of `target` consist of; None where they are not long runs of its rows.

    The rules say it themselves: they are asked where each row goes.
    """
    whole = [source.span(name) for name in step.sources]
    if None in whole:
        return None
    if same or isinstance(step.rule, Reshape) or isinstance(target.rule, Reshape):
        return tuple((span,) for span in whole)
    shapes = [source.shape(name) for name in step.sources]
    if len({(source.dtype(name), shape[1:]) for name, shape in zip(step.sources, shapes, strict=True)}) > 1:
        return None
    if any(not span.nbytes for span in whole):
        return None
    row = whole[0].nbytes // shapes[0][0]
    starts = list(itertools.accumulate((shape[0] + 1 for shape in shapes), initial=0))  # a gap: no run over two sources
    rows = [torch.arange(start, start + shape[0]) for start, shape in zip(starts[:-1], shapes, strict=True)]
    moved = target.rule.to_theirs(step.rule.to_ours(rows, geometry), geometry)
    result = tuple(_runs(tensor, starts, whole, row) for tensor in moved)
    shortest = min(span.nbytes for spans in result for span in spans)
    return result if shortest >= SHORTEST_RUN else None


def _runs(rows: Tensor, starts: list[int], whole: list[Span], row: int) -> tuple[Span, ...]:
    """Rows of the sources, numbered from `starts` on, as runs of bytes; `row` bytes each."""
    cuts = (torch.diff(rows) != 1).nonzero().flatten() + 1
    result = []
    for run in torch.tensor_split(rows, cuts):
        number = bisect.bisect_right(starts, int(run[0])) - 1
        first = (int(run[0]) - starts[number]) * row
        result.append(Span(whole[number].path, whole[number].offset + first, len(run) * row))
    return tuple(result)


def _filling(source: PartSource, target: Step, steps: dict[str, Step], geometry: Geometry, wanted: Wanted) -> Job:
    """A job for an unused tensor that the source lacks."""
    rule = target.rule
    example = rule.shape_like or rule.target.replace("{}", "0")
    if not target.unused or example not in steps:
        raise WeightError(
            f"{source.path}: nothing gives {target.target}; expected it in the {source.part}. Give complete weights."
        )
    like = check_step(steps[example], source, geometry)
    value = 1.0 if target.target.endswith("layernorm.weight") else 0.0

    def make(device: str = "cpu") -> list[Tensor]:
        full = torch.full(like.shape, value, dtype=wanted.dtype or like.dtype, device=device)
        return rule.to_theirs(full, geometry)

    return Job(_outputs(target, make("meta"), wanted), make)


def _outputs(target: Step, tensors: list[Tensor], wanted: Wanted) -> tuple[Output, ...]:
    names = [wanted.prefix + name for name in target.sources]
    return tuple(Output(name, tuple(t.shape), t.dtype) for name, t in zip(names, tensors, strict=True))


def _resize(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows, or all of them and mean rows behind."""
    if rows <= tensor.shape[0]:
        return tensor[:rows]
    if tensor.is_meta:
        return torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
    mean = tensor.mean(dim=0, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - tensor.shape[0], *tensor.shape[1:])])
