"""CLIP and SigLIP of any layer and size against transformers' classes: features, gradients, export."""

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.part import part_for_model_type, part_of
from mindspeed_mm.models.sources import open_source
from tests.helpers.encoder_ranks import EncoderShard, encode, whole_gradients
from tests.helpers.tiny_llava import VISION, clip, close, image, randomised, siglip
from tests.parallel.comparison import names

CLASSES = {"clip": (clip, transformers.CLIPVisionModel), "siglip": (siglip, transformers.SiglipVisionModel)}

VARIANTS = {
    "clip": ("clip", {}, {}),
    "clip layer 1": ("clip", {}, {"select_layer": 1}),
    "clip layer 2 of 5": ("clip", {"num_hidden_layers": 5}, {"select_layer": -4}),
    "clip last layer": ("clip", {}, {"select_layer": -1}),
    "clip class token": ("clip", {}, {"select_layer": 3, "select_feature": "cls_patch"}),
    "clip gelu": ("clip", {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {}),
    "clip with rest": ("clip", {"image_size": 31, "patch_size": 9}, {}),
    "clip of one patch": ("clip", {"image_size": 14, "patch_size": 14}, {}),
    "siglip": ("siglip", {}, {}),
    "siglip layer": ("siglip", {}, {"select_layer": -2}),
    "siglip without head": ("siglip", {"vision_use_head": False}, {"select_layer": 1}),
    "siglip quick gelu": ("siglip", {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}, {}),
    "siglip with rest": ("siglip", {"image_size": 31, "patch_size": 9}, {}),
}


class EncoderCase:
    """A tiny encoder of transformers, its folder and our spec of it."""

    def __init__(self, kind: str, changes: dict, chosen: dict, folder) -> None:
        config, model = CLASSES[kind]
        torch.manual_seed(3)
        self.theirs = randomised(model(config(**changes)))
        self.theirs.save_pretrained(folder)
        self.folder, self.chosen = folder, chosen
        self.spec = describe_part(open_source(folder).part("vision_encoder"), **chosen)
        self.part = part_of("vision_encoder", self.spec)
        assert self.part.name == kind
        side = self.spec.image_size
        generator = torch.Generator().manual_seed(5)
        self.pixels = torch.randn(3, 3, side, side, generator=generator)
        self.weights = torch.randn(3 * self.spec.num_image_tokens, self.spec.hidden_size, generator=generator)

    def their_features(self) -> torch.Tensor:
        """[F, Hv] of transformers' hidden state."""
        hidden = self.theirs(self.pixels, output_hidden_states=True).hidden_states[self.spec.select_layer]
        dropped = self.part.name == "clip" and self.spec.select_feature == "patch"
        return hidden[:, int(dropped) :].flatten(0, 1)

    def ours(self, ranks=None) -> list[EncoderShard]:
        """What each rank has; one process without `ranks`."""
        if ranks is None:
            return [encode(str(self.folder), self.chosen, 1, self.pixels, self.weights)]
        return ranks(2).run(encode, str(self.folder), self.chosen, 2, self.pixels, self.weights)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory):
    return EncoderCase(*VARIANTS[request.param], tmp_path_factory.mktemp("encoder"))


def test_features_and_gradients(case):
    check_features_and_gradients(case)


SPREAD = ("clip", "clip with rest", "siglip", "siglip with rest")
"""Variants that two ranks compute: the others differ in what stands behind or in front of the layers."""


@pytest.mark.parametrize("case", names(VARIANTS, slow=set(VARIANTS) - set(SPREAD)), indirect=True)
def test_features_and_gradients_of_two_ranks(case, ranks):
    check_features_and_gradients(case, ranks)


def check_features_and_gradients(case, ranks=None):
    case.theirs.zero_grad()
    features = case.their_features()
    (features * case.weights).sum().backward()
    shards = case.ours(ranks)
    for shard in shards:
        close(shard.features, features.detach())
    wanted = {name.removeprefix("vision_model."): p.grad for name, p in case.theirs.named_parameters()}
    found = whole_gradients(shards, case.part, case.spec)
    used = {name for name, gradient in wanted.items() if gradient is not None and gradient.any()}
    assert used <= set(found)
    for name, gradient in found.items():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding noise
            assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_layers_behind_the_feature_are_not_built(case):
    layers = {name.split(".")[2] for name in case.ours()[0].gradients if name.startswith("decoder.layers.")}
    assert len(layers) == case.spec.num_built_layers


def test_export_is_read_by_transformers(case, tmp_path):
    mm.convert(case.folder, tmp_path / "out", to=case.part.layouts[0].name)
    again, report = type(case.theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    wanted = case.theirs.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(CLASSES)),
    heads=st.integers(1, 4),
    channels=st.sampled_from([4, 6, 10]),
    inner=st.integers(3, 40),
    layers=st.integers(2, 4),
    patch=st.integers(3, 15),
    patches=st.integers(1, 4),
    rest=st.integers(0, 2),
    data=st.data(),
)
def test_features_of_any_geometry(tmp_path_factory, kind, heads, channels, inner, layers, patch, patches, rest, data):
    layer = data.draw(st.sampled_from([*range(1, layers + 1), *range(-layers, 0)]))
    changes = {
        "hidden_size": heads * channels,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "patch_size": patch,
        "image_size": patch * patches + rest,
    }
    feature = data.draw(st.sampled_from(["patch", "cls_patch"])) if kind == "clip" else "patch"
    chosen = {"select_layer": layer, "select_feature": feature}
    found = EncoderCase(kind, changes, chosen, tmp_path_factory.mktemp("any"))
    close(found.ours()[0].features, found.their_features().detach())


@pytest.mark.parametrize("kind", ["CLIPImageProcessorPil", "SiglipImageProcessorPil", "ViTImageProcessorPil"])
@pytest.mark.parametrize("size", [(30, 50), (90, 20), (1, 1), (1, 300), (300, 1)])
def test_pixels_equal_the_processor_that_transformers_has(kind, size):
    """Also of one pixel and of extreme aspect ratios."""
    theirs = getattr(transformers, kind)()
    shown = image(*size)
    wanted = theirs(shown, return_tensors="pt")["pixel_values"][0]
    for config in (theirs.to_dict(), {"image_processor_type": kind}):
        torch.testing.assert_close(mm.preprocess(shown, config, pad=False), wanted, atol=1e-6, rtol=0)


# --- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "clip",
            {"vision_feature_layer": 0},
            "select_layer 0 .* is outside the 3 layers; expected -3..-1 or 1..3",
        ),
        (
            "clip",
            {"vision_feature_layer": -4},
            "select_layer -4 .HF's vision_feature_layer. is outside the 3",
        ),
        ("clip", {"vision_feature_layer": [-2, -5]}, r"select_layer \[-2, -5\] .* is outside the 3 layers"),
        ("clip", {"vision_feature_select_strategy": "all"}, "strategy 'all'; expected default or full"),
        ("clip", {"hidden_act": "relu"}, "activation_func"),
        ("clip", {"num_channels": 4}, "images are RGB"),
        ("clip", {"image_size": 6}, "image_size 6 holds no patch of patch_size 7"),
        ("clip", {"num_attention_heads": 3}, "CLIP has plain multi-head attention whose heads fill its width"),
        ("siglip", {"vision_feature_select_strategy": "default"}, "would drop the first patch"),
        ("siglip", {"vision_feature_layer": 4}, "select_layer 4 .* is outside the 3 layers"),
        ("siglip", {"image_size": 6}, "image_size 6 holds no patch of patch_size 7"),
        ("siglip", {"num_attention_heads": 3}, "SigLIP has plain multi-head attention"),
        ("siglip", {"hidden_act": "relu"}, "activation_func"),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(kind, changes, message):
    types = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
    config = {"model_type": types[kind], **VISION, **changes}
    part = part_for_model_type("vision_encoder", config["model_type"])
    with pytest.raises(ConfigError, match=message):
        part.from_hf(config)


def test_an_unsupported_model_type_gets_the_nearest_ones():
    with pytest.raises(ConfigError, match='reads model_type "siglip2_vision_model"; the nearest are siglip_vision_mod'):
        part_for_model_type("vision_encoder", "siglip2_vision_model")
    with pytest.raises(ConfigError, match='"dinov2"; known are .*clip.*docs/adding_a_family.md'):
        part_for_model_type("vision_encoder", "dinov2")
