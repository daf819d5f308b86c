"""Write weights: beside the target first, then renamed, so that what has its final name is complete."""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.files import RECORD_NAME

SHARD_BYTES = 5 * 10**9
"""Largest shard of an export, as Hugging Face writes them."""


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


def write_pt(path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any] | None = None) -> None:
    """Write a flat dict of tensors with torch.save.

    `record` (what the tensors are: a block of a model.json) goes along as a member of the zip file that torch.load does
    not look at, so the file stays readable wherever such files are read.
    """
    with beside(path) as temporary:
        try:
            torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        except RuntimeError as error:  # what torch's zip writer raises where the disk is full or not writable
            raise OSError(str(error).splitlines()[0]) from error
        if record is not None:
            with zipfile.ZipFile(temporary, "a", zipfile.ZIP_STORED) as archive:
                root = archive.namelist()[0].split("/", 1)[0]
                archive.writestr(f"{root}/{RECORD_NAME}", json.dumps(record))


def write_safetensors(folder: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` with an index, into an existing folder."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an indented JSON object."""
    with beside(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
