"""Does what a page of the documentation says, in a folder of stand-ins, and fails where a command fails."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import httpx

from tests.docs.pages import ROOT, Block, ShellCommand, commands
from tests.helpers.loopback import data_url, png, serving

SHORT = {
    "train": (
        "--device cpu --num-workers 0 --train-iters 2 --micro-batch-size 1 --global-batch-size 4 --seq-length 256 "
        "--save-interval 2 --lr-decay-style constant --log-interval 1 --lr 1e-3"
    ),
    "reference": "--device cpu --num-workers 0 --micro-batch-size 1 --global-batch-size 4 --seq-length 256",
    "infer": "--device cpu --max-new-tokens 3 --dtype fp32",
    "chat": "--device cpu --max-new-tokens 3",
    "evaluate": "--device cpu --max-new-tokens 3 --dtype fp32 --accept-table",
    "predict": "--device cpu --dtype fp32",
    "doctor": "--device cpu",
    "serve": "--device cpu --port 0 --check",
    "serve controller": "--port 0 --check",
    "bench-serve": "--requests 3 --rate 50",
}
"""Flags put behind a command's own: the small model has little to learn and to say, and tables are short."""

ELSEWHERE = {
    "--parity": (0, "tests/doctor/test_parity.py"),  # takes minutes
    "--wandb-project": (1, "tests/driver/test_boards.py"),  # needs an extra
}
"""Flags that are read, and then left out with so many values, and the test that runs what they ask for."""

CI = {
    *("examples/quickstart/run.sh", "examples/hallucination/digits.sh", "examples/grounding/digits.sh"),
    "scripts/test.sh",
}
"""Scripts that .ci/run runs: the whole job, the studies and the whole test suite."""

SETTING_UP = {"git", "cd", "source", "export", "conda", "sbatch", "apt-get", "wandb", "swanlab"}
"""What a reader does before: nothing of ours to try."""

INSTALLED = re.compile(r"\.\[([\w,]+)\]")


class PageReader:
    """Runs the blocks of one page, one after the other, in one folder.

    `ranks` is the fixture of that name: it stands in for torchrun.
    """

    def __init__(self, folder: Path, ranks: Callable) -> None:
        self.folder, self.ranks = folder, ranks
        self.served = ["--model", "llava-1.5-7b-hf"]

    def run(self, block: Block) -> None:
        """Raises AssertionError with the place and what was printed when something fails."""
        with inside(self.folder):
            if block.language == "json" and block.text.startswith('{"dataset_param"'):
                Path("data.json").write_text(block.text)  # the page's commands take it
            if block.language == "python":
                self.python(block)
                as_after_the_process()
            for command in commands(block) if block.language == "bash" else ():
                self.command(command)
                as_after_the_process()

    def python(self, block: Block) -> None:
        code = compile(block.text, block.place, "exec")
        with redirect_stdout(io.StringIO()):
            exec(code, {"__name__": "__page__"})

    def command(self, command: ShellCommand) -> None:
        words = list(command.words)
        first = words[0]
        if first == "mindspeed-mm":
            self.ours(command.place, words[1:])
            self.served = words[2:] if words[1:2] == ["serve"] and words[2].startswith("--") else self.served
        elif first == "torchrun":
            self.torchrun(command.place, words[1:])
        elif first == "bash":
            self.script(command)
        elif first in ("python", "python3.11") and words[1].endswith(".py"):
            self.python_script(command.place, words[1:])
        elif first == "curl":
            self.request(command.place, words[1:])
        elif first == "pip" or words[1:3] == ["-m", "venv"]:
            self.installation(command.place, words)
        else:
            assert first in SETTING_UP, f"{command.place}: nobody can run {first!r} in a test; see docs/README.md"
            absent = [word for word in words if word.endswith((".sh", ".sbatch")) and not (ROOT / word).is_file()]
            assert not absent, f"{command.place}: {absent[0]} is not there"

    def ours(self, place: str, words: list[str]) -> None:
        """A command of mindspeed-mm in this process; `> FILE` at its end is followed."""
        words, target = (words[:-2], words[-1]) if ">" in words else (words, os.devnull)
        code, printed, log = told(words)
        assert code == 0, f"{place}: mindspeed-mm {' '.join(words)} ended with {code}:\n{log[-3000:]}"
        Path(target).write_text(printed)

    def torchrun(self, place: str, words: list[str]) -> None:
        """The same on ranks of the test pool, two at most."""
        size = min(2, int(words[words.index("--nproc_per_node") + 1]))
        start = words.index("mindspeed_mm") if words[-1:] != ["mindspeed_mm"] else len(words)
        while words[start - 1] != "-m":  # --logs-specs names the package, too
            start = words.index("mindspeed_mm", start + 1)
        found = self.ranks(size).run(on_this_rank, str(self.folder), words[start + 1 :])
        assert not any(code for code, *_ in found), f"{place}: {found}"

    def request(self, place: str, words: list[str]) -> None:
        """curl, to a server with what the page's last `serve` was given; an image stands in for its dots."""
        (asked,) = [word for word in words if word.startswith("http://127.0.0.1:")]
        rest = [word for word in words if word != asked]
        options = dict(zip(rest[::2], rest[1::2], strict=True))
        assert options.keys() <= {"-X", "-H", "-d"}, f"{place}: {words}"
        body = options.get("-d", "").replace("data:image/png;base64,...", data_url(png(30, 20)))
        kind, _, value = options.get("-H", "Accept: */*").partition(": ")
        with answering(self.served) as address:
            url = re.sub(r"^http://127.0.0.1:\d+", address, asked)
            answer = httpx.request(
                options.get("-X", "POST" if body else "GET"), url, headers={kind: value}, content=body, timeout=60
            )
        assert answer.status_code == 200, f"{place}: {asked} answers {answer.status_code}: {answer.text}"

    def script(self, command: ShellCommand) -> None:
        """A launcher with a torchrun that notes what it is asked; the note is followed in this process."""
        name, *flags = command.words[1:]
        if name in CI:
            assert f"bash {name}" in (ROOT / ".ci/run").read_text(), f"{command.place}: .ci/run does not run {name}"
            return
        note = self.folder / "asked of torchrun"
        environment = os.environ | dict(command.variables) | {"ASKED_OF_TORCHRUN": str(note)}
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        done = subprocess.run(["bash", name, *flags], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command.place}: {name} ended with {done.returncode}:\n{done.stderr}"
        asked = note.read_text().splitlines()
        self.ours(command.place, asked[asked.index("-m") + 2 :])

    def python_script(self, place: str, words: list[str]) -> None:
        before = sys.argv, list(sys.path)
        sys.argv = words
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{place}: {words} ended with {end.code}:\n{said.getvalue()}"
        finally:
            sys.argv, sys.path[:] = before

    def installation(self, place: str, words: list[str]) -> None:
        """Not done; the extras and the file of constraints must exist."""
        for constraints in [words[place + 1] for place, word in enumerate(words) if word == "-c"]:
            assert (ROOT / constraints).is_file(), f"{place}: {constraints} is not there"
        setup = (ROOT / "setup.py").read_text()
        for extras in INSTALLED.findall(" ".join(words)):
            for extra in extras.split(","):
                assert f'"{extra}": ' in setup, f"{place}: setup.py has no extra {extra!r}"


def as_after_the_process() -> None:
    """Takes down what a command's own process would take with it."""
    if "megatron.driver.initialize" in sys.modules:
        sys.modules["megatron.driver.initialize"].shutdown()


@contextmanager
def answering(words: list[str]) -> Iterator[str]:
    """The address of a server in this process, of the model and the adapters that `serve` was given."""
    import mindspeed_mm as mm
    from mindspeed_mm.cli.flags.adapters import named_adapters
    from mindspeed_mm.cli.main import build_parser
    from mindspeed_mm.cli.serve import name_of
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.ranks import joined_lanes
    from mindspeed_mm.serving.service import ChatService

    given = build_parser(only="serve").parse_args(["serve", *words])
    name = name_of(given.model)
    vlm = mm.load(given.model, device="cpu", dtype="fp32")
    _, folders = named_adapters(given.adapter, name)
    lanes, _ = joined_lanes(vlm, name, partial(vlm.engine, batch_size=2), folders)
    with serving(ChatService(lanes, ServingLimits(batch_size=2))) as server:
        yield server.address


def told(words: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command of ours, made short."""
    from mindspeed_mm.cli.main import main

    words = without(words, ELSEWHERE)
    line = [*words, *SHORT.get(" ".join(words[:2]), SHORT.get(words[0], "")).split()]
    if {"--help", "--compare", "--predictions"} & set(words):
        line = words
    before = sys.stdin
    sys.stdin = io.StringIO("What is it?\n")
    try:
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as log:
            try:
                code = main(line)
            except SystemExit as end:
                code = end.code or 0
    finally:
        sys.stdin = before
    return code, said.getvalue(), log.getvalue()


def without(words: list[str], flags: dict[str, tuple[int, str]]) -> list[str]:
    """The words without these flags and their values."""
    left, skip = [], 0
    for word in words:
        skip = 1 + flags[word][0] if word in flags else skip
        left += [word] if skip == 0 else []
        skip = max(0, skip - 1)
    return left


def on_this_rank(folder: str, words: list[str]) -> tuple[int, str, str]:
    """`told` on a rank of the pool, with the variables that torchrun sets."""
    import torch

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    with inside(Path(folder)):
        os.environ |= variables
        try:
            return told(words)
        finally:
            for name in variables:
                os.environ.pop(name, None)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The working folder for a while; processes that are started there find this checkout."""
    before, paths = Path.cwd(), os.environ.get("PYTHONPATH")
    os.chdir(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([paths] if paths else [])])
    try:
        yield
    finally:
        os.chdir(before)
        del os.environ["PYTHONPATH"]
        os.environ |= {"PYTHONPATH": paths} if paths else {}
