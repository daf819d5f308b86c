"""`train` with what the data engine adds: several sets, packing, grouping, bad images, a validation set."""

import json

import pytest
from PIL import Image

from tests.helpers.golden_model import model_json

FLAGS = "--lr 1e-3 --train-iters 3 --micro-batch-size 1 --global-batch-size 2 --seq-length 256 --log-interval 1"
COMMON = f"{FLAGS} --num-workers 0 --device cpu --lr-decay-style constant"


@pytest.fixture
def train(tmp_path, golden, single_process):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (60, 60), "red").save(folder / "red.png")

    def records(name, count, image=None):
        path = tmp_path / name
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho ho."}]
        with_image = [{"from": "human", "value": "<image>\nHi"}, turns[1]]
        rows = [{"id": f"{name}{i}", "conversations": with_image if image else turns} for i in range(count)]
        path.write_text(json.dumps([row | ({"image": image} if image else {}) for row in rows]))
        return {"data_path": str(path), "data_folder": str(folder)}

    def run(*flags, loader=None, **dataset_param):
        from mindspeed_mm.cli.main import main

        model, data = tmp_path / "model.json", tmp_path / "data.json"
        model.write_text(json.dumps(model_json(golden, trained=("text_decoder", "vision_projector"))))
        config = {
            "dataset_type": "multimodal",
            "basic_parameters": [records("text.json", 6), records("red.json", 6, "red.png")],
            "preprocess_parameters": {"image_processer_path": str(golden / "models" / "clip_hf")},
            "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
        }
        data.write_text(json.dumps({"dataset_param": config | dataset_param, "dataloader_param": loader or {}}))
        save = ["--save", str(tmp_path / "save")]
        code = main(["train", "--mm-model", str(model), "--mm-data", str(data), *COMMON.split(), *save, *flags])
        run_json = tmp_path / "save" / "iter_0000003" / "run.json"
        return code, json.loads(run_json.read_text()) if run_json.exists() else None

    run.records = records
    return run


def test_packing(train):
    code, run = train(loader={"packing": True, "packing_window": 8})
    assert code == 0 and run["consumed_samples"] == 6  # rows
    counts = run["extra"]["data_counts"]
    assert counts["samples"] >= 6 and counts["skipped"] == counts["truncated_overlong"] == 0


def test_weights_and_bad_images(train):
    bad = train.records("bad.json", 4, "none.png") | {"weight": 1}
    good = train.records("good.json", 4) | {"weight": 3}
    code, run = train(basic_parameters=[good, bad], image_error="skip")
    counts = run["extra"]["data_counts"]
    assert code == 0 and counts["samples"] == 6 and counts["dropped_overlong"] == 0


def test_validation(train, capsys):
    held_out = train.records("held_out.json", 4, "red.png")
    code, _ = train("--eval-interval", "2", "--log-format", "megatron", validation_parameters=[held_out])
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation loss at iteration" in line]
    assert code == 0 and len(lines) == 1 and "iteration 2 | lm loss value: " in lines[0]
    assert "samples: 4" in lines[0]


def test_validation_of_the_moving_average(train, capsys):
    """Both losses are told, the weights' as without it; early stop looks at the average's."""
    held_out = {"validation_parameters": [train.records("held_out.json", 4, "red.png")]}
    flags = ["--eval-interval", "3", "--ema-decay", "0.9", "--lr", "1e-2", "--early-stop-patience", "1"]
    code, run = train(*flags, **held_out)
    plain = run["extra"]["early_stop"]["best"]
    assert code == 0 and "moving average " not in capsys.readouterr().err.partition("step 3/3")[2]
    code, run = train(*flags, "--ema-validation", **held_out)
    said = capsys.readouterr().err
    averaged = run["extra"]["early_stop"]["best"]
    assert code == 0 and abs(averaged - plain) > 0.1
    assert f"validation loss {plain:#.4g}" in said and f"loss of the moving average {averaged:#.4g}" in said
    code, _ = train("--ema-decay", "0.9", "--ema-validation")
    assert code == 1 and "--ema-validation needs a validation set" in capsys.readouterr().err


def test_the_screen_and_the_curve_of_a_run(train, tmp_path, capsys):
    """Letter P: short lines, what the weights are in words, and loss_curve.png."""
    held_out = train.records("held_out.json", 4, "red.png")
    code, _ = train("--eval-interval", "2", "--log-interval", "1", "--use-flash-attn", validation_parameters=[held_out])
    said = capsys.readouterr().err
    assert code == 0 and "step 1/3 | loss " in said and " left" in said
    assert "step 2/3 | validation loss " in said and "lm loss" not in said
    assert said.count("without an effect") == 1 and "from scratch" not in said
    assert "loaded from " in said and "none there" not in said
    assert (tmp_path / "save" / "loss_curve.png").stat().st_size > 10_000


def test_validation_changes_nothing(train, tmp_path):
    import shutil

    held_out = train.records("held_out.json", 4, "red.png")
    losses = []
    for flags, parameters in ((["--eval-interval", "1"], {"validation_parameters": [held_out]}), ([], {})):
        code, _ = train(*flags, loader={"group_by_modality_length": True}, **parameters)
        assert code == 0
        lines = (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        shutil.rmtree(tmp_path / "save")
        from megatron.driver.initialize import shutdown

        shutdown()
    assert losses[0] == losses[1]


def test_a_validation_set_needs_an_interval(train, capsys):
    code, _ = train(validation_parameters=[train.records("held_out.json", 4)])
    assert code == 1 and "when to use them is open: --eval-interval" in capsys.readouterr().err


def test_early_stop(train, tmp_path, capsys):
    """No loss falls by 1000: the first validation is the lowest; a resumed run knows how many followed it."""
    from megatron.driver.initialize import shutdown

    held_out, save = train.records("held_out.json", 4, "red.png"), str(tmp_path / "save")
    flags = ["--eval-interval", "1", "--early-stop-min-improvement", "1000", "--early-stop-patience"]

    def steps(*more):
        code, _ = train(*flags, *more, "--load", save, validation_parameters=[held_out])
        shutdown()
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        return code, len((tmp_path / "save" / "metrics.jsonl").read_text().splitlines()), said

    code, done, said = steps("2", "--train-iters", "9", "--exit-interval", "2")
    assert (code, done) == (0, 2) and "early stop" not in "".join(said)
    code, done, said = steps("2", "--train-iters", "9")
    assert (code, done) == (0, 3), "one validation without a lower loss was in the checkpoint"
    assert (tmp_path / "save" / "iter_0000003" / "run.json").exists()
    assert "early stop after step 3: 2 validation(s) in a row did not lower the loss by more than 1000" in said[-1]
    assert "after step 1); saved in " in said[-1] and "iter_0000003" in said[-1]
    code, done, said = steps("2", "--train-iters", "9")
    assert (code, done) == (0, 3) and "early stop after step 3" in said[-1], "nothing is left to do"
    code, done, said = steps("3", "--train-iters", "9")
    assert (code, done) == (0, 4) and "early stop after step 4: 3 validation(s)" in said[-1]
