"""`mindspeed-mm chat` in a terminal: history by arrow keys, Ctrl-C, Ctrl-D, dropped files."""

import codecs
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from functools import partial

PATIENCE = 120
"""Seconds to wait for the next character; a machine may be busy."""

AGAIN = 10
"""Seconds after which Ctrl-C is pressed again. One that comes when the prompt is there and does not listen yet is not
noticed before the next one or the end of the line (so does Python's readline)."""

PROMPT = "USER: "


def run_in_terminal(path, line):
    """Exit code of a command in the terminal `path`, which sends its Ctrl-C to this process."""
    from mindspeed_mm.cli.main import main

    if os.getsid(0) != os.getpid():
        os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # comes when the terminal is closed
    kept, files = [os.dup(number) for number in range(3)], (sys.stdin, sys.stdout, sys.stderr)
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(terminal, number)
    os.close(terminal)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))
    os.environ["TERM"] = "xterm"
    try:
        return main(line)
    finally:
        fcntl.ioctl(0, termios.TIOCNOTTY)
        for number, old in enumerate(kept):
            os.dup2(old, number)
            os.close(old)
        sys.stdin, sys.stdout, sys.stderr = files


class PseudoTerminal:
    """The other side of a command's terminal."""

    def __init__(self) -> None:
        self.master, self._slave = pty.openpty()
        self.path = os.ttyname(self._slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """All that came up to and including the pattern."""
        found = self._until(pattern, PATIENCE)
        assert re.search(pattern, found), f"{pattern!r} did not come; found {found!r}"
        return found

    def press_ctrl_c(self, pattern: str) -> str:
        """Press it until the pattern comes; all that came up to it."""
        found = ""
        for _ in range(PATIENCE // AGAIN):
            self.type("\x03")
            found += self._until(pattern, AGAIN)
            if re.search(pattern, found):
                return found
        raise AssertionError(f"{pattern!r} did not come; found {found!r}")

    def _until(self, pattern: str, patience: float) -> str:
        found = ""
        while not re.search(pattern, found) and select.select([self.master], [], [], patience)[0]:
            found += self._decoder.decode(os.read(self.master, 1))
        return found

    def close(self) -> None:
        """The command then finds the end of its input."""
        os.close(self._slave)
        os.close(self.master)


def test_a_session(ranks, golden, tmp_path):
    image = tmp_path / "my view.png"
    shutil.copy(golden / "images" / "src" / "gray.png", image)
    line = ["chat", "--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--json"]
    # Every answer is long: it could not end by itself between two keys.
    line += ["--max-new-tokens", "1700", "--option", "min_new_tokens=1700"]
    with ThreadPoolExecutor(1) as thread, contextlib.closing(PseudoTerminal()) as terminal:
        code = thread.submit(partial(ranks(1).run, run_in_terminal, terminal.path, line, timeout=5 * PATIENCE))
        result = talk(terminal, image)
        assert code.result() == [0]
    assert result["turns"] == 3
    turns = result["conversation"]["conversations"]
    assert [turn["value"] for turn in turns[::2]] == ["Hi", "<image>\nWhat is it?", "Hi"]
    assert all(turn["value"] for turn in turns[1::2])


def talk(terminal, image):
    """What the command tells at the end of a talk of three questions."""
    begun = "ASSISTANT: [^\r\n]{8}"
    assert "/help lists the commands" in terminal.wait_for(PROMPT)

    terminal.type("Hi\n")
    terminal.wait_for(begun)
    assert "[ended]" in terminal.press_ctrl_c(PROMPT)

    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.press_ctrl_c("Ctrl-D leaves")
    terminal.wait_for(PROMPT)

    terminal.type(f"'{image}'\n")  # as a terminal pastes a dropped file
    assert "[image 1: " in terminal.wait_for(re.escape(f"{image}]"))
    terminal.wait_for(PROMPT)
    terminal.type("https://example.org/a.png\n")
    terminal.wait_for("is an address, and nothing is downloaded")
    terminal.wait_for(PROMPT)
    terminal.type("What is it?\n")
    terminal.wait_for(begun)
    terminal.press_ctrl_c(PROMPT)

    terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\n")  # four up: the question, the address, the image, "Hi"
    terminal.wait_for(begun)
    terminal.press_ctrl_c(PROMPT)
    terminal.type("\x04")
    return json.loads(re.search(r"\{.*\}", terminal.wait_for(r"\{.*\}\s*\n"))[0])
