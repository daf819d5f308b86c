"""The output folder: which run it belongs to and which of its steps are done, so that two runs never mix."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATE_FILE = "state.json"


class FolderError(Exception):
    """The output folder cannot be used; the message says why and what to do."""


class RunFolder:
    """OUT with its state.json: {"fingerprint": ..., "steps": {name: result}}."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self._state = {"fingerprint": fingerprint, "steps": {}}

    def open(self, clean: bool) -> None:
        """Take up the run that the folder holds, or begin one.

        Raises:
            FolderError: the folder holds something else, or a run with other settings (unless `clean` is given).
        """
        file = self.path / STATE_FILE
        if not file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise FolderError(
                    f"{self.path} is not empty and holds no {STATE_FILE} of a quickstart run: nothing was touched; "
                    "choose another folder with --out"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._write()
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            fingerprint, steps = found["fingerprint"], dict(found["steps"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise FolderError(f"{file} cannot be read ({error}): remove {self.path} or choose another --out") from error
        if clean:
            self._remove_content()
            self._write()
        elif fingerprint != self._state["fingerprint"]:
            raise FolderError(
                f"{self.path} holds a run with other settings or other code (fingerprint {fingerprint}, expected "
                f"{self._state['fingerprint']}): start over with --clean, or choose another folder with --out"
            )
        else:
            self._state["steps"] = steps

    def result(self, step: str) -> dict | None:
        """What a finished step returned; None when it has not finished."""
        return self._state["steps"].get(step)

    def finish(self, step: str, result: dict) -> None:
        """Note a finished step; the file is replaced as a whole."""
        self._state["steps"][step] = result
        self._write()

    def fresh(self, name: str) -> Path:
        """An empty subfolder `name`: what an unfinished step left in it is removed."""
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _remove_content(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _write(self) -> None:
        aside = self.path / (STATE_FILE + ".new")
        aside.write_text(json.dumps(self._state, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.path / STATE_FILE)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keeps a second quickstart out of the same folder; made when it is missing.

    Raises:
        FolderError: another run holds it, or it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise FolderError(f"{path} cannot be used ({error}): choose another folder with --out") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderError(f"another quickstart is running in {path}: wait for it or choose another --out") from None
    else:
        yield
    finally:
        os.close(descriptor)
