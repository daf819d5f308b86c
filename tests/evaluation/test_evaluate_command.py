"""`mindspeed-mm evaluate` and its launcher, with the golden tiny model."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from evaluation_helpers import choice_rows, write_table

import mindspeed_mm as mm
from evaluation.runner import run
from mindspeed_mm.cli.main import main
from mindspeed_mm.config.evaluation import EvaluationConfig
from mindspeed_mm.config.load import load_config, read_json
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import MODEL_KEYS
from tests.helpers.golden_model import model_json

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "llava1.5"


def command(golden, table, out, *flags):
    return [
        *("evaluate", "--model", str(golden / "models" / "llava_hf"), "--dataset-path", str(table)),
        *("--evaluation-dataset", "toy", "--result-output-path", str(out), "--max-new-tokens", "3"),
        *("--device", "cpu", *flags),
    ]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_scores_are_printed_and_resumed(golden, table_path, tmp_path, capsys):
    assert main(command(golden, table_path, tmp_path / "out", "--json", "--batch-size", "4")) == 0
    *text, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert (result["benchmark"], result["model"], result["n"], result["resumed"]) == ("toy", "llava_hf", 6, 0)
    assert text[0].startswith("toy, strict scoring: accuracy ") and text[1].startswith("toy, compat scoring")
    names = ("toy.xlsx", "toy_acc.csv", "toy_report.json", "toy_report.html")
    assert set(files(tmp_path / "out")) == {f"llava_hf_{name}" for name in names}
    before = files(tmp_path / "out")
    assert main(command(golden, table_path, tmp_path / "out", "--json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["resumed"] == 6
    assert files(tmp_path / "out") == before


def test_answers_are_those_of_the_api(golden, table_path, tmp_path):
    assert main(command(golden, table_path, tmp_path, "--limit", "2")) == 0
    report = json.loads((tmp_path / "llava_hf_toy_report.json").read_text())
    (journal,) = (tmp_path / "llava_hf_toy.journal").iterdir()
    answers = {r["index"]: r["prediction"] for r in map(json.loads, journal.read_text().splitlines()[1:])}
    from evaluation.tsv import read_table

    vlm, table = mm.load(golden / "models" / "llava_hf", device="cpu"), read_table(table_path)
    for row in table.rows[:2]:
        question = f"<image>\n{row.cells['question']}\nA. cat\nB. dog\n" + ("C. None\n" if row.index == 0 else "")
        question += "Answer with the option's letter from the given choices directly."
        assert [answers[row.index]] == vlm.generate(question, list(table.images(row)), max_new_tokens=3)
    assert report["decoding"]["method"] == "greedy" and report["template"] == "v1"


def test_letter_b_the_models_sampling_is_told_and_not_used(golden, table_path, tmp_path, capsys):
    """A benchmark is greedy, whatever the model's own generation_config.json asks for."""
    shutil.copytree(golden / "models" / "llava_hf", tmp_path / "drawing")
    (tmp_path / "drawing" / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.7}')
    line = command(golden, table_path, tmp_path / "out", "--limit", "1")
    line[2] = str(tmp_path / "drawing")
    assert main(line) == 0
    assert "generation_config.json asks for do_sample True, temperature 1.7: not used here" in capsys.readouterr().err
    assert main(command(golden, table_path, tmp_path / "out", "--limit", "1")) == 0
    drawn, plain = (
        json.loads((tmp_path / "out" / f"{name}_toy_report.json").read_text()) for name in ("drawing", "llava_hf")
    )
    assert drawn["decoding"] == plain["decoding"] and drawn["decoding"]["method"] == "greedy"


def test_both_prompt_styles_and_an_unknown_benchmark(golden, table_path, tmp_path, capsys):
    assert main(command(golden, table_path, tmp_path, "--limit", "1", "--prompt-style", "vlmevalkit")) == 0
    path = write_table(tmp_path / "t.tsv", [{"index": "1", "image": choice_rows(1)[0]["image"], "question": "?"}])
    line = command(golden, path, tmp_path)
    line[line.index("toy")] = "ai2d_tset"
    assert main(line) == 1
    assert "nearest: ai2d_test" in capsys.readouterr().err


def test_the_guides_json_with_flags_on_top(golden, table_path, tmp_path):
    values = model_json(golden) | {
        "dataset_path": "nowhere.tsv",
        "evaluation_dataset": "toy",
        "result_output_path": str(tmp_path / "out"),
        "tokenizer": {"hub_backend": "hf", "from_pretrained": str(golden / "tokenizer")},
        "image_processer_path": str(golden / "models" / "clip_hf"),
        "generation_config": {
            "max_new_tokens": 2,
            "temperature": 0.0,
            "top_p": None,
            "do_sample": False,
            "num_beams": 1,
        },
        "device": "cpu",
    }
    path = tmp_path / "evaluate.json"
    path.write_text(json.dumps(values))
    assert main(["evaluate", "--mm-model", str(path), "--dataset-path", str(table_path), "--limit", "1"]) == 0
    report = json.loads((tmp_path / "out" / "llava_v1.5_7b_toy_report.json").read_text())
    assert report["decoding"]["max_new_tokens"] == 2 and report["limit"] == 1


def test_what_is_missing_is_told_before_the_model_is_loaded(golden, tmp_path, capsys):
    assert main(["evaluate", "--model", "nowhere"]) == 1
    error = capsys.readouterr().err
    assert "dataset_path: missing" in error and "result_output_path: missing" in error
    assert main(command(golden, tmp_path / "no.tsv", tmp_path)) == 1
    assert "cannot read" in capsys.readouterr().err
    table = write_table(tmp_path / "t.tsv", choice_rows(1))
    assert main(["evaluate", *command(golden, table, tmp_path)[3:]]) == 1
    assert "give --model PATH, --load CHECKPOINT or --mm-model JSON, or --predictions" in capsys.readouterr().err


def test_example_config():
    values = read_json(EXAMPLES / "evaluate_llava1_5.json")
    own = {key: value for key, value in values.items() if key not in MODEL_KEYS}
    config = load_config(EvaluationConfig, own, what="evaluation config")
    assert config.evaluation_dataset == "ai2d_test" and config.evaluation_model == "llava_v1.5_7b"
    with pytest.raises(ConfigError, match='dataset_pth: unknown key; did you mean "dataset_path"'):
        load_config(EvaluationConfig, own | {"dataset_pth": "x"}, what="evaluation config")


def test_launcher(tmp_path):
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPUS_PER_NODE": "3", "LOAD_PATH": "a b"}
    script = ["bash", str(EXAMPLES / "evaluate_llava1_5.sh"), "--limit", "5"]
    told = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.startswith("--nproc_per_node 3 --nnodes 1")
    expected = "-m mindspeed_mm evaluate --mm-model examples/llava1.5/evaluate_llava1_5.json --load a b --limit 5\n"
    assert told.endswith(expected)


def evaluate_on_this_rank(model, table, out, batch_size, tensor=1, pipeline=1):
    """Runs on every rank of a pool."""
    from evaluation.model_engine import ModelEngine
    from evaluation.ranks import connect
    from mindspeed_mm.generation.options import GenerationOptions

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(torch.distributed.get_world_size()))  # as torchrun does
        communicator = connect("cpu", tensor, pipeline)
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    engine = ModelEngine(mm.load(model, device="cpu", **sizes), GenerationOptions(max_new_tokens=3))
    result = run("toy", table, engine, out, model="m", batch_size=batch_size, communicator=communicator, progress=False)
    return result.predictions


def test_files_are_equal_at_any_number_of_ranks_and_batch_size(golden, tmp_path, ranks):
    table = write_table(tmp_path / "t.tsv", choice_rows(11))
    model = golden / "models" / "llava_hf"
    flags = ("--evaluation-model", "m", "--batch-size")
    assert main(command(golden, table, tmp_path / "1-1", *flags, "1")) == 0
    assert main(command(golden, table, tmp_path / "1-16", *flags, "16")) == 0
    expected = files(tmp_path / "1-1")
    assert len(expected) == 4 and files(tmp_path / "1-16") == expected
    for count, batch_size in ((2, 16), (3, 1)):
        out = tmp_path / f"{count}-{batch_size}"
        answers = ranks(count).run(evaluate_on_this_rank, model, table, out, batch_size)
        assert all(own == answers[0] for own in answers) and len(answers[0]) == 11
        assert len(list((out / "m_toy.journal").iterdir())) == count
        assert files(out) == expected


@pytest.mark.parametrize(("count", "tensor", "pipeline"), [(2, 2, 1), (2, 1, 2), (4, 2, 1)])
def test_a_model_that_is_spread_over_ranks_gives_the_same_answers(golden, tmp_path, ranks, count, tensor, pipeline):
    table = write_table(tmp_path / "t.tsv", choice_rows(7))
    model = golden / "models" / "llava_hf"
    assert main(command(golden, table, tmp_path / "whole", "--evaluation-model", "m")) == 0
    answers = ranks(count).run(evaluate_on_this_rank, model, table, tmp_path / "o", 4, tensor, pipeline)
    assert all(own == answers[0] for own in answers)
    whole, spread = (json.loads((tmp_path / name / "m_toy_report.json").read_text()) for name in ("whole", "o"))
    assert spread["rows"] == whole["rows"] and spread["scores"] == whole["scores"]
    assert (spread["tensor_model_parallel_size"], spread["pipeline_model_parallel_size"]) == (tensor, pipeline)
    assert spread["fingerprint"] != whole["fingerprint"]
    assert len(list((tmp_path / "o" / "m_toy.journal").iterdir())) == count // (tensor * pipeline)


def test_copies_that_do_not_fit_the_number_of_processes(golden, table_path, tmp_path, capsys):
    assert main(command(golden, table_path, tmp_path, "--tensor-model-parallel-size", "2")) == 1
    assert "need a multiple of 2 processes, found 1: start with torchrun --nproc_per_node 2" in capsys.readouterr().err


def test_a_question_beyond_the_context_has_an_empty_answer(golden, tmp_path, capsys):
    rows = choice_rows(2)
    rows[0]["question"] = "What is it? " * 2000
    table = write_table(tmp_path / "t.tsv", rows)
    assert main(command(golden, table, tmp_path / "o")) == 0
    told = capsys.readouterr().err
    assert "question 0 has no answer and counts as wrong: a prompt of" in told and "empty answers: 1" in told
    report = json.loads((tmp_path / "o" / "llava_hf_toy_report.json").read_text())
    assert report["empty_answers"] == 1 and report["rows"][0]["prediction"] == "" != report["rows"][1]["prediction"]
    assert report["rows"][0]["strict"][1] == report["rows"][0]["compat"][1] == 0


def kill_when_answered(line, journal, lines):
    """Start the command and kill it (SIGKILL) when its journal holds `lines` answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mindspeed_mm", *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        written = sum(path.read_bytes().count(b"\n") - 1 for path in journal.glob("*.jsonl"))
        if written >= lines:
            break
        time.sleep(0.005)
    process.kill()
    process.wait()


def test_a_killed_run_gives_the_same_files(golden, tmp_path, capsys):
    table = write_table(tmp_path / "t.tsv", choice_rows(60))
    line = command(golden, table, tmp_path / "killed", "--json")
    kill_when_answered(line, tmp_path / "killed" / "llava_hf_toy.journal", 25)
    assert main(line) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["resumed"] >= 25
    assert main(command(golden, table, tmp_path / "whole", "--batch-size", "16")) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_digest_tells_weights_apart_and_not_their_layout(golden):
    from evaluation.model_engine import weights_digest

    first = mm.load(golden / "models" / "llava_hf", device="cpu").model
    again = mm.load(golden / "models" / "llava_hf", device="cpu").model
    name = weights_digest(first)
    assert weights_digest(again) == name
    parameter = next(again.parameters()).data.flatten()
    parameter[[0, 1]] = parameter[[1, 0]]
    assert weights_digest(again) != name
    assert weights_digest(first.to(torch.bfloat16)) != name


def test_digest_does_not_depend_on_the_chunks(monkeypatch):
    from evaluation import model_engine

    model = torch.nn.Linear(7, 5)
    name = model_engine.weights_digest(model)
    monkeypatch.setattr(model_engine, "DIGEST_CHUNK", 3)
    assert model_engine.weights_digest(model) == name
