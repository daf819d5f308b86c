"""A guide's Python configuration, and Hugging Face's training flags, as files of ours with a report."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.config.guide_config import migrate
from mindspeed_mm.config.hf_training import Migrated, parse_flags, refuse_unknown
from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.python_literals import read_python
from mindspeed_mm.errors import ConfigError

HEADINGS = {"mapped": "mapped", "by_hand": "left to do", "needless": "needs nothing", "unread": "not read here"}


def migrate_files(
    config: str | None,
    output: str | None,
    hf_flags: str | None,
    processes: int,
    names: Collection[str],
    count: Callable[[dict[str, Any]], int | None],
) -> dict[str, Any]:
    """Write data.json, train_flags.txt and migration.json into `output`, and return the report.

    `names` are the flags that Hugging Face's trainer has. `count` says how many samples an epoch of a data.json has,
    None where its files are not here.

    Raises ConfigError for what cannot be read, and for files that are there.
    """
    if config is None and hf_flags is None:
        raise ConfigError("config migrate: nothing is given; expected a Python file, or --hf-flags")
    if output is None:
        raise ConfigError("config migrate: give --output DIR, the folder for data.json, train_flags.txt and the report")
    values = {} if config is None else read_config(config, read=read_python)
    flags = parse_flags(hf_flags or "")
    refuse_unknown(flags, names)
    data, result = migrate(values, flags, processes)
    _steps_of_epochs({**(values.get("training_args") or {}), **flags}, result, processes, count(data) if data else None)
    report = {"flags": result.flags} | {name: getattr(result, name) for name in HEADINGS}
    texts = {"train_flags.txt": shlex.join(result.flags) + "\n", "migration.json": _text(report)}
    texts |= {"data.json": _text(data)} if data else {}
    folder = Path(output)
    taken = [name for name in texts if (folder / name).exists()]
    if taken:
        raise ConfigError(f"{folder / taken[0]} is there already; nothing is overwritten, give another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}; give another --output") from error
    return report | {"files": [str(folder / name) for name in texts]}


def _steps_of_epochs(training: Mapping[str, Any], result: Migrated, processes: int, samples: int | None) -> None:
    """Epochs as steps, as the trainer counts them, where the samples are known and no number of steps is given."""
    epochs, batch = training.get("num_train_epochs"), training.get("per_device_train_batch_size")
    if samples is None or batch is None or not isinstance(epochs, int | float) or "--train-iters" in result.flags:
        return
    batches = math.ceil(samples / (batch * processes))
    steps = math.ceil(epochs * math.ceil(batches / (training.get("gradient_accumulation_steps") or 1)))
    result.flags += ["--train-iters", str(steps)]
    key = "training_args.num_train_epochs"
    result.by_hand.pop(key, None)
    result.mapped[key] = f"--train-iters {steps}: {epochs:g} epochs of {samples} samples"


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
