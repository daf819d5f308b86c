"""Options of LLaVA's configs against transformers' classes: several feature layers, other activations, no biases."""

import json

import peft
import pytest
import torch
import transformers
from transformers.activations import ACT2FN

import mindspeed_mm as mm
from checkpoint_converters.checkpoint.adapters import adapters_of_run
from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.inference.model_json import model_json_of
from mindspeed_mm.models.complete import read_model
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import find_family, load_model_spec, model_block
from mindspeed_mm.models.vision_encoder.clip import ClipSpec
from mindspeed_mm.models.vision_projector import mlp
from tests.helpers.golden_training import GoldenLayout, records
from tests.helpers.tiny_llava import (
    FULL,
    clip,
    close,
    fixed_processor,
    image,
    inputs,
    llava,
    llava_next,
    sample,
    save,
    siglip,
    their_loss,
    tile_processor,
)
from tests.helpers.vlm_ranks import GRADIENT, STEP, compare, stored, train, trained

ODD = {"hidden_size": 36, "intermediate_size": 46, "num_attention_heads": 6, "image_size": 39, "patch_size": 13}
NO_BIAS = {"multimodal_projector_bias": False}
CASES = {
    "llava": ("llava", clip, {"vision_feature_layer": [-1, 1, -3], "projector_hidden_act": "relu"}),
    "llava from the embedding": ("llava", clip, NO_BIAS | {"vision_feature_layer": [0, 2, 0]}),
    "llava siglip": ("llava", siglip, FULL | {"vision_feature_layer": [1, -1], "projector_hidden_act": "quick_gelu"}),
    "llava_next": ("llava_next", clip, NO_BIAS | {"vision_feature_layer": [2, -1], "projector_hidden_act": "silu"}),
}
CLASSES = {
    "llava": transformers.LlavaForConditionalGeneration,
    "llava_next": transformers.LlavaNextForConditionalGeneration,
}


def make(name, folder, **others):
    """(transformers' model, the family) of a case, saved in the folder."""
    kind, vision, changes = CASES[name]
    changes = changes | others
    if kind == "llava":
        theirs, side = llava(vision(**ODD), **changes), ODD["image_size"]
        save(theirs, folder, fixed_processor("siglip" if vision is siglip else "clip", side))
    else:
        theirs = llava_next(vision(hidden_size=36, num_attention_heads=2, num_hidden_layers=4), **changes)
        save(theirs, folder, tile_processor())
    return theirs, find_family(kind)


def shown(media):
    """Two images, none, one."""
    return [
        sample(media, [image(30, 50), image(90, 20)], (6, 9, 5), seed=1),
        sample(media, [], (23,), seed=5),
        sample(media, [image(1, 7)], (4, 12), seed=9),
    ]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(transformers' model with its gradients of the samples, the family, the folder, our spec, samples)."""
    folder = tmp_path_factory.mktemp("options")
    theirs, family = make(request.param, folder)
    spec = describe_model(open_source(folder))
    samples = shown(family.media_processor(spec, folder))
    their_loss(theirs, family, spec, samples).backward()
    return theirs, family, folder, spec, samples


def test_logits_and_export(case, tmp_path):
    theirs, family, folder, _, samples = case
    ours = mm.load(folder, device="cpu")
    own = inputs(family, ours.spec, samples[0])
    with torch.no_grad():
        wanted = theirs(**own).logits
    close(ours.logits(**own), wanted)
    layout = family.layouts[0].name
    mm.convert(folder, tmp_path / "ours", to="mindspeed-mm")
    mm.convert(tmp_path / "ours", tmp_path / "out", to=layout)
    again, report = CLASSES[family.name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for key in ("vision_feature_layer", "multimodal_projector_bias", "projector_hidden_act"):
        assert getattr(again.config, key) == getattr(theirs.config, key)
    with torch.no_grad():
        close(again.eval()(**own).logits, wanted, 0)


LAYOUTS = {
    "packed, recomputed": GoldenLayout(packed=True),
    "TP2 SP": GoldenLayout(tensor=2, flags="--sequence-parallel"),
    "TP2 PP2": GoldenLayout(tensor=2, pipeline=2),
    "CP2 packed": GoldenLayout(context=2, packed=True),
}
SPREADS = [("llava", name) for name in LAYOUTS] + [
    ("llava from the embedding", "TP2 SP"),
    ("llava siglip", "packed, recomputed"),
    ("llava_next", "packed, recomputed"),
    ("llava_next", "TP2 PP2"),
]
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform"}


@pytest.mark.parametrize(("case", "name"), SPREADS, indirect=["case"])
def test_gradients(case, ranks, name, tmp_path):
    theirs, family, folder, spec, samples = case
    names, layout = family.layouts[0], LAYOUTS[name]
    parameters = stored(theirs, names)
    wanted = {key: tensor.grad for key, tensor in parameters.items() if tensor.grad is not None}
    block = model_block(dict(spec.part_specs()), family.name)
    if "recomputed" in name:
        together = {"recompute_num_layers": spec.vision_encoder.num_built_layers}
        block["image_encoder"]["vision_encoder"] |= RECOMPUTED | together
    ranks(layout.ranks).run(train, str(folder), layout, samples, str(tmp_path), 1, GRADIENT, block)
    after = trained(tmp_path, spec, names)
    found = {key: (parameters[key].detach() - tensor[: len(parameters[key])]) / STEP for key, tensor in after.items()}
    compare(found, wanted)


def test_adapters_on_the_projector(ranks, tmp_path):
    """Three steps of adapters on linears without biases are PEFT's, at TP2 and PP2."""
    theirs, family = make("llava_next", tmp_path / "base")
    spec = describe_model(open_source(tmp_path / "base"))
    targets = ["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"]
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    values = [parameter for name, parameter in wrapped.named_parameters() if ".lora_" in name]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in values:
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "adapter")
    block = model_block(dict(spec.part_specs()), family.name)
    for own in (block["text_decoder"], *block["image_encoder"].values()):
        own["freeze"] = own is not block["image_encoder"]["vision_projector"]
    lora = {"r": 3, "alpha": 7, "target_modules": ["linear_1", "linear_2"], "load": str(tmp_path / "adapter")}
    block["image_encoder"]["vision_projector"]["lora"] = lora
    samples = shown(family.media_processor(spec, tmp_path / "base"))
    optimizer, losses = torch.optim.AdamW(values, lr=1e-2, eps=1e-2, weight_decay=0.0), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = their_loss(wrapped, family, spec, samples)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    layout = GoldenLayout(tensor=2, pipeline=2)
    flags = "--lr 1e-2 --adam-eps 1e-2"
    ranks(4).run(train, str(tmp_path / "base"), layout, samples, str(tmp_path / "run"), 3, flags, block)
    assert [row["loss"] for row in records(tmp_path / "run")] == pytest.approx(losses, rel=1e-5)
    found = adapters_of_run(tmp_path / "run", load_model_spec(block), "vision_projector")
    wanted = [tensor for own in found.values() for tensor in own[:2]]
    for ours, value in zip(wanted, values, strict=True):
        close(ours, value.detach(), 1e-5)


def test_activations():
    """Values and derivatives of every one that a projector may have."""
    from mindspeed_mm.models.runtime import ACTIVATIONS

    x = torch.linspace(-9, 9, 301, dtype=torch.float64)
    for name in mlp.ACTIVATIONS:
        (found, slope), (wanted, their_slope) = (
            (function(point), torch.autograd.grad(function(point).sum(), point)[0])
            for function, point in ((own, x.clone().requires_grad_()) for own in (ACTIVATIONS[name], ACT2FN[name]))
        )
        close(found, wanted, 1e-6)
        close(slope, their_slope, 1e-6)


# --- model.json ----------------------------------------------------------------------------------------------------


def test_a_model_json_of_weights(tmp_path):
    """`config init` says what config.json chose; what a short model.json leaves out follows from it."""
    make("llava from the embedding", tmp_path)
    block = model_json_of([tmp_path])
    encoder, projector = block["image_encoder"]["vision_encoder"], block["image_encoder"]["vision_projector"]
    assert encoder["select_layer"] == [0, 2, 0]
    assert projector["input_size"] == 3 * 36 and projector["add_bias_linear"] is False
    short = {"ckpt_path": str(tmp_path)}
    projector = short | {"add_bias_linear": False}
    made = read_model(
        {"text_decoder": short, "image_encoder": {"vision_encoder": short, "vision_projector": projector}}
    )
    assert made == load_model_spec(block)
    again = mm.load(tmp_path, device="cpu").spec
    assert again.vision_encoder.feature_layers == (0, 2, 0) and again.vision_encoder.num_built_layers == 2


CLIP = {"num_layers": 3, "hidden_size": 64, "patch_size": 7, "image_size": 28}
LINEARS = {"input_size": 64, "hidden_size": 48}


@pytest.mark.parametrize(
    ("spec", "block", "message"),
    [
        (ClipSpec, CLIP | {"select_layer": []}, "select_layer"),
        (ClipSpec, CLIP | {"select_layer": [-2, 4]}, r"select_layer \[-2, 4\] .* outside the 3 layers; expected -4..3"),
        (ClipSpec, CLIP | {"select_layer": [0, -4]}, "one of them behind a layer"),
        (ClipSpec, CLIP | {"select_layer": [-2, "1"]}, "select_layer"),
        (mlp.MlpSpec, LINEARS | {"activation_func": "prelu"}, "activation_func"),
        (mlp.MlpSpec, LINEARS | {"num_layers": 1, "activation_func": "relu"}, '"relu" stands between linears'),
    ],
)
def test_parts_that_cannot_be_built(spec, block, message):
    with pytest.raises(ConfigError, match=message):
        load_config(spec, block, what="x")


def test_a_projector_of_another_width(tmp_path):
    make("llava", tmp_path)
    block = model_json_of([tmp_path])
    block["image_encoder"]["vision_projector"]["input_size"] = 36
    wanted = "input_size: found 36, expected 108, the vision_encoder's hidden_size times the 3 layers of its select_lay"
    with pytest.raises(ConfigError, match=wanted):
        load_model_spec(block)
    block["image_encoder"]["vision_projector"] |= {"input_size": 108, "activation_func": "silu"}
    with pytest.raises(WeightError, match="activation_func: the weights have 'relu', model.json says 'silu'"):
        weights = tmp_path / "model.json"
        weights.write_text(json.dumps(block))
        mm.load(weights, device="cpu")


# --- The original code's layout, which says none of it --------------------------------------------------------------


ONE = {"vision_feature_layer": -1}
UNSAID = [
    ("llava", {}, "llava", r"layers \[-1, 1, -3\]; expected one layer"),
    ("llava_next", ONE, "llava", 'activation_func "silu" and add_bias_linear false'),
    ("llava siglip", ONE, "projector", 'activation_func "quick_gelu" and add_bias_linear true'),
]


@pytest.mark.parametrize(("name", "changes", "to", "message"), UNSAID)
def test_what_the_original_code_cannot_say(name, changes, to, message, tmp_path):
    make(name, tmp_path / "base", **changes)
    with pytest.raises(WeightError, match=message):
        mm.convert(tmp_path / "base", tmp_path / "out", to=to)


def test_several_layers_of_an_original_folder(tmp_path):
    save(llava(clip()), tmp_path / "base", fixed_processor("clip"))
    mm.convert(tmp_path / "base", tmp_path / "original", to="llava")
    path = tmp_path / "original/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mm_vision_select_layer": [-2, -1]}))
    with pytest.raises(WeightError, match=r"mm_vision_select_layer \[-2, -1\]; expected one layer"):
        mm.load(tmp_path / "original", device="cpu")
