"""Two sources tensor by tensor, under our names, whatever their layouts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint_converters.convert import specs_of
from checkpoint_converters.plan import our_tensor
from checkpoint_converters.progress import bytes_bar
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import describe_part, part_of_source
from mindspeed_mm.models.part import ALL_SLOTS, PartSpec
from mindspeed_mm.weights.layouts import VISION
from mindspeed_mm.weights.rules import Step
from mindspeed_mm.weights.sources import PartSource, Source


@dataclass(frozen=True)
class PartComparison:
    """What became of one part.

    equal: tensors with equal values; rounded: equal once one is rounded to the other's type.
    max_difference: largest |a - b| in float32 of the others, at tensor `worst`; infinity for another shape, NaN in one.
    only: tensors that only one side holds and the model uses. rows: further vocabulary rows that one side has.
    """

    part: str
    tensors: int
    equal: int
    rounded: int
    max_difference: float
    worst: str | None
    only: tuple[str, ...]
    rows: int

    def within(self, tolerance: float) -> bool:
        """Whether every tensor is there on both sides and differs by no more than `tolerance`."""
        return not self.only and self.max_difference <= tolerance


def compare(a: Source, b: Source, *, num_attention_heads: int | None = None) -> list[PartComparison]:
    """Compare the parts that both hold. Raises WeightError where there are none, or one cannot be read.

    `num_attention_heads`: heads of a vision encoder of which neither source says it.
    """
    kinds = [kind for kind in ALL_SLOTS if kind in a.parts and kind in b.parts]
    if not kinds:
        raise WeightError(
            f"{a.path} holds {', '.join(a.parts)} and {b.path} {', '.join(b.parts)}; expected a common part. "
            "Give two sources of one model."
        )
    num_attention_heads = vision_heads(a, b, num_attention_heads)
    specs = [{kind: specs_of(source, [kind], num_attention_heads)[kind] for kind in kinds} for source in (a, b)]
    with bytes_bar("compare", sum(_nbytes(a.part(kind)) for kind in kinds)) as advance:
        return [_compare_part(a.part(kind), b.part(kind), specs[0][kind], specs[1][kind], advance) for kind in kinds]


def vision_heads(a: Source, b: Source, given: int | None) -> int | None:
    """Heads of the vision encoder: those given, else what one of the sources says, else None."""
    known = [source for source in (a, b) if VISION in source.parts and _says_heads(source.part(VISION))]
    if given is None and known:
        return describe_part(known[0].part(VISION)).num_attention_heads
    return given


def _says_heads(source: PartSource) -> bool:
    return source.config is not None and "num_attention_heads" not in source.assumed


def _nbytes(source: PartSource) -> int:
    return sum(math.prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names)


def _compare_part(
    a: PartSource, b: PartSource, spec_a: PartSpec, spec_b: PartSpec, advance: Callable[[int], None]
) -> PartComparison:
    steps_a, steps_b = _steps(a, spec_a), _steps(b, spec_b)
    used = {name for steps in (steps_a, steps_b) for name, step in steps.items() if not step.unused}
    common = [name for name in steps_a if name in steps_b]
    only = tuple(sorted(used - set(common)))
    equal = rounded = rows = 0
    largest, worst = 0.0, None
    for name in common:
        left, right = _tensor(a, spec_a, steps_a[name]), _tensor(b, spec_b, steps_b[name])
        advance(left.nbytes)
        if steps_a[name].rule.padded and left.shape[1:] == right.shape[1:]:
            rows = max(rows, abs(len(left) - len(right)))
            shared = min(len(left), len(right))
            left, right = left[:shared], right[:shared]
        if _equal(left, right):
            equal += 1
        elif _equal(left.to(right.dtype), right) or _equal(left, right.to(left.dtype)):
            rounded += 1
        else:
            difference = _difference(left, right)
            if worst is None or difference > largest:
                largest, worst = difference, name
    return PartComparison(a.part, len(common), equal, rounded, largest, worst, only, rows)


def _steps(source: PartSource, spec: PartSpec) -> dict[str, Step]:
    rules = part_of_source(source).rules[source.dialect]
    match = rules.match(source.names, spec.geometry, where=f"{source.path} ({source.part})")
    return {step.target: step for step in match.steps}


def _tensor(source: PartSource, spec: PartSpec, step: Step) -> Tensor:
    stored = describe_part(source).geometry if source.assumed else spec.geometry
    return our_tensor(step, source, spec.geometry, stored)


def _equal(left: Tensor, right: Tensor) -> bool:
    """Equal values to the last bit, in the wider type: NaN equals the same NaN, 0.0 and -0.0 differ."""
    if left.shape != right.shape:
        return False
    wide = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(wide), right.to(wide)
    return torch.equal(_bits(left), _bits(right))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _difference(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        return math.inf
    largest = float((left.float() - right.float()).abs().max())
    return math.inf if math.isnan(largest) else largest
