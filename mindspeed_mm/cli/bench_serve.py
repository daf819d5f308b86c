"""`mindspeed-mm bench-serve`: load on a server, and how it bears it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError, DataError, naming_file

HELP = "open-loop load on a server of the OpenAI protocol: throughput, time to the first text and per token"
EXAMPLE = "mindspeed-mm bench-serve http://127.0.0.1:8000 --requests 200 --rate 4 --out load.json --plot load.png"

NUMBERS = {
    "requests": (int, 1, "how many (default 100)"),
    "rate": (float, 0, "arrivals a second on average, at random times (default 2)"),
    "seed": (int, 0, "of times, images and words (default 0)"),
    "images": (int, 0, "of each request (default 1)"),
    "image_side": (int, 1, "pixels of a side of each image (default 336)"),
    "question_words": (int, 1, "of each question (default 32)"),
    "max_tokens": (int, 1, "of an answer (default 64)"),
}
"""Numbers of a LoadPlan: type, the least, help."""

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="the server's address, http://HOST:PORT, with or without /v1")
    parser.add_argument("--model", metavar="NAME", help="default: the first one that the server lists")
    for name, (kind, _, text) in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    parser.add_argument("--token-file", metavar="FILE", help="file with the bearer token that the server wants")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="without a byte (default 600)")
    parser.add_argument("--out", metavar="JSON", help="write the figures and a record of each request")
    parser.add_argument("--plot", metavar="PNG", help="draw the waiting times and the requests in flight")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Ask and tell. Returns the figures for --json."""
    from mindspeed_mm.cli.serve import read_token

    try:
        from mindspeed_mm.serving import load_report, open_loop
    except ModuleNotFoundError as error:
        raise ConfigError(f"bench-serve needs {error.name}: pip install 'mindspeed-mm[serve]'") from error
    given, address = given_numbers(namespace), server_address(namespace.url)
    out, plot = (_writable(namespace, name) for name in ("out", "plot"))
    token = read_token(namespace.token_file)
    plan = open_loop.LoadPlan(namespace.model or open_loop.first_model(address, token), **given)
    logger.info("%d requests to %s, model %s, %g a second", plan.requests, address, plan.model, plan.rate)
    records = open_loop.run_load(address, plan, token=token, timeout=namespace.timeout, tell=_Progress(plan.requests))
    found = load_report.report(plan, records)
    if out is not None:
        rows = [dataclasses.asdict(record) for record in records]
        with naming_file(out):
            out.write_text(json.dumps({**found, "records": rows}, indent=1), encoding="utf-8")
    if plot is not None:
        load_report.draw(plot, records, f"{plan.model}: {plan.rate:g} requests/s asked for")
    if not found["answered"]:
        first = next(record for record in records if record.error is not None)
        raise DataError(f"none of {plan.requests} requests was answered; the first one: {first.error} {first.message}")
    _tell(found)
    return found


def given_numbers(namespace: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a LoadPlan that were given. Raises ConfigError for all that are too small at once."""
    given = {name: getattr(namespace, name) for name in NUMBERS if getattr(namespace, name) is not None}
    wrong = [
        f"--{name.replace('_', '-')} {value:g}: expected {'more than 0' if name == 'rate' else f'{least} or more'}"
        for name, value in given.items()
        for least in [NUMBERS[name][1]]
        if not (value > 0 if name == "rate" else value >= least)
    ]
    if not namespace.timeout > 0:
        wrong.append(f"--timeout {namespace.timeout:g}: expected more than 0")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return given


def server_address(url: str) -> str:
    """The address with /v1. Raises ConfigError for what is no address of http."""
    if not url.startswith(("http://", "https://")) or len(url.split("/")) < 3 or not url.split("/")[2]:
        raise ConfigError(f"found the address {url!r}; expected http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def _writable(namespace: argparse.Namespace, name: str) -> Path | None:
    value = getattr(namespace, name)
    if value is None:
        return None
    if not Path(value).absolute().parent.is_dir():
        raise ConfigError(f"--{name} {value}: the folder {Path(value).parent} does not exist; make it first")
    return Path(value)


class _Progress:
    """Tells of the answers, about ten times."""

    def __init__(self, requests: int) -> None:
        self._requests, self._ended, self._errors = requests, 0, 0

    def __call__(self, record: Any) -> None:
        self._ended += 1
        self._errors += record.error is not None
        if self._ended % max(1, self._requests // 10) == 0:
            logger.info("%d of %d have ended, %d with an error", self._ended, self._requests, self._errors)


def _tell(found: dict[str, Any]) -> None:
    logger.info(
        "%d answered in %.1f s: %.2f requests/s, %.1f tokens/s",
        *(found[name] for name in ("answered", "seconds", "requests_per_second", "tokens_per_second")),
    )
    for name in ("first_text", "seconds_per_token", "request", "sent_late"):
        if found[name] is not None:
            values = ", ".join(f"{key} {value:.3f}" for key, value in found[name].items())
            logger.info("%s (s): %s", name.replace("_", " "), values)
    for name, count in found["errors"].items():
        logger.warning("%d errors: %s", count, name)
