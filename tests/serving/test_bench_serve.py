"""`mindspeed-mm bench-serve` against a scripted server on loopback whose times and errors are known."""

import json
import math

import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.serving.load_report import per_token, report, spread
from mindspeed_mm.serving.open_loop import LoadPlan, LoadRecord
from tests.helpers.loopback import app_on_loopback
from tests.helpers.scripted_server import STEP, scripted_app


def test_a_server_is_measured_and_drawn(tmp_path, capsys):
    app, seen = scripted_app()
    flags = ["--requests", "40", "--rate", "80", "--image-side", "40", "--images", "2", "--max-tokens", "9", "--json"]
    files = ["--out", str(tmp_path / "load.json"), "--plot", str(tmp_path / "load.png")]
    with app_on_loopback(app) as server:
        assert main(["bench-serve", server.address, *flags, *files]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["errors"] == {"429": 2, "stream: cut off": 2, "stream: no event": 2, "stream: worker_lost": 2}
    assert found["answered"] == 32 and found["new_tokens"] == 32 * 7 and found["prompt_tokens"] == 32 * 11
    assert found["requests_per_second"] == pytest.approx(32 / found["seconds"])
    assert found["first_text"]["p50"] >= 2 * STEP and found["request"]["p50"] >= 5 * STEP
    assert found["seconds_per_token"]["p50"] >= 3 * STEP / 6 * 0.9
    assert "2 errors: 429" in told.err and "40 of 40 have ended, 8 with an error" in told.err
    written = json.loads((tmp_path / "load.json").read_text())
    assert len(written["records"]) == 40 and written["first_text"] == found["first_text"]
    assert Image.open(tmp_path / "load.png").width > 500
    body = seen[0]
    assert body["model"] == "scripted" and body["max_tokens"] == 9 and body["stream"]
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert len({json.dumps(body["messages"]) for body in seen}) == 40


def test_arrivals_are_poisson_and_come_again():
    plan = LoadPlan("m", requests=4000, rate=5.0, seed=2)
    times = plan.arrivals()
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert times[0] == 0 and mean == pytest.approx(0.2, rel=0.06)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)
    assert times == LoadPlan("m", requests=4000, rate=5.0, seed=2).arrivals() != LoadPlan("m", 4000, 5.0, 3).arrivals()
    assert plan.body(3) == plan.body(3) != plan.body(4)


def test_figures():
    record = LoadRecord(1.0, first_text=0.5, end=2.0, new_tokens=5, pieces=[0.5, 1.0, 1.5])
    assert per_token(record) == 0.25 and per_token(LoadRecord(0.0, pieces=[1.0], new_tokens=1)) is None
    found = report(LoadPlan("m"), [record, LoadRecord(2.0, end=6.0, error="503", new_tokens=3)])
    assert found["seconds"] == 8.0 and found["tokens_per_second"] == 5 / 8 and found["errors"] == {"503": 1}
    assert spread([]) is None and spread([1.0, 3.0])["p50"] == 2.0


def test_what_is_refused(tmp_path, capsys):
    def told(*words):
        assert main(["bench-serve", *words]) == 1
        return capsys.readouterr().err

    assert "expected http://HOST:PORT" in told("localhost:8000")
    err = told("http://127.0.0.1:1", "--rate", "0", "--requests", "0", "--timeout", "0")
    assert "--rate 0: expected more than 0" in err and "--requests 0: expected 1 or more" in err
    assert "--timeout 0: expected more than 0" in err
    assert "lists no model (ConnectError" in told("http://127.0.0.1:1")
    assert "does not exist; make it first" in told("http://127.0.0.1:1", "--out", str(tmp_path / "none" / "a.json"))
    gone = told("http://127.0.0.1:1", "--model", "m", "--requests", "2", "--rate", "99")
    assert "none of 2 requests was answered; the first one: ConnectError" in gone
    app, _ = scripted_app(always=503)
    with app_on_loopback(app) as server:
        assert "lists no model" in told(server.address)
        assert "first one: 503 " in told(server.address, "--model", "m", "--requests", "2", "--rate", "99")
