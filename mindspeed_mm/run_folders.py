"""Names of what lies in the folder of a training run."""

import re
from collections.abc import Callable
from pathlib import Path

AVERAGED = "ema"
"""Behind the path of a training checkpoint: its moving averages in place of the weights that it trained."""

_ITERATION = re.compile(r"iter_\d{7}|release")


def name_with_run(path: Path, otherwise: Callable[[Path], str]) -> str:
    """Name of the weights at an absolute path: RUN_iter_0000100 for RUN/iter_0000100, `otherwise(path)` for what is no
    checkpoint inside of a run's folder. That of moving averages ends in "_ema"."""
    if path.name == AVERAGED and not path.exists():
        return f"{name_with_run(path.parent, otherwise)}_{AVERAGED}"
    return f"{path.parent.name}_{path.name}" if _ITERATION.fullmatch(path.name) else otherwise(path)
