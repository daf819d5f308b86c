"""Letter B: every key of the files that come with a model is honoured, harmless or refused; none is ignored."""

import inspect
import logging
from pathlib import Path

import pytest
import transformers

from mindspeed_mm.config.file_keys import file_keys
from mindspeed_mm.data import processor_keys, tokenizer_keys
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models import config_keys
from mindspeed_mm.models.part import all_parts
from mindspeed_mm.models.spec import all_families
from tests.helpers.file_keys_page import BEGIN, END, section

PAGE = Path(__file__).parents[2] / "docs/weights.md"

CONFIGS = {
    "LlavaConfig": config_keys.LLAVA_HF,
    "LlavaNextConfig": config_keys.LLAVA_NEXT_HF,
    "Qwen2_5_VLConfig": config_keys.QWEN2_5_VL,
    "Blip2Config": config_keys.BLIP2,
    "InstructBlipConfig": config_keys.BLIP2,
    "Blip2QFormerConfig": config_keys.QFORMER,
    "InstructBlipQFormerConfig": config_keys.QFORMER,
    "Blip2VisionConfig": all_parts("vision_encoder")["eva_vit"].keys,
    "InstructBlipVisionConfig": all_parts("vision_encoder")["eva_vit"].keys,
    "OPTConfig": all_parts("text_decoder")["opt"].keys,
    "BlipImageProcessor": processor_keys.FIXED_SIZE,
    "CLIPConfig": all_parts("vision_encoder")["clip"].keys,
    "CLIPVisionConfig": all_parts("vision_encoder")["clip"].keys,
    "SiglipConfig": all_parts("vision_encoder")["siglip"].keys,
    "SiglipVisionConfig": all_parts("vision_encoder")["siglip"].keys,
    "LlamaConfig": all_parts("text_decoder")["llama"].keys,
    "Qwen2Config": all_parts("text_decoder")["qwen2"].keys,
    "Qwen3Config": all_parts("text_decoder")["qwen3"].keys,
    "MistralConfig": all_parts("text_decoder")["mistral"].keys,
    "Phi3Config": all_parts("text_decoder")["phi3"].keys,
    "GemmaConfig": all_parts("text_decoder")["gemma"].keys,
    "Gemma2Config": all_parts("text_decoder")["gemma2"].keys,
    "GenerationConfig": tokenizer_keys.GENERATION_CONFIG,
    "CLIPImageProcessor": processor_keys.FIXED_SIZE,
    "SiglipImageProcessor": processor_keys.FIXED_SIZE,
    "ViTImageProcessor": processor_keys.FIXED_SIZE,
    "LlavaImageProcessor": processor_keys.FIXED_SIZE,
    "LlavaNextImageProcessor": processor_keys.TILES,
    "Qwen2VLImageProcessor": processor_keys.PATCHES,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_letter_b_every_key_that_transformers_writes_is_known(name):
    kind, table = getattr(transformers, name), CONFIGS[name]
    names = set() if "Processor" in name else set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    keys = {*kind().to_dict(), *names}
    assert keys <= table.known, f"{name} of transformers {transformers.__version__} writes {keys - table.known}"


def test_letter_b_the_vision_config_of_qwen():
    found = transformers.Qwen2_5_VLConfig().vision_config.to_dict()
    assert found.keys() <= all_parts("vision_encoder")["qwen2_5_vl"].keys.known


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "GPT2Tokenizer"])
def test_letter_b_every_key_of_a_tokenizer_is_known(name, tmp_path):
    names = set(inspect.signature(getattr(transformers, name).__init__).parameters) - {"self", "kwargs"}
    roles = set(transformers.PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
    assert names | roles <= tokenizer_keys.TOKENIZER_CONFIG.known
    assert roles <= tokenizer_keys.SPECIAL_TOKENS_MAP.known


@pytest.mark.parametrize("name", ["LlavaProcessor", "LlavaNextProcessor", "Qwen2_5_VLProcessor", "Blip2Processor"])
def test_letter_b_every_key_of_a_processor_is_known(name):
    names = set(inspect.signature(getattr(transformers, name).__init__).parameters) - {"self", "kwargs"}
    assert names <= processor_keys.PROCESSOR_CONFIG.known


def test_letter_b_every_part_and_family_has_a_table():
    """What a config.json describes has a list of its keys."""
    slots = ("text_decoder", "vision_encoder")
    assert not [name for slot in slots for name, part in all_parts(slot).items() if part.model_types and not part.keys]
    for family in all_families().values():
        assert set(family.config_keys) == {layout.name for layout in family.layouts}


def test_letter_b_the_page_shows_the_tables():
    text = PAGE.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) : text.index(END) + len(END)]
    assert shown == section(), "docs/weights.md: put tests.helpers.file_keys_page.section() between the marks"


TABLE = file_keys("toy.json", ("a",), {"b": (False, 0), "a": (1,)}, ("a", "b", "c"))


def test_letter_b_a_key_is_one_kind():
    assert TABLE.honoured == {"a"} and set(TABLE.neutral) == {"b"} and TABLE.harmless == {"c"}


@pytest.mark.parametrize("value", [True, 1, "no", [False]])
def test_letter_b_a_value_that_is_not_neutral_is_refused(value):
    shown = "true" if value is True else str(value).replace("[", r"\[")
    with pytest.raises(ConfigError, match=rf"toy.json \(here\): found b {shown}; a model without that is supported"):
        TABLE.check({"a": 5, "b": value}, where="here")


def test_letter_b_unknown_keys_with_a_value_are_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            TABLE.check({"a": 2, "b": False, "c": 3, "novel": 4, "silent": None, "off": False}, where="there")
    assert caplog.text.count("toy.json (there): keys that are not known here change nothing: novel") == 1
    assert "silent" not in caplog.text and "off" not in caplog.text
