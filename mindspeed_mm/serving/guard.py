"""Who may ask: the bearer token, and which names a server on loopback answers to."""

from __future__ import annotations

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mindspeed_mm.serving.refusal import UNAUTHORIZED, RequestRefused

GUARDED = ("/v1/", "/metrics")
"""Beginnings of the addresses that need the token; the page and /health say nothing that is secret."""


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class AccessGuard:
    """ASGI middleware that refuses requests before anything of them is read."""

    def __init__(self, app: ASGIApp, *, token: str | None, loopback_only: bool) -> None:
        """`loopback_only`: the Host header must name this machine, so that no web page reaches the server by a name
        of its own that resolves to loopback."""
        self._app, self._loopback_only, self._token = app, loopback_only, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        response = JSONResponse(refusal.body(), refusal.status, headers=refusal.headers())
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestRefused | None:
        headers = Headers(scope=scope)
        if self._loopback_only:
            host = headers.get("host", "")
            name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
            if not is_loopback(name):
                return RequestRefused(f"this server listens on loopback; found the host {host[:100]!r}", status=403)
        if self._token is None or not scope["path"].startswith(GUARDED):
            return None
        return token_refusal(headers, self._token)


def token_refusal(headers: Headers, token: str) -> RequestRefused | None:
    """What a request is answered that does not bear the token; None where it does."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    # Both are compared whatever they are, in a time that tells nothing of the token.
    right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())
    if kind.lower() == "bearer" and right:
        return None
    return RequestRefused(
        "the bearer token is missing or wrong: send Authorization: Bearer TOKEN",
        status=UNAUTHORIZED,
        code="invalid_api_key",
    )
