"""`train` itself at parallel layouts, with plain and with packed rows."""

import json

import pytest
from PIL import Image

from tests.helpers.golden_model import model_json
from tests.helpers.golden_training import records

# A large epsilon: Adam would scale gradients that are rounding noise up to whole steps, and few rows give many of them.
COMMON = (
    "--lr 1e-3 --train-iters 3 --micro-batch-size 1 --global-batch-size 2 --seq-length 192 --log-interval 1 "
    "--num-workers 0 --device cpu --lr-decay-style constant --adam-eps 1e-3"
)
LAYOUTS = {
    "PP2": "--pipeline-model-parallel-size 2",
    "PP2 VPP2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "TP2 SP": "--tensor-model-parallel-size 2 --sequence-parallel",
    "CP2": "--context-parallel-size 2",
    "DP2": "--use-distributed-optimizer",
}


def train(folder, name, flags):
    """`mindspeed-mm train` on this rank; its exit code."""
    import os

    import torch

    from mindspeed_mm.cli.main import main

    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())  # as torchrun sets it
    files = ["--mm-model", f"{folder}/model.json", "--mm-data", f"{folder}/data.json", "--save", f"{folder}/{name}"]
    try:
        return main(["train", *files, *COMMON.split(), *flags.split()])
    finally:
        del os.environ["WORLD_SIZE"]


@pytest.fixture
def folder(golden, tmp_path):
    Image.new("RGB", (60, 60), "red").save(tmp_path / "red.png")
    answer = {"from": "gpt", "value": "Ho ho."}
    rows = []
    for number in range(12):
        words = " ".join(["Hi"] * (1 + 3 * number % 7))
        image = number % 3 == 0
        turns = [{"from": "human", "value": ("<image>\n" if image else "") + words}, answer]
        rows.append({"id": str(number), "conversations": turns} | ({"image": "red.png"} if image else {}))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = model_json(golden, trained=("text_decoder", "vision_projector"))
    (tmp_path / "model.json").write_text(json.dumps(model))
    return tmp_path


def describe_data(golden, folder, packing=False):
    """Write data.json."""
    parameters = {
        "dataset_type": "multimodal",
        "basic_parameters": {"data_path": str(folder / "rows.json"), "data_folder": str(folder)},
        "preprocess_parameters": {"image_processer_path": str(golden / "models" / "clip_hf")},
        "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
    }
    data = {"dataset_param": parameters, "dataloader_param": {"packing": packing} if packing else {}}
    (folder / "data.json").write_text(json.dumps(data))


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "packed"])
def test_the_command_at_every_layout(ranks, golden, folder, packing):
    describe_data(golden, folder, packing)
    assert ranks(1).run(train, str(folder), "one", "") == [0]
    wanted = records(folder / "one")
    for name, flags in LAYOUTS.items():
        if name == "PP2" and packing:  # of the same stages, but more of them: PP2 VPP2
            continue
        assert ranks(2).run(train, str(folder), name, flags) == [0, 0], name
        found = records(folder / name)
        for key in ("loss", "grad_norm", "supervised"):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in wanted], rel=1e-5), (name, key)


def test_what_cannot_work_is_refused_before_the_ranks_meet(golden, folder, monkeypatch, capsys):
    from mindspeed_mm.cli.main import main

    describe_data(golden, folder)
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = "--tensor-model-parallel-size 4"
    files = ["--mm-model", str(folder / "model.json"), "--mm-data", str(folder / "data.json")]
    assert main(["train", *files, *COMMON.split(), *flags.split()]) != 0
    assert "num_attention_heads 6 cannot be split over --tensor-model-parallel-size 4" in capsys.readouterr().err
