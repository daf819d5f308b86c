"""Each benchmark runs to its end on its smallest work: nobody else would see that one has been left behind."""

import json
import os
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

SMALLEST = {
    "train": "--size tiny --kind stage1 equal mixed --repeats 1 --steps 1 --batch 2",
    "levers": "--size tiny --kind stage1 mixed --repeats 1",
    "dpo": "--size tiny --repeats 1 --steps 1 --batch 2",
    "startup": "--repeats 1",
    "growth": "--size tiny --repeats 1 --curves text",
    "feature_cache": "--size tiny --images 4 --turns 1",
    "serve": "--size tiny --clients 2 --requests 4 --new-tokens 4 --repeats 1",
    "generate": "--size tiny --batch 2 --new-tokens 4 --repeats 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_work(name, tmp_path):
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", *SMALLEST[name].split(), "--out", out],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text())
