"""Ranks that run on the stand-in for an NPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.pool import RankPool

STAND_IN = str(Path(__file__).parent / "stand_in")


@pytest.fixture(scope="session")
def npu_ranks() -> Iterator[Callable[[int], RankPool]]:
    """`npu_ranks(2).run(function, *args)` calls a module-level function on two ranks of the stand-in."""
    pools: dict[int, RankPool] = {}
    yield lambda size: pools.setdefault(size, RankPool(size, "npu", (STAND_IN,)))
    for pool in pools.values():
        pool.close()
