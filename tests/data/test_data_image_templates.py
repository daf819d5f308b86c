"""Templates that give images a place of their own: BLIP-2's, InstructBLIP's and MiniGPT-4's."""

from pathlib import Path

import pydantic
import pytest

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.encode import encode, encode_prompt
from mindspeed_mm.data.rendering import generation_prompt, render, render_turns, segments_of
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.template_check import check_template, supervised_runs
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import TemplateError
from tests.helpers.tiny_flamingo import letters


def test_images_stand_where_the_template_wants_them(tokenizer):
    """BLIP-2's processor: image tokens, the begin token, then the question."""
    conversation = [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "A cat"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes"},
    ]
    rendered = "<image>Question: What is this? Answer: A cat\nQuestion: Sure? Answer: Yes\n"
    assert render(conversation, "blip2") == rendered
    ids, labels = encode(conversation, tokenizer, "blip2")
    text = tokenizer.encode("Question: What is this? Answer: A cat\nQuestion: Sure? Answer: Yes\n")
    assert ids == [IMAGE_TOKEN_INDEX, *text] and text[0] == tokenizer.bos_token_id
    assert [tokenizer.decode(run).strip() for run in supervised_runs(labels)] == ["A cat", "Yes"]
    assert encode_prompt([("<image>\nWhy?", None)], tokenizer, "blip2") == [
        IMAGE_TOKEN_INDEX,
        *tokenizer.encode("Question: Why? Answer:"),
    ]
    assert encode_prompt([("Why?", None)], tokenizer, "blip2") == tokenizer.encode("Question: Why? Answer:")


def test_literal_images_move_with_their_text():
    text = "a <image> b <image>c <image>"
    turns = [Turn("human", text, literal=(12,)), Turn("gpt", "x")]
    segments = segments_of(turns, get_template("instructblip"))
    human = segments[1]
    assert human.text == "<image><image>a b <image>c" and [human.text[p:] for p in human.literal] == ["<image>c"]


def test_templates_with_images_in_a_wrong_place_are_refused():
    plain = {"human": "{text}", "gpt": "{text}</s>", "end": "</s>", "stop": ()}
    for changes in ({"human": "{images}{text}"}, {"image": "<image>"}, {"with_system": "{images}{system}{text}"}):
        with pytest.raises(pydantic.ValidationError, match="expected {images} once in a template with `image`"):
            Template(**plain | changes)
    with pytest.raises(pydantic.ValidationError, match="expected <image> in it, once"):
        Template(**plain | {"human": "{images}{text}", "image": "<Img>"})


def test_minigpt4_encodes_prompt_and_answer_apart(tokenizer):
    """The prompt up to the image, behind it, and the answer with its end symbol; BOS once."""
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "A cat."}]
    pieces = ("###Human: <Img>", "</Img> Describe it. ###Assistant: ", "A cat.###")
    assert render(turns, "minigpt4_vicuna") == pieces[0] + "<image>" + pieces[1] + pieces[2]
    before, behind, answer = (tokenizer.encode(piece, add_bos=False) for piece in pieces)
    ids, labels = encode(turns, tokenizer, "minigpt4_vicuna")
    prompt = [tokenizer.bos_token_id, *before, IMAGE_TOKEN_INDEX, *behind]
    assert ids == prompt + answer
    assert labels == [IGNORE_INDEX] * len(prompt) + answer
    assert encode_prompt([("<image>\nDescribe it.", None)], tokenizer, "minigpt4_vicuna") == prompt


@pytest.mark.parametrize(
    "template, wanted",
    [
        ("minigpt4_caption", "<image>A cat.\n"),
        ("minigpt4_llama2", "[INST] <Img><image></Img> Why? [/INST] A cat.</s>"),
        ("minigpt4_v2", "[INST] <Img><image></Img> Why? [/INST]A cat.</s>"),
        ("minigpt4_gemma_guide", "[INST] <Img><image></Img> Why? [/INST] A cat.</s>"),
        (
            "minigpt4_gemma",
            "<start_of_turn>user\n<Img><image></Img> Why?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n",
        ),
    ],
)
def test_minigpt4_forms(template, wanted):
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "A cat."}]
    assert render(turns, template) == wanted


def test_later_questions_of_minigpt4_begin_a_sequence(tokenizer):
    """The original puts the begin token before every question of a conversation."""
    turns = [
        {"from": "human", "value": "<image>\nWhy?"},
        {"from": "gpt", "value": "So."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    assert render(turns, "minigpt4_v2").endswith("[/INST]So.</s><s>[INST] Sure? [/INST]Yes.</s>")
    ids, labels = encode(turns, tokenizer, "minigpt4_v2")
    assert ids.count(tokenizer.bos_token_id) == 2
    answers = [tokenizer.encode(text, add_bos=False) for text in ("So.</s>", "Yes.</s>")]
    assert supervised_runs(labels) == answers


SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
SHOWN = "<Img><image></Img> What is it?"
CHATS = {
    "minigpt4_vicuna_chat": f"{SYSTEM}###Human: {SHOWN}###Assistant: A cat.###Human: Why?###Assistant: ",
    "minigpt4_llama2_chat": f"{SYSTEM}<s>[INST] {SHOWN} [/INST] A cat.</s><s>[INST] Why? [/INST] ",
    "minigpt4_v2_chat": f"<s>[INST] {SHOWN} [/INST]A cat.</s><s>[INST] Why? [/INST]",
    "minigpt4_gemma_guide_chat": f"{SYSTEM}<bos>[INST] {SHOWN} [/INST] A cat.</s><bos>[INST] Why? [/INST] ",
    "minigpt4_gemma": f"<start_of_turn>user\n{SHOWN}<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
}


@pytest.mark.parametrize("name", CHATS)
def test_minigpt4s_demo(name):
    """System text, roles and separators of the demo, over two questions; with another system text."""
    pairs = [("<image>\nWhat is it?", "A cat."), ("Why?", None)]
    assert generation_prompt(pairs, name) == CHATS[name]
    opened = [Turn("system", "Be brief."), Turn("human", "Why?"), Turn("gpt", "So.")]
    wanted = "<start_of_turn>user\nBe brief.\n\nWhy?<end" if name == "minigpt4_gemma" else "Be brief."
    assert render_turns(opened, name).startswith(wanted)
    stops = {"minigpt4_vicuna_chat": "###", "minigpt4_gemma": "<end_of_turn>"}
    assert stops.get(name, "</s>") in get_template(name).stop


def test_the_marks_of_llama_2s_demo_are_tokens(tokenizer):
    """`<s>` of the role is the token that begins a sequence, also behind the one that begins this."""
    ids = encode_prompt([("Hi", None)], tokenizer, "minigpt4_v2_chat")
    assert ids[:2] == [tokenizer.bos_token_id] * 2
    user = encode_prompt([("<s>", None)], tokenizer, "minigpt4_v2_chat", special_text="text")
    assert user.count(tokenizer.bos_token_id) == 2


def test_flamingo_forms(tmp_path):
    """Images in front, EOS behind the last answer alone; captions with others as examples."""
    turns = [{"from": "human", "value": "<image>\nw3?"}, {"from": "gpt", "value": "w4"}]
    assert render(turns, "otter") == "<image>User: w3? GPT:<answer> w4<|endofchunk|>"
    assert render(turns, "flamingo") == "<image>Question:w3? Short answer:w4<|endofchunk|>"
    assert render(turns, "flamingo_pretrain") == "<image>w4<|endofchunk|>"
    assert render(turns * 2, "flamingo_caption") == "<image>Output:w4<|endofchunk|>" * 2
    pairs = [("<image>w3", "w4"), ("<image>w5", None)]
    assert generation_prompt(pairs, "flamingo_caption") == "<image>Output:w4<|endofchunk|><image>Output:"
    with pytest.raises(TemplateError, match="gpt turn, behind others as examples; found 4 turns with 1 and 0 images"):
        render([*turns, {"from": "human", "value": "w5"}, turns[1]], "flamingo_caption")
    tokenizer = load_tokenizer(Path(letters(131).save_pretrained(tmp_path)[0]).parent)
    for template in ("otter", "flamingo", "flamingo_caption"):
        check_template(template, tokenizer)
        ids, labels = encode(turns * 2, tokenizer, template)
        assert ids[-2:] == labels[-2:] == [tokenizer.token_to_id("<|endofchunk|>"), tokenizer.eos_token_id]
        answers = [tokenizer.decode(run).strip() for run in supervised_runs(labels)]
        assert answers == ["w4", "w4"] and labels.count(tokenizer.eos_token_id) == 1
        assert tokenizer.eos_token_id not in encode_prompt([("<image>w3", None)], tokenizer, template)
