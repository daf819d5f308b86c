"""Letters P and Q: loss_curve.png of a run, and curves of several."""

import json

import pytest
from PIL import Image

from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.trainer.curves import draw, leave_loss_curve, read_records, smoothed, values_of

RECORDS = [
    {"iteration": step, "loss": 50.0 / step, "grad_norm": None if step == 2 else 1.0, "samples": 8, "tokens": 90}
    | {"seconds": 0.5}
    for step in range(1, 41)
]


def save(folder, records=RECORDS, end=""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return folder


def test_a_run_leaves_its_curve(tmp_path):
    path = leave_loss_curve(save(tmp_path / "run", end='{"iteration": 41, "lo'))
    assert path == tmp_path / "run" / "loss_curve.png"
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 800
    assert sorted(each.name for each in path.parent.iterdir()) == ["loss_curve.png", "metrics.jsonl"]


def test_a_curve_that_cannot_be_drawn_is_told(tmp_path, caplog):
    assert leave_loss_curve(save(tmp_path / "run", [])) is None
    assert "loss_curve.png is not drawn" in caplog.text and "no step is recorded yet" in caplog.text
    (save(tmp_path / "full") / "loss_curve.png").mkdir()
    assert leave_loss_curve(tmp_path / "full") is None
    assert "Is a directory" in caplog.text
    caplog.clear()
    assert leave_loss_curve(tmp_path) is None and not caplog.text  # training did not begin


def test_records_of_another_kind_do_not_hide_how_a_run_ended(tmp_path, caplog):
    assert leave_loss_curve(save(tmp_path / "run", [{"iteration": 1, "seconds": 1.0}])) is None
    assert "loss_curve.png is not drawn: --metric loss: expected one of iteration, seconds" in caplog.text


def test_records_are_read_from_folder_and_file(tmp_path):
    folder = save(tmp_path / "run")
    assert read_records(folder) == read_records(str(folder / "metrics.jsonl")) == RECORDS


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="metrics.jsonl: no such file; expected a run's save folder"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="no step is recorded yet"):
        read_records(save(tmp_path / "empty", []))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 1 has no iteration"):
        read_records(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("x\n")
    with pytest.raises(DataError, match="line 1 is damaged"):
        read_records(tmp_path)


def test_values_of_a_metric():
    assert values_of(RECORDS[:2], "loss") == ([1, 2], [50.0, 25.0])
    assert values_of(RECORDS[:3], "grad_norm") == ([1, 3], [1.0, 1.0]), "a skipped step has none"
    assert values_of(RECORDS[:1], "samples/s") == ([1], [16.0])
    with pytest.raises(
        ConfigError, match="--metric grad_nrm: expected one of iteration, loss, .*did you mean grad_norm"
    ):
        values_of(RECORDS, "grad_nrm")
    with pytest.raises(ConfigError, match=r"--metric xyz: expected one of .*, tokens/s$"):
        values_of(RECORDS, "xyz")


def test_smoothing_keeps_a_constant():
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smoothed([1.0, 3.0], weight=0.0) == [1.0, 3.0]


def test_several_runs_in_one_image(tmp_path):
    flat = [record | {"loss": 2.0} for record in RECORDS]
    draw(tmp_path / "one.png", {"a": RECORDS})
    draw(tmp_path / "two.png", {"a": RECORDS, "b": flat}, weight=0.5)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.size == two.size and one.tobytes() != two.tobytes()


@pytest.mark.parametrize(
    ("content", "metric", "message"),
    [
        (b"\xff\xfe\x00\n", "loss", "line 1 is damaged"),
        (b'{"iteration": "a", "loss": 1.0}\n', "loss", "line 1 has no iteration"),
        (b'{"iteration": 1, "loss": "x"}\n', "loss", "step 1 has loss 'x'; expected a number"),
        (b'{"iteration": 1, "loss": 1.0}\n', "samples/s", "expected one of iteration, loss$"),
    ],
)
def test_letter_q_damaged_records_are_told(tmp_path, content, metric, message):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises((ConfigError, DataError), match=message):
        values_of(read_records(tmp_path), metric)


def test_letter_q_late_odd_and_missing_values(tmp_path):
    records = [{"iteration": 1, "loss": float("nan"), "note": "a\u2028b"}, {"iteration": 2, "loss": 1.0, "late": 3}]
    found = read_records(save(tmp_path / "run", records))
    assert values_of(found, "loss") == ([2], [1.0]) and values_of(found, "late") == ([2], [3.0])
    assert values_of([{"iteration": 1, "samples": 2, "seconds": 0}], "samples/s") == ([], [])
    with pytest.raises(ConfigError, match="b: --metric late: expected one of iteration, loss"):
        draw(tmp_path / "two.png", {"a": records, "b": RECORDS}, "late")


def test_letter_q_names_that_mean_something_to_matplotlib(tmp_path, caplog, recwarn):
    draw(tmp_path / "names.png", {name: RECORDS for name in ("_run", "a$x$b$_{", "\u56fe")})
    assert (tmp_path / "names.png").is_file() and not recwarn.list
    assert "lacks characters of a run's name" in caplog.text
