"""What a server reads of a request before it knows what it asks: the bytes of its body, and whether anybody waits."""

from __future__ import annotations

from typing import TypeVar

import pydantic
from starlette.requests import Request

from mindspeed_mm.serving.refusal import TOO_LARGE, WRONG_TYPE, RequestRefused, refusal_of

Body = TypeVar("Body", bound=pydantic.BaseModel)


async def read_body(request: Request, most: int) -> bytes:
    """The bytes of a request of JSON, of which none beyond the limit is read.

    Raises RequestRefused for another type, or more than `most` bytes.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestRefused(f"the content type is {kind[:100]!r}; expected application/json", status=WRONG_TYPE)
    too_large = RequestRefused(f"the body has more than {most} bytes", status=TOO_LARGE)
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    return bytes(body)


def parse_body(kind: type[Body], body: bytes) -> Body:
    """A body as a model. Raises RequestRefused with the field for anything that is wrong with it."""
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise refusal_of(error) from error


async def until_gone(request: Request) -> None:
    """Wait until the client leaves. Its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
