"""Which worker a controller chooses, with a clock of the test."""

import pytest

from mindspeed_mm.serving.refusal import RequestRefused
from mindspeed_mm.serving.worker_pool import FORGOTTEN_AFTER, LOST_AFTER, WorkerNotice, WorkerPool


class HandClock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def notice(port, capacity=1, models=("tiny",)):
    return WorkerNotice(address=f"http://127.0.0.1:{port}", models=list(models), capacity=capacity)


def port_of(worker):
    return int(worker.notice.address.rpartition(":")[2])


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def pool(clock):
    pool = WorkerPool(clock)
    pool.hear(notice(1, capacity=1))
    pool.hear(notice(2, capacity=4))
    return pool


def test_the_shortest_queue_by_capacity(pool):
    chosen = []
    for _ in range(10):
        worker = pool.choose("tiny")
        worker.in_flight += 1
        chosen.append(port_of(worker))
    assert chosen.count(1) == 2 and chosen.count(2) == 8


def test_equal_queues_take_turns(pool):
    assert [port_of(pool.choose("tiny")) for _ in range(4)] == [1, 2, 1, 2]


def test_silent_workers_are_lost_and_return(pool, clock):
    clock.now = LOST_AFTER
    assert not pool.hear(notice(2)) and len(pool.workers()) == 2
    clock.now += 1
    assert [port_of(worker) for worker in pool.workers()] == [2]
    assert pool.hear(notice(1)) and len(pool.workers()) == 2
    clock.now += LOST_AFTER + 1
    with pytest.raises(RequestRefused, match="no worker of the model 'tiny' can be reached") as caught:
        pool.choose("tiny")
    assert caught.value.status == 503 and caught.value.retry_after == 5 and pool.models() == []


def test_long_lost_workers_are_forgotten(pool, clock):
    clock.now = FORGOTTEN_AFTER + 1
    pool.hear(notice(3, models=("other",)))
    with pytest.raises(RequestRefused, match="'tiny' does not exist; the workers have other") as caught:
        pool.choose("tiny")
    assert caught.value.status == 404


def test_broken_workers_return_with_their_next_heartbeat(pool):
    pool.choose("tiny").unreachable = True
    assert [port_of(worker) for worker in pool.workers()] == [2]
    assert pool.hear(notice(1)) and len(pool.workers()) == 2


def test_tried_workers_are_not_chosen_again(pool):
    first = pool.choose("tiny")
    second = pool.choose("tiny", [first])
    assert second is not first and pool.choose("tiny", [first, second]) is None


def test_workers_that_leave(pool):
    pool.leave("http://127.0.0.1:1")
    pool.leave("http://127.0.0.1:9")
    assert [port_of(worker) for worker in pool.workers()] == [2]


@pytest.mark.parametrize(
    "address", ["", "tiny:80", "http://a", "http://a:80/x", "ftp://a:80", "http://u@a:80", "http://a:b"]
)
def test_addresses_that_are_none(address):
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        WorkerNotice(address=address, models=["tiny"], capacity=1)
