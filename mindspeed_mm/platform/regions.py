"""Names for the stretches of a training step, recorded while a step is profiled and free of cost otherwise.

The model and the driver mark their stretches with `with region("vision_encoder"):`; `recording` makes each of them a
range of torch's profiler, and waits for the device at its ends, so that the host's clock shows where the time goes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch.profiler import record_function

PREFIX = "step: "
"""Begins the names of the ranges in a trace."""

_synchronize: Callable[[], None] | None = None


def region(name: str) -> contextlib.AbstractContextManager:
    """Marks a stretch of the step. Stretches may lie inside each other; time belongs to the innermost."""
    return contextlib.nullcontext() if _synchronize is None else _recorded(name, _synchronize)


@contextlib.contextmanager
def _recorded(name: str, synchronize: Callable[[], None]) -> Iterator[None]:
    synchronize()
    with record_function(PREFIX + name):
        yield
        synchronize()


@contextlib.contextmanager
def recording(synchronize: Callable[[], None]) -> Iterator[None]:
    """Inside, regions are recorded. `synchronize` waits for the device."""
    global _synchronize
    _synchronize = synchronize
    try:
        yield
    finally:
        _synchronize = None
