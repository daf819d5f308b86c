"""Letter B: what the files of a model say is done, or refused; never ignored."""

import json
import logging
import shutil

import pytest
import torch

import mindspeed_mm as mm
from checkpoint_converters.convert import convert
from mindspeed_mm.data.rendering import segments_of
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.template_choice import choose_template, template_fact
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import ConfigError, DataError, TemplateError
from mindspeed_mm.generation.engine import GenerationRequest
from mindspeed_mm.generation.prompts import prompt_ids
from mindspeed_mm.inference.model_json import model_json_of
from mindspeed_mm.models.complete import read_model
from tests.helpers.tiny_families import make_family

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PART = "{% for c in m.content %}{% generation %}{{ c.text }}{% endgeneration %}{% endfor %}"
PARTS = CHATML.replace("{{ m.content }}", PART)
UNREADABLE = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }} {% endfor %}"


def changed(source, target, file="config.json", **changes):
    """A copy of a folder with other values in one JSON file."""
    shutil.copytree(source, target)
    content = json.loads((target / file).read_text()) if (target / file).is_file() else {}
    (target / file).write_text(json.dumps(content | changes))
    return target


def original(golden, target, **changes):
    """A copy of the original code's folder with other keys in config.json."""
    models = golden / "models"
    return changed(models / "llava_original", target, mm_vision_tower=str(models / "clip_hf"), **changes)


def with_template(source, target, text):
    """A copy of a folder whose tokenizer has a chat template, and ChatML's tokens where it has none."""
    shutil.copytree(source, target)
    (target / "chat_template.jinja").write_text(text)
    return target


@pytest.fixture(scope="module")
def chat(golden, tmp_path_factory):
    """A LLaVA folder whose tokenizer has ChatML's tokens and template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(golden / "models" / "llava_hf", folder)
    for name in ("tokenizer.model", "tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    for path in (golden / "tokenizer_chatml").iterdir():
        shutil.copy(path, folder / path.name)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def short_model(path):
    """A model.json that says where its weights lie and nothing else."""
    block = {"ckpt_path": str(path)}
    return {"text_decoder": block, "image_encoder": {"vision_encoder": block, "vision_projector": block}}


READERS = {
    "inference": lambda path, target: mm.load(path, device="cpu"),
    "conversion": lambda path, target: convert(path, target, to="mindspeed-mm"),
    "config init": lambda path, target: model_json_of([path]),
    "training": lambda path, target: read_model(short_model(path)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_use_im_start_end": True}, "found mm_use_im_start_end true, and no <im_start> and no <im_end>"),
        ({"image_aspect_ratio": "anyres"}, "found image_grid_pinpoints 'None'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "found image_aspect_ratio 'pad' with mm_patch_merge_type"),
        ({"mm_patch_merge_type": "spatial"}, "found image_aspect_ratio 'pad' with mm_patch_merge_type"),
        ({"image_aspect_ratio": "crop_split"}, "found image_aspect_ratio 'crop_split'; expected pad or square"),
        ({"mm_resampler_type": "perceiver"}, "found mm_resampler_type perceiver; LLaVA-1.5 or LLaVA-1.6 without that"),
        ({"s2": True, "use_mm_proj": False}, "found use_mm_proj false and s2 true"),
        ({"attention_bias": True}, "found attention_bias true"),
        ({"text_config": "llama"}, "config.json: found text_config 'llama'; expected an object"),
    ],
)
def test_letter_b_every_reader_refuses_what_is_not_done(golden, tmp_path, reader, changes, message):
    folder = original(golden, tmp_path / "model", **changes)
    with pytest.raises(ConfigError, match=message):
        READERS[reader](folder, tmp_path / "target")


def test_letter_b_harmless_and_empty_keys_pass(golden, tmp_path, caplog):
    """What describes how weights were trained, and switches that are off, stop nobody; unknown keys are told."""
    extra = {"mm_vision_tower_lr": 2e-6, "mm_patch_merge_type": None, "image_aspect_ratio": None, "mm_unheard_of": 3}
    with caplog.at_level(logging.WARNING):
        model_json_of([original(golden, tmp_path / "model", **extra)])
    assert "original LLaVA: keys that are not known here change nothing: mm_unheard_of" in caplog.text


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_config.json", {"add_eos_token": True}, "found add_eos_token true"),
        ("tokenizer_config.json", {"do_lower_case": True}, "found do_lower_case true"),
        ("tokenizer_config.json", {"sp_model_kwargs": {"alpha": 0.1}}, "found sp_model_kwargs {'alpha': 0.1}"),
        ("tokenizer_config.json", {"add_prefix_space": False}, "add_prefix_space false"),
        (
            "generation_config.json",
            {"num_beam_groups": 4, "max_time": 5.0},
            r"config.json \(.*\): found num_beam_groups 4 and max_time 5.0; decoding without that .*Take it out",
        ),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token's id"),
    ],
)
def test_letter_b_files_of_the_tokenizer(golden, tmp_path, file, changes, message):
    folder = changed(golden / "models" / "vicuna", tmp_path / "model", file, **changes)
    with pytest.raises((ConfigError, DataError), match=message):
        load_tokenizer(folder)


def test_letter_b_end_ids_of_the_files_end_an_answer(golden, tmp_path):
    """generation_config.json names them, else config.json; a training run keeps them beside its checkpoints."""
    source = golden / "models" / "vicuna"
    ends = changed(source, tmp_path / "a", "generation_config.json", eos_token_id=[2, 7])
    assert load_tokenizer(ends).end_ids == (2, 7)
    load_tokenizer(ends).save(tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").end_ids == (2, 7)
    older = changed(source, tmp_path / "b", eos_token_id=9)
    (older / "generation_config.json").unlink()
    assert load_tokenizer(older).end_ids == (2, 9)
    assert load_tokenizer(golden / "tokenizer").end_ids == (2,)


def test_letter_b_generation_stops_at_the_end_ids(golden, tmp_path):
    source = golden / "models" / "llava_hf"
    prompt = torch.tensor([[1, 5, 6, 7]])
    free = mm.load(source, device="cpu").generate(input_ids=prompt, max_new_tokens=6)[0]
    folder = changed(source, tmp_path / "model", "generation_config.json", eos_token_id=[2, free[2]])
    stopped = mm.load(folder, device="cpu").generate(input_ids=prompt, max_new_tokens=6)[0]
    assert stopped == free[: free.index(free[2]) + 1]


def test_letter_b_transformers_5_names_of_special_tokens(golden, tmp_path):
    """extra_special_tokens, as a list or by name, are what additional_special_tokens were."""
    source = golden / "models" / "vicuna"
    wanted = load_tokenizer(changed(source, tmp_path / "a", "tokenizer_config.json", additional_special_tokens=["<x>"]))
    for number, value in enumerate((["<x>"], {"image_token": "<x>"})):
        folder = changed(source, tmp_path / f"b{number}", "tokenizer_config.json", extra_special_tokens=value)
        found = load_tokenizer(folder)
        assert found.encode("a <x> b") == wanted.encode("a <x> b") and found.token_to_id("<x>") in found.special_ids


@pytest.mark.parametrize("adds", [True, False])
def test_letter_b_add_bos_token_decides_for_fast_llama(golden, tmp_path, adds):
    folder = tmp_path / "fast"
    folder.mkdir()
    shutil.copy(golden / "models" / "llava_hf" / "tokenizer.json", folder)
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": adds, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert (load_tokenizer(folder).encode("a")[0] == 1) is adds


# The prompt


def test_letter_b_the_order_of_templates(chat):
    words = load_tokenizer(chat)
    assert str(choose_template("v0", "v1", words, "qwen")) == "v0 (as asked for)"
    assert choose_template(None, "mpt", words, "qwen").name == "mpt"
    assert choose_template(None, "plain", words, "qwen").name == "tokenizer"  # captions answer nothing
    assert choose_template(None, None, words, "blip2", chats=False).name == "blip2"  # it is the decoder's alone
    assert str(choose_template(None, None, words)) == "tokenizer (the tokenizer's own chat template)"
    assert str(choose_template(None, None, None, "qwen")) == "qwen (the usual one of the model's family)"
    with pytest.raises(TemplateError, match="no template is known for this model: the tokenizer has no chat template"):
        choose_template(None, None, None, None)
    assert template_fact("v1", words) == "v1"
    assert template_fact("tokenizer", words) == f"tokenizer {get_template('tokenizer', words).digest[:16]}"


def test_letter_b_a_chat_template_that_cannot_be_read_is_told(chat, tmp_path, caplog):
    words = load_tokenizer(with_template(chat, tmp_path / "a", UNREADABLE))
    with caplog.at_level(logging.WARNING):
        assert choose_template(None, None, words, "v1").name == "v1"
    assert "no label mask can be proven for it" in caplog.text and "the template v1 is taken" in caplog.text
    with pytest.raises(TemplateError, match="no template is known for this model: the tokenizer's chat template does"):
        choose_template(None, None, words, None)


def test_letter_b_a_chat_template_of_parts(chat, tmp_path):
    """Processors' templates take a list of parts, and mark what is generated."""
    parts = load_tokenizer(with_template(chat, tmp_path / "a", PARTS))
    assert get_template("tokenizer", parts) == get_template("tokenizer", load_tokenizer(chat))


@pytest.mark.parametrize(
    ("content", "trimmed"),
    [
        ("m.content | trim", ("human", "gpt", "system")),
        ("(m.content | trim if m.role == 'user' else m.content)", ("human",)),
    ],
)
def test_letter_b_a_chat_template_that_trims_texts(chat, tmp_path, content, trimmed):
    """As the templates of Llama 3 and Gemma do: white space at the ends of a text is no part of the prompt."""
    from transformers import AutoTokenizer

    folder = with_template(chat, tmp_path / "a", CHATML.replace("m.content", content))
    template = get_template("tokenizer", load_tokenizer(folder))
    assert template.trimmed == trimmed
    texts = {"system": " Be brief.\n", "human": "\n What <image> ? ", "gpt": " That. \n"}
    turns = [Turn(role, text, (7,) if role == "human" else ()) for role, text in texts.items()]
    talk = [
        {"role": role, "content": text}
        for role, text in zip(("system", "user", "assistant"), texts.values(), strict=True)
    ]
    segments = segments_of(turns, template)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, tokenize=False)
    assert "".join(segment.text for segment in segments) == theirs
    (place,) = next(segment.literal for segment in segments if segment.literal)
    assert next(segment.text for segment in segments if segment.literal)[place:].startswith("<image>")


def test_letter_b_the_first_chat_template_that_can_be_read(chat, tmp_path):
    """A processor's comes first, as in transformers; where it has no fixed form, the tokenizer's is there."""
    folder = with_template(chat, tmp_path / "a", CHATML)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": UNREADABLE}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    other = CHATML.replace("<|im_end|>\n{% endfor", "<|im_end|> {% endfor")  # a blank behind an answer
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": other}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    words = load_tokenizer(folder)
    assert words.chat_templates == (UNREADABLE, other)
    found = get_template("tokenizer", words)
    assert (found.end, found.gpt_footer) == ("<|im_end|>", " ")


def test_letter_b_a_model_answers_in_its_tokenizers_template(chat, caplog):
    vlm = mm.load(chat, device="cpu")
    with caplog.at_level(logging.INFO):
        engine = vlm.engine()
    assert "template: tokenizer (the tokenizer's own chat template)" in caplog.text
    ids = engine.prepare(GenerationRequest("1", turns=(("What?", None),)))
    assert "<|im_start|>user" in vlm.tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "")
    assert vlm.tokenizer.token_to_id("<|im_end|>") in engine._template_stops[0]


def test_letter_b_llavas_v1_without_a_chat_template(golden):
    assert mm.load(golden / "models" / "llava_original", device="cpu").template == "v1"


def test_letter_b_qwens_own_template_and_no_line_feed_behind_an_image(tmp_path):
    """As Qwen2.5-VL's processor writes it; LLaVA's prompts have a line feed there."""
    base = make_family("qwen2_5_vl", tmp_path / "model")
    vlm = mm.load(base.folder, device="cpu")
    assert vlm.template == "qwen" and vlm.spec.family.after_image == ""
    request = GenerationRequest("1", turns=(("w5", None),), images=("x.png",))
    own = get_template("qwen")
    with_line, without = (prompt_ids(request, vlm.tokenizer, own, after_image=after) for after in ("\n w9 ", ""))
    assert len(with_line) == len(without) + 1
