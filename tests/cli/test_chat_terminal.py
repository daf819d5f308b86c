"""`mindspeed-mm chat` in a terminal: history by arrow keys, Ctrl-C, Ctrl-D, dropped files."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios

import pytest

PATIENCE = 120
"""Seconds to wait for a text; a machine may be busy."""

PROMPT = "USER: "


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
            env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """All that came up to and including the pattern."""
        found = ""
        while not re.search(pattern, found):
            ready, _, _ = select.select([self.master], [], [], PATIENCE)
            piece = os.read(self.master, 1).decode("utf-8", "replace") if ready else ""
            assert piece, f"{pattern!r} did not come; found {found!r}"
            found += piece
        return found

    def rest(self) -> str:
        """What comes until the command ends."""
        found = b""
        with contextlib.suppress(OSError):  # Linux tells the end of a terminal as an error
            while piece := os.read(self.master, 4096):
                found += piece
        return found.decode("utf-8", "replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def start(golden):
    opened = []

    def chat(*flags: str) -> Terminal:
        line = [sys.executable, "-m", "mindspeed_mm", "chat", "--model", str(golden / "models" / "llava_hf")]
        opened.append(Terminal(*line, "--device", "cpu", "--json", *flags))
        return opened[-1]

    yield chat
    for terminal in opened:
        terminal.close()


def test_a_session(start, golden, tmp_path):
    picture = tmp_path / "my view.png"
    shutil.copy(golden / "images" / "src" / "gray.png", picture)
    # Every answer is long: it could not end by itself between two keys.
    terminal = start("--max-new-tokens", "1700", "--option", "min_new_tokens=1700")
    assert "/help lists the commands" in terminal.wait_for(PROMPT)

    terminal.type("Hi\n")
    terminal.wait_for("ASSISTANT: [^\r\n]{8}")
    terminal.type("\x03")
    assert "[ended]" in terminal.wait_for(PROMPT)

    terminal.type("half a line")
    terminal.wait_for("half a line")  # a Ctrl-C before the prompt listens would be noticed with the next key only
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for(PROMPT)

    terminal.type(f"'{picture}'\n")  # as a terminal pastes a dropped file
    assert "[picture 1: " in terminal.wait_for(re.escape(f"{picture}]"))
    terminal.wait_for(PROMPT)
    terminal.type("https://example.org/a.png\n")
    terminal.wait_for("is an address, and nothing is downloaded")
    terminal.wait_for(PROMPT)
    terminal.type("What is it?\n")
    terminal.wait_for("ASSISTANT: [^\r\n]{8}")
    terminal.type("\x03")
    terminal.wait_for(PROMPT)

    terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\n")  # four up: the question, the address, the picture, "Hi"
    terminal.wait_for("ASSISTANT: [^\r\n]{8}")
    terminal.type("\x03")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    result = json.loads(terminal.rest().strip().splitlines()[-1])
    assert terminal.process.wait() == 0 and result["turns"] == 3
    turns = result["conversation"]["conversations"]
    assert [turn["value"] for turn in turns[::2]] == ["Hi", "<image>\nWhat is it?", "Hi"]
    assert all(len(turn["value"]) >= 8 for turn in turns[1::2])


def test_a_pipe(golden):
    """Questions from a real pipe, answers alone on stdout."""
    line = [sys.executable, "-m", "mindspeed_mm", "chat", "--model", str(golden / "models" / "llava_hf")]
    done = subprocess.run(
        [*line, "--device", "cpu", "--max-new-tokens", "4"],
        input="Hi\n\n/help\nAgain?\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "/reset" in done.stderr
    assert done.stdout.strip() and PROMPT not in done.stdout and "ASSISTANT" not in done.stdout
