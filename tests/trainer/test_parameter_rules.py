"""Freezing, learning rates and weight decay by part and by name pattern (models/trainable.py)."""

import pytest
import torch

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import load_model_spec
from tests.helpers.golden_model import model_json
from tests.helpers.golden_training import GoldenLayout, full_tensors, train_golden

DECODER = (
    ("lr", 2e-3),
    (
        "parameters",
        [
            {"names": "embedding.*", "freeze": True},
            {"names": "decoder.layers.[12].mlp.*", "lr": 5e-4},
            {"names": "decoder.layers.2.mlp.linear_fc1.*", "freeze": True},
        ],
    ),
)
VISION = (("freeze", True), ("parameters", [{"names": "decoder.layers.1.*", "freeze": False, "lr": 3e-3}]))
LAYOUTS = {
    "one rank": GoldenLayout(decoder=DECODER, vision_encoder=VISION),
    "TP2 SP": GoldenLayout(tensor=2, flags="--sequence-parallel", decoder=DECODER, vision_encoder=VISION),
    "PP2": GoldenLayout(pipeline=2, decoder=DECODER, vision_encoder=VISION),
    "DP2, distributed optimizer": GoldenLayout(
        data=2, flags="--use-distributed-optimizer", decoder=DECODER, vision_encoder=VISION
    ),
}


def expected(name: str) -> float:
    """The learning rate of a parameter of the run; 0: frozen."""
    if name.startswith("image_encoder.encoder"):
        return 3e-3 if ".decoder.layers.1." in name else 0.0
    if name.startswith("image_encoder"):
        return 1e-3  # the run's
    if name.startswith("text_decoder.embedding") or name.endswith(".layers.2.mlp.linear_fc1.weight"):
        return 0.0
    return 5e-4 if ".layers.1.mlp." in name or ".layers.2.mlp." in name else 2e-3


@pytest.fixture(scope="module")
def before(ranks, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    ranks(1).run(train_golden, golden, GoldenLayout(), str(folder), "--lr 1e-30 --no-save-optim", 1)
    return full_tensors(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_of_adam_is_as_large_as_the_learning_rate(ranks, golden, before, tmp_path, name):
    """The first step of Adam changes a value by its learning rate, whatever the gradient."""
    layout = LAYOUTS[name]
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path), "--no-save-optim", 1)
    after = full_tensors(tmp_path)
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        rows = min(len(tensor), len(before[key]))  # the vocabulary is padded
        change = (tensor[:rows] - before[key][:rows]).abs().max().item()
        assert change == pytest.approx(expected(key), rel=2e-3), key


def test_layer_decay(ranks, golden, before, tmp_path):
    """BEiT's rule: 0.5 for each layer from the end, for what stands in front of the layers one more than they are."""
    rules = [{"names": "decoder.layers.0.input_layernorm.*", "lr": 7e-4}]
    layout = GoldenLayout(decoder=(("lr", 2e-3), ("layer_decay", 0.5), ("parameters", rules)))
    ranks(1).run(train_golden, golden, layout, str(tmp_path), "--no-save-optim", 1)
    layers = 1 + max(
        int(key.split(".layers.")[1].split(".")[0]) for key in before if key.startswith("text_decoder.decoder.layers.")
    )
    for key, tensor in full_tensors(tmp_path).items():
        if not key.startswith("text_decoder"):
            continue
        if ".layers." in key:
            away = layers - int(key.split(".layers.")[1].split(".")[0])
        else:
            away = layers + 1 if "embedding" in key else 0
        wanted = 7e-4 if ".layers.0.input_layernorm." in key else 2e-3 * 0.5**away
        rows = min(len(tensor), len(before[key]))
        change = (tensor[:rows] - before[key][:rows]).abs().max().item()
        assert change == pytest.approx(wanted, rel=5e-3), key


def test_a_run_goes_on_exactly(ranks, golden, tmp_path):
    layout = LAYOUTS["DP2, distributed optimizer"]
    ranks(2).run(train_golden, golden, layout, str(tmp_path / "whole"), "", 4)
    half = f"--load {tmp_path / 'half'}"
    ranks(2).run(train_golden, golden, layout, str(tmp_path / "half"), f"{half} --exit-interval 2", 4)
    ranks(2).run(train_golden, golden, layout, str(tmp_path / "half"), half, 4)
    whole, resumed = full_tensors(tmp_path / "whole"), full_tensors(tmp_path / "half")
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


def test_weight_decay_of_a_part(ranks, golden, before, tmp_path):
    """With a vanishing gradient step (a huge epsilon) only decay is left: factor 1 - lr * weight_decay."""
    layout = GoldenLayout(decoder=(("weight_decay", 0.5),))
    flags = "--no-save-optim --adam-eps 1e30 --lr 1e-2"
    ranks(1).run(train_golden, golden, layout, str(tmp_path), flags, 1)
    for key, tensor in full_tensors(tmp_path).items():
        decayed = key.startswith("text_decoder") and tensor.dim() > 1
        torch.testing.assert_close(tensor, before[key] * (1 - 0.5 * 1e-2 if decayed else 1), atol=1e-7, rtol=1e-6)


def test_the_plan_counts_what_trains(golden):
    from tests.planning.planned_run import model, planned
    from tests.planning.real_run import Work

    rules = [{"names": "decoder.layers.[01].*", "freeze": True}]
    made = model(("text_decoder",), parameters=rules)
    from mindspeed_mm.planning.parameters import stage_parameters

    some = stage_parameters(planned(Work(made, "")), 0).trained
    whole = stage_parameters(planned(Work(model(("text_decoder",)), "")), 0).trained
    layer = 4 * 128 * 128 + 3 * 128 * 352 + 2 * 128
    assert whole - some == 2 * layer


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"freeze": True, "lr": 1e-4}, r"text_decoder.lr: found 0.0001 for a part that is frozen"),
        ({"parameters": [{"names": "layers.*"}]}, r"text_decoder.parameters\[0\].names: 'layers.\*' fits no parameter"),
        (
            {"freeze": True, "parameters": [{"names": "embedding.*", "lr": 1e-3}]},
            r"parameters\[0\].lr: found 0.001 for parameters that are frozen",
        ),
        ({"lr": 0.0}, "text_decoder.lr"),
        ({"layer_decay": 1.5}, "text_decoder.layer_decay"),
        ({"freeze": True, "layer_decay": 0.9}, "text_decoder.layer_decay: found 0.9 for a part that is frozen"),
        ({"parameters": [{"names": "embedding.*", "learning_rate": 1e-3}]}, "unknown key"),
    ],
)
def test_what_cannot_be_meant_is_refused(golden, block, message):
    made = model_json(golden, trained=("text_decoder", "vision_projector"))
    made["text_decoder"] |= block
    with pytest.raises(ConfigError, match=message):
        load_model_spec(made)


def test_layer_decay_of_a_part_without_layers(golden):
    made = model_json(golden, trained=("text_decoder", "vision_projector"))
    made["image_encoder"]["vision_projector"]["layer_decay"] = 0.9
    with pytest.raises(ConfigError, match=r"vision_projector.layer_decay: found 0.9 for a part without layers"):
        load_model_spec(made)


def test_learning_rates_in_the_table(golden):
    from mindspeed_mm.trainer.plan_verdict import learning_rates

    made = model_json(golden, trained=("text_decoder", "vision_projector"))
    made["text_decoder"] |= {"layer_decay": 0.5, "parameters": [{"names": "output_layer.*", "lr": 1e-4}]}
    spec = load_model_spec(made)
    part = spec.parts()["text_decoder"]
    count = spec.text_decoder.num_layers + 3
    lowest = 1e-3 * 0.5 ** (spec.text_decoder.num_layers + 1)
    assert learning_rates(part, spec.text_decoder, 1e-3) in (
        f"{lowest:g} to 0.001 ({count} of them)",
        ", ".join(f"{rate:g}" for rate in sorted([1e-4, *(1e-3 * 0.5**n for n in range(count - 1))])),
    )
    assert learning_rates(spec.parts()["vision_encoder"], spec.vision_encoder, 1e-3) == ""
    made["text_decoder"] = made["text_decoder"] | {"lora": {"r": 2, "loraplus_lr_ratio": 16}, "parameters": []}
    made["text_decoder"]["layer_decay"] = None
    spec = load_model_spec(made)
    assert learning_rates(spec.parts()["text_decoder"], spec.text_decoder, 1e-3) == "0.001, 0.016"
