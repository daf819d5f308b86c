"""Fixtures of the whole suite."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import reference
from tests.helpers.pool import RankPool


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is measured of this machine goes into no user's home; processes that tests start share it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and results do not depend on their number."""
    torch.set_num_threads(1)
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def reference_data_stays() -> Iterator[None]:
    """No test writes into the reference data of tests/data."""
    before = reference.snapshot()
    yield
    assert reference.snapshot() == before, "a test changed the reference data in tests/data"


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference values made with transformers, openai-clip and LLaVA's own code; see README.md there."""
    return reference.golden(tmp_path_factory.mktemp("reference") / "golden")


@pytest.fixture(scope="session")
def golden_flamingo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference values made with open_flamingo around transformers' decoders; see README.md there."""
    return reference.golden_flamingo(tmp_path_factory.mktemp("reference") / "golden_flamingo")


@pytest.fixture(scope="session")
def golden_eval() -> Path:
    """Reference scores made with VLMEvalKit and the official scorers."""
    return reference.DATA / "golden_eval"


@pytest.fixture(scope="session")
def cases() -> Path:
    """Small inputs on which the project once did the wrong thing."""
    return reference.DATA / "cases"


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(2).run(function, *args)` calls a module-level function on two ranks; the processes are re-used."""
    pools: dict[int, RankPool] = {}
    yield lambda size: pools.setdefault(size, RankPool(size))
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No file of tests meets the process groups of the file before it."""
    yield
    if "megatron.driver.initialize" in sys.modules:
        sys.modules["megatron.driver.initialize"].shutdown()
    gc.collect()  # see tests/helpers/pool.py
    gc.freeze()  # modules that the file has imported are not looked at again


@pytest.fixture
def single_process() -> Iterator[None]:
    """For tests that initialise the driver in the test process: takes it down again."""
    from mindspeed_mm.platform import get_platform

    get_platform("cpu")
    from megatron.driver.initialize import shutdown

    shutdown()  # an earlier test may have loaded a model
    yield
    shutdown()
    gc.collect()  # see tests/helpers/pool.py
