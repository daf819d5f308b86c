"""A new user's walk: convert, train on one rank and on two, resume, evaluate; then what goes wrong on the way.

Each step is a process of its own, as in a terminal; nothing is patched.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from tests.evaluation.evaluation_helpers import choice_rows, write_table
from tests.helpers.golden_training import records
from tests.helpers.killed_runs import free_port
from tests.parallel.test_command import describe_data, folder  # noqa: F401  a fixture

ROOT = Path(__file__).parents[2]
STEPS = 3


def command(*arguments, expected=0):
    """Run `mindspeed-mm` with these arguments and return what it said."""
    return said_by([sys.executable, "-m", "mindspeed_mm", *arguments], {}, expected)


def said_by(words, variables, expected):
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == (expected == 0), done.stdout
    assert expected == 0 or "Traceback" not in done.stdout, done.stdout
    return done.stdout


def pretrain(place, *flags, ranks=1, save="save", expected=0):
    """Stage 1 by its launcher."""
    variables = {"NPUS_PER_NODE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables |= {"MBS": "1", "GBS": "2", "PRECISION": "fp32", "MM_MODEL": f"{place}/model.json"}
    variables |= {"MM_DATA": f"{place}/data.json", "SAVE_PATH": f"{place}/{save}"}
    variables |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    own = ["--num-workers", "0", "--device", "cpu", "--save-interval", str(STEPS), "--lr-decay-iters", "6", *flags]
    return said_by(["bash", "examples/llava1.5/pretrain_llava1_5.sh", *own], variables, expected)


def losses(save):
    return [record["loss"] for record in records(save)]


@pytest.fixture
def place(golden, folder):  # noqa: F811
    """A folder with data, whose model.json names converted weights."""
    describe_data(golden, folder)
    model = json.loads((folder / "model.json").read_text())
    model["text_decoder"] |= {"ckpt_path": str(folder / "decoder"), "freeze": True, "language_max_sequence_length": 192}
    shutil.copytree(golden / "models" / "vicuna", folder / "decoder")
    (folder / "model.json").write_text(json.dumps(model))
    return folder


@pytest.mark.slow
def test_letter_r_the_walk_of_a_new_user(golden, place):
    said = command("convert", golden / "models/llava_original", place / "converted", "--to", "llava-hf")
    assert (place / "converted" / "config.json").is_file(), said

    pretrain(place, "--train-iters", STEPS)
    pretrain(place, "--train-iters", STEPS, ranks=2, save="two")
    assert losses(place / "two") == pytest.approx(losses(place / "save"), rel=1e-5)

    pretrain(place, "--train-iters", 2 * STEPS)
    assert (place / "save/latest_checkpointed_iteration.txt").read_text().strip() == str(2 * STEPS)
    pretrain(place, "--train-iters", 2 * STEPS, save="whole")
    assert losses(place / "save") == pytest.approx(losses(place / "whole"), rel=1e-6)

    table = write_table(place / "mine.tsv", choice_rows(4))
    common = ("--evaluation-dataset", "mine", "--dataset-path", table, "--result-output-path", place / "results")
    common = (*common, "--tokenizer", golden / "tokenizer", "--image-processor", golden / "models/clip_hf")
    command("evaluate", "--load", place / "save", "--device", "cpu", *common)
    assert list((place / "results").glob("*_acc.csv"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("a mistyped flag", "--train-iters"),
        ("an image that is not there", "red.png"),
        ("weights cut short", "decoder"),
        ("an unknown key", "freeze"),
        ("no data", "rows.json"),
    ],
)
def test_letter_r_what_goes_wrong_on_the_walk_is_told(place, broken, told):
    flags = ["--train-iters", STEPS]
    if broken == "a mistyped flag":
        flags = ["--train-itres", STEPS]
    elif broken == "an image that is not there":
        (place / "red.png").unlink()
    elif broken == "weights cut short":
        weights = next((place / "decoder").glob("*.safetensors"))
        assert safetensors.torch.load_file(weights)
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif broken == "an unknown key":
        model = json.loads((place / "model.json").read_text())
        model["text_decoder"]["freez"] = True
        (place / "model.json").write_text(json.dumps(model))
    else:
        (place / "rows.json").write_text("[]")
    said = pretrain(place, *flags, expected=1)
    assert told in said
    assert not (place / "save/latest_checkpointed_iteration.txt").exists()
