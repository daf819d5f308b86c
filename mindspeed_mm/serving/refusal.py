"""What a server answers when it does not do what it was asked, in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import pydantic

from mindspeed_mm.config.load import json_path
from mindspeed_mm.errors import ConfigError

BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TOO_LARGE, WRONG_TYPE = 400, 401, 404, 413, 415
TOO_MANY, SERVER_ERROR, UNAVAILABLE, TIMED_OUT = 429, 500, 503, 504

KINDS = {
    UNAUTHORIZED: "authentication_error",
    TOO_MANY: "rate_limit_error",
    SERVER_ERROR: "server_error",
    UNAVAILABLE: "server_error",
    TIMED_OUT: "server_error",
}
"""`type` of an error by its status; everything else is the request's fault."""


class RequestRefused(ValueError):
    """A request is not answered; becomes the error of the response."""

    def __init__(
        self,
        message: str,
        *,
        status: int = BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`param` is the field at fault, `retry_after` the seconds after which it is worth asking again."""
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> Mapping[str, str]:
        """The headers that belong to it."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == UNAUTHORIZED else {})


UNION_TAG = "kind: "
"""Begins the tags by which protocol's unions tell their kinds apart: no fields of a request."""

NAMES = {
    "stop_strings": "stop",
    "num_return_sequences": "n",
    "max_new_tokens": "max_tokens",
    "set do_sample": "set temperature above 0",
}
"""The engine's options under the protocol's names."""


def refusal_of_options(error: ConfigError, known: Collection[str]) -> RequestRefused:
    """The first problem of the engine's options in the protocol's words, with its field where the text begins with one
    of the `known` options."""
    found = [line.strip().removeprefix("(top level): ") for line in str(error).splitlines()]
    text = found[1] if len(found) > 1 else found[0]
    name = re.match(r"\w*", text)[0]
    for ours, theirs in NAMES.items():
        text = text.replace(ours, theirs)
    return RequestRefused(text, param=NAMES.get(name, name) if name in known else None)


def refusal_of(error: pydantic.ValidationError) -> RequestRefused:
    """The first problem of a body, with its field as in messages[0].role."""
    first = error.errors(include_url=False, include_input=False)[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, RequestRefused):
        return own
    param = json_path(tuple(name for name in first["loc"] if not str(name).startswith(UNION_TAG)))
    more = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return RequestRefused(f"{param or 'body'}: {message}{more}", param=param or None)


def unknown_model(name: str, known: str) -> RequestRefused:
    """The refusal of a model that is not there; `known` says which are."""
    text = f"the model {name[:200]!r} does not exist; {known}"
    return RequestRefused(text, status=NOT_FOUND, param="model", code="model_not_found")


def server_ends() -> RequestRefused:
    """The refusal of a request for which there is no time any more."""
    return RequestRefused("the server is ending: ask again later", status=UNAVAILABLE, code="ending", retry_after=5)
