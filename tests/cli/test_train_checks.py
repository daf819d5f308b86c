"""`train` end to end: what it checks, tells and leaves behind."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.golden_model import model_json

FLAGS = "--lr 1e-3 --micro-batch-size 1 --global-batch-size 2 --seq-length 256 --num-workers 0 --device cpu"


class TrainCommand:
    """Writes model.json and data.json, runs the command, keeps what it printed."""

    def __init__(self, folder, golden, capsys):
        self.folder, self.capsys, self.save = folder, capsys, folder / "save"
        self.model = model_json(golden, trained=("vision_projector",))
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A picture."}]
        self.records = [{"id": f"r{i}", "image": "gray.png", "conversations": turns} for i in range(6)]
        self.dataloader_param = {}
        self.dataset_param = {
            "dataset_type": "multimodal",
            "basic_parameters": {"data_path": str(folder / "r.json"), "data_folder": str(golden / "images" / "src")},
            "preprocess_parameters": {"image_processer_path": str(golden / "models" / "clip_hf")},
            "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
            "template_name": "llava-plain",
        }

    def data(self):
        return {"dataset_param": self.dataset_param, "dataloader_param": self.dataloader_param}

    def __call__(self, *flags):
        from mindspeed_mm.cli.main import main

        (self.folder / "m.json").write_text(json.dumps(self.model))
        (self.folder / "d.json").write_text(json.dumps(self.data()))
        (self.folder / "r.json").write_text(json.dumps(self.records))
        files = ["--mm-model", str(self.folder / "m.json"), "--mm-data", str(self.folder / "d.json")]
        save = ["--save", str(self.save), "--load", str(self.save)]
        code = main(["train", *files, *FLAGS.split(), *save, "--json", *flags])
        printed = self.capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]) if code == 0 else None, printed.err


@pytest.fixture
def train(tmp_path, golden, single_process, capsys):
    return TrainCommand(tmp_path, golden, capsys)


def test_stage_1_checkpoint_chats_in_v1_and_brings_its_tokenizer(train):
    from mindspeed_mm.data.template_choice import choose_template
    from mindspeed_mm.data.tokenizer import load_tokenizer
    from mindspeed_mm.inference.locate import locate

    code, result, _ = train("--train-iters", "2")
    assert code == 0 and result["iteration"] == 2
    located = locate(train.save)
    assert choose_template(None, located.template, load_tokenizer(located.tokenizer)).name == "v1"
    assert located.tokenizer == train.save / "tokenizer"


def test_finished_run_names_its_checkpoint(train):
    first = train("--train-iters", "2")[1]
    again = train("--train-iters", "2")[1]
    assert again["checkpoint"] == first["checkpoint"] and again["loss"] is None


def test_resuming_with_another_order_is_told(train):
    train("--train-iters", "2")
    _, _, err = train("--train-iters", "3", "--seed", "7")
    assert "--seed changed since the checkpoint was written" in err
    _, _, err = train("--train-iters", "4", "--seed", "7")
    assert "changed since the checkpoint" not in err


def test_keys_of_sets_that_are_not_given_are_no_part_of_the_order(train):
    """A checkpoint from before a key existed resumes without a warning."""
    from mindspeed_mm.data.set_config import READ_BY

    saved = json.loads((Path(train("--train-iters", "2")[1]["checkpoint"]) / "run.json").read_text())
    assert "grounding" in READ_BY and "basic_parameters of the data config" in json.dumps(saved)
    assert not any(f'"{name}"' in json.dumps(saved) for name in READ_BY)


def test_a_mix_is_trained_on_and_another_one_is_told(train):
    train.dataset_param["mixing"] = {"subset": 0, "portion": 0.5, "shuffle": False}
    train.dataloader_param = {"shuffle": False}
    result, err = train("--train-iters", "2")[1:]
    assert "mixing: an epoch has 3 samples, of sets of [6]" in err
    facts = json.loads((Path(result["checkpoint"]) / "run.json").read_text())
    assert "mixing of the data config" in json.dumps(facts)
    train.dataset_param["mixing"] = {"subset": 0, "portion": 1.0, "shuffle": False}
    assert "mixing of the data config changed since the checkpoint" in train("--train-iters", "3")[2]


def test_letter_n_train_says_plans_verdict_before_it_begins(train):
    _, _, err = train("--train-iters", "1")
    assert err.index("plan: the run fits, ") < err.index("first sample, supervised tokens")


def test_letter_f_another_global_batch_is_no_other_order(train):
    train("--train-iters", "2")
    _, _, err = train("--train-iters", "3", "--global-batch-size", "4")
    assert "another order" not in err


@pytest.mark.parametrize("kind", ["group_by_modality_length", "packing"])
def test_letter_f_what_forms_batches_by_length_is_an_order_of_its_own(train, kind):
    train.dataloader_param = {kind: True}
    train("--train-iters", "2")
    grouped = kind == "group_by_modality_length"
    err = train("--train-iters", "3", "--global-batch-size", "4")[2]
    assert ("--global-batch-size changed since the checkpoint was written" in err) == grouped
    train.dataloader_param = {}
    assert "shuffle, packing or group_by_modality_length of the data config changed" in train("--train-iters", "4")[2]


def test_letter_f_another_preprocessing_is_no_other_order(train):
    train("--train-iters", "2")
    train.dataset_param["image_error"] = "skip"
    assert "another order" not in train("--train-iters", "3")[2]
    train.dataset_param["basic_parameters"]["repeat_time"] = 2
    assert "samples, basic_parameters of the data config changed" in train("--train-iters", "4")[2]


def test_letter_f_stage_2_from_stage_1_is_no_resume(train, tmp_path):
    train("--train-iters", "2")
    empty, stage_1 = str(tmp_path / "stage2"), str(train.save)
    flags = ("--save", empty, "--load", empty, "--pretrained-checkpoint", stage_1, "--seed", "7")
    code, _, err = train("--train-iters", "1", *flags)
    assert code == 0 and "another order" not in err and "scratch" not in err
    assert f"the run begins at step 0 with the weights of {stage_1}" in err


def test_letter_o_a_mistyped_stage_1_is_told_before_anything_is_built(train, monkeypatch):
    def build(*args, **options):
        raise AssertionError("the model was built")

    monkeypatch.setattr("mindspeed_mm.trainer.run.build_vlm", build)
    code, _, err = train("--train-iters", "1", "--pretrained-checkpoint", str(train.folder / "stage1"))
    assert code == 1 and "stage1 holds no checkpoint (latest_checkpointed_iteration.txt is missing)" in err


def test_precision_of_the_json_is_not_the_runs(train):
    train.model["text_decoder"]["params_dtype"] = "bf16"
    assert "text_decoder says bfloat16, the run computes in float32" in train("--train-iters", "1")[2]


def test_id_beyond_the_vocabulary_names_the_tokenizer(train, golden):
    train.dataset_param["tokenizer_config"] = {"from_pretrained": str(golden / "tokenizer_chatml")}
    train.dataset_param["template_name"] = "mpt"
    code, _, err = train("--train-iters", "1")
    assert code == 1 and "tokenizer_chatml gives id 100" in err and "language_vocab_size is 1000" in err


def test_a_mistyped_key_stops_the_start(train):
    train.records[3]["video"] = "clip.mp4"
    code, _, err = train("--train-iters", "1")
    assert code == 1 and "record 3 (id r3), line 1: 'video' is not read here" in err and "Traceback" not in err


def test_added_tokens_without_a_row_are_told_at_the_start(train, golden):
    folder = shutil.copytree(golden / "tokenizer", train.folder / "tok")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["1000"] = {"content": "<region>", "special": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    train.dataset_param["tokenizer_config"] = {"from_pretrained": str(folder)}
    code, _, err = train("--train-iters", "1")
    assert code == 1 and "added tokens beyond the 1000 rows" in err and "<region> = 1000" in err


def test_missing_image_stops_with_its_name(train):
    for record in train.records:
        record["image"] = "gone.png"
    code, _, err = train("--train-iters", "1")
    assert code == 1 and "gone.png is missing" in err and "Traceback" not in err


def test_profile_of_tools_json(train, tmp_path):
    tool = {"profile": {"enable": True, "static_param": {"start_step": 1, "end_step": 2}}}
    tool["profile"]["static_param"]["save_path"] = str(tmp_path / "traces")
    (tmp_path / "tools.json").write_text(json.dumps(tool))
    code, _, err = train("--train-iters", "2", "--mm-tool", str(tmp_path / "tools.json"))
    assert code == 0 and list((tmp_path / "traces").iterdir())
    tool["memory_profile"] = {"enable": True}
    (tmp_path / "tools.json").write_text(json.dumps(tool))
    code, _, err = train("--train-iters", "2", "--mm-tool", str(tmp_path / "tools.json"))
    assert code == 1 and "memory_profile.enable" in err


def test_flags_must_agree_with_the_model(train):
    code, _, err = train("--train-iters", "1", "--vocab-size", "32000", "--seq-length", "4096")
    assert code == 1
    assert "--vocab-size is 32000, but text_decoder.language_vocab_size is 1000" in err
    assert "--seq-length 4096 exceeds text_decoder.language_max_sequence_length 2048: make them equal" in err


def test_image_size_must_agree(train, tmp_path):
    from mindspeed_mm.data.image import ImageProcessor

    processor = ImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save(tmp_path)
    train.dataset_param["preprocess_parameters"] = {"image_processer_path": str(tmp_path)}
    code, _, err = train("--train-iters", "1")
    assert code == 1 and "gives 28 x 28 pixels, the vision encoder takes 56 x 56" in err


def fail_on_one_rank(rank_that_fails: int) -> str:
    """Fetch a step's micro-batches on each rank; one of them has bad data."""
    import torch

    from megatron.driver.loop import MeteredIterator
    from mindspeed_mm.errors import DataError, TrainingError

    def batches():
        if torch.distributed.get_rank() == rank_that_fails:
            raise DataError("image 7 is broken")
        yield from range(4)

    data = MeteredIterator(batches(), lambda batch: batch)
    try:
        data.fetch(2, torch.device("cpu"))
    except (DataError, TrainingError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_bad_data_of_one_rank_stops_all(ranks):
    assert ranks(2).run(fail_on_one_rank, 1) == [
        "TrainingError: the data of another rank cannot be used: see its message",
        "DataError: image 7 is broken",
    ]


def test_letter_g_an_error_of_the_forward_pass_names_the_records(train, monkeypatch):
    from mindspeed_mm.errors import DataError
    from mindspeed_mm.models.vlm import VLM

    forward, passes = VLM.forward, []

    def broken(self, *arguments, **named):
        passes.append(arguments)
        if len(passes) == 2:
            raise DataError("these features do not fit")
        return forward(self, *arguments, **named)

    monkeypatch.setattr(VLM, "forward", broken)
    code, _, said = train("--train-iters", "2")
    assert code == 1
    assert re.search(
        r"train: error: these features do not fit\n  The last to go into the model: "
        r"micro-batch 2 of 2, in step 1: r\d\n$",
        said,
    )
