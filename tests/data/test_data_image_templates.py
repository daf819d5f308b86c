"""Templates that give images a place of their own: BLIP-2's, InstructBLIP's and MiniGPT-4's."""

import pydantic
import pytest

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.encode import encode, encode_prompt
from mindspeed_mm.data.rendering import render, segments_of
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.template_check import supervised_runs
from mindspeed_mm.data.template_form import Template


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
