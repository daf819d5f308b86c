"""An application on an address, until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from mindspeed_mm import ending
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.serving.guard import is_loopback
from mindspeed_mm.serving.limits import ServingLimits

logger = logging.getLogger(__name__)

BACKLOG = 2048

IDLE_SECONDS = 75
"""How long a connection may wait for its next request. Clients that keep connections (httpx and openai for 5 s, aiohttp
15, nginx 60) give theirs up before, so that none sends a request on one that closes at that moment and loses it."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free one. Raises ConfigError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port, error) from error


def check_address(host: str, port: int) -> None:
    """Raise ConfigError where `listen` could not have the address. Nobody can connect meanwhile."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((host, port))
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: Exception) -> ConfigError:
    return ConfigError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port")


class AddressServer(uvicorn.Server):
    """uvicorn on a socket of ours. SIGINT, SIGTERM and SIGHUP end it in order, and end no more than it: the caller goes
    on. A second one does not wait for what runs."""

    def __init__(self, app: FastAPI, listening: socket.socket, *, shutdown_seconds: int, leave: bool = False) -> None:
        """`leave`: end as soon as it could answer."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=shutdown_seconds,
            )
        )
        self._listening, self._leave = listening, leave
        self._told_by: int | None = None
        self.ready = threading.Event()
        host, port = listening.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def end(self) -> None:
        """End in order, from any thread."""
        self.should_exit = True

    def serve_until_told(self) -> None:
        """Answer until `should_exit` is set or a signal comes."""
        self.run(sockets=[self._listening])
        if self._told_by is not None:
            logger.info("stopped by %s", signal.Signals(self._told_by).name)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn."""
        self._told_by = sig
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        logger.info("serving on %s", self.address)
        self.should_exit = self.should_exit or self._leave
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn, which would raise the signals again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = ending.heard(*ending.END_SIGNALS)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def address_server(
    make: Callable[..., FastAPI], host: str, port: int, token: str | None, limits: ServingLimits, *, leave: bool
) -> Iterator[AddressServer]:
    """The server of an address, which is open while the context lasts. Warns where everybody may ask.

    Args:
        make: gets `token` and `loopback_only`, gives the application.
        leave: see AddressServer.

    Raises:
        ConfigError: the address cannot be had.
    """
    local = is_loopback(host)
    if not local and token is None:
        logger.warning("everybody who reaches %s may ask: --token-file FILE asks for a token", host)
    with listen(host, port) as listening:
        app = make(token=token, loopback_only=local)
        yield AddressServer(app, listening, shutdown_seconds=limits.shutdown_seconds, leave=leave)
