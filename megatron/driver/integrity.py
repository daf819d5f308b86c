"""Checksums of a checkpoint's files: written with it, compared when it is loaded.

FOLDER/checksums.json: {file: sha256}, for every file of the folder but itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from megatron.driver import storage
from megatron.driver.collectives import gather
from mindspeed_mm.errors import CheckpointError

BLOCK = 2**22
"""Bytes that are hashed at a time."""


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value.update(block)
    return value.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Checksums of all files in `folder`. Collective: every rank hashes the files that it wrote, rank 0 the others."""
    rank = torch.distributed.get_rank()
    own = {}
    for name in storage.files(folder):
        if _writer(name) == rank:
            own[name] = digest(folder / name)
    return {name: value for part in gather(own) for name, value in part.items()}


def _writer(name: str) -> int:
    """The rank that wrote a file: torch calls tensors' files __<rank>_<number>.distcp, everything else is rank 0's."""
    if not (name.startswith("__") and name.endswith(".distcp")):
        return 0
    return int(name[2:].split("_", 1)[0])


def write(folder: Path, values: dict[str, str]) -> None:
    """Write the checksums file: `values`, and what else there is in the folder by now."""
    rest = {name: digest(folder / name) for name in storage.files(folder) if name not in values}
    text = json.dumps(values | rest, indent=1, sort_keys=True)
    (folder / storage.CHECKSUMS).write_text(text, encoding="utf-8")


def verify(folder: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Compare every `ranks`-th file with its checksum, from number `rank` on; one line for each that differs."""
    path = folder / storage.CHECKSUMS
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path.name} cannot be read: {error}"]
    names = storage.files(folder)
    if not isinstance(expected, dict) or sorted(expected) != names:
        return [f"{path.name} does not name the files that are there"]
    return [f"{name} has changed" for name in names[rank::ranks] if digest(folder / name) != expected[name]]


def check(folders: list[Path], *, together: bool) -> None:
    """Refuse folders with changed files.

    Args:
        folders: of a checkpoint and of its frozen parameters.
        together: share the work between all ranks (collective); else this process does it alone.

    Raises:
        CheckpointError: names the files, and earlier iterations that lie beside.
    """
    rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)
    for folder in folders:
        problems = verify(folder, rank, ranks)
        if together:
            problems = list(dict.fromkeys(problem for part in gather(problems) for problem in part))
        if problems:
            raise CheckpointError(
                f"checkpoint {folder} is damaged, its checksums do not agree: {'; '.join(problems)}. Restore the files"
                f"{storage.offer(folder)}"
            )
