"""`train --feature-cache`: the losses of a run without it, the vision encoder left out of later epochs, on one and two
ranks."""

import json
import os

import pytest
import torch
from PIL import Image

from tests.helpers.golden_model import model_json

FLAGS = "--device cpu --lr 1e-3 --lr-decay-style constant --micro-batch-size 2 --global-batch-size 4 --seq-length 256"


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """Six samples with four images, one of them used by three; an epoch and a half in three steps of four."""
    folder = tmp_path_factory.mktemp("feature_cache")
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (60, 40), colour).save(folder / f"{number}.png")
    records = []
    for number, shown in enumerate((0, 1, 2, None, 0, 3)):
        text = "Hi" if shown is None else "<image>\nHi"
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Ho " * (number + 1)}]
        image = {} if shown is None else {"image": f"{shown}.png"}
        records.append({"id": str(number), "conversations": turns} | image)
    (folder / "records.json").write_text(json.dumps(records))
    parameters = {
        "dataset_type": "llava",
        "basic_parameters": {"data_path": str(folder / "records.json"), "data_folder": str(folder)},
        "preprocess_parameters": {"image_processer_path": str(golden / "models" / "clip_hf")},
        "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
    }
    (folder / "data.json").write_text(json.dumps({"dataset_param": parameters}))
    for name, trained in (("stage2", ("text_decoder", "vision_projector")), ("vision_encoder", ("vision_encoder",))):
        (folder / f"{name}.json").write_text(json.dumps(model_json(golden, trained=trained)))
    layers = model_json(golden, trained=("text_decoder", "vision_projector"))
    encoder, projector = layers["image_encoder"]["vision_encoder"], layers["image_encoder"]["vision_projector"]
    encoder["select_layer"] = [1, -2]
    projector |= {"ckpt_path": None, "fresh": True, "input_size": 2 * encoder["hidden_size"]}
    (folder / "layers.json").write_text(json.dumps(layers))
    return folder


def train(folder, name, *flags, steps=3, workers=0):
    """(code, losses, operations) of the steps of a run on this rank."""
    from mindspeed_mm.cli.main import main

    files = ["--mm-model", str(folder / "stage2.json"), "--mm-data", str(folder / "data.json")]
    counts = ["--train-iters", str(steps), "--num-workers", str(workers), "--save", str(folder / name)]
    code = main(["train", *files, *FLAGS.split(), *counts, *flags])
    lines = (folder / name / "metrics.jsonl").read_text().splitlines() if code == 0 else []
    records = [json.loads(line) for line in lines]
    return code, [record["loss"] for record in records], [record["flops"] for record in records]


def on_a_rank(folder, name, *flags):
    """`train` on this rank of the pool, with the variables that torchrun sets."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {variable: str(value) for variable, value in variables.items()}
    try:
        return train(folder, name, *flags)
    finally:
        for variable in variables:
            del os.environ[variable]


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ()),
        (1, ("--mm-model", "layers.json")),
        pytest.param(2, (), marks=pytest.mark.slow),
        (2, ("--pipeline-model-parallel-size", "2")),
    ],
)
def test_losses_are_those_without_a_cache(ranks, folder, world, flags):
    flags = [str(folder / flag) if flag.endswith(".json") else flag for flag in flags]
    cache = folder / f"cache{world}{len(flags)}"
    plain, filling, full = (
        ranks(world).run(on_a_rank, folder, f"{world}{len(flags)}{name}", *flags, *options)[0]
        for name, options in (
            ("plain", []),
            ("filling", ["--feature-cache", str(cache)]),
            ("full", ["--feature-cache", str(cache)]),
        )
    )
    assert plain[0] == filling[0] == full[0] == 0
    assert filling[1] == pytest.approx(plain[1], rel=1e-5) and full[1] == pytest.approx(plain[1], rel=1e-5)
    # The vision encoder's operations: all in the first step, fewer where images come again, none with a full cache.
    assert filling[2][0] == plain[2][0] and filling[2][2] < plain[2][2]
    assert all(cached < whole for cached, whole in zip(full[2], plain[2], strict=True))
    assert len(list(cache.glob("*/*/*"))) == 4


def test_workers_and_a_resumed_run_use_it(folder, single_process):
    cache = ["--feature-cache", str(folder / "cache_workers"), "--load", str(folder / "resumed")]
    train(folder, "plain", steps=4)
    train(folder, "resumed", *cache, steps=2, workers=1)
    code, losses, operations = train(folder, "resumed", *cache, steps=4, workers=1)
    _, plain, whole = train(folder, "plain", steps=4)
    assert code == 0 and losses == pytest.approx(plain, rel=1e-5)
    assert all(cached < all_of_it for cached, all_of_it in zip(operations[2:], whole[2:], strict=True))


def test_a_small_room_is_kept(folder, single_process, capsys):
    code, _, _ = train(folder, "small", "--feature-cache", str(folder / "cache_small"), "--feature-cache-size", "9KB")
    assert code == 0 and "the room for features is used up" in capsys.readouterr().err
    assert len(list((folder / "cache_small").glob("*/*/*"))) == 2  # of 16 x 64 float32 and a checksum


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--feature-cache-size", "1GB"], "given without --feature-cache"),
        (["--feature-cache", "FOLDER/data.json"], "is not a folder"),
        (
            ["--feature-cache", "FOLDER/x", "--mm-model", "FOLDER/vision_encoder.json"],
            "needs a vision encoder that is not trained",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused(folder, single_process, capsys, flags, message):
    code, _, _ = train(folder, "refused", *(flag.replace("FOLDER", str(folder)) for flag in flags))
    assert code == 1 and message in capsys.readouterr().err


def test_ranks_that_share_images_are_refused():
    from mindspeed_mm.platform import get_platform

    get_platform("cpu")
    from mindspeed_mm.errors import ConfigError
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.trainer.caching_step import check_cachable
    from tests.helpers.media import fixed_plan
    from tests.planning.planned_run import model

    class OfAnySize:
        fixed = None

    class OneSize:
        reads_instructions = False
        fixed = fixed_plan(4)

    spec = load_model_spec(model())
    with pytest.raises(ConfigError, match="tensor 2 x context 1, whose ranks encode"):
        check_cachable(spec, Runtime(tensor_model_parallel_size=2), OneSize())

    with pytest.raises(ConfigError, match="those of model_id llava depend on their size: leave it out"):
        check_cachable(spec, Runtime(), OfAnySize())
