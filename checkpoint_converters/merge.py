"""Put LoRA adapters and partial weights (a projector, LLaVA's non_lora_trainables.bin) into a copy of a base folder."""

import contextlib
import dataclasses
import functools
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_converters.convert import convert, open_parts
from checkpoint_converters.merge_adapters import check_not_merged, record_merged, with_adapters
from checkpoint_converters.merge_block import check_form, is_block, names_of_stage, new_block, written_name
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
from mindspeed_mm.models.adapters.merged import MergedFile
from mindspeed_mm.models.adapters.peft_format import BESIDE
from mindspeed_mm.models.describe import describe_part, part_of_source
from mindspeed_mm.models.families.llava import LLAVA
from mindspeed_mm.models.sources import PEFT_PREFIX, open_source
from mindspeed_mm.weights.files import TensorFile, read_json_object
from mindspeed_mm.weights.folders import STANDARD_FILES, TensorFiles, open_file
from mindspeed_mm.weights.layouts import INTERACTION, PROJECTOR, VISION
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
    to: str | None = None,
    tune_stage: int | None = None,
) -> Merged:
    """Write a copy of a base folder in which the tensors of partial files take the place of the base's.

    Args:
        base: folder in layout hf or clip, or in one of a family; it is only read.
        partial: folders of LoRA adapters in PEFT's format, which are added up (with the non_lora_trainables.bin that
            LLaVA puts inside), and files of tensors under the names of LLaVA, Llama or of the base, with or without
            PEFT's prefix. Each of their tensors must be in the base with the same shape; only a projector may be new,
            to a base of layout hf or llava that has none, and a post-interaction block to one of layout llava. Later
            files win over none: the same tensor twice is an error.
        target: the new folder. Its shards and index are those of the base, new tensors are in the last shard.
        dtype: type of the merged tensors (with `to` of all); None takes that of the tensor they replace.
        to: layout of the new folder, one that `convert` writes; None is that of the base.
        tune_stage: take what replace_bin.py of the post-interaction block's fork takes at this stage (0, 1, 2).

    Raises WeightError when a tensor has no place in the base, has another shape, or comes twice, and for an adapter
    that the base holds already (the file MERGED says so).
    """
    base, target = Path(base), Path(target)
    source = _open_base(base)
    if base.resolve() in (target.resolve(), *target.resolve().parents):
        raise WeightError(f"{target} lies in the base {base}; expected another folder. Choose a new target.")
    if to not in (None, source.layout):
        if tune_stage is not None:
            raise WeightError("--tune-stage makes another folder of the base's layout: leave --to out, then convert.")
        return _convert(source, partial, target, to, overwrite=overwrite, allow_nonfinite=allow_nonfinite, dtype=dtype)
    check_target(target, overwrite=overwrite)
    shards = _shards(base)
    places = {name: file for file, names in shards.items() for name in names}
    changes = _changes(source, places, [Path(path) for path in partial])
    if tune_stage is not None:
        changes = {name: changes[name] for name in names_of_stage(tune_stage, changes, places)}
    new = [change for name, change in changes.items() if name not in places]
    block = _check_new(source, changes, new)
    _check_vision_encoder(source, changes)
    last, wanted = list(shards)[-1], as_dtype(dtype)
    jobs = {
        file: _jobs(open_file(base / file), names, changes, wanted, new if file == last else [])
        for file, names in shards.items()
        if file == last or any(name in changes for name in names)
    }
    stale = _other_formats(base, set(shards))
    with _changed_copy(base, target, jobs, stale, Runner(allow_nonfinite=allow_nonfinite), overwrite) as folder:
        _write_index(base, folder, jobs, places, stale)
        record_merged(base, partial, folder)
        _keep_vision_encoder(source, folder)
        if block is not None:
            config = read_json_object(folder / "config.json")
            write_json(folder / "config.json", config | {INTERACTION: block})
    return Merged(tuple(sorted(set(changes) & set(places))), tuple(sorted(change.name for change in new)))


@contextlib.contextmanager
def _changed_copy(
    base: Path, target: Path, jobs: Mapping[str, list[Job]], stale: set[str], runner: Runner, overwrite: bool
) -> Iterator[Path]:
    """A new folder, which becomes `target` at the end, with the files of the base but for `stale` ones and the shards
    of `jobs`, which are written anew."""
    total = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    check_space(target, total)
    with bytes_bar("merge", total) as advance, new_folder(target, overwrite=overwrite) as folder:
        _copy_others(base, folder, set(jobs) | stale, advance)
        for file, shard in jobs.items():
            write = write_safetensors if file.endswith(".safetensors") else write_torch
            write(folder / file, shard, runner, advance=advance)
        yield folder


def merged_source(
    base: str | Path,
    partial: Sequence[str | Path],
    *,
    last_adapter: bool = True,
    dtype: str | torch.dtype | None = None,
) -> Source:
    """A base with partial weights in the place of its own (see `merge`), as a source whose values are made when they
    are read. `last_adapter` False leaves A and B of the last adapter out; `dtype` is that of changed tensors.

    Raises WeightError as `merge` does, and for tensors that the base does not have.
    """
    source = _open_base(Path(base))
    places = {name: file for file, names in _shards(source.path).items() for name in names}
    changes = _changes(source, places, [Path(path) for path in partial], last_adapter=last_adapter)
    _check_vision_encoder(source, changes)
    new = sorted(set(changes) - set(places))
    if new:
        raise WeightError(
            f"{changes[new[0]].files.path}: {new[0]} is new to {base}, which is not written in another layout at once; "
            "expected tensors that the base has. Merge without --to, then convert."
        )
    reads = {name: functools.partial(_changed, change) for name, change in changes.items()}
    merged = MergedFile(next(iter(source.part_sources.values())).files, reads, dtype=as_dtype(dtype))
    parts = {
        slot: dataclasses.replace(part, _files=merged) if part.path == source.path else part
        for slot, part in source.part_sources.items()
    }
    return dataclasses.replace(source, part_sources=parts)


def _changed(change: _Change, weight: Tensor) -> Tensor:
    tensor = change.files.get(change.stored)
    if tensor.shape != weight.shape:
        raise WeightError(_other_shape(change, tensor.shape, weight.shape))
    return tensor.float()


def _other_shape(change: _Change, found: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"{change.files.path}: tensor {change.stored} has shape {list(found)}; expected {list(expected)} as in the "
        "base. Give partial weights of this model."
    )


def _convert(source: Source, partial: Sequence[str | Path], target: Path, to: str, **options) -> Merged:
    """Write the merged weights in another layout."""
    merged = merged_source(source.path, partial, dtype=options.get("dtype"))
    convert(merged, target, to=to, **options)
    record_merged(source.path, partial, target)
    names = {name for part in merged.part_sources.values() for name in getattr(part.files, "changed", ())}
    return Merged(tuple(sorted(names)), ())


def _open_base(base: Path) -> Source:
    if not base.is_dir():
        raise WeightError(f"{base} is no folder; expected a base model's folder. Correct the path.")
    source = open_source(base)
    if source.layout not in MERGEABLE and source.family is None:
        raise WeightError(f"{base} has layout {source.layout}; expected {', '.join(MERGEABLE)}. Convert it first.")
    return source


def _shards(base: Path) -> dict[str, list[str]]:
    """File -> names of its tensors, in the order of the files, of the one set of weights that the folder has."""
    source = open_source(base)
    part = next(iter(source.part_sources.values()))
    files = part.files
    shards: dict[str, list[str]] = {}
    for name in files.names:
        shards.setdefault(str(files.file_of(name).relative_to(base)), []).append(name)
    return dict(sorted(shards.items()))


def _changes(
    source: Source, places: dict[str, str], partial: list[Path], *, last_adapter: bool = True
) -> dict[str, _Change]:
    """Name in the base -> where its new value is. Raises WeightError for a tensor without a place."""
    folders = [path for path in partial if path.is_dir()]
    check_not_merged(source.path, folders)
    merged, names = with_adapters(source, folders, last=last_adapter)
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
    if not changes and last_adapter:
        raise WeightError("found no partial weights; expected at least one file with tensors or one adapter.")
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
        if found is None and part == INTERACTION and source.layout == LLAVA.name:
            return written_name(next(iter(names)))
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


def _check_new(source: Source, changes: dict[str, _Change], new: list[_Change]) -> dict[str, Any] | None:
    """New tensors must be complete parts that fit the decoder. Returns what config.json says of a new block."""
    projector = [change for change in new if not is_block(change.name)]
    if projector:
        _check_projector(source, projector)
    blocks = [change for name, change in changes.items() if is_block(name)]
    if not blocks or not any(change in new for change in blocks):
        for path in {change.files.path for change in blocks}:
            check_form(source, path)
        return None
    return new_block(source, blocks[0].files.path)


def _check_projector(source: Source, new: list[_Change]) -> None:
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


def _jobs(
    file, names: list[str], changes: dict[str, _Change], wanted: torch.dtype | None, new: list[_Change]
) -> list[Job]:
    """Jobs of one shard: the base's tensors, changed where they are, and new ones."""
    jobs = []
    for name in names:
        change = changes.get(name)
        dtype = file.dtype(name) if change is None else wanted or file.dtype(name)
        if change and change.files.shape(change.stored) != file.shape(name):
            raise WeightError(_other_shape(change, change.files.shape(change.stored), file.shape(name)))
        span = file.span(name) if change is None else None
        kept = ((span,),) if span else None
        jobs.append(Job((Output(name, file.shape(name), dtype),), _reading(file, name, change, dtype), kept))
    for change in new:
        shape, dtype = change.files.shape(change.stored), wanted or change.files.dtype(change.stored)
        jobs.append(Job((Output(change.name, shape, dtype),), _reading(file, change.name, change, dtype)))
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
