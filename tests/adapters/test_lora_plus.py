"""LoRA+: B has its own learning rate, as PEFT's optimizer gives it, in a run of any layout."""

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import load_model_spec
from tests.helpers.golden_model import model_json
from tests.helpers.golden_training import GoldenLayout, full_tensors, train_golden

LORA = {"r": 4, "loraplus_lr_ratio": 8.0, "target_modules": ["q_proj", "down_proj"]}
RULED = [{"names": "decoder.layers.0.mlp.linear_fc2.lora.*.b", "lr": 5e-4}]
LAYOUTS = {
    "the run's rate, TP2 SP": GoldenLayout(tensor=2, flags="--sequence-parallel", decoder=(("lora", LORA),)),
    "the part's rate and a rule, DP2": GoldenLayout(
        data=2,
        flags="--use-distributed-optimizer",
        decoder=(("lora", LORA), ("lr", 2e-3), ("parameters", RULED)),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_step_of_b_is_as_large_as_its_learning_rate(ranks, tmp_path, golden, name):
    """Adam's first step changes B by its learning rate; A, whose first gradient is zero, moves by its own at the
    second one: (0.1 / 0.19) / sqrt(0.001 / 0.001999) of it."""
    layout = LAYOUTS[name]
    saved = []
    for steps in (1, 2):
        folder = tmp_path / str(steps)
        ranks(2).run(train_golden, golden, layout, str(folder), "--no-save-optim", steps)
        saved.append({key: tensor for key, tensor in full_tensors(folder).items() if ".lora." in key})
    first, second = saved
    rate = dict(layout.decoder).get("lr", 1e-3)
    second_of_a = 0.1 / 0.19 / (0.001 / 0.001999) ** 0.5
    assert len(first) == 2 * 2 * len({key.split(".layers.")[1].split(".")[0] for key in first})
    for key, tensor in first.items():
        if key.endswith(".b"):
            ruled = "parameters" in dict(layout.decoder) and ".layers.0.mlp." in key
            assert tensor.abs().max().item() == pytest.approx(5e-4 if ruled else 8 * rate, rel=2e-3), key
        else:
            moved = (second[key] - tensor).abs().max().item()
            assert moved == pytest.approx(second_of_a * rate, rel=1e-2), key


def test_ratios_that_cannot_be(golden):
    made = model_json(golden, trained=("text_decoder", "vision_projector"))
    made["text_decoder"]["lora"] = LORA | {"loraplus_lr_ratio": 0}
    with pytest.raises(ConfigError, match="lora.loraplus_lr_ratio"):
        load_model_spec(made)
