"""Flags of LLaVA and of its HA-DPO fork: what trains, by the originals' own order of statements."""

import argparse
import itertools
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.cli.flags.lora import add_lora_arguments
from mindspeed_mm.cli.flags.trained import add_trained_arguments, given_flags
from mindspeed_mm.config.trained_parts import ModelFlags, TrainedParts
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.models.trainable import names_of, setting
from tests.helpers.golden_model import model_json

SWITCHES = ("freeze_backbone", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "tune_lm_head")


def original(flags) -> dict[str, bool]:
    """What trains after the statements of the originals, in their order. The vision encoder never does."""
    model = torch.nn.Module()
    model.model, model.lm_head = torch.nn.Module(), torch.nn.Linear(1, 1)
    model.model.layers, model.model.mm_projector = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    projector = model.model.mm_projector
    if flags.tune_lm_head is None:  # LLaVA
        if flags.freeze_backbone:
            model.model.requires_grad_(False)
        projector.requires_grad_(True)
        if flags.tune_mm_mlp_adapter:
            model.requires_grad_(False)
            projector.requires_grad_(True)
        if flags.freeze_mm_mlp_adapter:
            projector.requires_grad_(False)
    else:  # the fork
        if flags.freeze_backbone is not None:
            model.model.requires_grad_(not flags.freeze_backbone)
        projector.requires_grad_(bool(flags.tune_mm_mlp_adapter) and not flags.freeze_mm_mlp_adapter)
        model.lm_head.requires_grad_(flags.tune_lm_head)
    parts = {"body": model.model.layers, "head": model.lm_head, "projector": projector}
    return {name: module.weight.requires_grad for name, module in parts.items()}


def trained(spec) -> dict[str, bool]:
    """What of a spec trains."""
    found = {}
    for slot, part in spec.part_specs().items():
        for name in names_of(spec.parts()[slot], part):
            head = name.startswith("output_layer.")
            key = {"text_decoder": "head" if head else "body", "vision_projector": "projector"}.get(slot, "vision")
            found.setdefault(key, set()).add(setting(part, name).trained)
    assert all(len(values) == 1 for values in found.values())
    return {key: values.pop() for key, values in found.items()}


@pytest.mark.parametrize("values", itertools.product((None, True, False), repeat=4), ids=str)
def test_the_truth_table(golden, values):
    flags = TrainedParts(**dict(zip(SWITCHES, values, strict=True)))
    made = model_json(golden, trained=("text_decoder", "vision_projector"))
    assert trained(load_model_spec(flags.applied(made))) == original(flags) | {"vision": False}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--freeze_backbone True --tune_mm_mlp_adapter False --tune_lm_head False", ""),
        ("--freeze_backbone True --tune_mm_mlp_adapter False --tune_lm_head True", "head"),
        ("--tune-mm-mlp-adapter --mm_projector_lr 1e-3", "projector"),
        ("--freeze-backbone", "head projector"),
        ("--freeze-mm-mlp-adapter", "body head"),
        ("--vision-encoder-lr 1e-6", "body head projector vision"),
    ],
)
def test_the_flags(golden, words, wanted):
    parser = argparse.ArgumentParser()
    add_trained_arguments(parser)
    add_lora_arguments(parser)
    flags = given_flags(parser.parse_args(words.split()))
    made = model_json(golden, trained=("text_decoder", "vision_encoder", "vision_projector"))
    spec = load_model_spec(flags.applied(made))
    found = trained(spec)
    opened = {name for name, value in found.items() if value and (name != "vision" or "vision" in wanted)}
    assert opened == set(wanted.split())
    assert spec.vision_projector.lr == (1e-3 if "lr 1e-3" in words else None)
    with pytest.raises(SystemExit):
        parser.parse_args(["--freeze_backbone", "maybe"])


def test_the_projector_begins_with_any_weights(golden):
    """LLaVA's --pretrain_mm_mlp_adapter, of a model.json that begins with random ones."""
    parser = argparse.ArgumentParser()
    add_trained_arguments(parser)
    add_lora_arguments(parser)
    made = model_json(golden, trained=("vision_projector",))
    made["image_encoder"]["vision_projector"]["ckpt_path"] = None
    path = golden / "models" / "mm_projector.bin"
    flags = given_flags(parser.parse_args(["--pretrain_mm_mlp_adapter", str(path)]))
    projector = load_model_spec(flags.applied(made)).vision_projector
    assert (projector.ckpt_path, projector.trains) == (str(path), True)


def test_lora_flags(golden):
    parser = argparse.ArgumentParser()
    add_trained_arguments(parser)
    add_lora_arguments(parser)
    words = "--lora-r 4 --lora-use-rslora --loraplus-lr-ratio 16 --quantize nf4 --double-quant --freeze_backbone True"
    flags = given_flags(parser.parse_args(words.split()))
    decoder = load_model_spec(
        flags.applied(model_json(golden, trained=("vision_projector",)) | trained_decoder(golden))
    )
    decoder = decoder.text_decoder
    assert (decoder.lora.r, decoder.lora.use_rslora, decoder.lora.loraplus_lr_ratio) == (4, True, 16)
    assert (decoder.quantize, decoder.double_quant, decoder.freeze) == ("nf4", True, False)
    flags = given_flags(parser.parse_args(["--lora-use-dora"]))
    assert load_model_spec(flags.applied(model_json(golden, trained=("text_decoder",)))).text_decoder.lora.use_dora
    assert not given_flags(parser.parse_args([])).given


def trained_decoder(golden):
    return {"text_decoder": model_json(golden, trained=("text_decoder",))["text_decoder"]}


def test_what_cannot_be_meant(golden):
    made = model_json(golden, trained=("text_decoder", "vision_projector"))
    with pytest.raises(ConfigError, match="--mm-projector-lr is given for a projector that the flags freeze"):
        TrainedParts(freeze_mm_mlp_adapter=True, mm_projector_lr=1e-3).applied(made)
    tied = SimpleNamespace(**made)
    tied.text_decoder = made["text_decoder"] | {"share_embeddings_and_output_weights": True}
    with pytest.raises(ConfigError, match="--tune-lm-head: found share_embeddings_and_output_weights"):
        TrainedParts(tune_lm_head=True).applied(vars(tied))
    flags = ModelFlags({"r": 4}, {}, TrainedParts(tune_mm_mlp_adapter=True))
    with pytest.raises(ConfigError, match="--tune-mm-mlp-adapter freezes all but the projector"):
        flags.applied(made)
    with pytest.raises(ConfigError, match="image_encoder.vision_encoder.lr: found 1e-06 for a part that is frozen"):
        load_model_spec(TrainedParts(vision_encoder_lr=1e-6).applied(made))
    assert TrainedParts(freeze_backbone=True).applied({"text_decoder": 3}) == {"text_decoder": 3}
