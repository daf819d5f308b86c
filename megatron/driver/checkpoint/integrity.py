"""Checksums of a checkpoint's files: written with it, compared when it is loaded.

FOLDER/checksums.json: {file: sha256}, for every file of the folder but itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from megatron.driver.checkpoint import storage
from megatron.driver.collectives import everywhere
from mindspeed_mm.errors import CheckpointError

BLOCK = 2**22
"""Bytes that are hashed at a time."""

LISTED = 8
"""Problems that a message shows at most."""


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value.update(block)
    return value.hexdigest()


def digests(folder: Path, group: ProcessGroup | None = None) -> dict[str, str]:
    """Checksums of all files in `folder`. Collective: every rank hashes the files that it wrote, rank 0 the others."""
    rank = torch.distributed.get_rank()

    def own() -> dict[str, str]:
        return {name: digest(folder / name) for name in storage.files(folder) if _writer(name) == rank}

    return {name: value for part in everywhere(own, group) for name, value in part.items()}


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
    expected = _expected(folder)
    own = sorted(expected)[rank::ranks]
    return [f"{name} has changed" for name in own if digest(folder / name) != expected[name]]


def _expected(folder: Path) -> dict[str, str]:
    """What checksums.json says, of the files that are there.

    Raises:
        CheckpointError: it cannot be read, or names other files.
    """
    try:
        expected = json.loads((folder / storage.CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(_damaged(folder, [f"{storage.CHECKSUMS} cannot be read: {error}"])) from error
    names = storage.files(folder)
    if not isinstance(expected, dict) or sorted(expected) != names:
        raise CheckpointError(_damaged(folder, _other_names(expected, names)))
    return expected


def _other_names(expected: object, names: list[str]) -> list[str]:
    """What is wrong with the names in checksums.json."""
    if not isinstance(expected, dict):
        return [f"{storage.CHECKSUMS} holds no names"]
    return [f"{name} is missing" for name in sorted(set(expected) - set(names))] + [
        f"{name} is not in {storage.CHECKSUMS}" for name in sorted(set(names) - set(expected))
    ]


def _damaged(folder: Path, problems: list[str]) -> str:
    more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return (
        f"checkpoint {folder} is damaged: {'; '.join(problems[:LISTED])}{more}. "
        f"Restore the files{storage.offer(folder)}"
    )


def check_file(folder: Path, name: str) -> None:
    """Refuse one file that has changed; for those that are read before all others can be compared.

    Raises:
        CheckpointError: names it, and the iteration before.
    """
    if digest(folder / name) != _expected(folder).get(name):
        raise CheckpointError(_damaged(folder, [f"{name} has changed"]))


def check(folders: list[Path], *, together: bool) -> None:
    """Refuse folders with changed files.

    Args:
        folders: of a checkpoint and of its frozen parameters.
        together: share the work between all ranks (collective); else this process does it alone.

    Raises:
        CheckpointError: names the files, and the iteration before.
    """
    for folder in folders:
        if together:
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
            found = everywhere(functools.partial(verify, folder, rank, ranks))
            problems = list(dict.fromkeys(problem for part in found for problem in part))
        else:
            problems = verify(folder)
        if problems:
            raise CheckpointError(_damaged(folder, problems))
