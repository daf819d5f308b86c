"""Ending a run whose validation loss has stopped to fall (--early-stop-patience)."""

from __future__ import annotations

import logging
from typing import Any

from megatron.driver.arguments import DriverArguments
from megatron.driver.initialize import is_rank_0
from mindspeed_mm.errors import ConfigError

logger = logging.getLogger(__name__)


class EarlyStop:
    """Counts validations without improvement. The loss is the same on every rank, so is the decision."""

    def __init__(self, args: DriverArguments, *, validates: bool) -> None:
        """`validates`: whether there is a validation set.

        Raises:
            ConfigError: a value that cannot be used, or no validation set to judge by.
        """
        self._patience, self._least = args.early_stop_patience, args.early_stop_min_improvement
        self.best: float | None = None
        self.best_step = self.without = 0
        if self._patience is not None and self._patience < 1:
            raise ConfigError(f"--early-stop-patience: found {self._patience}, expected at least 1 validation")
        if not 0 <= self._least < float("inf"):
            raise ConfigError(f"--early-stop-min-improvement: found {self._least:g}, expected 0 or a larger number")
        if self._least and self._patience is None:
            raise ConfigError("--early-stop-min-improvement is given without --early-stop-patience: give both")
        if self._patience is not None and not validates:
            raise ConfigError(
                "--early-stop-patience needs a validation loss: add validation_parameters to the data config, and "
                "--eval-interval"
            )

    def add(self, loss: float, step: int) -> None:
        """Count a validation loss. NaN (nothing was supervised) is no improvement."""
        if self._patience is None:
            return
        if loss == loss and (self.best is None or loss < self.best - self._least):
            self.best, self.best_step, self.without = loss, step, 0
        else:
            self.without += 1

    def is_due(self) -> bool:
        """Whether the run is to end."""
        return self._patience is not None and self.without >= self._patience

    def tell(self, step: int, checkpoint: object) -> None:
        """Say why the run has ended after `step`, and with which checkpoint, where there is one."""
        if is_rank_0():
            best = "there was none" if self.best is None else f"{self.best:.6g} after step {self.best_step}"
            logger.info(
                "early stop after step %d: %d validation(s) in a row did not lower the loss by more than %g (lowest: "
                "%s); %s. --load with a larger --early-stop-patience trains on",
                step,
                self.without,
                self._least,
                best,
                f"saved in {checkpoint}" if checkpoint else "nothing is saved, since --save is not given",
            )

    def as_saved(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON-able."""
        return {"best": self.best, "best_step": self.best_step, "without": self.without}

    def resume_from(self, saved: dict[str, Any]) -> None:
        """Go on counting where a checkpoint left off. One of an older version has nothing."""
        if self._patience is not None and saved:
            self.best, self.best_step, self.without = saved["best"], saved["best_step"], saved["without"]
