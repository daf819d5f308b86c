"""Letter O: what can be known without the weights is told before they are read."""

import socket

import pytest

from mindspeed_mm.cli.main import main


@pytest.fixture
def never(monkeypatch):
    """No weights are read."""

    def load(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr("mindspeed_mm.inference.api.load", load)


ASK = ("infer", "--model", "model")
IMAGES = ("--image", "/nowhere/a.png", "--image", "/nowhere/b.png")
EARLY = [
    ((*ASK, "--prompt", "Hi", "--image", "/nowhere/a.png"), "image /nowhere/a.png is missing; expected a file there."),
    ((*ASK, "--prompt", "Hi", *IMAGES), "none of 2 prompts can be answered:\n  request 1: image"),
    ((*ASK, "--prompt", "Hi", "--image", "https://example.org/a.png"), "is an address, and nothing is downloaded"),
    ((*ASK, "--prompt", " "), "request 1: the prompt is empty; give it a text"),
    (("serve", "--model", "model", "--port", "99999"), "cannot listen on 127.0.0.1 port 99999"),
    (("convert", "a", "b", "--to", "llavahf"), "cannot convert to 'llavahf'; did you mean llava-hf? Known are"),
]


@pytest.mark.parametrize(("line", "message"), EARLY, ids=lambda value: value if isinstance(value, str) else "")
def test_letter_o_told_before_weights_are_read(never, capsys, line, message):
    assert main(list(line)) == 1
    told = capsys.readouterr().err
    assert message in told and "record" not in told.partition("request 1")[2]


def test_letter_o_a_port_in_use_is_told_before_weights_are_read(never, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--model", "model", "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another --host or --port" in capsys.readouterr().err
