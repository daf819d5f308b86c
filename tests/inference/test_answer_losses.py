"""Losses of given answers: those of whole conversations, one by one."""

import pytest
import torch
from PIL import Image

import mindspeed_mm as mm
from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.encode import encode
from mindspeed_mm.errors import ConfigError, DataError
from tests.helpers.tiny_families import MAKERS

ANSWERS = ["w9", "w7 w8 w9 w10", "w9 w10"]


def whole(vlm, answer, image):
    """The mean loss of the conversation with one answer, from the logits of the whole model."""
    turns = [{"from": "human", "value": "<image>\nw5 w6"}, {"from": "gpt", "value": answer}]
    ids, labels = encode(turns, vlm.tokenizer, vlm.template)
    place, count = ids.index(IMAGE_TOKEN_INDEX), vlm.tokens_per_image
    ids[place : place + 1], labels[place : place + 1] = [IMAGE_TOKEN_INDEX] * count, [-100] * count
    inputs = {"pixel_values": vlm.media.item(image).pixels}
    if vlm.media.reads_instructions:
        inputs["qformer_input_ids"] = torch.tensor([vlm.media.instruction("w5 w6")])
    logits = vlm.logits(torch.tensor([ids]), **inputs)[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:])).item()


@pytest.mark.parametrize("name", ["instructblip", "llava"])
def test_as_whole_conversations(name, golden, tmp_path, monkeypatch):
    if name == "llava":
        folder = golden / "models" / "llava_hf"
    else:
        MAKERS[name](tmp_path)
        folder = tmp_path
    vlm, image = mm.load(folder, device="cpu"), Image.new("RGB", (40, 30), "red")
    found = vlm.answer_losses("w5 w6", [image], ANSWERS)
    assert found == pytest.approx([whole(vlm, answer, image) for answer in ANSWERS], rel=1e-4)
    assert vlm.answer_losses("<image>\nw5 w6", [image], ANSWERS[1:2]) == pytest.approx(found[1:2], rel=1e-5)
    assert len(vlm.answer_losses("w5", [], ["w9", "w9"])) == 2
    with pytest.raises(ConfigError, match="got no answers"):
        vlm.answer_losses("w5", [], [])
    with pytest.raises(DataError, match="the answer ' ' has no token to be judged"):
        vlm.answer_losses("w5", [], [" "], template="v1")
    with pytest.raises(ConfigError, match="tokens; expected at most .*, the model's context"):
        vlm.answer_losses("w5", [], ["w9 " * 5000])
    monkeypatch.setattr(vlm.model, "post_process", False)
    with pytest.raises(ConfigError, match="needs the whole model on each pipeline stage"):
        vlm.answer_losses("w5", [], ["w9"])
