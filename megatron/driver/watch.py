"""Notices ranks that are lost, and says which.

Every rank counts up a number of its own in torch's key-value store. Rank 0 watches all numbers and writes down whose
stands still; the others watch rank 0's number and that note. Only differences of a clock that cannot be set are used. A
rank that learns of a loss while it waits in a collective ends its process: nothing else gets it out of there.

A store that cannot be reached leaves its callers waiting, so one thread speaks with the store and another one looks at
the time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch
from torch.distributed import Store

from mindspeed_mm.errors import TrainingError

logger = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds without a sign of life after which a rank is lost; less where the collective timeout is short."""

SHARE = 3
"""A third of that timeout: one patience until the loss is seen, one until a stuck rank ends, and beats in between."""

BEATS = 30
"""Signs of life in that time."""

HURRY = 6.0
"""Seconds that replace PATIENCE where they are fewer, once a collective has failed or a loss is known: the run is over
then, and what is left to find out is which rank has gone."""

HURRIED = "hurried"
"""Key that a rank sets whose collective has failed."""

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""

_watch: Watch | None = None


class Watch:
    """Beats and watches from `start` to `finish`."""

    def __init__(self, store: Store, rank: int, ranks: int, patience: float) -> None:
        self._store, self.rank, self._ranks, self._patience = store, rank, ranks, patience
        self._allowed = patience
        self._done, self._lock = threading.Event(), threading.Lock()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._answered = self._asked = time.monotonic()
        self._leaving = False
        self._threads = [threading.Thread(target=work, name="watch", daemon=True) for work in (self._ask, self._judge)]
        self.lost: str | None = None
        """What has happened to other ranks, once it is known."""

    @property
    def _hurry(self) -> float:
        """Seconds without a sign of life once the run is over for some rank."""
        return min(self._patience, HURRY)

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        """Beat, and ask the store for the others."""
        number = 0
        while not self._done.wait(self._patience / BEATS):
            number += 1
            self._ask_once(number)

    def _ask_once(self, number: int) -> None:
        begin = time.monotonic()
        try:
            self._store.set(f"alive/{self.rank}", str(number))
            self._allowed = self._hurry if self._store.check([HURRIED]) else self._patience
            self._learn(self._watch_all() if self.rank == 0 else self._watch_first())
            self._answered, self._asked = time.monotonic(), begin
        except RuntimeError as error:  # the store has gone, and with it whoever kept it
            self._learn(f"rank 0 or its host is lost: {str(error).splitlines()[0][:200]}")

    def _learn(self, news: str | None) -> None:
        """Keep the first news: what comes after them follows from them."""
        with self._lock:
            self.lost = self.lost or news

    def _judge(self) -> None:
        """End a process that cannot end by itself."""
        noticed, before = None, time.monotonic()
        while not self._done.wait(self._patience / BEATS):
            now = time.monotonic()
            if now - before > self._patience:  # this process itself stood still, it knows nothing of the others
                self._answered = now
            before = now
            self._learn(self._silent_store(now))
            if self.lost and noticed is None:
                noticed = now
            # An orderly end of the main thread comes first, where a collective lets it.
            if noticed is not None and now - noticed > self._hurry and not self._leaving:
                logger.error("%s. This rank stops; start again to resume from the last checkpoint", self.lost)
                os._exit(EXIT_CODE)

    def _silent_store(self, now: float) -> str | None:
        if now - self._answered <= self._patience:
            return None
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        return f"rank 0's host is lost or cannot be reached, {place} gave no answer for {self._patience:g} s"

    def _stands_still(self, rank: int) -> bool:
        """Whether a rank's number has not changed for as long as patience lasts."""
        key = f"alive/{rank}"
        value = self._store.get(key) if self._store.check([key]) else b""
        now = time.monotonic()
        before, since = self._seen.get(rank, (None, now))
        if value != before:
            since = now
        self._seen[rank] = value, since
        return value != b"done" and now - since > self._allowed

    def _watch_all(self) -> str | None:
        still = [rank for rank in range(1, self._ranks) if self._stands_still(rank)]
        failed = [rank for rank in range(1, self._ranks) if self._store.check([f"failed/{rank}"])]
        notes = [f"rank {rank} on {self._host(rank)} stopped: {self._read(f'failed/{rank}')}" for rank in failed]
        notes += [
            f"rank {rank} on {self._host(rank)} is lost, it gave no sign of life for {self._allowed:g} s"
            for rank in still
            if rank not in failed
        ]
        if not notes:
            return None
        self._store.set("lost", "; ".join(notes[:8]))
        return "; ".join(notes[:8])

    def _watch_first(self) -> str | None:
        if self._store.check(["lost"]):
            return self._read("lost")
        if self._store.check(["failed/0"]):
            return f"rank 0 on {self._host(0)} stopped: {self._read('failed/0')}"
        if self._stands_still(0):
            return f"rank 0 on {self._host(0)} is lost, it gave no sign of life for {self._allowed:g} s"
        return None

    def _host(self, rank: int) -> str:
        return self._read(f"here/{rank}")

    def _read(self, key: str) -> str:
        return self._store.get(key).decode("utf-8", errors="replace") if self._store.check([key]) else "?"

    def wait_for_news(self) -> str | None:
        """After a failed collective: what the watch finds out once its patience is over, also rank 0's.

        The clock alone does not end this: on a busy machine the others are asked late, and then the loss is seen late.
        A store that gives no answer is a loss, so that this comes to an end.
        """
        self._leaving = True
        with contextlib.suppress(RuntimeError):  # the store may have gone with the rank that kept it
            self._store.set(HURRIED, "")
        end = time.monotonic() + 2 * self._patience
        while self.lost is None and self._asked < end:
            time.sleep(0.02)
        return self.lost

    def finish(self, error: BaseException | None) -> None:
        """Stop beating, and tell the others that this rank has not been lost."""
        self._done.set()
        for thread in self._threads:
            thread.join(self._hurry)
        if self._threads[0].is_alive():  # it waits for a store that does not answer
            return
        with contextlib.suppress(RuntimeError):  # the store may have ended with the rank that kept it
            if error is not None and self.lost is None:
                text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self._store.set(f"failed/{self.rank}", text)
            self._store.set(f"alive/{self.rank}", "done")


def start(store: Store, rank: int, ranks: int, timeout_minutes: float) -> None:
    """Watch the other ranks of this run until `stop`."""
    global _watch
    _watch = Watch(store, rank, ranks, min(PATIENCE, 60 * timeout_minutes / SHARE))
    _watch.start()


def stop() -> None:
    """End the watch; the exception that is on its way, if any, is told to the other ranks."""
    global _watch
    if _watch is not None:
        _watch.finish(sys.exc_info()[1])
        _watch = None


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn the error that a collective raises when a peer has gone into one that names the peer.

    Raises:
        TrainingError: names the ranks that were lost or have stopped.
    """
    try:
        yield
    except Exception as error:
        if _watch is None or not _is_from_a_collective(error):
            raise
        news = _watch.wait_for_news()
        if news is None:
            raise
        raise TrainingError(
            f"{news}. Rank {_watch.rank} on {socket.gethostname()} stops; start again to resume from the last "
            "checkpoint"
        ) from error


def _is_from_a_collective(error: BaseException | None) -> bool:
    """Gloo raises plain RuntimeErrors; a failed save wraps them."""
    while error is not None:
        words = str(error).lower()
        signs = ("gloo", "nccl", "hccl", "connection", "timed out")
        if isinstance(error, torch.distributed.DistError):
            return True
        if isinstance(error, RuntimeError) and any(sign in words for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False
