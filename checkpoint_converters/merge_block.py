"""The post-interaction block in a merge: new to a base, or one of the stages of the fork's replace_bin.py."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.families.llava import LLAVA
from mindspeed_mm.models.interaction.post_block import BLOCK_ONLY, PART
from mindspeed_mm.models.part import part_block
from mindspeed_mm.models.sources import PEFT_PREFIX
from mindspeed_mm.weights.files import read_json_object
from mindspeed_mm.weights.folders import TensorFiles, open_file
from mindspeed_mm.weights.layouts import INTERACTION, TEXT
from mindspeed_mm.weights.sources import PartSource, Source

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"


class Stage(NamedTuple):
    """What replace_bin.py does at a --tune_stage; each one replaces the block's tensors."""

    adds: bool
    """Take tensors that the base does not have; without, the base has a block already."""
    head: bool
    """Replace the head."""


STAGES = {0: Stage(adds=True, head=True), 1: Stage(adds=True, head=False), 2: Stage(adds=False, head=True)}


def is_block(name: str) -> bool:
    """Whether a name of the original layout, or of a partial file, is one of the block's."""
    return any(prefix.old and name.startswith(prefix.old) for prefix in BLOCK_ONLY.prefixes)


def written_name(short: str) -> str:
    """The name under which a tensor of the block is added to a base."""
    return LLAVA.written[INTERACTION] + short


def names_of_stage(number: int, names: Iterable[str], base: Iterable[str]) -> list[str]:
    """Those of the partial tensors that a stage takes, by their names in the base; the others are told.

    Raises WeightError where what the stage replaces is not on both sides.
    """
    stage, names, base = STAGES[number], list(names), set(base)
    block = [name for name in names if is_block(name)]
    if not block:
        raise WeightError(
            f"--tune-stage {number} replaces the post-interaction block, and the partial weights hold none; expected "
            "post_interaction_block.* or post_decoder.*. Give the run's non_lora_trainables.bin, or leave the flag out"
        )
    new = [name for name in names if name not in base]
    if not stage.adds and new:
        raise WeightError(
            f"--tune-stage {number} adds nothing, and the base has no {new[0]}; expected a base with a "
            "post-interaction block. Merge stage 1 first and give its result as BASE"
        )
    if stage.head and (HEAD not in names or HEAD not in base):
        where = "the partial weights" if HEAD not in names else "the base"
        raise WeightError(
            f"--tune-stage {number} replaces the head, and {where} have no {HEAD}; expected it on both sides. Give the "
            "weights of a run that trained the head, or --tune-stage 1"
        )
    wanted = {*block, *new, *([HEAD] if stage.head else [])}
    left = [name for name in names if name not in wanted]
    if left:
        logger.warning("--tune-stage %d leaves %s as in the base", number, ", ".join(left))
    return [name for name in names if name in wanted]


def new_block(source: Source, path: Path) -> dict[str, Any]:
    """The key `interaction` of config.json for the block of a partial file that is new to an original LLaVA's folder.

    It is what the config.json beside the file says; else the block is the original's, with the form that its tensors
    show and the doubled residual.

    Raises WeightError for a block that is not complete or does not fit the base.
    """
    files = TensorFiles(path, [open_file(path)])
    names = LLAVA.split([name.removeprefix(PEFT_PREFIX) for name in files.names])[0][INTERACTION]
    stored = {name.removeprefix(PEFT_PREFIX): name for name in files.names}
    stated = stated_form(path)
    if stated is None:
        logger.warning(
            "%s: no config.json beside it has the key interaction; the block is taken for the original's, which adds "
            "its input twice (doubled_residual)",
            path,
        )
    config = (source.config or {}) | ({} if stated is None else {"interaction": stated})
    own = {short: stored[name] for short, name in names.items()}
    part = PartSource(INTERACTION, "llava", path, config, files, own)
    part = replace(part, config=PART.with_form(part))
    spec = describe_part(part)
    match = PART.rules["llava"].match(part.names, spec.geometry, where=f"{path} ({INTERACTION})")
    _check_widths(path, part, match, spec, source)
    return part_block(INTERACTION, spec)


def _check_widths(path: Path, part: PartSource, match: Any, spec: Any, source: Source) -> None:
    hidden = describe_part(source.part(TEXT)).hidden_size
    if spec.hidden_size != hidden:
        raise WeightError(
            f"{path}: the block has width {spec.hidden_size}; expected {hidden}, that of {source.path}. Give the block "
            "of this decoder"
        )
    shapes = PART.shapes(spec)
    for step in match.steps:
        found, expected = part.shape(step.sources[0]), shapes.get(step.target) or shapes[step.rule.target]
        if found != expected:
            raise WeightError(
                f"{path}: tensor {part.stored_name(step.sources[0])} has shape {list(found)}; expected "
                f"{list(expected)} in a block of {source.path}. Give the block of this model"
            )


def stated_form(path: Path) -> Mapping[str, Any] | None:
    """What the config.json beside a partial file says of the block in it; None where it says nothing."""
    beside = path.parent / "config.json"
    return read_json_object(beside).get("interaction") if beside.is_file() else None


def check_form(source: Source, path: Path) -> None:
    """Raise WeightError where a file's block is said to compute something else than the one of the base."""
    stated = stated_form(path)
    if stated is None:
        return
    own, other = describe_part(source.part(INTERACTION)), PART.read_config({"interaction": stated}, "llava")
    for field in ("doubled_residual", "features", "layernorm_epsilon", *PART.checked):
        if getattr(own, field) != getattr(other, field):
            raise WeightError(
                f"{path}: its block has {field} {getattr(other, field)!r}, the one of {source.path} "
                f"{getattr(own, field)!r}; expected one form. Merge into a base without a block"
            )
