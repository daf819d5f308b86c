"""How much a server takes on."""

from __future__ import annotations

from pathlib import Path

import pydantic

from mindspeed_mm.config.load import StrictModel


class ServingLimits(StrictModel):
    """Limits of one server. What exceeds one is refused with an error of the protocol."""

    body_bytes: pydantic.PositiveInt = 2**26
    """Of a request, images included."""
    images: pydantic.NonNegativeInt = 16
    """Of a request."""
    pixels: pydantic.PositiveInt = 2**25
    """Of an image; its header says how many there are, before anything is unpacked."""
    messages: pydantic.PositiveInt = 512
    """Of a conversation."""
    new_tokens: pydantic.PositiveInt = 4096
    """Of an answer; also what an answer gets where the request does not say."""
    batch_size: pydantic.PositiveInt = 16
    """Sequences that run together, and the most that one request may ask for."""
    queue: pydantic.NonNegativeInt = 64
    """Requests that wait for a place in the batch."""
    seconds: pydantic.PositiveFloat = 600.0
    """From a request's arrival to the end of its answer."""
    shutdown_seconds: pydantic.PositiveInt = 30
    """For requests in flight when the server is told to end."""
    media_root: Path | None = None
    """Folder of which images may be read by file:// addresses; None: of none."""
