"""The micro-batches of one pass, and which of them an error came from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from mindspeed_mm.errors import add_note


@contextlib.contextmanager
def naming_samples(batches: Sequence[Any], chunks: int, place: str) -> Iterator[list[Iterator[Any]]]:
    """One iterator over all micro-batches for each of the `chunks` of a stage.

    An error inside has a note with the samples of the micro-batch that was the last to go into the model. With
    pipeline stages, and on a device that computes behind the program, an error may come from one before it.

    Args:
        batches: each has its samples' names as `sample_ids`, where they have any.
        place: of the pass in the run, for the note.
    """
    last = -1

    def read() -> Iterator[Any]:
        nonlocal last
        for number, batch in enumerate(batches):
            last = number
            yield batch

    try:
        yield [read() for _ in range(chunks)]
    except Exception as error:
        samples = getattr(batches[last], "sample_ids", ()) if last >= 0 else ()
        if samples:
            names = ", ".join(map(str, samples))
            where = f"micro-batch {last + 1} of {len(batches)}, {place}"
            add_note(error, f"The last to go into the model: {where}: {names}")
        raise
