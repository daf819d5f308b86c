"""The driver: folders that never mix, commands that fail loudly, a kill that leaves nothing behind."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from examples.quickstart import main as quickstart
from examples.quickstart import steps
from examples.quickstart.commands import (
    Command,
    StepError,
    follow,
    iteration_of,
    json_result,
    logged_losses,
    run,
    shortened,
)
from examples.quickstart.plots import plot_losses, plot_test_sheet, sheet_selection
from examples.quickstart.results import Answer, loss_drop, read_metrics
from examples.quickstart.settings import FAST, FULL
from examples.quickstart.state import FolderError, RunFolder, exclusive
from examples.quickstart.walk import guarded

LOG_LINE = (
    "[2026-01-01 00:00:00] iteration       40/     100 | consumed samples: 1280 | learning rate: 1.0E-04 | "
    "lm loss: 1.960707E+00 | grad norm: 1.944 |"
)


def python(code: str) -> Command:
    return Command([sys.executable, "-c", code], {})


# --- the output folder


def test_a_run_is_taken_up_again(tmp_path):
    folder = RunFolder(tmp_path / "out", "print")
    folder.open(clean=False)
    folder.finish("data", {"images": 3})
    again = RunFolder(tmp_path / "out", "print")
    again.open(clean=False)
    assert again.result("data") == {"images": 3} and again.result("models") is None


def test_another_run_is_refused_and_untouched(tmp_path):
    RunFolder(tmp_path, "old").open(clean=False)
    (tmp_path / "kept").write_text("x")
    with pytest.raises(FolderError, match="holds a run with other settings.*--clean"):
        RunFolder(tmp_path, "new").open(clean=False)
    assert (tmp_path / "kept").exists()


def test_clean_starts_over(tmp_path):
    RunFolder(tmp_path, "old").open(clean=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("x")
    folder = RunFolder(tmp_path, "new")
    folder.open(clean=True)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"] and folder.result("data") is None


@pytest.mark.parametrize("clean", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path, clean):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FolderError, match="is not empty and holds no state.json"):
        RunFolder(tmp_path, "print").open(clean)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["{", "[]", '{"fingerprint": "x"}'])
def test_a_broken_state_is_named(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(FolderError, match="state.json cannot be read"):
        RunFolder(tmp_path, "print").open(clean=False)


def test_two_runs_never_share_a_folder(tmp_path):
    with exclusive(tmp_path), pytest.raises(FolderError, match="another quickstart is running"):
        with exclusive(tmp_path):
            pass
    with exclusive(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="cannot be used"), exclusive(tmp_path / "file" / "out"):
        pass


def test_fingerprints_tell_the_forms_apart():
    assert FULL.fingerprint() != FAST.fingerprint() and FULL.fingerprint() == FULL.fingerprint()
    for settings in (FULL, FAST):
        assert settings.save_interval < settings.interrupt_at < settings.stage2_steps


# --- commands


def test_output_is_kept_and_returned(tmp_path):
    lines = run(python("print('one'); print('two')"), tmp_path, tmp_path / "logs" / "x.log")
    assert lines == ["one", "two"]
    assert (tmp_path / "logs" / "x.log").read_text(encoding="utf-8").endswith("one\ntwo\n")


def test_a_failure_shows_the_programs_own_lines(tmp_path):
    code = "print('the cause'); print('E torch/distributed/elastic: page'); print('noise'); raise SystemExit(3)"
    with pytest.raises(StepError, match=r"exit code 3(.|\n)*the cause") as caught:
        run(python(code), tmp_path, tmp_path / "x.log")
    assert "noise" not in str(caught.value)


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(StepError, match="no-such-program"):
        run(Command(["no-such-program"], {}), tmp_path, tmp_path / "x.log")


def test_an_interruption_kills_the_whole_family(tmp_path):
    child = "import time, os; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "import os\n"
        "while not os.path.exists('pid') or not open('pid').read(): time.sleep(0.01)\n"
        "print('now', flush=True); time.sleep(60)"
    )
    run(python(code), tmp_path, tmp_path / "x.log", stop_when=lambda line: line.startswith("now"))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


SAVING = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.3)  # subprocess.run kills what takes longer than 0.25 s
    open('saved', 'w').close()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print('begun', flush=True)
os.kill(os.getppid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("way", ["run", "follow"])
def test_letter_k_ctrl_c_lets_a_command_save(tmp_path, monkeypatch, way):
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\n{SAVING}")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Command([str(program)], {}), tmp_path, tmp_path / "x.log") if way == "run" else follow(["train"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()


def test_a_command_that_fails_has_said_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert guarded("study", lambda: follow(["train"])) == 1
    assert capsys.readouterr().err == "\nstudy: error: train ended with exit code 1; the lines above say why\n"


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_an_interruption_that_never_comes_is_an_error(tmp_path):
    with pytest.raises(StepError, match="should have been interrupted"):
        run(python("print('done')"), tmp_path, tmp_path / "x.log", stop_when=lambda line: False)


def test_log_lines_are_read():
    assert iteration_of(LOG_LINE) == (40, 100, 1.960707)
    assert iteration_of("saved checkpoint") is None
    assert logged_losses(["x", LOG_LINE]) == {40: 1.960707}


def test_json_is_the_last_line_that_is_json():
    assert json_result(["{not", '{"a": 1}', "progress"]) == {"a": 1}
    with pytest.raises(StepError, match="no line of JSON"):
        json_result(["text"])


def test_commands_are_shown_as_they_are_typed(tmp_path):
    assert str(Command(["echo", "a b"], {"X": "1 2"})) == "X='1 2' echo 'a b'"
    assert shortened(f"cat {tmp_path}/out/x {tmp_path}2/y", tmp_path) == f"cat out/x {tmp_path}2/y"


# --- results


def test_metrics_skip_a_cut_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 1, "loss": 2.0}]


def test_loss_drop_compares_the_ends():
    assert loss_drop([{"loss": float(value)} for value in range(20, 0, -1)]) == (19.5, 1.5)


def test_images_are_drawn(tmp_path):
    records = [{"iteration": step, "loss": 5.0 / step} for step in range(1, 41)]
    plot_losses(tmp_path / "a.png", records, records, {"checkpoint": 20, "killed_at": 30, "lost": [[30, 0.2]]})
    options = dict(zip("ABCD", ("one", "two", "three", "four"), strict=True))
    drawn = Image.new("L", (32, 32))
    answers = [Answer(drawn, "Which?", options, "A", said, said == "A") for said in ("A", "B", "I do not know") * 20]
    plot_test_sheet(tmp_path / "b.png", answers, 1 / 3)
    chosen = sheet_selection(answers)
    assert len(chosen) == 24 and sum(not answer.hit for answer in chosen) >= 12
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 800


# --- the walk


@pytest.fixture
def stub_steps(monkeypatch):
    """Two steps that note their calls instead of training."""
    calls = []

    def stage2(run):
        calls.append("stage2")
        return {"checkpoint": "somewhere"}

    def evaluate(run):
        calls.append("evaluate")
        return {"accuracy": 0.95, "n": 360, "unparsed": 0}

    monkeypatch.setattr(quickstart, "STEPS", (("stage2", "Train", stage2), ("evaluate", "Evaluate", evaluate)))
    return calls


def test_the_last_line_is_json(stub_steps, tmp_path, capsys):
    assert quickstart.main(["--out", "out", "--relative-to", str(tmp_path)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["accuracy"], last["n"], last["checkpoint"]) == (0.95, 360, "somewhere")
    assert quickstart.main(["--out", "out", "--relative-to", str(tmp_path)]) == 0
    assert stub_steps == ["stage2", "evaluate"], "finished steps are not done again"


def test_a_poor_accuracy_fails(stub_steps, tmp_path, monkeypatch, capsys):
    poor = ("evaluate", "Evaluate", lambda run: {"accuracy": 0.5, "n": 360, "unparsed": 0})
    monkeypatch.setattr(quickstart, "STEPS", (quickstart.STEPS[0], poor))
    assert quickstart.main(["--out", str(tmp_path)]) == 1
    assert "at least 0.9 is required" in capsys.readouterr().err


def test_a_failed_step_is_done_again(stub_steps, tmp_path, monkeypatch, capsys):
    def broken(run):
        raise StepError("no luck")

    good = quickstart.STEPS
    monkeypatch.setattr(quickstart, "STEPS", (good[0], ("evaluate", "Evaluate", broken)))
    assert quickstart.main(["--out", str(tmp_path)]) == 1
    assert "no luck" in capsys.readouterr().err
    monkeypatch.setattr(quickstart, "STEPS", good)
    assert quickstart.main(["--out", str(tmp_path)]) == 0
    assert stub_steps == ["stage2", "evaluate"]


def test_training_commands_name_existing_launchers(tmp_path):
    folder = RunFolder(tmp_path, "print")
    folder.open(clean=False)
    folder.finish("models", {"vocabulary": 1024})
    for words in (steps.training_words(steps.Run(folder, FULL), name, 1, 0.1) for name in LAUNCHERS):
        assert (steps.ROOT / words[1]).exists()
    assert os.path.isabs(Path(steps.ROOT))


LAUNCHERS = ("pretrain_llava1_5.sh", "finetune_llava1_5.sh")
