"""`mindspeed-mm serve`: a model behind the OpenAI protocol."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from mindspeed_mm.cli.flags.adapters import named_adapters
from mindspeed_mm.cli.flags.model import (
    add_model_arguments,
    add_parallel_arguments,
    load_model,
    model_path,
    refuse_idle_processes,
)
from mindspeed_mm.cli.flags.workers import (
    add_worker_arguments,
    check_role,
    heartbeat_of,
    registered,
    serve_controller,
)
from mindspeed_mm.errors import ConfigError, LostRankError
from mindspeed_mm.run_folders import name_with_run

HELP = "answer chat completions of the OpenAI protocol over HTTP"
EXAMPLE = "mindspeed-mm serve --model llava-1.5-7b-hf --port 8000"

LIMITS = {
    "batch_size": (int, "sequences that run together (default 16)"),
    "queue": (int, "requests that may wait for a place in the batch (default 64)"),
    "new_tokens": (int, "most tokens of an answer (default 4096)"),
    "images": (int, "most images of a request (default 16)"),
    "pixels": (int, "most pixels of an image (default 33554432)"),
    "body_bytes": (int, "most bytes of a request (default 67108864)"),
    "seconds": (float, "from a request's arrival to the end of its answer (default 600)"),
    "shutdown_seconds": (int, "for requests in flight when the server is told to end (default 30)"),
}
"""Limits that have a flag, `--limit-images` and so on, but for the first two."""

PLAIN = ("batch_size", "queue")

KEPT_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""Kernels that oneDNN, and torch on top of it, keep on the CPU: one for each shape of a product, and a server meets
ever new ones. 1,024, which they keep where nothing is said, took 160 MiB after 600 requests of a tiny model and grew
on; 32 took 25 MiB from the first 200 on, and no more processor time."""

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_worker_arguments(parser)
    add_model_arguments(parser, several_adapters=True)
    add_parallel_arguments(parser)
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="default: the name of the weights' folder or file; RUN_ema for RUN/ema",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0: any free one")
    parser.add_argument("--token-file", metavar="FILE", help="file with the bearer token that requests must send")
    parser.add_argument(
        "--media-root", metavar="DIR", help="folder whose images requests may name by file:// addresses"
    )
    for name, (kind, text) in LIMITS.items():
        parser.add_argument(_flag(name), dest=f"limit_{name}", type=kind, metavar="N", help=text)
    parser.add_argument("--check", action="store_true", help="load the model, open the address, and leave")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Answer until SIGINT, SIGTERM or SIGHUP; ranks beside the first one follow it."""
    from mindspeed_mm.cli.main import is_first_rank

    check_role(namespace)
    refuse_idle_processes(namespace)
    if namespace.role == "controller":
        worker_token = read_token(namespace.worker_token_file, "--worker-token-file")
        return serve_controller(namespace, given_limits(namespace), read_token(namespace.token_file), worker_token)
    for name, value in KEPT_KERNELS.items():  # read when torch is loaded
        os.environ.setdefault(name, value)
    try:
        from mindspeed_mm.serving.app import make_app
        from mindspeed_mm.serving.ranks import follow, joined_lanes
        from mindspeed_mm.serving.server import address_server, check_address
        from mindspeed_mm.serving.service import ChatService

        if namespace.role == "worker":  # what it needs is known before the model is read
            import mindspeed_mm.serving.heartbeat  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'mindspeed-mm[serve]'") from error
    limits, token = given_limits(namespace), read_token(namespace.token_file)
    if namespace.role == "worker":  # only its controller asks it
        token = read_token(namespace.worker_token_file, "--worker-token-file")
    path = model_path(namespace)
    if is_first_rank():
        check_address(namespace.host, namespace.port)  # an address that cannot be had is told before weights are read
    name = namespace.served_model_name or name_of(path)
    namespace.adapter, folders = named_adapters(namespace.adapter, name)
    vlm = load_model(namespace, path, device=None, dtype=None, tokenizer=None, image_processor=None)
    make_engine = partial(vlm.engine, namespace.template, batch_size=limits.batch_size)
    lanes, channel = joined_lanes(vlm, name, make_engine, folders)
    if channel is not None and not channel.first:
        follow(lanes, channel)
        return {"model": name, "models": lanes.names}
    service = ChatService(lanes, limits, channel)
    make = partial(make_app, service)
    with address_server(make, namespace.host, namespace.port, token, limits, leave=namespace.check) as server:
        service.thread.on_failure = server.end
        heartbeat = heartbeat_of(namespace, server.address, lanes.names, limits.batch_size, token)
        with contextlib.nullcontext() if heartbeat is None else registered(heartbeat, service.thread, server):
            server.serve_until_told()
    if isinstance(service.thread.failure, LostRankError):
        raise service.thread.failure
    return {"model": name, "models": lanes.names, "address": server.address}


def name_of(path: str | Path) -> str:
    """The name of the weights' folder or file; of what lies in a run's folder RUN_iter_0000100, RUN_ema for RUN/ema."""
    return name_with_run(Path(path).resolve(), lambda other: other.name)


def given_limits(namespace: argparse.Namespace):
    """The ServingLimits of the flags. Raises ConfigError for a wrong value, or a media root that is not there."""
    import pydantic

    from mindspeed_mm.serving.limits import ServingLimits

    given = {name: getattr(namespace, f"limit_{name}") for name in LIMITS}
    given = {name: value for name, value in given.items() if value is not None}
    root = None if namespace.media_root is None else Path(namespace.media_root)
    if root is not None and not root.is_dir():
        raise ConfigError(f"--media-root {root} is no folder: give the one that holds the images")
    try:
        return ServingLimits(**given, media_root=root)
    except pydantic.ValidationError as error:
        lines = [f"{_flag(str(e['loc'][0]))} {e['input']}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def read_token(path: str | None, flag: str = "--token-file") -> str | None:
    """The token in a file, white space around it left out. Raises ConfigError where there is none."""
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}") from error
    if not token or not token.isascii() or any(map(str.isspace, token)):
        raise ConfigError(f"{flag} {path}: expected one word of ASCII in it, and nothing else")
    return token


def _flag(name: str) -> str:
    return f"--{name if name in PLAIN else f'limit-{name}'}".replace("_", "-")
