"""Write weights: beside the target first, then renamed, so that what has its final name is complete."""

import contextlib
import glob
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from checkpoint_converters.plan import Job, total_bytes
from checkpoint_converters.stream import Runner
from checkpoint_converters.torch_zip import write_all, write_torch_zip
from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.files import SAFETENSORS_DTYPES

logger = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
"""Largest shard of an export, as Hugging Face writes them."""

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

OWN_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja")
VISION_ENCODER_FOLDER = "vision_tower"
OWN_FOLDERS = (VISION_ENCODER_FOLDER, "release", "tokenizer")
"""What a converted folder holds: --overwrite removes nothing else."""

Advance = Callable[[int], None]


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends well, and is removed otherwise.

    Raises WeightError when the folder cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WeightError(
            f"cannot write {target}: {error.strerror or error}; expected a writable folder with enough space. "
            "Choose another target."
        ) from error


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well: whole or not at all.

    With `overwrite` an earlier conversion there is removed after its successor is complete.
    Raises WeightError when the target is a symbolic link, exists, or holds what no conversion writes.
    """
    recover(target)
    check_target(target, overwrite=overwrite)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    with beside(target) as temporary:
        temporary.mkdir()
        yield temporary
        if target.is_dir() and any(target.iterdir()):
            os.rename(target, old)
    if old.is_dir():
        shutil.rmtree(old)


def recover(target: Path) -> None:
    """Tidy up after conversions to `target` that were killed: half-written results go, and an earlier target that was
    moved aside to be replaced comes back where its successor did not arrive."""
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.*")):
        number, _, kind = left.name.removeprefix(f".{target.name}.").partition(".")
        if not number.isdigit() or kind not in ("part", "old") or psutil.pid_exists(int(number)):
            continue
        if kind == "old" and not target.exists():
            os.rename(left, target)
            logger.warning("%s is back: a conversion that was to replace it was interrupted", target)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise WeightError unless `target` may be written; call it before long work."""
    if target.is_symlink():
        raise WeightError(
            f"{target} is a symbolic link; expected a new path. Remove the link or choose another target."
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise WeightError(
            f"{target} exists; expected a new folder or file. Give --overwrite (overwrite=True), or another target."
        )
    entries = [target] if target.is_file() else list(target.iterdir())
    foreign = [entry.name for entry in entries if entry.name not in OWN_FOLDERS and entry.suffix not in OWN_SUFFIXES]
    if foreign:
        raise WeightError(
            f"{target} holds {', '.join(sorted(foreign)[:4])}, which no conversion writes; it is not removed. "
            "Choose another target."
        )


def check_space(folder: Path, needed: int) -> None:
    """Raise WeightError where the disk of `folder`, which need not exist yet, has less than `needed` bytes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise WeightError(
            f"{folder}: the disk has {free / 1e6:.1f} MB left; expected {needed / 1e6:.1f} MB. "
            "Free some space or choose another target."
        )


def write_folder(
    folder: Path,
    jobs: Sequence[Job],
    runner: Runner,
    *,
    kind: str = "safetensors",
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda _: None,
) -> None:
    """Write jobs as one file or as shards of at most `shard_bytes` with an index, named as Hugging Face does.

    kind: "safetensors" (model*.safetensors) or "bin" (pytorch_model*.bin, with an index also where there is one shard,
    as the liuhaotian folders have it). A job is never spread over two shards.
    """
    stem, suffix, write = {
        "safetensors": ("model", ".safetensors", write_safetensors),
        "bin": ("pytorch_model", ".bin", write_torch),
    }[kind]
    shards = cut(jobs, shard_bytes)
    indexed = len(shards) > 1 or kind == "bin"
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" if indexed else f"{stem}{suffix}"
        write(folder / name, shard, runner, advance=advance)
        weight_map |= {output.name: name for job in shard for output in job.outputs}
    if indexed:
        index = {"metadata": {"total_size": total_bytes(jobs)}, "weight_map": weight_map}
        write_json(folder / f"{stem}{suffix}.index.json", index)


def cut(jobs: Sequence[Job], shard_bytes: int) -> list[list[Job]]:
    """Jobs in order, cut into shards of at most `shard_bytes` (more where one job is larger)."""
    shards: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if shards[-1] and size + job.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.nbytes
    return shards


def write_safetensors(path: Path, jobs: Sequence[Job], runner: Runner, *, advance: Advance = lambda _: None) -> None:
    """Write one safetensors file, tensor by tensor (format: README of the safetensors library)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in (output for job in jobs for output in job.outputs):
        offsets = [offset, offset + output.nbytes]
        header[output.name] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": offsets,
        }
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for block in runner.blocks(jobs):
            write_all(file, block)
            advance(len(block))


def write_torch(
    path: Path,
    jobs: Sequence[Job],
    runner: Runner,
    *,
    record: dict[str, Any] | None = None,
    advance: Advance = lambda _: None,
) -> None:
    """Write one torch file, tensor by tensor. `record` says what the tensors are (see weights/files.py)."""
    outputs = [(output.name, output.shape, output.dtype) for job in jobs for output in job.outputs]
    write_torch_zip(path, outputs, runner.blocks(jobs), record=record, advance=advance)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an indented JSON object."""
    with beside(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
