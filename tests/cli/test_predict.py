"""do_train, do_eval, do_predict and do_multi_predict in one launch; predictions in the order of the records."""

import json
import os

import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.errors import ConfigError
from tests.helpers.golden_model import model_json

FLAGS = "--lr 1e-3 --micro-batch-size 1 --global-batch-size 2 --seq-length 256 --num-workers 0 --device cpu"
NAMES = ("it", "the grey one", "all", "a corner", "the left")
STEPS = ["--do-eval", "--do-predict", "--do-multi-predict"]


def rec_set(folder, count, **more):
    rows = [{"img_path": "a.png", "expression": name, "bbox": [0, 0, 10 + n, 20]} for n, name in enumerate(NAMES)]
    path = folder / f"rec{count}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    return {"data_path": str(path), "data_folder": str(folder), "dataset_type": "rec"} | more


@pytest.fixture
def files(tmp_path, golden):
    """Writes model.json and data.json; their paths as flags."""
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    prediction = {
        "eval": rec_set(tmp_path, 2, metric="rec"),
        "test": rec_set(tmp_path, 5, metric="rec", grounding={"notation": "minigpt_v2"}),
        "multitest": {"words": rec_set(tmp_path, 3, metric="exact"), "free": rec_set(tmp_path, 1)},
        "generation": {"max_new_tokens": 3},
    }
    data = {
        "dataset_param": {
            "dataset_type": "rec",
            "basic_parameters": rec_set(tmp_path, 4),
            "preprocess_parameters": {"image_processer_path": str(golden / "models" / "clip_hf"), "pad2square": True},
            "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
            "template_name": "v1",
        },
        "prediction": prediction,
    }
    (tmp_path / "d.json").write_text(json.dumps(data))
    (tmp_path / "m.json").write_text(json.dumps(model_json(golden, trained=("vision_projector",))))
    return ["--mm-data", str(tmp_path / "d.json"), "--mm-model", str(tmp_path / "m.json")]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_launch_trains_and_answers(files, tmp_path, single_process, capsys):
    save = tmp_path / "save"
    assert main(["train", *files, *FLAGS.split(), "--train-iters", "1", "--save", str(save), *STEPS, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["iteration"] == 1 and result["test_samples"] == 5 and result["eval_failed"] == 2
    answers = lines(save / "test_extra_prediction.jsonl")
    assert [pair["target"] for pair in answers] == [f"Answer: {{<0><25><{n}><75>}} ." for n in (25, 27, 30, 32, 35)]
    assert [len(lines(save / f"multitest_{name}_extra_prediction.jsonl")) for name in ("words", "free")] == [3, 1]
    everything = json.loads((save / "all_results.json").read_text())
    assert everything["multitest_words_target_failed"] == 0 and everything["multitest_free_samples"] == 1
    assert everything.items() >= json.loads((save / "eval_results.json").read_text()).items()

    # Alone, from the checkpoint: the same answers; what was answered is not asked again, and nothing is written twice.
    alone = ["predict", *files[:2], "--load", str(save), "--output-dir", str(tmp_path / "alone"), "--device", "cpu"]
    for _ in range(2):
        assert main([*alone, "--do-predict"]) == 0
        assert lines(tmp_path / "alone" / "test_extra_prediction.jsonl") == answers
    assert not (tmp_path / "alone" / "eval_results.json").exists()


def test_answers_without_training(files, tmp_path, single_process, capsys):
    common = ["train", *files, *FLAGS.split(), "--train-iters", "1", "--do-train", "false"]
    assert main([*common, "--save", str(tmp_path / "out"), "--do-eval"]) == 0
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()
    assert len(lines(tmp_path / "out" / "eval_extra_prediction.jsonl")) == 2
    for more, message in (
        ([], "--do-train false leaves nothing to do: give --do-eval, --do-predict or --do-multi-predict"),
        (["--do-eval"], "--do-train false needs --mm-data, --save for the answers"),
    ):
        assert main([*common, *more]) == 1 and message in capsys.readouterr().err


def on_a_rank(arguments):
    import torch

    variables = {"RANK": torch.distributed.get_rank(), "WORLD_SIZE": torch.distributed.get_world_size()}
    os.environ |= {name: str(value) for name, value in variables.items()}
    try:
        return main(arguments)
    finally:
        for name in variables:
            del os.environ[name]


def test_two_ranks_share_the_records(files, tmp_path, ranks, golden):
    model = ["--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--do-predict"]
    for count in (1, 2):
        where = ["--output-dir", str(tmp_path / f"of{count}")]
        assert ranks(count).run(on_a_rank, ["predict", *files[:2], *model, *where]) == [0] * count
    one, two = (tmp_path / f"of{count}" / "test_extra_prediction.jsonl" for count in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    journals = sorted((tmp_path / "of2").glob("test*/*.rank*.jsonl"))
    assert [len(lines(path)) - 1 for path in journals] == [3, 2]  # the first line says what the answers depend on


@pytest.mark.parametrize(
    "change, flags, message",
    [
        ({}, ["--do-predict"], r'--do-predict is given, and data.json has no "prediction": {"test": ..}; add the set'),
        ({}, [], 'has no sets under "prediction"; add them'),
        ({}, ["--do-eval", "--predict-batch-size", "0"], "--predict-batch-size is 0; expected at least 1"),
    ],
)
def test_sets_that_are_not_there(files, tmp_path, capsys, change, flags, message):
    data = json.loads((tmp_path / "d.json").read_text())
    del data["prediction"]
    (tmp_path / "d.json").write_text(json.dumps(data | change))
    assert main(["predict", *files[:2], "--model", "x", "--output-dir", "out", *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "test",
            {"repeat_time": 2},
            'has "repeat_time", which is of sets that are trained on; remove it: every record',
        ),
        ("test", {"metric": "f1"}, "prediction.test.metric"),
        (
            "test",
            {"metric": None, "lenient": True},
            'has "lenient", which the metric rec reads, and the metric is None',
        ),
        (
            "test",
            {"dataset_type": "pope", "mimic_it": {}},
            'has "mimic_it", which only the dataset_type "mimic_it" reads',
        ),
        ("multitest", {"a/b": {"data_path": "x"}}, "found the name 'a/b'; expected letters, digits, dots and dashes"),
    ],
)
def test_blocks_that_do_not_fit(files, tmp_path, name, value, message):
    data = json.loads((tmp_path / "d.json").read_text())
    data["prediction"][name] |= value
    with pytest.raises(ConfigError, match=message):
        DataConfig.load(data)


def test_records_that_cannot_be_asked(files, tmp_path, golden, single_process, capsys):
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}] * 1}
    row["conversations"].append({"from": "human", "value": "And?"})
    (tmp_path / "open.jsonl").write_text(json.dumps(row) + "\n")
    data = json.loads((tmp_path / "d.json").read_text())
    data["prediction"] = {"test": {"data_path": str(tmp_path / "open.jsonl"), "dataset_type": "multimodal"}}
    (tmp_path / "d.json").write_text(json.dumps(data))
    model = ["--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    assert main(["predict", *files[:2], *model]) == 1
    assert "record 0: the turns are from human, gpt, human; expected questions" in capsys.readouterr().err
    # A run hears of it before it trains.
    save = tmp_path / "save"
    assert main(["train", *files, *FLAGS.split(), "--train-iters", "1", "--save", str(save), "--do-predict"]) == 1
    assert "record 0: the turns are from human, gpt, human" in capsys.readouterr().err and not save.exists()
