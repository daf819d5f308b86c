"""Exported folders stand by themselves: transformers' Auto classes read model, processor, options and template."""

import json

import pytest
import torch
import transformers

import mindspeed_mm as mm
from tests.helpers import tiny_blip, tiny_llava, tiny_qwen
from tests.helpers.tiny_llava import close, image

TEMPLATE = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}{% endfor %}"
OPTIONS = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1, "max_new_tokens": 6}
IDS = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}


def _llava(folder):
    return tiny_llava.save(tiny_llava.llava(tiny_llava.clip(), "qwen2"), folder, tiny_llava.fixed_processor("clip"))


def _llava_next(folder):
    return tiny_llava.save(tiny_llava.llava_next(tiny_llava.clip()), folder, tiny_llava.tile_processor())


MADE = {
    "llava-hf": _llava,
    "llava_next": _llava_next,
    "blip2": lambda folder: tiny_blip.save(tiny_blip.blip2(), folder),
    "instructblip": lambda folder: tiny_blip.save(tiny_blip.instructblip(), folder),
    "qwen2_5_vl": lambda folder: tiny_qwen.save(tiny_qwen.qwen(), folder),
}


@pytest.fixture(params=MADE)
def exported(request, tmp_path):
    """(folder of transformers' model, the same through layout mindspeed-mm, layout)."""
    folder = MADE[request.param](tmp_path / "theirs")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    transformers.GenerationConfig(**OPTIONS, **IDS).save_pretrained(folder)
    mm.convert(folder, tmp_path / "ours", to="mindspeed-mm")
    mm.convert(tmp_path / "ours", tmp_path / "out", to=request.param)
    return folder, tmp_path / "out", request.param


def test_exports_stand_by_themselves(exported):
    folder, out, layout = exported
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    again = transformers.AutoModelForImageTextToText.from_pretrained(out).eval()
    found = again.generation_config.to_dict()
    assert {key: found[key] for key in OPTIONS | IDS} == OPTIONS | IDS
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    if layout == "qwen2_5_vl":  # whose video processor needs torchvision
        return
    processor = transformers.AutoProcessor.from_pretrained(out)
    text = "w9 w5" if "blip" in layout else "<image> w9 w5"
    given = processor(text=[text], images=[image(30, 50)], return_tensors="pt")
    with torch.no_grad():
        wanted = theirs(**given).logits
        close(again(**given).logits, wanted, 0)
        close(mm.load(out, device="cpu").logits(**given), wanted)


def test_ids_of_no_file_are_those_of_the_tokenizer(tmp_path):
    """A tokenizer that ends with another token than Llama's, and knows <image> but no <pad>."""
    folder = _llava(tmp_path / "theirs")
    words = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(words | {"eos_token": "w7", "pad_token": "w8"}))
    mm.convert(folder, tmp_path / "ours", to="mindspeed-mm")
    (tmp_path / "ours" / "generation_config.json").unlink(missing_ok=True)
    mm.convert(tmp_path / "ours", tmp_path / "out", to="llava-hf")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 8}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 8
