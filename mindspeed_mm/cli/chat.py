"""`mindspeed-mm chat`: a conversation about images in the terminal, or over a pipe."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from mindspeed_mm.cli.flags.cfg_path import add_cfg_path_arguments, chat_of_cfg_path
from mindspeed_mm.cli.flags.model import (
    add_model_arguments,
    add_option_arguments,
    add_parallel_arguments,
    given_options,
    load_model,
    model_path,
    refuse_idle_processes,
)
from mindspeed_mm.errors import ConfigError, DataError

HELP = "talk about images in the terminal; reads questions from a pipe as well"
EXAMPLE = "mindspeed-mm chat --model llava-1.5-7b-hf --image view.jpg"

COMMANDS = """/image FILE ...   show images with the next question (or drop files into the terminal)
/system TEXT      start anew with this system text; without a text: the template's own
/reset            forget the conversation and its images
/save FILE        write the conversation as a LLaVA record
/help             this list
/exit             leave (as Ctrl-D does); Ctrl-C ends an answer"""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

WORD = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)"|((?:\\.|[^\s'"\\])+))(?=\s|$)""")
"""A word as a terminal pastes a dropped file: in quotes, or with backslashes before spaces."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_cfg_path_arguments(parser)
    parser.add_argument("--gpu-id", type=int, metavar="N", help="with --cfg-path, as the original's demo takes it: 0")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="image to begin with; repeatable")
    parser.add_argument("--system", metavar="TEXT", help="system text in place of the template's")
    parser.add_argument(
        "--max-context-len",
        type=int,
        metavar="N",
        help="most tokens of a prompt and its answer: of a longer talk the model no longer sees the oldest turns",
    )
    add_option_arguments(parser)
    add_parallel_arguments(parser)


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Talk until the input ends. Answers go to stdout, everything else to stderr."""
    from mindspeed_mm.generation.options import generation_options

    refuse_idle_processes(namespace)
    with chat_of_cfg_path(namespace) as defaults:
        given = {"num_beams": 1, "num_return_sequences": 1} | given_options(namespace, defaults)
        checked = generation_options(given)  # before the weights are read
        if checked.num_beams > 1 or checked.num_return_sequences > 1:
            raise ConfigError("chat gives one answer as it is written: leave num_beams and num_return_sequences at 1")
        path = model_path(namespace)
        vlm = load_model(namespace, path, device=None, dtype=None, tokenizer=None, image_processor=None)
    from mindspeed_mm.generation.chat import ChatSession

    engine, limit = vlm.engine(namespace.template, batch_size=1), namespace.max_context_len
    options = engine.defaults.options(given)
    if limit is not None and limit <= options.max_new_tokens:
        raise ConfigError(
            f"--max-context-len: found {limit}, expected more than max_new_tokens {options.max_new_tokens}"
        )
    session = ChatSession(engine, given, max_context=limit)
    if namespace.system is not None:
        session.set_system(namespace.system)
    terminal = Terminal(session)
    for image in namespace.image:
        terminal.show(image)
    return terminal.run()


class Terminal:
    """Lines in, answers out, around a ChatSession. Of several ranks, the first one reads, tells and writes."""

    def __init__(self, session: Any) -> None:
        from mindspeed_mm.cli.main import is_first_rank

        self._session = session
        self._first, self._alone = is_first_rank(), int(os.environ.get("WORLD_SIZE", "1")) == 1
        self._interactive = self._first and sys.stdin.isatty()
        self._ctrl_c_is_for: Literal["line", "answer", "nothing"] = "nothing"
        self._failed: list[str] = []

    def run(self) -> dict[str, Any]:
        """Read lines until the end. Over a pipe, raises DataError at the end where a line has failed."""
        with self._own_ctrl_c():
            self._talk()
        if self._failed and self._first and not self._interactive:
            raise DataError(f"{len(self._failed)} of the lines failed; the first: {self._failed[0]}")
        return {"turns": len(self._session.turns), "conversation": self._session.as_record()}

    def _talk(self) -> None:
        if self._interactive:
            self._tell("Ask about your images; /help lists the commands.")
        for line in self._lines() if self._alone else shared(self._lines() if self._first else iter(())):
            if line in ("/exit", "/quit"):
                break
            try:
                self._take(line)
            except (DataError, ConfigError, OSError) as error:
                self._tell(f"error: {error}")
                self._failed.append(str(error))

    def _lines(self) -> Iterator[str]:
        if not self._interactive:
            yield from (line.strip() for line in sys.stdin if line.strip())
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its history and arrow keys, where the system has it
        while True:
            try:
                self._ctrl_c_is_for = "line"
                line = input("USER: ").strip()
                self._ctrl_c_is_for = "nothing"
            except KeyboardInterrupt:
                if not self._alone:
                    raise
                self._tell(" (Ctrl-D leaves)")
                continue
            except EOFError:
                self._tell("")
                return
            if line:
                yield line

    def _take(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        command: Callable[[str], None] | None = self._commands().get(name)
        if command is not None:
            command(rest.strip())
            return
        files, question = dropped_files(line)
        for file in files:
            self.show(file)
        if not files and re.fullmatch(r"/[a-z]+", name):
            raise ConfigError(f"{name} is no command; /help lists them")
        if question:
            self._answer(question)

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/help": lambda rest: self._tell(COMMANDS),
            "/image": self._images,
            "/reset": lambda rest: self._session.reset(),
            "/system": lambda rest: self._session.set_system(rest or None),
            "/save": self._save,
        }

    def _images(self, rest: str) -> None:
        files = words(rest) or []
        if not files:
            raise ConfigError("/image needs a file: /image view.jpg")
        # A path with spaces that nobody quoted
        for file in [rest] if Path(rest).is_file() else files:
            self.show(file)

    def show(self, path: str) -> None:
        """Load an image and show it with the next question. Raises ImageError for one that cannot be used."""
        from mindspeed_mm.data.image import load_image
        from mindspeed_mm.generation.images import refuse_url

        refuse_url(path)
        path = local_path(path)
        self._session.add_image(path, load_image(path))
        self._tell(f"[image {len(self._session.images)}: {path}]")

    def _answer(self, question: str) -> None:
        if self._interactive:
            self._say("ASSISTANT: ")
        self._ctrl_c_is_for = "answer"
        try:
            for piece in self._session.ask(question):
                self._say(piece)
        finally:
            self._ctrl_c_is_for = "nothing"
        if self._session.forgotten:
            self._tell(f"[{self._session.forgotten} earlier turns no longer fit and were not seen]")
        ended = self._session.result.sequences[0].finish_reason == "cancelled"
        self._say(" [ended]\n" if ended else "\n")

    @contextlib.contextmanager
    def _own_ctrl_c(self) -> Iterator[None]:
        """Inside, Ctrl-C at the prompt drops the line. In an answer it ends the answer between two tokens, so that the
        engine is ready for the next one; a second one interrupts as ever. One that comes a moment too late for either
        does nothing: it was not meant to end the talk. Of several processes each would end an answer at another token:
        there it always interrupts."""
        if not (self._interactive and self._alone):
            yield
            return

        def interrupt(signal_number: int, frame: Any) -> None:
            meant, self._ctrl_c_is_for = self._ctrl_c_is_for, "nothing"
            if meant == "line":
                raise KeyboardInterrupt
            if meant == "answer":
                self._session.cancel()
                self._ctrl_c_is_for = "line"

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _save(self, rest: str) -> None:
        files = words(rest) or []
        if len(files) != 1:
            raise ConfigError("/save needs one file: /save chat.json")
        if not self._first:
            return
        with open(local_path(files[0]), "x", encoding="utf-8") as file:
            json.dump([self._session.as_record()], file, ensure_ascii=False, indent=2)
            file.write("\n")
        self._tell(f"[saved {files[0]}]")

    def _say(self, text: str) -> None:
        if self._first:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _tell(self, text: str) -> None:
        if self._first:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def shared(lines: Iterator[str]) -> Iterator[str]:
    """The lines of the first rank, on every rank."""
    import torch

    # A person may think for hours; collectives of the default group give up after minutes.
    group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    while True:
        line = [next(lines, None)]
        torch.distributed.broadcast_object_list(line, src=0, group=group)
        if line[0] is None:
            return
        yield line[0]


def words(text: str) -> list[str] | None:
    """The words of a line, quotes and backslashes taken off; None where a quote stays open."""
    found, position = [], 0
    text = text.strip()
    while position < len(text):
        match = WORD.match(text, position)
        if match is None:
            return None
        found.append(_unquoted(match))
        position = match.end()
    return found


def dropped_files(line: str) -> tuple[list[str], str]:
    """(image files at the start of a line, the rest of it). A word is an image file by its suffix and its form: it
    is quoted, a file:// address, has a folder in it, or is there."""
    files, position = [], 0
    while match := WORD.match(line, position):
        word = _unquoted(match)
        quoted = match.group(3) is None
        if not word.lower().endswith(SUFFIXES):
            break
        if not (quoted or "/" in word or os.path.isfile(word)):
            break
        files.append(word)
        position = match.end()
    return files, line[position:].strip()


def _unquoted(match: re.Match[str]) -> str:
    single, double, bare = match.groups()
    return re.sub(r"\\(.)", r"\1", bare) if bare is not None else single if single is not None else double


def local_path(path: str) -> str:
    """A path as the system takes it: file:// addresses and ~ resolved."""
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    return os.path.expanduser(path)
