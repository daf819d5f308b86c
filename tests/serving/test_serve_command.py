"""`mindspeed-mm serve`: what it refuses before it loads anything, its address, and its end by a signal."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from mindspeed_mm.cli.main import main
from mindspeed_mm.cli.serve import name_of
from mindspeed_mm.errors import ConfigError


@pytest.fixture
def run(golden, capsys):
    def run(*words, role=None):
        roles = [] if role is None else [role]
        code = main(
            ["serve", *roles, "--model", str(golden / "models" / "llava_hf"), "--device", "cpu", *map(str, words)]
        )
        return code, *capsys.readouterr()

    return run


def test_check_loads_opens_and_leaves(run):
    code, out, err = run("--port", 0, "--check", "--json", "--served-model-name", "mine")
    told = json.loads(out)
    assert code == 0 and told["model"] == "mine" and told["address"].startswith("http://127.0.0.1:")
    assert f"serving on {told['address']}" in err


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/llava/ema", "llava_ema"),
        ("runs/llava/iter_0000100", "llava_iter_0000100"),
        ("runs/llava/iter_0000100/ema", "llava_iter_0000100_ema"),
        ("runs/llava", "llava"),
        ("weights/ema", "ema"),  # a folder of that name
    ],
)
def test_the_model_has_the_name_of_its_run(tmp_path, path, name):
    for folder in ("runs/llava/iter_0000100", "weights/ema"):
        (tmp_path / folder).mkdir(parents=True)
    assert name_of(tmp_path / path) == name


def test_what_is_kept_of_kernels_is_bounded_unless_the_user_says(run, monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert run("--port", 0, "--check")[0] == 0
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32" and os.environ["LRU_CACHE_CAPACITY"] == "7"


def test_an_open_address_without_a_token_is_warned_of(run):
    code, _, err = run("--port", 0, "--check", "--host", "0.0.0.0")
    assert code == 0 and "everybody who reaches 0.0.0.0 may ask" in err


def test_what_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "empty").write_text(" \n")
    assert "expected one word of ASCII" in run("--token-file", tmp_path / "empty")[2]
    assert "cannot be read" in run("--token-file", tmp_path / "none")[2]
    assert "is no folder" in run("--media-root", tmp_path / "none")[2]
    assert "--limit-new-tokens 0: Input should be greater than 0" in run("--limit-new-tokens", 0)[2]
    assert "--batch-size -1: " in run("--batch-size", -1)[2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes would all do the same" in run()[2]


def test_a_missing_extra_is_named(run, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("mindspeed_mm.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serve needs uvicorn: pip install 'mindspeed-mm[serve]'" in run()[2]


def test_a_worker_without_httpx_ends_before_it_loads(golden, capsys, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("mindspeed_mm.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.setattr("mindspeed_mm.inference.api.load", lambda *_, **__: pytest.fail("the model was loaded"))
    model = str(golden / "models" / "llava_hf")
    assert main(["serve", "worker", "--controller", "http://127.0.0.1:1", "--model", model, "--device", "cpu"]) == 1
    assert "serve needs httpx: pip install 'mindspeed-mm[serve]'" in capsys.readouterr().err


def test_a_full_disk_for_the_log_ends_nothing(monkeypatch):
    import io
    import logging
    import sys

    from mindspeed_mm.cli.main import set_up_logging

    class FullDiskLog(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", FullDiskLog())
    set_up_logging()
    logging.getLogger("mindspeed_mm.serving").warning("nobody reads it")


@pytest.mark.slow
def test_a_server_answers_while_the_disk_of_its_log_is_full(golden):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", "--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--port", str(port)]
    body = {"model": "llava_hf", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    with open("/dev/full", "w") as full, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        line = [sys.executable, "-m", "mindspeed_mm", *words]
        run = subprocess.Popen(line, stdout=full, stderr=full, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while run.poll() is None:
                with contextlib.suppress(httpx.ConnectError):
                    client.get("/health")
                    break
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            refused = client.post("/v1/chat/completions", json=body | {"n": 0})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"
        finally:
            run.terminate()
        assert run.wait(60) == 0


def test_controller_and_worker(run, capsys, tmp_path):
    assert main(["serve", "controller", "--port", "0", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["address"].startswith("http://127.0.0.1:")
    code, out, _ = run("--controller", "http://127.0.0.1:1", "--port", 0, "--check", "--json", role="worker")
    assert code == 0 and json.loads(out)["model"] == "llava_hf"


def test_roles_and_their_flags(run, capsys, tmp_path):
    (tmp_path / "token").write_text("word")
    url, token = "http://127.0.0.1:1", tmp_path / "token"
    assert "serve controller has no model, but found --model" in run(role="controller")[2]
    assert "--controller is a worker's" in run("--controller", url)[2]
    assert "--worker-token-file belongs to serve controller" in run("--worker-token-file", token)[2]
    assert "serve worker needs --controller" in run(role="worker")[2]
    assert "--controller: found 'host:1'; expected http://HOST:PORT" in run("--controller", "host:1", role="worker")[2]
    reached = run("--controller", url, "--worker-address", "http://host", role="worker")[2]
    assert "--worker-address: found 'http://host'; expected http://HOST:PORT" in reached
    assert "give --worker-token-file FILE instead" in run("--controller", url, "--token-file", token, role="worker")[2]
    everywhere = run("--controller", url, "--port", 0, "--host", "0.0.0.0", "--check", role="worker")
    assert "give --worker-address http://HOST:PORT" in everywhere[2]
    assert main(["serve", "controller", "--host", "0.0.0.0", "--check", "--port", "0"]) == 1
    assert "could register as a worker" in capsys.readouterr().err


def test_an_address_that_is_taken():
    from mindspeed_mm.serving.server import listen

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="choose another --host"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1 port 70000"):
        listen("127.0.0.1", 70000)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_and_nothing_else(number, caplog):
    from fastapi import FastAPI

    from mindspeed_mm.serving.server import AddressServer, listen

    app, answers = FastAPI(), []
    app.get("/")(lambda: "here")

    def ask_and_end():
        if server.ready.wait(60):
            answers.append(httpx.get(server.address).json())
            os.kill(os.getpid(), number)

    ignored = signal.SIG_IGN if number == signal.SIGTERM else lambda *_: None  # ignored SIGHUP is left ignored
    before = signal.signal(number, ignored)  # should the server not listen to it, the test fails alone
    try:
        with listen("127.0.0.1", 0) as listening:
            server = AddressServer(app, listening, shutdown_seconds=5)
            asking = threading.Thread(target=ask_and_end)
            asking.start()
            with caplog.at_level("INFO", logger="mindspeed_mm.serving.server"):
                server.serve_until_told()
            asking.join(60)
        assert answers == ["here"] and signal.getsignal(number) is ignored
        assert f"stopped by {number.name}" in caplog.text
    finally:
        signal.signal(number, before)
