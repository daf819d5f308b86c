"""Loss sums and the operation count."""

import pytest
import torch

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.operations import EncoderWork
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.objectives._batches import pad_to_one_length
from mindspeed_mm.objectives.sft import sum_losses
from mindspeed_mm.trainer.flops import forward_flops, step_flops
from tests.helpers.golden_model import PROJECTOR, TEXT, VISION


def spec(**freeze):
    return load_model_spec(
        {
            "text_decoder": TEXT | {"freeze": freeze.get("text", False), "fresh": True},
            "image_encoder": {
                "vision_encoder": VISION | {"freeze": freeze.get("vision_encoder", False), "fresh": True},
                "vision_projector": PROJECTOR | {"freeze": freeze.get("projector", False)},
            },
        }
    )


def one_image() -> EncoderWork:
    return spec().family.planned_image(spec())


def test_losses_are_summed_and_counted():
    losses = torch.tensor([1.0, 2.5], requires_grad=True)
    total, count, report = sum_losses(losses)
    assert (total.item(), count.item()) == (3.5, 2)
    assert report["lm loss"] == (total, count) and not report["lm loss"][0].requires_grad


def test_no_supervised_token_sums_to_zero():
    total, count, _ = sum_losses(torch.empty(0, requires_grad=True))
    assert (total.item(), count.item()) == (0.0, 0)
    total.backward()


def test_dense_transformer_is_two_flops_a_weight_and_token():
    encoder = spec().vision_encoder
    layers, width, inner = encoder.num_built_layers, encoder.hidden_size, encoder.ffn_hidden_size
    work = EncoderWork(positions=5, pairs=layers * 25)
    weights = width * 3 * width + width * width + 2 * width * inner
    forward = forward_flops(spec(), lengths=[0], work=work, supervised=0)
    assert forward.vision_encoder == layers * (2 * 5 * weights + 4 * width * 25)
    assert (forward.decoder, forward.projector, forward.head) == (0, 0, 0)


@pytest.mark.parametrize("lengths", [[100], [60, 40]])
def test_backward_costs_what_is_trained(lengths):
    def flops(**freeze):
        return step_flops(spec(**freeze), lengths=lengths, work=one_image(), supervised=10)

    everything = flops()
    only_projector = flops(text=True, vision_encoder=True)
    forward = flops(text=True, vision_encoder=True, projector=True)
    patches = forward_flops(spec(), lengths=lengths, work=one_image(), supervised=10).patches
    assert everything == pytest.approx(3 * forward - patches)  # images need no gradient
    assert forward < only_projector < everything


def test_counts_agree_with_torch(golden, monkeypatch):
    """torch's own counter over a forward pass sees the same matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    import mindspeed_mm as mm
    from mindspeed_mm.platform import host_products

    monkeypatch.setattr(host_products, "choose", lambda *_: host_products.PLAIN)  # it does not know oneDNN's products

    vlm = mm.load(golden / "models" / "llava_original", device="cpu")
    ids = torch.randint(3, 900, (1, 40))
    ids[0, 4:20] = -200
    pixels = torch.randn(1, 3, 56, 56)
    labels = torch.full_like(ids, -100)
    labels[0, 30:35] = 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vlm.model(ids, torch.arange(40)[None], labels=labels, media=Media.of_images(pixels))
    frozen = spec(text=True, vision_encoder=True, projector=True)
    counted = step_flops(frozen, lengths=[40], work=one_image(), supervised=5)
    # torch 2.13 does not count its CPU attention kernel: 4 causal decoder layers, 3 vision encoder layers over 17
    # positions.
    attention = 4 * 4 * 96 * 40 * 40 / 2 + 3 * 4 * 64 * 17 * 17
    assert counter.get_total_flops() == counted - attention


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_micro_batches_of_one_length(packed):
    """The padding is a segment of its own, without labels; nothing else changes."""
    short, long = (Encoded("x", list(range(1, size)), list(range(1, size))) for size in (6, 10))
    batches = []
    for sample in (short, long):
        collate = Collator(0, row_length=len(sample.input_ids) if packed else None)
        batches.append(collate([[sample]] if packed else [sample]))
    leveled = pad_to_one_length(batches, 7)
    assert leveled[1] is batches[1]
    assert leveled[0].input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 7, 7, 7]]
    assert leveled[0].labels[0, 5:].tolist() == [IGNORE_INDEX] * 4
    assert leveled[0].position_ids.shape == leveled[0].labels.shape == leveled[0].input_ids.shape
    assert (leveled[0].tokens, leveled[0].supervised, leveled[0].lengths) == (5, 4, (5,))
    if packed:
        assert leveled[0].segment_ids.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0, 0]]
