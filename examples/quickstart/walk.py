"""The walk through the steps of an example, and how its program ends."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.quickstart.commands import StepError, say
from examples.quickstart.state import FolderError, RunFolder


def walk(folder: RunFolder, steps: Sequence[tuple[str, str, Callable[[Any], dict]]], run: Any) -> float:
    """All steps (name, title, what is done with `run`) that are not done yet; returns the seconds that all steps took,
    earlier runs included."""
    for number, (name, title, step) in enumerate(steps, start=1):
        done = folder.result(name)
        say(f"\n[{number}/{len(steps)}] {title}" + (": done before" if done is not None else ""))
        if done is None:
            start = time.monotonic()
            result = step(run)
            folder.finish(name, {**result, "seconds": round(time.monotonic() - start, 1)})
    return sum(folder.result(name)["seconds"] for name, _, _ in steps)


def ended(program: str, out: Path, work: Callable[[], dict]) -> int:
    """Does the work and says how it ended: 0 with its values as the last line, 1 with a message, 130 if interrupted."""

    def told() -> None:
        result = work()
        say(f"\nEverything is in {out}")
        say(json.dumps(result))

    return guarded(program, told, "interrupted; the same command goes on where it was")


def guarded(program: str, work: Callable[[], Any], interrupted: str = "interrupted") -> int:
    """Does the work; 0, 1 with the message of its error, or 130 with `interrupted`."""
    try:
        work()
    except (StepError, FolderError) as error:
        sys.stdout.flush()
        sys.stderr.write(f"\n{program}: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: {interrupted}\n")
        return 130
    return 0
