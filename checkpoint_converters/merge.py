"""Put LoRA adapters and partial weights (a projector, LLaVA's non_lora_trainables.bin) into a copy of a base folder."""

import contextlib
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_converters.convert import open_parts
from checkpoint_converters.merge_adapters import with_adapters
from checkpoint_converters.plan import Job, Output, as_dtype, total_bytes
from checkpoint_converters.progress import bytes_bar
from checkpoint_converters.stream import Runner
from checkpoint_converters.write import (
    check_space,
    check_target,
    new_folder,
    write_json,
    write_safetensors,
    write_torch,
)
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.peft_format import BESIDE
from mindspeed_mm.models.describe import describe_part, part_of_source
from mindspeed_mm.models.families.llava import LLAVA
from mindspeed_mm.models.sources import PEFT_PREFIX, open_source
from mindspeed_mm.weights.files import TensorFile, read_json_object
from mindspeed_mm.weights.folders import STANDARD_FILES, TensorFiles, open_file
from mindspeed_mm.weights.layouts import PROJECTOR, VISION
from mindspeed_mm.weights.sources import Source

logger = logging.getLogger(__name__)

MERGEABLE = ("hf", "llava", "llava-hf", "clip")
"""Layouts of a base folder, beside those of the other families."""

_PROJECTOR_NAME = re.compile(r"(?:mm_projector\.)?([0-9]+\.(?:weight|bias))")
"""A projector's name without LLaVA's prefix."""


@dataclass(frozen=True)
class Merged:
    """Names that took another value, and names that the base did not have."""

    replaced: tuple[str, ...]
    added: tuple[str, ...]


@dataclass(frozen=True)
class _Change:
    """A tensor of the result that comes from a partial file."""

    name: str
    files: TensorFile
    stored: str


def merge(
    base: str | Path,
    partial: Sequence[str | Path],
    target: str | Path,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dtype: str | torch.dtype | None = None,
) -> Merged:
    """Write a copy of a base folder in which the tensors of partial files take the place of the base's.

    Args:
        base: folder in layout hf or clip, or in one of a family; it is only read.
        partial: folders of LoRA adapters in PEFT's format, which are added up (with the non_lora_trainables.bin that
            LLaVA puts inside), and files of tensors under the names of LLaVA, Llama or of the base, with or without
            PEFT's prefix. Each of their tensors must be in the base with the same shape; only a projector may be new,
            to a base of layout hf or llava that has none. Later files win over none: the same tensor twice is an error.
        target: the new folder. Its shards and index are those of the base, new tensors are in the last shard.
        dtype: type of the merged tensors; None takes that of the tensor they replace.

    Raises WeightError when a tensor has no place in the base, has another shape, or comes twice.
    """
    base, target = Path(base), Path(target)
    if not base.is_dir():
        raise WeightError(f"{base} is no folder; expected a base model's folder. Correct the path.")
    source = open_source(base)
    if source.layout not in MERGEABLE and source.family is None:
        raise WeightError(f"{base} has layout {source.layout}; expected {', '.join(MERGEABLE)}. Convert it first.")
    if base.resolve() in (target.resolve(), *target.resolve().parents):
        raise WeightError(f"{target} lies in the base {base}; expected another folder. Choose a new target.")
    check_target(target, overwrite=overwrite)
    shards = _shards(base)
    places = {name: file for file, names in shards.items() for name in names}
    changes = _changes(source, places, [Path(path) for path in partial])
    _check_vision_encoder(source, changes)
    last = list(shards)[-1]
    wanted = as_dtype(dtype)
    jobs = {
        file: _jobs(open_file(base / file), names, changes, wanted, added=file == last)
        for file, names in shards.items()
        if file == last or any(name in changes for name in names)
    }
    total = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    check_space(target, total)
    runner = Runner(allow_nonfinite=allow_nonfinite)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(bytes_bar("merge", total))
        folder = stack.enter_context(new_folder(target, overwrite=overwrite))
        stale = _other_formats(base, set(shards))
        _copy_others(base, folder, set(jobs) | stale, advance)
        for file, shard in jobs.items():
            write = write_safetensors if file.endswith(".safetensors") else write_torch
            write(folder / file, shard, runner, advance=advance)
        _write_index(base, folder, jobs, places, stale)
        _keep_vision_encoder(source, folder)
    added = tuple(sorted(name for name in changes if name not in places))
    return Merged(tuple(sorted(name for name in changes if name in places)), added)


def _shards(base: Path) -> dict[str, list[str]]:
    """File -> names of its tensors, in the order of the files, of the one set of weights that the folder has."""
    source = open_source(base)
    part = next(iter(source.part_sources.values()))
    files = part.files
    shards: dict[str, list[str]] = {}
    for name in files.names:
        shards.setdefault(str(files.file_of(name).relative_to(base)), []).append(name)
    return dict(sorted(shards.items()))


def _changes(source: Source, places: dict[str, str], partial: list[Path]) -> dict[str, _Change]:
    """Name in the base -> where its new value is. Raises WeightError for a tensor without a place."""
    folders = [path for path in partial if path.is_dir()]
    merged, names = with_adapters(source, folders)
    changes = {name: _Change(name, merged, name) for name in names}
    files = [path for path in partial if not path.is_dir()]
    for path in [*files, *(folder / BESIDE for folder in folders if (folder / BESIDE).is_file())]:
        files = TensorFiles(path, [open_file(path)])
        for stored in files.names:
            name = _place(source, places, stored.removeprefix(PEFT_PREFIX), path)
            if name in changes:
                raise WeightError(
                    f"{path}: tensor {name} also comes from {changes[name].files.path}; expected it once. "
                    "Leave one of the files out."
                )
            changes[name] = _Change(name, files, stored)
    if not changes:
        raise WeightError("found no partial weights; expected at least one file with tensors or one adapter.")
    _check_projector(source, places, changes)
    return changes


def _place(source: Source, places: dict[str, str], name: str, path: Path) -> str:
    """The base's name of a partial tensor."""
    if ".lora_" in name:
        raise WeightError(f"{path}: found LoRA adapters ({name}); expected full tensors. Merge the adapters first.")
    if name in places:
        return name
    alone = _PROJECTOR_NAME.fullmatch(name)
    canonical = LLAVA.written[PROJECTOR] + alone[1] if alone else name
    split, _, _ = LLAVA.split([canonical])
    for part, names in split.items():
        found = source.part_sources.get(part)
        if found is None and part == PROJECTOR and source.layout in ("hf", "llava"):
            return canonical
        for short in names:
            renamed = _renamed(part, short, found.dialect if found else None)
            if found is not None and renamed in found.names:
                return found.stored_name(renamed)
    raise WeightError(
        f"{path}: tensor {name} has no place in {source.path} ({source.layout}); expected a tensor that the base has, "
        "or a projector. Give partial weights of this model."
    )


def _renamed(part: str, short: str, dialect: str | None) -> str:
    """LLaVA's projector names in HF's dialect; other parts have one dialect in all base layouts."""
    if part == PROJECTOR and dialect == "hf":
        for number, name in (("0.", "linear_1."), ("2.", "linear_2.")):
            if short.startswith(number):
                return name + short.removeprefix(number)
    return short


def _check_projector(source: Source, places: dict[str, str], changes: dict[str, _Change]) -> None:
    """A new projector must be complete and fit the decoder."""
    new = [change for name, change in changes.items() if name not in places]
    if not new:
        return
    projector = open_parts({PROJECTOR: new[0].files.path}).part(PROJECTOR)
    spec = describe_part(projector)
    part_of_source(projector).rules[projector.dialect].match(
        projector.names, spec.geometry, where=f"{projector.path} (vision_projector)"
    )
    hidden = describe_part(source.part("text_decoder")).hidden_size
    if spec.hidden_size != hidden:
        raise WeightError(
            f"{projector.path}: the projector ends with width {spec.hidden_size}; expected {hidden}, that of "
            f"{source.path}. Give the projector of this decoder."
        )


def _jobs(file, names: list[str], changes: dict[str, _Change], wanted: torch.dtype | None, *, added: bool) -> list[Job]:
    """Jobs of one shard: the base's tensors, changed where they are, and the new ones where they belong here."""
    jobs = []
    for name in names:
        change = changes.get(name)
        dtype = file.dtype(name) if change is None else wanted or file.dtype(name)
        if change and change.files.shape(change.stored) != file.shape(name):
            raise WeightError(
                f"{change.files.path}: tensor {change.stored} has shape {list(change.files.shape(change.stored))}; "
                f"expected {list(file.shape(name))} as in the base. Give partial weights of this model."
            )
        span = file.span(name) if change is None else None
        kept = ((span,),) if span else None
        jobs.append(Job((Output(name, file.shape(name), dtype),), _reading(file, name, change, dtype), kept))
    known = set(names)
    for name, change in changes.items() if added else ():
        if name not in known and change.name.startswith("model.mm_projector."):
            shape, dtype = change.files.shape(change.stored), wanted or change.files.dtype(change.stored)
            jobs.append(Job((Output(name, shape, dtype),), _reading(file, name, change, dtype)))
    return jobs


def _reading(file, name: str, change: _Change | None, dtype: torch.dtype):
    def make() -> list[Tensor]:
        return [change.files.get(change.stored).to(dtype) if change else file.get(name)]

    return make


def _check_vision_encoder(source: Source, changes: dict[str, _Change]) -> None:
    """A liuhaotian folder that carries its vision encoder twice must not get two different ones."""
    vision_encoder = source.path / str((source.config or {}).get("mm_vision_tower"))
    prefix = LLAVA.written[VISION].partition("{own}")[0]
    changed = [change for name, change in changes.items() if name.startswith(prefix)]
    if source.layout == "llava" and changed and vision_encoder.exists():
        raise WeightError(
            f"{changed[0].files.path}: tensor {changed[0].stored} changes the vision encoder, "
            f"which {vision_encoder} holds once more; "
            "expected a base with one vision encoder. Convert the base to llava-hf and merge into that."
        )


def _keep_vision_encoder(source: Source, folder: Path) -> None:
    """A vision encoder beside the base, which its config names by a relative path, is named by its whole path in the
    copy."""
    name = (source.config or {}).get("mm_vision_tower")
    if source.layout != "llava" or not isinstance(name, str) or not name or Path(name).is_absolute():
        return
    vision_encoder = (source.path / name).resolve()
    if vision_encoder.exists() and not vision_encoder.is_relative_to(source.path.resolve()):
        write_json(folder / "config.json", source.config | {"mm_vision_tower": str(vision_encoder)})


def _other_formats(base: Path, used: set[str]) -> set[str]:
    """The base's weights in further formats beside the one that was read: they would be those before the merge."""
    found: set[str] = set()
    for name in STANDARD_FILES:
        if not (base / name).is_file():
            continue
        table = read_json_object(base / name).get("weight_map") if name.endswith(".json") else None
        files = {value for value in table.values() if isinstance(value, str)} if isinstance(table, dict) else {name}
        if not files & used:
            found |= files | {name}
    if found:
        logger.warning("left out, since they hold the weights before the merge: %s", ", ".join(sorted(found)))
    return found


def _copy_others(base: Path, folder: Path, left_out: set[str], advance) -> None:
    """Everything of the base but some files, and the index, which is written anew."""
    for path in sorted(base.rglob("*")):
        name = str(path.relative_to(base))
        index = name.endswith(".index.json") and path.parent == base
        if path.is_file() and name not in left_out and not index:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
            advance(path.stat().st_size)


def _write_index(base: Path, folder: Path, jobs: dict[str, list[Job]], places: dict[str, str], stale: set[str]) -> None:
    """The index of the base with new tensors and the new total."""
    indexes = sorted(path for path in base.glob("*.index.json") if path.name not in stale)
    if not indexes:
        return
    weight_map = dict(places)
    size = sum(total_bytes(shard) for shard in jobs.values())
    for file, shard in jobs.items():
        weight_map |= {output.name: file for job in shard for output in job.outputs}
    for file in sorted(set(places.values()) - set(jobs)):
        tensors = open_file(base / file)
        size += sum(Output(name, tensors.shape(name), tensors.dtype(name)).nbytes for name in tensors.names)
    write_json(folder / indexes[0].name, {"metadata": {"total_size": size}, "weight_map": weight_map})
