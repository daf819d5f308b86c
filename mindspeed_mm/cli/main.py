"""The `mindspeed-mm` command: finds the commands, parses the line, reports errors as text and results as JSON."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib
import json
import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import NoReturn

import mindspeed_mm
from mindspeed_mm import ending
from mindspeed_mm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LostRankError,
    TrainingError,
    WeightError,
    full_text,
)

USER_ERRORS = (ConfigError, WeightError, DataError, CheckpointError, TrainingError, LostRankError)
"""Errors whose message is for the user. Anything else is a bug of ours and keeps its traceback."""

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the kernel says of a disk, a user's share of it, or a file that must not grow."""


def command_names() -> list[str]:
    """Every file of this package but this one is a command; what commands share lies in folders."""
    package = importlib.import_module("mindspeed_mm.cli")
    return sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg and module.name != "main"
    )


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The whole command line; `only` fills in the flags of that command alone (the others may import much)."""
    parser = argparse.ArgumentParser(
        prog="mindspeed-mm",
        description="Multimodal LLMs of the LLaVA family on Megatron-Core: pretrain, fine-tune, infer, evaluate.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {mindspeed_mm.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in command_names():
        module = importlib.import_module(f"mindspeed_mm.cli.{name}")
        subparser = subparsers.add_parser(
            name.replace("_", "-"),
            help=module.HELP,
            description=module.HELP,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.set_defaults(module=module, parser=subparser)
        if only == name:
            module.add_arguments(subparser)
            subparser.add_argument("--json", action="store_true", help="print the result as a last line of JSON")
    return parser


def is_first_rank() -> bool:
    """True in the process that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


class _ToStderr(logging.Handler):
    """Writes to whatever sys.stderr is at the moment, so that a redirected one is respected."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record) + "\n"
        with contextlib.suppress(OSError):  # a full disk or a closed pipe takes no line, and ends no work either
            sys.stderr.write(text)
            sys.stderr.flush()


def set_up_logging() -> None:
    """Our log goes to stderr, from the first rank; other ranks only warn, under their number."""
    handler = _ToStderr()
    prefix = "" if is_first_rank() else f"[rank {os.environ.get('RANK')}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    for name in ("mindspeed_mm", "megatron.driver", "evaluation", "checkpoint_converters"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if is_first_rank() else logging.WARNING)


def _is_first_of_host() -> bool:
    """True in the process that says what all of a host would say."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _say(command: str | None, text: str) -> None:
    """The last line of a command on the screen, which may have been closed."""
    rank = "" if is_first_rank() else f" [rank {os.environ.get('RANK')}]"
    name = "" if command is None else f" {command.replace('_', '-')}"
    with contextlib.suppress(OSError):
        sys.stderr.write(f"mindspeed-mm{name}{rank}: {text}\n")
        sys.stderr.flush()


def _fail(command: str | None, error: Exception | str) -> int:
    """Print the message. What the command line or a JSON file says is equal on all ranks of a host: one tells it."""
    if _is_first_of_host() or not isinstance(error, ConfigError):
        _say(command, f"error: {error if isinstance(error, str) else full_text(error)}")
    return EXIT_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 1 when the command failed with a message for the user, 2 for a wrong command line (argparse),
        130 when interrupted, 128 plus its number when a signal had the run stop, saved where it can be.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word.replace("-", "_") for word in argv if not word.startswith("-")), None)
    if command is not None and command not in command_names():
        return _unknown_command(argv[0])
    try:
        return _run(argv, command)
    except KeyboardInterrupt:
        if _is_first_of_host():
            _say(command, "interrupted")
        return EXIT_INTERRUPTED
    except ending.Terminated as terminated:
        _say(command, str(terminated))
        return terminated.exit_code
    except OSError as error:
        cause = _outside_cause(error)
        if cause is None:
            raise
        if "--json" in argv:
            with contextlib.suppress(OSError):  # it may be stdout that has no room
                _print_json({"error": cause})
        return _fail(command, cause)


def _outside_cause(error: OSError) -> str | None:
    """What is said about an error for which the machine and not this program has to be changed; None for others."""
    if error.errno in FULL:
        return f"{error}: a file could not be written to its end. Make room where the command writes, and start again"
    if error.errno == errno.EPIPE and ending.nobody_reads():
        return f"{error}: whoever read what the command prints has ended"
    return None


def _run(argv: list[str], command: str | None) -> int:
    """Parse the line and run the command. What `main` returns."""
    parser = build_parser(only=command)
    namespace, unknown = parser.parse_known_args(argv)
    namespace.words = argv
    set_up_logging()
    try:
        if unknown:
            _refuse_unknown(namespace.parser, unknown)
        with ending.closing():
            result = namespace.module.run(namespace)
        if namespace.json:
            _print_json(result)
    except ending.Stopped as stopped:
        if namespace.json:
            _print_json({**stopped.result, "error": str(stopped)})
        if is_first_rank():
            _say(command, str(stopped))
        return stopped.exit_code
    except USER_ERRORS as error:
        if namespace.json:
            _print_json({**getattr(error, "result", {}), "error": full_text(error)})
        return _fail(command, error)
    return 0


def entry() -> NoReturn:
    """What the console script and `python -m mindspeed_mm` do: `main`, and then the end of the process."""
    ending.run_process(main)


def _print_json(result: dict) -> None:
    if is_first_rank():
        sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def _unknown_command(word: str) -> int:
    near = difflib.get_close_matches(word.replace("-", "_"), command_names(), n=1)
    hint = f"did you mean {near[0].replace('_', '-')}?" if near else "see mindspeed-mm --help"
    sys.stderr.write(f"mindspeed-mm: error: unknown command {word!r}: {hint}\n")
    return EXIT_USAGE


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    from megatron.driver.arguments import refuse_unknown

    refuse_unknown(parser, unknown)
