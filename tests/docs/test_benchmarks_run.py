"""Each benchmark runs to its end on its smallest work: nobody else would see that one has been left behind."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

SMALLEST = {
    "train": "--size tiny --kind stage1 equal mixed --repeats 1 --steps 1 --batch 2 --out OUT",
    "finetune": "--size 'tiny blocks' --mode lora --repeats 1 --steps 1 --batch 2 --out OUT",
    "levers": "--size tiny --kind stage1 mixed --repeats 1 --out OUT",
    "dpo": "--size tiny --repeats 1 --steps 1 --batch 2 --out OUT",
    "startup": "--repeats 1 --out OUT",
    "growth": "--size tiny --repeats 1 --curves text --out OUT",
    "feature_cache": "--size tiny --images 4 --turns 1 --out OUT",
    "serve": "--size tiny --clients 2 --requests 4 --new-tokens 4 --repeats 1 --out OUT",
    "generate": "--size tiny --batch 2 --new-tokens 4 --repeats 1 --out OUT",
    "evaluate": "--tokenizer TOKENIZER --shapes gqa --questions 4",
    "data": "--tokenizer TOKENIZER --records 2000 --checked 200",
    "convert": "--tokenizer TOKENIZER --size 8MB --shard-size 4MB --repeat 1 --to llava-hf",
}
"""Flags; OUT stands for a file, TOKENIZER for a folder."""

ELSEWHERE = {
    "lever_accuracy": "whole runs of the quickstart, of minutes each",
    "scaling": "five layouts under torchrun; its parts are those of train.py",
    "serve_load": "kills and starts workers; its clients and servers run in tests/serving/test_rude_clients.py",
    "plots": "draws the results that are here already",
}
"""Benchmarks that are not run, and why. Files without a command line are modules of the others."""


def test_every_benchmark_is_run_or_says_why():
    own = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser(description=" in path.read_text()
    }
    assert own == {*SMALLEST, *ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_work(golden, name, tmp_path):
    places = {"OUT": tmp_path / "found.json", "TOKENIZER": golden / "models" / "vicuna"}
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / f"{name}.py"),
            *(places.get(word, word) for word in shlex.split(SMALLEST[name])),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "OUT" in SMALLEST[name]:
        assert json.loads(places["OUT"].read_text())
    else:
        assert done.stdout.lstrip().startswith("{")
