"""Letter Q: `mindspeed-mm plot RUN...` draws several runs into one PNG."""

import json

import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.trainer.curves import names_of


@pytest.fixture
def runs(tmp_path):
    """Two save folders of one name, and one whose only step was skipped."""
    made = []
    for number, name in enumerate(("first/save", "second/save", "skipped")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        records = [
            {
                "iteration": step,
                "loss": (number + 1) / step,
                "grad_norm": None,
                "samples": 4,
                "tokens": 80,
                "seconds": 0.5,
            }
            for step in range(1, 11)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        made.append(str(folder))
    return made


def test_several_runs_in_one_png(runs, tmp_path, capsys):
    out = tmp_path / "compared.png"
    assert main(["plot", *runs[:2], "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["file"] == str(out)
    assert result["runs"] == {"first/save": {"step": 10, "loss": 0.1}, "second/save": {"step": 10, "loss": 0.2}}
    assert "first/save: 10 steps, the last loss is 0.1" in printed.err
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width > 800


def test_another_metric(runs, tmp_path, capsys):
    out = str(tmp_path / "c.png")
    assert (
        main(["plot", runs[0] + "/metrics.jsonl", "--metric", "samples/s", "--smooth", "0", "--out", out, "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["runs"] == {"save": {"step": 10, "samples/s": 8.0}}
    assert main(["plot", runs[2], "--metric", "grad_norm", "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == {"skipped": None}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metric", "los"], "--metric los: expected one of iteration, loss, .*did you mean loss"),
        (["--smooth", "1"], "--smooth is 1.0: expected 0 or more and below 1"),
        (["--out", "a.svg"], "--out a.svg: expected a name that ends with .png"),
        (["--out", "nowhere/a.png"], "--out nowhere/a.png: the folder nowhere does not exist"),
        (["no_such_run"], "no_such_run: no such file; expected a run's save folder"),
    ],
)
def test_what_cannot_be_drawn_is_told(runs, capsys, flags, message):
    import re

    assert main(["plot", runs[0], *flags]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_runs_are_named_as_shortly_as_tells_them_apart(tmp_path):
    assert names_of(["a/save", "b/save/metrics.jsonl", "b/other"]) == ["a/save", "b/save", "b/other"]
    assert names_of(["x/one", "x/two"]) == ["one", "two"]
    with pytest.raises(ConfigError, match="b/save is given twice: leave one out"):
        names_of(["b/save", "b/save/metrics.jsonl"])
