"""--cfg-path and --options: MiniGPT-4's YAML files in place of our JSON files and flags."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import ConfigError

if TYPE_CHECKING:
    from mindspeed_mm.config.minigpt4_model import Mapped
    from mindspeed_mm.config.minigpt4_yaml import MappedRun

FOLDER = "from_yaml"
"""Below output_dir: what was made of the YAML file."""

OF_EPOCHS = ("iters_per_epoch", "lr_decay_rate")
"""Flags that mean nothing to another schedule, which the command line may ask for."""

logger = logging.getLogger(__name__)


def add_cfg_path_arguments(group: Any) -> None:
    """The two flags."""
    group.add_argument("--cfg-path", metavar="YAML", help="a YAML file of MiniGPT-4, mapped to our files and flags")
    group.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="with --cfg-path: values over those of the file, such as run.init_lr=1e-4",
    )


def apply_cfg_path(namespace: argparse.Namespace) -> None:
    """Set files and flags of `mindspeed-mm train` as the YAML file says. Flags of the command line win.

    Raises:
        ConfigError: neither --cfg-path nor both files are given, or --cfg-path beside them; what `map_run` refuses.
    """
    files = {"--mm-model": namespace.mm_model, "--mm-data": namespace.mm_data}
    if namespace.cfg_path is None:
        if namespace.options:
            raise ConfigError("--options is given without --cfg-path; --cfg-options changes --mm-model and --mm-data")
        missing = [flag for flag, path in files.items() if path is None]
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)}: found none; expected both files, or --cfg-path with a YAML file"
            )
        return
    given = [flag for flag, path in files.items() if path is not None]
    if given:
        raise ConfigError(f"--cfg-path is given beside {' and '.join(given)}: keep either")
    from mindspeed_mm.config.minigpt4_yaml import map_run  # only where there is a YAML file to read

    run = map_run(namespace.cfg_path, namespace.options)
    folder = run.output / FOLDER
    namespace.mm_model, namespace.mm_data = _written(run, folder)
    given = {word.partition("=")[0] for word in namespace.words if word.startswith("--")}
    kept = []
    if "--save" in given:  # of another run than output_dir's, which begins and goes on by the same command, too
        run.flags["load"] = namespace.save
    if "--lr-decay-style" in given:
        for name in OF_EPOCHS:
            run.flags.pop(name, None)
    for name, value in run.flags.items():
        flags = ("--bf16", "--fp16") if name == "fp16" else ("--" + name.replace("_", "-"),)
        if given.isdisjoint(flags):
            setattr(namespace, name, value)
        else:
            kept += [flag for flag in flags if flag in given]
    if kept:
        run.mapped.report.append(f"the command line decides on {', '.join(kept)}")
    tell(namespace.cfg_path, run.mapped)


@contextlib.contextmanager
def chat_of_cfg_path(namespace: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Set the model, template, context and --quantize of `mindspeed-mm chat` as the YAML file says; inside, its files
    are there.

    Yields the generation options of the original's demo, or none without --cfg-path.

    Raises:
        ConfigError: --cfg-path beside another model, or a flag without it; what `map_chat` refuses.
    """
    if namespace.cfg_path is None:
        if namespace.options or namespace.gpu_id is not None:
            raise ConfigError("--options and --gpu-id go with --cfg-path, which is not given: leave them out")
        yield {}
        return
    if namespace.model or namespace.load:
        raise ConfigError("--cfg-path is given beside --model or --load: keep either")
    if namespace.gpu_id not in (None, 0):
        raise ConfigError(
            f"--gpu-id: found {namespace.gpu_id}, expected 0: choose a card by its number in the environment's "
            "CUDA_VISIBLE_DEVICES or ASCEND_RT_VISIBLE_DEVICES"
        )
    from mindspeed_mm.config.minigpt4_yaml import map_chat

    mapped, low_resource, context, options = map_chat(namespace.cfg_path, namespace.options)
    if low_resource and namespace.quantize is None:
        namespace.quantize = "int8"
    namespace.template = namespace.template or mapped.template
    if namespace.max_context_len is None:
        namespace.max_context_len = context
    tell(namespace.cfg_path, mapped)
    if mapped.checkpoint.is_dir():
        namespace.load = str(mapped.checkpoint)  # a training checkpoint of ours is a whole model
        yield options
        return
    with tempfile.TemporaryDirectory() as folder:
        namespace.model = str(write_model(mapped, Path(folder)))
        yield options


def tell(path: str, mapped: Mapped) -> None:
    """Log the report."""
    logger.info("%s:\n  %s", path, "\n  ".join(mapped.report))


def write_model(mapped: Mapped, folder: Path) -> Path:
    """model.json and the image processor in a folder; links to the projector's files where it has several."""
    from mindspeed_mm.config.minigpt4_data import image_processor

    if mapped.files:
        (folder / "bridge").mkdir(parents=True, exist_ok=True)
        for path in mapped.files:
            _link(path.resolve(), folder / "bridge" / path.name)
        mapped.model["image_encoder"]["vision_projector"]["ckpt_path"] = str(folder / "bridge")
    _write(folder / "preprocessor_config.json", image_processor(mapped))
    _write(folder / "model.json", mapped.model)
    return folder / "model.json"


def _written(run: MappedRun, folder: Path) -> tuple[str, str]:
    """Paths of model.json and data.json. The ranks of a run write the same, each beside and then in place."""
    model = write_model(run.mapped, folder)
    for entry in run.data["dataset_param"]["basic_parameters"]:
        if entry.get("name") in run.mapped.conversions:
            entry["data_path"] = str(_converted(entry["name"], run.mapped.conversions[entry["name"]], folder))
    _write(folder / "data.json", run.data)
    return str(model), str(folder / "data.json")


def _converted(name: str, files: list[Path], folder: Path) -> Path:
    """The records of one of MiniGPT-v2's sets, which an earlier start has made where the same files lay there."""
    from mindspeed_mm.data.multitask import TASKS, records_of

    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    made_of = zlib.crc32(repr((state, TASKS[name].questions)).encode())
    path = folder / f"{name}-{made_of:08x}.jsonl"
    if path.is_file():
        return path
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records_of(name, list(files)))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(values, indent=2), encoding="utf-8")
    beside.replace(path)


def _link(target: Path, path: Path) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.symlink_to(target)
    beside.replace(path)
