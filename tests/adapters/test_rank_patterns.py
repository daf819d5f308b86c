"""Linears and parts with an r and alpha of their own: PEFT's rank_pattern and alpha_pattern, both ways."""

import json

import peft
import pytest
import torch
import transformers

import mindspeed_mm as mm
from checkpoint_converters.merge import merge
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import load_model_spec
from tests.adapters.test_peft_folders import adapted, block, written_alike
from tests.helpers.tiny_decoders import make, rows, save
from tests.helpers.tiny_llava import IMAGE_ID, clip, close, llava
from tests.helpers.tiny_llava import save as save_llava

PATTERNS = {
    "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp.down_proj": 2},
    "alpha_pattern": {"q_proj": 11, ".*up_proj": 3},
}


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_decoder(tmp_path, kind):
    theirs = make("llama")
    path, ids = save(theirs, "llama", tmp_path), rows(2, 9)
    wrapped = adapted(theirs, tmp_path / "adapter", target_modules="all-linear", **PATTERNS, **kind)
    with torch.no_grad():
        wanted = wrapped(input_ids=ids).logits
    ours = mm.load(path, device="cpu", adapter=tmp_path / "adapter")
    close(ours.logits(ids), wanted)
    written_alike(ours, tmp_path, decoder_only=True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(stock, tmp_path / "written").eval()(input_ids=ids).logits, wanted)
    merge(tmp_path / "hf", [tmp_path / "adapter"], tmp_path / "merged")
    with torch.no_grad():
        close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits, wanted)


def test_parts_with_ranks_of_their_own(tmp_path):
    """As XTuner trains them: one rank for the decoder, another for the vision encoder, in one folder."""
    model = llava(clip())
    base, ids = save_llava(model, tmp_path / "base"), rows(1, 30)
    ids[ids == IMAGE_ID] = 5
    ids[:, 2:18] = IMAGE_ID
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    targets = r".*(language_model|vision_tower).*\.(q_proj|fc1|up_proj)"
    own = {"rank_pattern": {r"model.vision_tower\..*": 2}, "alpha_pattern": {r"model.vision_tower\..*": 9}}
    wrapped = adapted(model, tmp_path / "adapter", target_modules=targets, **own)
    with torch.no_grad():
        wanted = wrapped(input_ids=ids, pixel_values=pixels).logits
    ours = mm.load(base, device="cpu", adapter=tmp_path / "adapter")
    close(ours.logits(ids, pixel_values=pixels), wanted)
    written_alike(ours, tmp_path)
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 7) and set(config["rank_pattern"].values()) == {2}
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    again = peft.PeftModel.from_pretrained(stock, tmp_path / "written").eval()
    with torch.no_grad():
        close(again(input_ids=ids, pixel_values=pixels).logits, wanted)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"rank_pattern": {"qproj": 4}},
            r"rank_pattern: 'qproj' fits none of the adapted linears; expected some of q_",
        ),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 4}}, "alpha_pattern: 'v_proj' fits none"),
        ({"rank_pattern": {"q_(": 4}}, "which is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ],
)
def test_patterns_that_cannot_be(tmp_path, lora, message):
    path = save(make("llama"), "llama", tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_model_spec(block(path, **lora))
