"""The post-interaction block's values: the original's formulas, the identity at the start, and what is refused."""

import re

import pytest
import torch

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.media import Media
from tests.interaction.post_block_helpers import FEATURES, WIDTH, formulas, tensors, with_block, write_block

IMAGE = -200


@pytest.fixture
def build(golden, tmp_path):
    """Builds the golden model with a block on this rank."""
    from mindspeed_mm.platform import get_platform

    platform = get_platform("cpu")
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.complete import read_model
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.platform.distributed import init_single_process

    if not torch.distributed.is_initialized():
        init_single_process(platform)

    def make(trained=(), **block):
        model = with_block(golden, trained, **block)
        return build_vlm(read_model(model), Runtime(), torch.device("cpu"))[0]

    return make


def batch(images: int = 3):
    """Rows with one, two and no image; and the pixels of all."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 900, (3, 60), generator=generator)
    ids[0, 4:20] = ids[1, 2:18] = ids[1, 30:46] = IMAGE
    return ids, torch.arange(60)[None], Media.of_images(torch.randn(images, 3, 56, 56, generator=generator))


FORMS = {
    "usual": {},
    "doubled": {"doubled_residual": True},
    "linear": {"align": "linear"},
    "after the projector": {"features": "vision_projector"},
    "no cross-attention": {"cross_attention": False},
    "two layers": {"num_layers": 2},
    "transformer block": {"cross_attention": False, "self_attention": True, "num_layers": 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_formulas(build, tmp_path, form):
    block = FORMS[form]
    own = {
        "depth": block.get("num_layers", 1),
        "align": block.get("align", "mlp"),
        "cross": block.get("cross_attention", True),
        "text": block.get("self_attention", False),
        "features": WIDTH if block.get("features") else FEATURES,
    }
    vlm = build(ckpt_path=str(write_block(tmp_path / "block.pt", **own)), **block)
    ids, positions, media = batch()
    states = []
    vlm.text_decoder.decoder.register_forward_hook(lambda module, given, output: states.append(output))
    with torch.no_grad():
        found = vlm(ids, positions, media=media)
        features = vlm.image_encoder.features(media)
        features = vlm.image_encoder.project(features) if block.get("features") else features
        images = list(features.values.split(features.counts))
        for row, position, shown in ((0, 3, []), (0, 25, [0]), (1, 20, [1]), (1, 59, [1, 2]), (2, 40, [])):
            hidden = states[0][0 if own["text"] else position : position + 1, row]
            memory = torch.cat([images[number] for number in shown]) if shown else None
            doubled = block.get("doubled_residual", False)
            wanted = vlm.text_decoder.logits(formulas(tensors(**own), hidden, memory, doubled=doubled))
            torch.testing.assert_close(found[row, position], wanted[-1, : found.shape[-1]], atol=2e-5, rtol=1e-4)


TEXT = {"cross_attention": False, "self_attention": True}


@pytest.mark.parametrize("block", [{}, TEXT], ids=["cross", "text"])
def test_identity_at_the_start(build, block):
    ids, positions, media = batch()
    labels = ids.roll(-1, 1).masked_fill(ids.roll(-1, 1) == IMAGE, -100)
    vlm = build(**block)
    with torch.no_grad():
        found = vlm(ids, positions, media=media), vlm(ids, positions, labels=labels, media=media)
        vlm.interaction = None
        wanted = vlm(ids, positions, media=media), vlm(ids, positions, labels=labels, media=media)
    for pair in zip(found, wanted, strict=True):
        torch.testing.assert_close(*pair, atol=0, rtol=0)


def test_doubled_residual_begins_at_twice_the_state(build):
    ids, positions, media = batch()
    vlm = build(doubled_residual=True, init_method_std=0.0)
    with torch.no_grad():
        found = vlm(ids, positions, media=media)
        vlm.interaction = None
        torch.testing.assert_close(found, 2 * vlm(ids, positions, media=media), atol=1e-5, rtol=1e-5)


@pytest.fixture(params=["cross", "text"])
def loaded(build, tmp_path, request):
    """The golden model with a block at random values, of both kinds of attention."""
    text = request.param == "text"
    path = write_block(tmp_path / "block.pt", cross=not text, text=text)
    return build(ckpt_path=str(path), **(TEXT if text else {}))


def test_losses_at_supervised_positions_are_those_of_the_logits(loaded):
    vlm = loaded
    ids, positions, media = batch()
    labels = torch.full_like(ids, -100)
    labels[0, 22:31], labels[1, 20:28], labels[2, 5:9] = 7, 8, 9
    with torch.no_grad():
        losses = vlm(ids, positions, labels=labels, media=media)
        scores = vlm(ids, positions, media=media).log_softmax(-1)
    places = (labels.t() != -100).nonzero()
    wanted = torch.stack([-scores[row, column, labels[row, column]] for column, row in places.tolist()])
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-5)


def test_packed_rows_see_their_own_images_and_text(loaded):
    from mindspeed_mm.platform.segments import Segments

    vlm = loaded
    ids, positions, media = batch()
    with torch.no_grad():
        wanted = vlm(ids, positions, media=media)
        segments = Segments.of_lengths([60, 60, 60], torch.device("cpu"))
        found = vlm(ids.view(1, -1), positions.repeat(1, 3), media=media, segments=segments)
    torch.testing.assert_close(found.view_as(wanted), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("trained", [("interaction",), ("vision_projector",), ()])
def test_gradients_go_where_something_is_trained(build, tmp_path, trained):
    path = str(write_block(tmp_path / "block.pt"))
    vlm = build(trained, ckpt_path=path, freeze="interaction" not in trained)
    ids, positions, media = batch()
    labels = torch.full_like(ids, -100)
    labels[0, 22:31] = labels[2, 3:5] = 7
    vlm.train()
    losses = vlm(ids, positions, labels=labels, media=media)
    if trained:
        losses.sum().backward()
    found = {name for name, parameter in vlm.named_parameters() if parameter.grad is not None}
    names = {"interaction": "interaction.", "vision_projector": "image_encoder.projector."}
    wanted = {name for name, _ in vlm.named_parameters() if name.startswith(tuple(names[slot] for slot in trained))}
    assert found == (wanted if trained else set())
    assert losses.requires_grad == bool(trained)


def test_a_batch_without_images_gives_zero_gradients(build, tmp_path):
    vlm = build(ckpt_path=str(write_block(tmp_path / "block.pt")))
    ids, positions, _ = batch()
    ids[ids == IMAGE] = 4
    labels = torch.full_like(ids, -100)
    labels[0, 22:31] = 7
    vlm(ids, positions, labels=labels).sum().backward()
    for name, parameter in vlm.interaction.named_parameters():
        looks = name.startswith(("align.", "memory_norm.")) or "cross_attention." in name
        assert parameter.grad is not None and bool(parameter.grad.any()) is not looks, name


REFUSED = {
    "width of features": ({"input_size": 65}, "interaction.input_size: found 65, expected 64, the vision_encoder's"),
    "width": ({"hidden_size": 90}, "interaction.hidden_size: found 90, expected 96, the text_decoder's hidden_size"),
    "heads": ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 96"),
    "align": ({"align": "mpl"}, "interaction.align"),
    "features": ({"features": "text_decoder"}, "interaction.features"),
    "two attentions": ({"self_attention": True}, "found self_attention true beside cross_attention"),
    "adapters": ({"lora": {"r": 4, "target_modules": ["linear_q"]}}, "found lora in the interaction block"),
    "fewer bits": ({"quantize": "nf4", "freeze": True}, "found quantize in the interaction block"),
    "activation": ({"activation_func": "gelu"}, "the block's MLP has SiLU"),
    "unknown key": ({"depth": 2}, "interaction.depth"),
    "unknown block": ({"model_id": "postblock"}, 'interaction model_id "postblock"'),
    "rate of a frozen one": ({"freeze": True, "lr": 1e-4}, "interaction.lr: found 0.0001 for a part that is frozen"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(golden, case):
    from mindspeed_mm.models.complete import read_model

    block, words = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_model(with_block(golden, **block))


def test_features_beside_the_text_are_refused(golden, monkeypatch):
    from mindspeed_mm.models.complete import read_model
    from mindspeed_mm.models.kit.cross_spec import CrossDecoderSpec

    monkeypatch.setattr(CrossDecoderSpec, "cross_shape", property(lambda spec: object()))
    with pytest.raises(ConfigError, match="behind a text_decoder that attends to features beside its text"):
        read_model(with_block(golden))


def test_weights_of_another_form(build, tmp_path):
    path = str(write_block(tmp_path / "block.pt"))
    with pytest.raises(WeightError, match="align"):
        build(ckpt_path=path, align="linear")
    with pytest.raises(WeightError, match="blocks.1"):
        build(ckpt_path=path, num_layers=2)
