"""What is said about a training run that was told to stop before its last step."""

from __future__ import annotations

import signal
from typing import Any

from megatron.driver.arguments import DriverArguments
from megatron.driver.loop import TrainReport
from mindspeed_mm.ending import Stopped


def stopped(report: TrainReport, args: DriverArguments, result: dict[str, Any]) -> Stopped:
    """The exception that ends such a run: names the signal, the step, and what is saved."""
    assert report.stopped_by is not None
    name = signal.Signals(report.stopped_by).name
    if args.save is None:
        saved = "nothing is saved, since --save is not given"
    else:
        saved = f"saved in {report.checkpoint}; the same command with --load {args.save} goes on from there"
    text = f"stopped by {name} after step {report.iteration} of {args.train_iters}: {saved}"
    return Stopped(text, report.stopped_by, result)
