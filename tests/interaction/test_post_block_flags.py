"""The fork's flags of what trains, with its post-interaction block: its own order of statements, and its stages."""

import argparse
import itertools

import pytest
import torch

from mindspeed_mm.cli.flags.lora import add_lora_arguments
from mindspeed_mm.cli.flags.trained import add_trained_arguments, given_flags
from mindspeed_mm.config.trained_parts import TrainedParts
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.complete import read_model
from mindspeed_mm.models.trainable import names_of, setting
from tests.helpers.golden_model import model_json
from tests.interaction.post_block_helpers import with_block


def statements(backbone: bool, adapter: bool, block: bool, head: bool) -> set[str]:
    """What trains after the fork's statements, in their order."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in ("body", "projector", "block", "head")})
    for name in ("body", "projector"):  # both stand in its model.model
        model[name].requires_grad_(not backbone)
    model["projector"].requires_grad_(adapter)
    model["block"].requires_grad_(block)
    model["head"].requires_grad_(head)
    return {name for name, module in model.items() if module.weight.requires_grad}


def opened(spec) -> set[str]:
    """What of a spec trains; each of these as a whole."""
    found: dict[str, set[bool]] = {}
    slots = {"vision_projector": "projector", "interaction": "block", "vision_encoder": "encoder"}
    for slot, part in spec.part_specs().items():
        for name in names_of(spec.parts()[slot], part):
            key = slots.get(slot, "head" if name.startswith("output_layer.") else "body")
            found.setdefault(key, set()).add(setting(part, name).trained)
    assert all(len(values) == 1 for values in found.values())
    return {key for key, (value,) in found.items() if value}


def flags_of(words: str):
    parser = argparse.ArgumentParser()
    add_trained_arguments(parser)
    add_lora_arguments(parser)
    return given_flags(parser.parse_args(words.split()))


@pytest.mark.parametrize("values", itertools.product((True, False), repeat=4), ids=str)
@pytest.mark.parametrize("name", ["tune_post_interaction_block", "tune-post-decoder"])
def test_the_truth_table_with_the_block(golden, values, name):
    backbone, adapter, block, head = values
    words = f"--freeze_backbone {backbone} --tune_mm_mlp_adapter {adapter} --{name} {block} --tune_lm_head {head}"
    made = with_block(golden, ("text_decoder", "vision_projector"))
    assert opened(read_model(flags_of(words).applied(made))) == statements(*values)


STAGES = {
    "stage 1": ("--freeze_backbone True --tune_post_interaction_block True --tune_lm_head False", {"block"}),
    "stage 2": ("--freeze_backbone True --tune_post_interaction_block True --tune_lm_head True", {"block", "head"}),
    "head alone": ("--freeze_backbone True --tune_lm_head True", {"head"}),
    "block beside the file": ("--tune_post_interaction_block False", {"body", "head", "projector"}),
    "projector alone": ("--tune_mm_mlp_adapter", {"projector"}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages(golden, stage):
    words, wanted = STAGES[stage]
    made = with_block(golden, ("text_decoder", "vision_projector"))
    assert opened(read_model(flags_of(words).applied(made))) == wanted


def test_adapters_beside_the_block(golden):
    words = "--lora-r 4 --freeze_backbone True --tune_post_interaction_block True --tune_lm_head False"
    made = with_block(golden, ("text_decoder", "vision_projector"))
    spec = read_model(flags_of(words).applied(made))
    assert spec.text_decoder.lora.r == 4 and spec.interaction.trains and not spec.vision_projector.trains


def test_a_flag_without_a_block(golden):
    with pytest.raises(ConfigError, match="--tune-post-interaction-block is given for a model without one"):
        TrainedParts(tune_post_interaction_block=True).applied(model_json(golden))
