"""TensorBoard, Weights & Biases and SwanLab: where a run's curves go besides metrics.jsonl. On rank 0 alone.

W&B and SwanLab are extras. They write to disk unless --online is given, so that a run needs no network and no account.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from megatron.driver.arguments import DriverArguments
from mindspeed_mm.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

EXTRAS = {"wandb": "W&B", "swanlab": "SwanLab"}
"""Library, which is also the name of the extra -> what it is called."""


class Board(Protocol):
    """Takes the figures of each step."""

    folder: Path
    """Where it writes."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """The figures of one step."""

    def flush(self) -> None:
        """A checkpoint is about to be written: what was added must not be lost."""

    def close(self, error: BaseException | None) -> None:
        """The run is over, `error` where it failed."""


class TensorBoard:
    """Event files."""

    def __init__(self, args: DriverArguments, iteration: int) -> None:
        """`iteration`: what the run begins with; figures of later steps are those of a run that was left."""
        self.folder = Path(args.tensorboard_dir)
        self._writer = SummaryWriter(args.tensorboard_dir, purge_step=iteration + 1)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """See Board."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """See Board."""
        self._writer.flush()

    def close(self, error: BaseException | None) -> None:
        """See Board."""
        self._writer.close()


class WandbBoard:
    """A run of Weights & Biases; each start of a training run is one of its own, in the group of the experiment."""

    def __init__(self, args: DriverArguments) -> None:
        """Raises TrainingError where W&B does not begin: with --online, no network or no login."""
        wandb = importlib.import_module("wandb")
        self.folder, name = _place(args, "wandb"), _experiment(args, "wandb")
        try:
            self._run = wandb.init(
                project=args.wandb_project,
                name=name,
                group=name,
                dir=str(self.folder),
                mode="online" if args.online else "offline",
                config=dataclasses.asdict(args),
                # It must neither take over standard error, which the screen writes to, nor write to it.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise TrainingError(f"W&B does not begin: {error}. Log in (wandb login), or leave --online out") from error
        _tell("W&B", f"wandb sync {Path(self._run.dir).parent}", args)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """See Board."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """W&B's own process writes at once."""

    def close(self, error: BaseException | None) -> None:
        """See Board."""
        self._run.finish(exit_code=0 if error is None else 1)


class SwanLabBoard:
    """An experiment of SwanLab; each start of a training run is one of its own, in the group of the experiment."""

    def __init__(self, args: DriverArguments) -> None:
        """Raises TrainingError where SwanLab does not begin: with --online, no network or no login."""
        self._swanlab = importlib.import_module("swanlab")
        self.folder, name = _place(args, "swanlab"), _experiment(args, "swanlab")
        try:
            self._swanlab.init(
                project=args.swanlab_project,
                name=name,
                group=name,
                log_dir=str(self.folder),
                mode="online" if args.online else "offline",
                config=dataclasses.asdict(args),
            )
        except (RuntimeError, ValueError, OSError) as error:  # its own are RequestExceptions, which are OSErrors
            raise TrainingError(
                f"SwanLab does not begin: {error}. Log in (swanlab login), or leave --online out"
            ) from error
        _tell("SwanLab", f"swanlab sync {self.folder}/run-*", args)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """See Board."""
        self._swanlab.log(dict(values), step=step)

    def flush(self) -> None:
        """SwanLab's own thread writes at once."""

    def close(self, error: BaseException | None) -> None:
        """See Board."""
        if error is None:
            self._swanlab.finish()
        else:
            self._swanlab.finish(state="crashed", error=f"{type(error).__name__}: {error}")


def _place(args: DriverArguments, library: str) -> Path:
    """The folder that a library writes to; made where it is missing. W&B makes its own `wandb` in it."""
    given = getattr(args, f"{library}_save_dir")
    folder = Path(given) if given else Path(args.save) / ("" if library == "wandb" else library)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _experiment(args: DriverArguments, library: str) -> str:
    """The name of the run: the flag's, else that of the save folder."""
    given = getattr(args, f"{library}_exp_name")
    return given or Path(args.save or getattr(args, f"{library}_save_dir")).resolve().name


def _tell(called: str, command: str, args: DriverArguments) -> None:
    what = "sends the curves while the run trains" if args.online else f"writes to disk, to be sent with: {command}"
    logger.info("%s %s", called, what)


def check_boards(args: DriverArguments) -> None:
    """Whether the libraries that the flags name are there. Called before anything is built.

    Raises:
        ConfigError: one is not; names the extra.
    """
    for library, called in EXTRAS.items():
        if getattr(args, f"{library}_project") is not None and importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"--{library}-project needs {called}, which is not installed: pip install 'mindspeed-mm[{library}]', "
                "or leave the flag out"
            )


def open_boards(args: DriverArguments, iteration: int) -> list[Board]:
    """The boards that the flags name, for a run that begins at `iteration`.

    Raises:
        TrainingError: one does not begin.
    """
    boards: list[Board] = []
    if args.tensorboard_dir is not None:
        boards.append(TensorBoard(args, iteration))
    if args.wandb_project is not None:
        boards.append(WandbBoard(args))
    if args.swanlab_project is not None:
        boards.append(SwanLabBoard(args))
    return boards
