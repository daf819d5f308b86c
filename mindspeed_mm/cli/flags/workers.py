"""`serve controller` and `serve worker`: their flags, and the controller's course."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import threading
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlsplit

from mindspeed_mm.errors import ConfigError

logger = logging.getLogger(__name__)

OF_MODELS = (
    *("model", "load", "template", "tokenizer", "image_processor", "dtype", "quantize", "double_quant", "adapter"),
    *("served_model_name", "media_root", "limit_batch_size", "limit_queue", "limit_new_tokens", "limit_images"),
    *("limit_pixels", "device"),
)
"""Flags that a controller has no use for: they belong to its workers."""


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """The role and its flags."""
    parser.add_argument(
        "role",
        nargs="?",
        choices=("controller", "worker"),
        help="controller: one address in front of workers, no model of its own; worker: a server that registers "
        "with a controller; without it: a server by itself",
    )
    parser.add_argument("--controller", metavar="URL", help="worker: the controller's address, http://HOST:PORT")
    parser.add_argument(
        "--worker-address", metavar="URL", help="worker: where the controller reaches it (default: where it listens)"
    )
    parser.add_argument(
        "--worker-token-file", metavar="FILE", help="controller and workers: file with the token they share"
    )


def check_role(namespace: argparse.Namespace) -> None:
    """Raise ConfigError for flags that do not belong to the role, or are missing from it."""
    role = namespace.role
    if role == "controller":
        given = [name for name in OF_MODELS if getattr(namespace, name) not in (None, False)]
        if given:
            flag = "--" + given[0].replace("limit_batch", "batch").replace("limit_queue", "queue").replace("_", "-")
            raise ConfigError(f"serve controller has no model, but found {flag}: give it to serve worker")
    if role != "worker":
        for name in ("controller", "worker_address"):
            if getattr(namespace, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} is a worker's: start serve worker, or leave it out")
    if role is None and namespace.worker_token_file is not None:
        raise ConfigError("--worker-token-file belongs to serve controller and serve worker: use --token-file")
    if role == "worker":
        if namespace.controller is None:
            raise ConfigError("serve worker needs --controller http://HOST:PORT, the address of serve controller")
        for flag, address in (("--controller", namespace.controller), ("--worker-address", namespace.worker_address)):
            if address is not None and not _is_address(address, bare=flag == "--worker-address"):
                raise ConfigError(f"{flag}: found {address!r}; expected http://HOST:PORT")
        if namespace.token_file is not None:
            raise ConfigError("serve worker is asked by its controller alone: give --worker-token-file FILE instead")
        if namespace.worker_address is None and _is_everywhere(namespace.host):
            raise ConfigError(
                f"--host {namespace.host} is no address to be reached at: give --worker-address http://HOST:PORT"
            )


def heartbeat_of(namespace: argparse.Namespace, address: str, models: list[str], capacity: int, token: str | None):
    """The WorkerHeartbeat of a worker; None for another role, or where the server leaves at once."""
    if namespace.role != "worker" or namespace.check:
        return None
    from mindspeed_mm.serving.heartbeat import WorkerHeartbeat

    return WorkerHeartbeat(namespace.controller, namespace.worker_address or address, models, capacity, token)


@contextlib.contextmanager
def registered(heartbeat, engine, server) -> Iterator[None]:
    """The heartbeat goes while the context lasts, once the server is ready and while its engine is alive."""
    thread = threading.Thread(target=heartbeat.run, args=(lambda: engine.alive, server.ready), daemon=True)
    thread.start()
    try:
        yield
    finally:
        heartbeat.close()
        server.ready.set()  # a server that never came up is not waited for
        thread.join()


def serve_controller(namespace: argparse.Namespace, limits, token: str | None, worker_token: str | None) -> dict:
    """Pass requests on until SIGINT, SIGTERM or SIGHUP. Raises ConfigError for an open address and no worker token."""
    try:
        from mindspeed_mm.serving.controller import ChatController, make_controller_app
        from mindspeed_mm.serving.guard import is_loopback
        from mindspeed_mm.serving.server import address_server
        from mindspeed_mm.serving.worker_pool import WorkerPool
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'mindspeed-mm[serve]'") from error
    if not is_loopback(namespace.host) and worker_token is None:
        raise ConfigError(
            f"whoever reaches {namespace.host} could register as a worker and read requests: give "
            "--worker-token-file FILE to the controller and its workers"
        )
    controller = ChatController(WorkerPool(), limits, worker_token)
    make = partial(make_controller_app, controller)
    with address_server(make, namespace.host, namespace.port, token, limits, leave=namespace.check) as server:
        server.serve_until_told()
    return {"address": server.address}


def _is_address(text: str, *, bare: bool) -> bool:
    """Whether a server can be reached there; `bare`: with its port and nothing behind, as a controller registers it."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return bool(known and (not bare or (parts.port and text == f"{parts.scheme}://{parts.netloc}")))


def _is_everywhere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return host == ""
