"""`mindspeed-mm plan` as its user sees it."""

import json
import re
from pathlib import Path

import pytest

from mindspeed_mm.cli.main import main
from mindspeed_mm.planning import calibration
from tests.planning.planned_run import model

MODEL = "examples/llava1.5/model_finetune.json"
EIGHT = ["--devices", "8", "--memory", "64GB", "--bf16", "--seq-length", "2048", "--global-batch-size", "128"]
PARTS = ("matrix", "elementwise", "communication", "bubble", "optimizer")
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1", "--context-parallel-size", "1"]


def plan(capsys, *flags, code=0, path=MODEL):
    assert main(["plan", "--mm-model", str(path), *flags, "--json"]) == code
    out = capsys.readouterr()
    return json.loads(out.out.splitlines()[-1]), out.err


def test_seven_billion_on_eight_devices(capsys):
    report, shown = plan(capsys, *EIGHT)
    assert report["fitting"] > 0
    assert "--peak-tflops" in shown  # no rates of this device are known, so no times are made up
    assert all(layout["time"] is None for layout in report["layouts"])
    assert all(layout["peak"] <= report["limit"] for layout in report["layouts"])


def test_one_layout_agrees_with_the_arithmetic_of_the_parallelism_page(capsys):
    """docs/parallelism.md: T2 D4 holds 7.1 + 13.5 + 10.1 GB for 7B."""
    report, _ = plan(capsys, *EIGHT, *LAYOUT, "--micro-batch-size", "1", "--use-distributed-optimizer")
    (layout,) = report["layouts"]
    (stage,) = layout["stages"]
    figures = [stage[name] / 1e9 for name in ("parameters", "gradients", "optimizer")]
    assert figures == pytest.approx([7.1, 13.5, 10.1], abs=0.06)
    assert layout["checkpoint"]["each"] == pytest.approx(6.76e9 * 14, rel=0.01)
    assert layout["recompute"] == "model"


def test_a_trained_vision_encoder_that_sees_no_image(capsys, tmp_path):
    changed = json.loads(Path(MODEL).read_text())
    changed["image_encoder"]["vision_encoder"]["freeze"] = False
    (tmp_path / "model.json").write_text(json.dumps(changed))
    report, _ = plan(capsys, *EIGHT, *LAYOUT, "--sample-images", "0", path=tmp_path / "model.json")
    assert report["layouts"]


def test_known_hardware_gives_times(capsys):
    report, shown = plan(
        capsys,
        "--devices",
        "8",
        "--hardware",
        "h100",
        "--bf16",
        "--global-batch-size",
        "64",
        "--seq-length",
        "2048",
        "--samples",
        "6400",
    )
    first, second = report["layouts"][:2]
    time = first["time"]
    assert time["step"] == pytest.approx(sum(time[part] for part in PARTS))
    assert time["epoch"] == pytest.approx(100 * time["step"])
    assert 0 < time["mfu"] < 1
    assert first["time"]["step"] <= 1.01 * second["time"]["step"]
    assert "lower bound" in shown


def test_a_measured_run_gives_the_rate(capsys, tmp_path):
    record = {"flops": 4e12, "seconds": 2.0}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for _ in range(3)))
    report, _ = plan(
        capsys,
        *EIGHT,
        *LAYOUT,
        "--micro-batch-size",
        "1",
        "--measured",
        str(path),
        "--measured-devices",
        "2",
        "--use-distributed-optimizer",
    )
    assert report["hardware"]["peak_flops"] == 1e12
    assert report["layouts"][0]["time"]["elementwise"] == 0


def test_calibration_takes_the_rates_of_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "SECONDS", 0.01)
    monkeypatch.setattr(calibration, "COPIED", 2**20)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model()))
    report, shown = plan(capsys, "--memory", "4GB", "--device", "cpu", "--calibrate", path=path)
    hardware, time = report["hardware"], report["layouts"][0]["time"]
    assert hardware["source"] == "measured: 512 x 128 x 352 products in torch.float32, copies"
    assert time["matrix"] > 0 and time["elementwise"] > 0
    assert time["step"] == pytest.approx(sum(time[part] for part in PARTS))
    assert "lower bound" not in shown


def test_flags_of_what_trains(capsys):
    """Adapters, fewer bits, Muon and the moving average change bytes by as much as they hold."""
    layout = [*EIGHT[2:], *LAYOUT, "--micro-batch-size", "1"]
    adapters = ["--lora-r", "16", "--lora-target-modules", "q_proj", "--freeze-mm-mlp-adapter"]

    def memory(*flags):
        report, _ = plan(capsys, "--devices", "2", *layout, *adapters, *flags)
        return report["layouts"][0]["stages"][0]

    lora, trained = memory(), 32 * 16 * (4096 + 4096 // 2)  # A is whole on both ranks, B in halves
    assert lora["optimizer"] == 12 * trained
    assert memory("--ema-decay", "0.99")["optimizer"] == 16 * trained
    assert memory("--optimizer", "muon")["optimizer"] == 8 * trained
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008) // 2
    assert lora["parameters"] - memory("--quantize", "nf4")["parameters"] == linears * (2 - 4.5 / 8)


def test_a_search_with_muon(capsys):
    """Which shares no optimizer state."""
    flags = ["--optimizer", "muon", "--lora-r", "16", "--freeze-mm-mlp-adapter"]
    report, _ = plan(capsys, *EIGHT[2:], *LAYOUT, "--devices", "4", *flags, "--recompute", "model")
    assert report["fitting"] and "--use-distributed-optimizer" not in report["layouts"][0]["flags"]


def test_nothing_fits(capsys):
    report, shown = plan(capsys, "--devices", "1", "--memory", "8GB", "--bf16", "--micro-batch-size", "1", code=1)
    assert "nothing fits into 7.2 GB a device" in report["error"]
    assert report["layouts"][0]["fits"] is False
    assert "DO NOT fit" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory", "64GB", "--devices", "0"], "--devices is 0: expected at least 1"),
        (["--memory", "64GB", "--efficiency", "2"], "expected at most 1, a share of the peak"),
        (["--memory", "64GB", "--reserve", "100"], "--reserve is 100: expected 0 to below 100"),
        (["--memory", "64GB", "--sample-images", "-1"], "--sample-images is -1: expected at least 0"),
        (["--memory", "64GB", "--sample-tokens", "9999"], "--sample-tokens 9999 exceeds --seq-length"),
        (["--hardware", "H9000"], "--hardware H9000 is not in the table: expected one of A100"),
        (["--memory", "64GB", "--measured", "no.jsonl"], "--measured no.jsonl cannot be read"),
        (["--memory", "64GB", "--mm-data", "d.json", "--sample-tokens", "9"], "leave out --sample-tokens"),
        (
            ["--memory", "64GB", "--devices", "6", "--tensor-model-parallel-size", "3"],
            "num_attention_heads 32 cannot be",
        ),
        (["--memory", "64GB", "--hidden-size", "7"], "--hidden-size is 7, but text_decoder.hidden_size is 4096"),
    ],
)
def test_refused(capsys, flags, message):
    report, _ = plan(capsys, *flags, code=1)
    assert message in report["error"]


@pytest.mark.parametrize(("given", "message"), [("64 apples", "is no size"), ("64", "'64' is 64 bytes: .* like 64GB")])
def test_no_size(capsys, given, message):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--mm-model", MODEL, "--memory", given])
    assert re.search(message, capsys.readouterr().err)


def test_all_frozen(capsys, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model(())))
    report, _ = plan(capsys, "--memory", "1GB", code=1, path=path)
    assert "nothing to train" in report["error"]
