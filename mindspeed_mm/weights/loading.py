"""Load one part of a model from any layout into a module's tensors, at any tensor and pipeline layout."""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.rules import Geometry, RuleSet, Step
from mindspeed_mm.weights.shards import check_divisible, padded_vocab_size, shard
from mindspeed_mm.weights.sources import PartSource, Source, errors_name

logger = logging.getLogger(__name__)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of weights. Narrower ones come with scales, without which their values mean nothing."""

_LAYER = re.compile(r"^decoder\.layers\.(\d+)(?=\.)")


@dataclass(frozen=True)
class LoadReport:
    """What became of one part: tensors this rank expected, loaded and left at random init, and source tensors dropped.

    `config` says whether the source's config confirmed what shapes cannot show; `example` is a dropped tensor.
    """

    part: str
    layout: str
    path: str
    expected: int
    loaded: int
    fresh: int
    dropped: int
    config: str
    example: str | None = None


def load_part(
    module: torch.nn.Module | Mapping[str, Tensor],
    part: Any,
    spec: Any,
    source: Source | None,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    layer_offset: int = 0,
    num_local_layers: int | None = None,
    allow_nonfinite: bool = False,
) -> LoadReport:
    """Copy a part's weights into a module's parameters in place, cast to their type, one group of tensors at a time.

    Args:
        module: the built part, or its names -> this rank's parameters. Layers are numbered from 0 on every pipeline
            stage; names that end in `_extra_state` (megatron.core's placeholders) are left alone.
        part: the Part (rules, from_hf, checked) and `spec` its Spec.
        source: opened weights; None leaves a part at random init that says `fresh`.
        tp_rank, tp_size: place in the tensor-parallel group.
        layer_offset: number of the first layer that this pipeline stage holds.
        num_local_layers: layers of this stage; None where it holds the whole part.
        allow_nonfinite: load weights with NaN or Inf, with a warning, which are else refused.

    Raises WeightError for missing or extra tensors, other shapes or types, NaN and Inf, and a source whose config
    differs.
    """
    content = module.state_dict() if isinstance(module, torch.nn.Module) else module
    state = {name: tensor for name, tensor in content.items() if not name.endswith("_extra_state")}
    if source is None:
        return _fresh_report(part, spec, state)
    part_source, found, confirmed, rules, steps = _matched(part, spec, source)
    geometry = spec.geometry
    check_tied_copy(rules, geometry, part_source)
    named = {global_name(name, layer_offset): tensor for name, tensor in state.items()}
    fresh = {name for name in named if name.startswith(spec.fresh_names) and name not in steps}
    local = {name: tensor for name, tensor in named.items() if name not in fresh}
    _check_targets(part.kind, local, steps, rules, geometry, whole=num_local_layers is None)
    stored = found.geometry if part_source.assumed else geometry
    with torch.no_grad():
        for name, parameter in local.items():
            step = steps[name] if name in steps else steps[rules.tied[1]]
            if _taken_as_stored(parameter, step, part_source, geometry, tp_rank, tp_size):
                continue
            value = local_tensor(step, part_source, geometry, tp_rank, tp_size, stored=stored)
            check_finite(value, f"{part_source.path}: {' + '.join(step.sources)}", allowed=allow_nonfinite)
            _copy(parameter, name, value, step, part_source)
    read = {name for step in steps.values() for name in step.sources}
    dropped = [part_source.stored_name(name) for name in part_source.names if name not in read]
    return LoadReport(
        part.kind,
        source.layout,
        str(part_source.path),
        expected=len(named),
        loaded=len(local),
        fresh=len(named) - len(local),
        dropped=len(dropped),
        config=confirmed,
        example=dropped[0] if dropped else None,
    )


def _taken_as_stored(
    parameter: Any, step: Step, source: PartSource, geometry: Geometry, tp_rank: int, tp_size: int
) -> bool:
    """Whether a place for a weight in 4 or 8 bits has taken its share of one that lies in the source in that form."""
    if not hasattr(parameter, "take_stored") or source.dialect != "ours":
        return False
    form = source.stored_form(step.sources[0])
    return form is not None and parameter.take_stored(
        form, lambda whole: shard(whole, step.rule, tp_rank, tp_size, geometry)
    )


def check_part(part: Any, spec: Any, source: Source | None) -> None:
    """Compare a part's weights with its spec before anything is built: names, shapes and types from the headers, and
    what the config beside them says. No value is read.

    Raises WeightError as `load_part` does, but for what only values show.
    """
    if source is None:
        _fresh_report(part, spec, {})
        return
    part_source, _, _, _, steps = _matched(part, spec, source)
    shapes = part.shapes(spec)
    for step in steps.values():
        full = check_step(step, part_source, spec.geometry)
        _check_shape(step, part_source, tuple(full.shape), shapes.get(step.target) or shapes[step.rule.target])


def whole_tensors(part: Any, spec: Any, source: Source, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of some of our tensors of a part, on the CPU in the stored type.

    Raises WeightError as `check_part` does.
    """
    part_source, found, _, _, steps = _matched(part, spec, source)
    stored = found.geometry if part_source.assumed else spec.geometry
    for name in names:
        yield name, local_tensor(steps[name], part_source, spec.geometry, 0, 1, stored=stored)


class _Matched(NamedTuple):
    """A source whose names and config fit a spec."""

    source: PartSource
    found: Any
    """The Spec of the config beside the weights; None where there is none."""
    confirmed: str
    rules: RuleSet
    steps: dict[str, Step]
    """By our name; those that are not built are left out."""


def _matched(part: Any, spec: Any, source: Source) -> _Matched:
    part_source = source.part(part.kind)
    if (lacking := spec.lacking(part_source.dialect)) is not None:
        raise WeightError(f"{part_source.path}: the weights do not fit the {part.kind}: {lacking}.")
    with errors_name(part_source.path):
        found = None if part_source.config is None else part.read_config(part_source.config, part_source.dialect)
    confirmed = "none there" if found is None else _check_config(part, spec, part_source, found)
    rules = _rules_of(part, part_source)
    match = rules.match(part_source.names, spec.geometry, where=f"{part_source.path} ({part.kind})")
    return _Matched(
        part_source, found, confirmed, rules, {step.target: step for step in match.steps if not step.unused}
    )


def table(reports: Iterable[LoadReport]) -> str:
    """What became of each part, in words, one line per part."""
    reports = list(reports)
    width = max((len(report.part) for report in reports), default=0)
    return "\n".join(f"  {report.part.ljust(width)}  {_in_words(report)}" for report in reports)


def _in_words(report: LoadReport) -> str:
    if report.layout == "-":
        return f"random values ({report.fresh} tensors), since the model config gives no ckpt_path"
    text = f"loaded from {report.path} ({report.loaded} tensors, layout {report.layout}); "
    if report.config == "equal":
        text += "the config beside them says the same as the model config"
    else:
        text += "no config lies beside them, so that only names and shapes were compared"
    if report.dropped:
        text += f"; tensors stored there that are not needed: {report.dropped}, such as {report.example}"
    return text


def _fresh_report(part: Any, spec: Any, state: Mapping[str, Tensor]) -> LoadReport:
    """The report of a part at random init. Raises WeightError unless its spec declares that."""
    if not spec.fresh:
        raise WeightError(
            f"{part.kind}: found neither ckpt_path nor fresh; expected weights. Set ckpt_path in the block "
            f'"{part.kind}" of model.json, or "fresh": true there to train it from random values.'
        )
    return LoadReport(part.kind, "-", "-", len(state), 0, len(state), 0, "-")


def _rules_of(part: Any, source: PartSource) -> RuleSet:
    if source.dialect not in part.rules:
        raise WeightError(
            f"{source.path}: its {source.part} has names of kind {source.dialect!r}, which model_id {part.name!r} "
            f"cannot read; expected {', '.join(part.rules)}. Give weights of a {part.name} model, or change model_id "
            f'of "{part.kind}" in model.json.'
        )
    return part.rules[source.dialect]


def _check_config(part: Any, spec: Any, source: PartSource, found: Any) -> str:
    """Compare the spec with what the source's config says; returns the word for the report."""
    fields = [*part.checked]
    fields += [name for name, key in part.checked_where.items() if source.dialect == "ours" or key in source.config]
    fields = [name for name in fields if name not in source.assumed]
    problems = [
        f"{field}: the weights have {getattr(found, field)!r}, model.json says {getattr(spec, field)!r}"
        for field in fields
        if getattr(found, field) != getattr(spec, field)
    ]
    if problems:
        raise WeightError(
            "\n  ".join(
                [f"{source.path}: the {part.kind} is another model than model.json describes.", *problems]
                + [f'Correct these keys of "{part.kind}" in model.json, or give the weights that belong to it.']
            )
        )
    return "equal"


def check_tied_copy(rules: RuleSet, geometry: Geometry, source: PartSource) -> None:
    """A tied head that is stored all the same must equal the embedding."""
    names = rules.tied_sources()
    if not geometry.tied or names is None or names[0][0] not in source.names:
        return
    head, embedding = source.get(names[0][0]), source.get(names[1][0])
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise WeightError(
            f"{source.path}: {names[0][0]} differs from {names[1][0]}, yet the head is said to be tied. Set "
            '"tie_word_embeddings": false in its config.json (in text_config, too, where that has the key), or, where '
            'a model.json describes the model, "share_embeddings_and_output_weights": false there.'
        )


def _check_targets(
    kind: str,
    local: Mapping[str, Tensor],
    steps: Mapping[str, Step],
    rules: RuleSet,
    geometry: Geometry,
    *,
    whole: bool,
) -> None:
    """Every tensor of the module has a rule, and a module that holds the whole part has a tensor for every rule."""
    known = set(steps)
    if geometry.tied and rules.tied:
        known.add(rules.tied[0])  # the last pipeline stage has its own copy
    unknown = sorted(set(local) - known)
    missing = sorted(set(steps) - set(local)) if whole else []
    if unknown or missing:
        raise WeightError(
            f"{kind}: the module was not built as its weight rules say; without a rule: {unknown or 'none'}, "
            f"without a tensor: {missing or 'none'}. Build and rules of a part belong together in its file."
        )


def local_tensor(
    step: Step,
    source: PartSource,
    geometry: Geometry,
    tp_rank: int,
    tp_size: int,
    *,
    stored: Geometry | None = None,
) -> Tensor:
    """The slice of our tensor of one step that a tensor-parallel rank holds, read without the bytes of other ranks.

    `stored` is the geometry that the source's own grouping of heads was made with, if it is another: then the tensor is
    read whole. Raises WeightError for sources that do not fit together or do not divide over the ranks.
    """
    full, rule = check_step(step, source, geometry), step.rule
    if tp_size == 1 or rule.axis is None or stored not in (None, geometry):
        tensor = rule.to_ours([source.get(name) for name in step.sources], geometry)
        tensor = tensor if stored in (None, geometry) else rule.regroup(tensor, stored, geometry)
        return shard(tensor, rule, tp_rank, tp_size, geometry)
    check_divisible(full.shape[rule.axis], rule, tp_size, geometry)
    if rule.padded:
        rows = padded_vocab_size(full.shape[0], tp_size) // tp_size
        start, stop = (min(place * rows, full.shape[0]) for place in (tp_rank, tp_rank + 1))
        real = source.get_slice(step.sources[0], 0, start, stop)
        return torch.cat([real, real.new_zeros(rows - real.shape[0], *real.shape[1:])])
    shares = []
    for name in step.sources:
        blocks, start, pieces = rule.source_blocks(source.shape(name)[rule.axis], geometry), 0, []
        for block in blocks:
            share = block // tp_size
            begin = start + tp_rank * share
            pieces.append(source.get_slice(name, rule.axis, begin, begin + share))
            start += block
        shares.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=rule.axis))
    return rule.to_ours(shares, geometry.local(tp_size) if rule.units(geometry) else geometry)


def check_step(step: Step, source: PartSource, geometry: Geometry) -> Tensor:
    """Our full tensor of one step without values, from the shapes and types of its sources alone.

    Raises WeightError for a type that is not of FLOATS, shapes that do not fit together, and another vocabulary.
    """
    for name in step.sources:
        if source.dtype(name) not in FLOATS:
            raise WeightError(
                f"{source.path}: tensor {name} has type {source.dtype(name)}; expected floating point of 16 bits or "
                "more. Quantised weights cannot be read; give the original ones."
            )
    full = step.rule.to_ours([source.meta(name) for name in step.sources], geometry)
    if step.rule.padded and geometry.vocab_size and full.shape[0] != geometry.vocab_size:
        raise WeightError(
            f"{source.path}: {', '.join(step.sources)} has {full.shape[0]} rows; expected language_vocab_size "
            f"{geometry.vocab_size}. Correct language_vocab_size in model.json, or vocab_size in the config.json "
            "beside the weights, whichever the model was described by."
        )
    return full


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf, in one pass over it."""
    return not tensor.numel() or all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def check_finite(tensor: Tensor, what: str, *, allowed: bool, advice: str = "") -> bool:
    """Whether a tensor holds neither NaN nor Inf. Else raises WeightError, or with `allowed` logs a warning."""
    if is_finite(tensor):
        return True
    text = f"{what} has {int((~tensor.isfinite()).sum())} NaN or Inf of {tensor.numel()} values, as {tensor.dtype}"
    if not allowed:
        raise WeightError(
            f"{text}; expected finite weights. {advice or 'The weights are damaged: take another copy.'} "
            "--allow-nonfinite (allow_nonfinite=True) takes them all the same."
        )
    logger.warning("%s", text)
    return False


def _copy(parameter: Tensor, name: str, value: Tensor, step: Step, source: PartSource) -> None:
    _check_shape(step, source, value.shape, parameter.shape, name)
    parameter.copy_(value)


def _check_shape(
    step: Step, source: PartSource, found: Sequence[int], expected: Sequence[int], name: str | None = None
) -> None:
    if tuple(found) != tuple(expected):
        raise WeightError(
            f"{source.path}: {', '.join(step.sources)} gives {name or step.target} the shape {list(found)}; expected "
            f"{list(expected)}. They are of another model: correct the sizes in model.json, or in the config.json "
            "beside the weights, whichever it was described by, or give the weights that belong to it."
        )


def global_name(name: str, layer_offset: int) -> str:
    """The name of a stage's tensor or module with the number that its layer has in the whole part."""
    return _LAYER.sub(lambda found: f"decoder.layers.{int(found.group(1)) + layer_offset}", name)
