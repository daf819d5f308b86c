"""What a server answers when it does not do what it was asked, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic

from mindspeed_mm.config.load import json_path

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


def refusal_of(error: pydantic.ValidationError) -> RequestRefused:
    """The first problem of a body, with its field as in messages[0].role."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = json_path(first["loc"])
    more = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return RequestRefused(f"{param or 'body'}: {message}{more}", param=param or None)


def unknown_model(name: str, known: str) -> RequestRefused:
    """The refusal of a model that is not there; `known` says which are."""
    text = f"the model {name[:200]!r} does not exist; {known}"
    return RequestRefused(text, status=NOT_FOUND, param="model", code="model_not_found")
