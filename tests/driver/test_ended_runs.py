"""Every way out of a run ends every rank within seconds, with a code that is not 0, and nothing is left behind."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import psutil
import pytest
from PIL import Image

from mindspeed_mm import ending
from tests.helpers.golden_model import model_json

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--lr 1e-3 --train-iters 6 --micro-batch-size 1 --global-batch-size 2 --seq-length 192 --log-interval 1 "
    "--device cpu --save {place} --save-interval 3 --distributed-timeout-minutes 1"
)
SAID = {
    "bad image": r"error: .*broken.png",
    "full disk": r"iteration 3 could not be saved",
    "not finite": r"step 3: the loss is nan",
    "hook": r"RuntimeError: a hook of the user",
    "hook 1": r"a hook of the user",
    "lost 0": r"rank 0( or its host|'s host| on \S+) is lost",
    "lost 1": r"rank 1 on \S+ (is lost|stopped)",
    "SIGINT": r"train: stopped by SIGINT after step 3 of 6: saved in \S+iter_0000003",
    "SIGTERM": r"train: stopped by SIGTERM after step 3 of 6: saved in \S+iter_0000003",
    "SIGUSR1": r"train: stopped by SIGUSR1 after step 3 of 6: saved in \S+iter_0000003",
    "SIGHUP": r"train: stopped by SIGHUP after step 3 of 6: saved in \S+iter_0000003",
}
CODES = {name: 128 + signal.Signals[name] for name in SAID if name.startswith("SIG")}
TRAINED = [
    ("bad image", 4, 2),
    ("not finite", 1, 1),
    ("hook 1", 1, 2),
    ("lost 1", 2, 2),
    ("SIGINT", 1, 2),
    ("SIGTERM", 1, 1),
]
"""(cause, loader workers, ranks) that every run of the tests tries."""


def ended(folder, cases):
    """The JSON lines of tests.helpers.ended_runs."""
    program = [sys.executable, "-m", "tests.helpers.ended_runs", str(folder), json.dumps(cases)]
    found = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(cases), found.stderr[-2000:]
    return lines


@pytest.fixture
def folder(golden, tmp_path):
    """model.json, good.json and bad.json."""
    Image.new("RGB", (60, 60), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    turns = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho ho."}]
    rows = [{"id": str(number), "image": "red.png", "conversations": turns} for number in range(12)]
    model = model_json(golden, trained=("text_decoder", "vision_projector"))
    (tmp_path / "model.json").write_text(json.dumps(model))
    for name in ("good", "bad"):
        if name == "bad":
            rows[4] = rows[4] | {"image": "broken.png"}
        (tmp_path / f"{name}_rows.json").write_text(json.dumps(rows))
        parameters = {
            "dataset_type": "multimodal",
            "basic_parameters": {"data_path": str(tmp_path / f"{name}_rows.json"), "data_folder": str(tmp_path)},
            "preprocess_parameters": {"image_processer_path": str(golden / "models" / "clip_hf")},
            "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
        }
        loading = {"shuffle": False}
        (tmp_path / f"{name}.json").write_text(json.dumps({"dataset_param": parameters, "dataloader_param": loading}))
    return tmp_path


def training(folder, cause, workers, ranks, *flags):
    """A case of `train`."""
    data = folder / ("bad.json" if cause == "bad image" else "good.json")
    files = ["--mm-model", str(folder / "model.json"), "--mm-data", str(data), "--num-workers", str(workers)]
    return {"cause": cause, "ranks": ranks, "command": ["train", *files, *FLAGS.split(), *flags]}


def check(case, found):
    """Codes and what is left; everything that was said but by a killed rank."""
    killed = int(case["cause"][5:]) if case["cause"].startswith("lost") else None
    told = "\n".join(text for rank, text in enumerate(found["said"]) if rank != killed)
    for rank, code in enumerate(found["ends"]):
        if rank == killed:
            assert code == -signal.SIGKILL
        else:
            wanted = CODES.get(case["cause"])
            assert code > 0 and wanted in (None, code), (case, found)
    assert not found["left"], (case, found)
    assert "Timeout (" not in told, told  # the process ended by itself
    return told


def check_training(cases, lines):
    for case, found in zip(cases, lines, strict=True):
        told = check(case, found)
        assert re.search(SAID[case["cause"]], told), (case, told)


def test_letter_j_every_way_out_of_training(folder):
    cases = [training(folder, *case) for case in TRAINED]
    cases.append(training(folder, "full disk", 1, 2, "--async-save"))
    check_training(cases, ended(folder, cases))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["saved at once", "saved in the background"])
def test_letter_j_every_way_out_of_training_at_every_size(folder, flags):
    cases = [
        training(folder, cause, workers, ranks, *flags)
        for cause, workers, ranks in product(SAID, (0, 1, 4), (1, 2))
        if ranks == 2 or cause[-1] not in "01"
    ]
    check_training(cases, ended(folder, cases))


RANK = """
import os, signal
from mindspeed_mm import ending
ending.run_process(lambda: print(os.getpid(), flush=True) or signal.pause())
"""
LAUNCHER = "import signal, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); signal.pause()"


def test_letter_j_a_rank_stops_when_its_torchrun_is_killed():
    variables = os.environ | {ending.TORCHRUN: "none"}
    program = [sys.executable, "-c", LAUNCHER, RANK]
    with subprocess.Popen(program, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as launcher:
        rank = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
        _, alive = psutil.wait_procs([rank], timeout=60)
        for process in alive:
            process.kill()
    assert not alive


ENDING = """
import atexit, threading
from mindspeed_mm import ending

class Kept:
    def __del__(self):
        print("taken apart")

kept, told = Kept(), threading.Event()
atexit.register(print, "handler")
threading.Thread(target=lambda: told.wait() and print("thread")).start()
ending.run_process(lambda: told.set() or 3)
"""


def test_letter_j_the_end_waits_for_threads_and_handlers_alone():
    """It does not take every module apart, which takes long on a busy machine."""
    done = subprocess.run([sys.executable, "-c", ENDING], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "thread\nhandler\n", "")


def test_letter_j_an_end_without_room_for_its_words_is_a_failure():
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command, kept = [sys.executable, "-c", ENDING], subprocess.PIPE
        done = subprocess.run(command, cwd=ROOT, env=variables, stdout=full, stderr=kept, text=True)
    assert done.returncode == 120 and "No space left on device" in done.stderr


INTERRUPTED = """
import threading
from mindspeed_mm import ending
threading.Thread(target=threading.Event().wait).start()
ending.run_process(lambda: 130)
"""


def test_letter_k_ctrl_c_twice_waits_for_no_thread():
    assert subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, timeout=60).returncode == 130


STREAMS = """
import os, sys
from mindspeed_mm import ending

def work():
    print("nobody sees it")
    with open(sys.argv[1], "w") as file:
        file.write(str(file.fileno()))
    assert all(map(os.get_inheritable, range(3)))
    return ending.nobody_reads()

ending.run_process(work)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_letter_j_a_process_without_streams_ends_as_any_other(tmp_path, closed):
    """The file it opens does not take their place."""
    command = ["bash", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", STREAMS, str(tmp_path / "file")]
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


def test_letter_j_nobody_reads_a_pipe_whose_reader_has_ended(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", STREAMS, str(tmp_path / "file")]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("name", "ranks", "before"),
    [("SIGTERM", 1, "SIG_DFL"), ("SIGTERM", 2, "SIG_DFL"), ("SIGHUP", 1, "SIG_DFL"), ("SIGHUP", 1, "SIG_IGN")],
)
def test_letter_k_a_signal_is_the_last_word_of_a_command_alone(tmp_path, name, ranks, before):
    """Ranks of several end at once, and torchrun says it. nohup has SIGHUP ignored."""
    number = signal.Signals[name]
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, mindspeed_mm.cli.infer as command\n"
        f"command.run = lambda _: os.kill(os.getpid(), {number})\n"
        f"signal.signal({number}, signal.{before})\n"
    )
    variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "WORLD_SIZE": str(ranks), "RANK": "0"}
    command = [sys.executable, "-m", "mindspeed_mm", "infer"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    alone = (128 + number, f"mindspeed-mm infer: stopped by {name}\n")
    ended = alone if ranks == 1 else (-number, "")
    assert (done.returncode, done.stderr) == ((0, "") if before == "SIG_IGN" else ended)


def answering(golden, folder, command, cause, ranks):
    """A case of `infer` or `evaluate`; at 2 ranks the model is spread over both."""
    common = ["--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--max-new-tokens", "40"]
    if ranks == 2:
        common += ["--tensor-model-parallel-size", "2"]
    if command == "infer":
        image = str(folder / ("broken.png" if cause == "bad image" else "red.png"))
        own = ["--image", image, "--prompt", "What is it?"]
    else:
        rows = [{"index": str(n), "question": "Why?", "answer": "A", "A": "cat", "B": "dog"} for n in range(4)]
        buffer = io.BytesIO()
        Image.new("RGB", (60, 60), "red").save(buffer, "PNG")
        data = buffer.getvalue()
        for row in rows:
            broken = cause == "bad image" and row["index"] == "3"
            row["image"] = base64.b64encode(data[:60] if broken else data).decode()
        table = folder / f"table_{cause}.tsv"
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        table.write_text("\n".join(lines) + "\n")
        own = ["--dataset-path", str(table), "--evaluation-dataset", "toy", "--result-output-path", "{place}"]
    return {"cause": cause, "ranks": ranks, "command": [command, *common, *own]}


def test_letter_j_every_way_out_of_infer_and_evaluate(golden, folder):
    causes = (("bad image", 1), ("bad image", 2), ("SIGINT", 1), ("SIGTERM", 2), ("lost 1", 2))
    cases = [answering(golden, folder, name, *cause) for name in ("infer", "evaluate") for cause in causes]
    for case, found in zip(cases, ended(folder, cases), strict=True):
        killed = [1] if case["cause"] == "lost 1" else []
        for rank, code in enumerate(found["ends"]):
            # SIGTERM ends them at once: every answer is on the disk already.
            by_signal = rank in killed or case["cause"] == "SIGTERM"
            wanted = {"SIGINT": 130, "SIGTERM": -signal.SIGTERM, "lost 1": -signal.SIGKILL}.get(case["cause"])
            assert code == wanted if by_signal or case["cause"] == "SIGINT" else code > 0, (case, found)
        assert not found["left"] and not any("Timeout (" in text for text in found["said"]), (case, found)
