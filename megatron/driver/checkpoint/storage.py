"""Files of a save folder: written aside, made durable, put in place by a rename, cleaned up after a crash.

SAVE/latest_checkpointed_iteration.txt   the tracker: an iteration, or `release`
SAVE/iter_0000010/                       a whole checkpoint
SAVE/frozen/<id>/                        frozen parameters, shared by checkpoints
SAVE/.lock                               held by the run that writes here, see locks.py
.<name>.saving                           beside its place: a save that is under way or was killed, or a deletion
.<name>.replaced                         a checkpoint that the one being put in its place replaces
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from mindspeed_mm.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
FROZEN = "frozen"
RUN_FILE = "run.json"
CHECKSUMS = "checksums.json"
SAVING = ".saving"
REPLACED = ".replaced"


def iteration_dir(save: Path, iteration: int) -> Path:
    """Folder of one checkpoint; Megatron's naming."""
    return save / f"iter_{iteration:07d}"


def frozen_dir(save: Path, frozen_id: str) -> Path:
    """Folder of the frozen parameters with this hash."""
    return save / FROZEN / frozen_id


def _aside(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}{suffix}")


def begin(final: Path) -> Path:
    """An empty folder beside `final` to write into."""
    work = _aside(final, SAVING)
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    return work


def discard(final: Path) -> str:
    """Remove what was written beside `final`; a word about the space before."""
    space = free(final.parent)
    shutil.rmtree(_aside(final, SAVING), ignore_errors=True)
    return space


def free(save: Path) -> str:
    """The space left on the file system, for the end of a message."""
    try:
        return f"{shutil.disk_usage(save).free / 1e9:.3g} GB are free there"
    except OSError as error:
        return str(error)


def work_dir(final: Path) -> Path:
    """The folder that `begin` makes, for the other ranks."""
    return _aside(final, SAVING)


def publish(final: Path) -> None:
    """Make what was written beside `final` durable and put it in place; an older `final` goes last."""
    work, replaced = _aside(final, SAVING), _aside(final, REPLACED)
    for path in sorted(work.rglob("*")):
        sync(path)
    sync(work)
    if final.exists():
        os.rename(final, replaced)
    os.rename(work, final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def clean(save: Path) -> None:
    """Remove what killed saves left behind, and put back a checkpoint that was moved away and not replaced."""
    if not save.is_dir():
        return
    for folder in (save, save / FROZEN):
        for left in sorted(folder.glob(f".*{REPLACED}")):
            original = left.with_name(left.name[1 : -len(REPLACED)])
            if original.exists():
                shutil.rmtree(left)
            else:
                os.rename(left, original)
        for left in sorted(folder.glob(f".*{SAVING}")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old text or the new one."""
    aside = _aside(path, SAVING)
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files(folder: Path) -> list[str]:
    """Names of all files in `folder`, sorted, the checksums left out."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != CHECKSUMS)


def sizes(folder: Path) -> dict[str, int]:
    """Every file of `folder` with its size in bytes, run.json and the checksums left out."""
    return {name: (folder / name).stat().st_size for name in files(folder) if name != RUN_FILE}


def iterations(save: Path) -> list[int]:
    """Iterations that a save folder holds, in order."""
    names = (path.name.removeprefix("iter_") for path in save.glob("iter_*") if (path / RUN_FILE).is_file())
    return sorted(int(name) for name in names if name.isdigit())


def offer(folder: Path) -> str:
    """What else could be loaded instead of a damaged checkpoint or frozen folder, for the end of a message."""
    number = folder.name.removeprefix("iter_")
    others = [other for other in iterations(folder.parent) if number.isdigit() and other < int(number)]
    if not others:
        return ""
    return f", or load the iteration before it: --ckpt-step {others[-1]}"


def prune(save: Path, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Delete old checkpoints: all but the last `keep_last` and those whose number `keep_every` divides.

    Returns:
        The iterations that were deleted; none where `keep_last` is None.
    """
    if keep_last is None:
        return []
    old = iterations(save)[:-keep_last]
    deleted = [number for number in old if keep_every is None or number % keep_every]
    for number in deleted:
        final = iteration_dir(save, number)
        os.rename(final, _aside(final, SAVING))  # a deletion that is cut short leaves no half checkpoint
        shutil.rmtree(_aside(final, SAVING))
    return deleted


def check_sizes(folder: Path, recorded: dict[str, int]) -> None:
    """Compare a checkpoint's files with what was recorded when it was written.

    Raises:
        CheckpointError: names each missing file and each file of another size.
    """
    found = sizes(folder)
    problems = [f"{name} is missing" for name in recorded if name not in found]
    problems += [
        f"{name} has {found[name]} bytes, {size} were written"
        for name, size in recorded.items()
        if name in found and found[name] != size
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {'; '.join(problems)}. Restore the files{offer(folder)}"
        )


def check_place(save: Path) -> None:
    """Raise CheckpointError where a save folder cannot be made or written to; nothing is made."""
    there = next(path for path in (save, *save.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        kind = "is no folder" if not there.is_dir() else "may not be written to"
        raise CheckpointError(f"--save {save} cannot be written to: {there} {kind}. Choose another folder")


def probe_writable(save: Path) -> None:
    """Make the save folder and write a byte into it.

    Raises:
        CheckpointError: the folder cannot be made or written to.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save) as file:
            file.write(b"0")
    except OSError as error:
        raise CheckpointError(f"--save {save} cannot be written to: {error}. Choose another folder") from error
