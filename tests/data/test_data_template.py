"""Rendering, ids and masks equal LLaVA's (or the correct ones, where LLaVA's own are wrong)."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data import template as template_module
from mindspeed_mm.data.encode import encode, encode_prompt
from mindspeed_mm.data.rendering import generation_prompt, render
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.template import get_template, template_names
from mindspeed_mm.data.template_check import check_template, describe_sample, supervised_runs
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.errors import DataError, TemplateError

CHAT_TEMPLATES = ("mpt", "chatml_direct")


def load(golden, name):
    return json.loads((golden / "prompts" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["conversations", "captions_plain"])
def test_golden_conversations(golden, tokenizer, chat_tokenizer, name):
    compared = 0
    for record in load(golden, name):
        for template, entry in record["templates"].items():
            chosen = chat_tokenizer if template in CHAT_TEMPLATES else tokenizer
            if "raises" in entry:
                with pytest.raises(TemplateError, match="expected"):
                    encode(record, chosen, template)
                continue
            label = f"{record['id']} {template}"
            assert render(record, template) == entry["prompt"], label
            if "input_ids" in entry:
                ids, labels = encode(record, chosen, template)
                assert ids == entry["input_ids"], label
                assert labels == entry.get("correct_labels", entry["labels"]), label
                assert not entry.get("nothing_to_supervise") or set(labels) == {IGNORE_INDEX}
                compared += 1
    assert compared > 5


def test_golden_generation_prompts(golden, tokenizer, chat_tokenizer):
    for record in load(golden, "generation_prompts"):
        for template, entry in record["templates"].items():
            chosen = chat_tokenizer if template in CHAT_TEMPLATES else tokenizer
            assert generation_prompt(record["turns"], template) == entry["prompt"]
            assert encode_prompt(record["turns"], chosen, template) == entry["input_ids"]


def test_golden_training_records(golden, tokenizer):
    import safetensors.numpy as safetensors

    batches = safetensors.load_file(golden / "training/batches.safetensors")
    rows: dict[int, int] = {}
    for line in (golden / "training/records.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record["step"]
        row = rows[step] = rows.get(step, -1) + 1
        ids, labels = encode(record, tokenizer, record["template"])
        length = int(batches["lengths"][step, row])
        assert ids == batches["input_ids"][step, row, :length].tolist()
        assert labels == batches["labels"][step, row, :length].tolist()


WORDS = [*"aZ 9.\n\u732b", "USER:", " ASSISTANT:", "[/INST]", "<|im_end|>", "<s>"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map("".join)
texts = texts.filter(lambda text: text and text.strip() == text)


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(texts, texts.filter(lambda text: "<s>" not in text)), min_size=1, max_size=3),
    name=st.sampled_from(["v1", "llava_v1", "llava_llama_2", "mpt"]),
)
def test_supervised_tokens_are_the_answers(chat_tokenizer, pairs, name):
    """Whatever users write, the supervised runs decode to the answers with their end marks."""
    turns = [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]
    _, labels = encode(turns, chat_tokenizer, name)
    template = get_template(name)
    end = chat_tokenizer.token_to_id(template.end)
    runs = supervised_runs(labels)
    assert len(runs) == len(pairs)
    for run, (_, answer) in zip(runs, pairs, strict=True):
        assert run[-1] == end
        pieces = "".join(chat_tokenizer.pieces(run[:-1]))
        text = chat_tokenizer.decode(run[:-1], skip_special_tokens=True).replace(" ", "")
        assert text == answer.replace("<|im_end|>", "").replace(" ", ""), pieces


def test_multi_image_turns(tokenizer):
    turn = {"from": "human", "value": "Compare <image> and <image>"}
    turns = [turn, {"from": "gpt", "value": "Same."}]
    assert render({"image": "a.png", "conversations": turns}, "v1").count("<image>") == 1  # as LLaVA does
    both = {"image": ["a.png", "b.png"], "conversations": turns}
    assert "USER: <image>\n<image>\nCompare  and ASSISTANT:" in render(both, "v1")
    assert render(both, "plain") == "<image><image>Same.\n"
    assert encode(both, tokenizer, "v1")[0].count(IMAGE_TOKEN_INDEX) == 2


def test_truncation_of_text_only_conversations(tokenizer):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]
    assert len(encode(turns, tokenizer, "v1", max_length=9)[0]) == 9
    assert len(encode({"conversations": turns, "model_max_length": 7}, tokenizer, "v1")[0]) == 7
    with_image = [{"from": "human", "value": "<image>\nHi"}, turns[1]]
    assert len(encode(with_image, tokenizer, "v1", max_length=9)[0]) > 9


def test_names_and_aliases():
    assert get_template("llava-plain") is get_template("plain")
    assert get_template("llava-v1") is get_template("vicuna_v1") is get_template("v1")
    assert get_template(get_template("v1")) is get_template("v1")
    assert {"plain", "v1", "llava_v1", "llava_llama_2", "mpt", "chatml_direct"} <= set(template_names())
    assert get_template("v1").stop == ("</s>",)
    with pytest.raises(TemplateError, match='unknown template "vicuna_v2"; did you mean "vicuna_v1"'):
        get_template("vicuna_v2")
    with pytest.raises(TemplateError, match='unknown template "zzz"; known: '):
        get_template("zzz")


def test_a_new_template_is_a_new_file(tmp_path, monkeypatch):
    monkeypatch.setattr(template_module, "FOLDER", tmp_path)
    template_module._own_templates.cache_clear()
    try:
        content = {"human": "Q: {text}\n", "gpt_header": "A:", "gpt": " {text}</s>", "end": "</s>", "stop": ["</s>"]}
        (tmp_path / "mine.json").write_text(json.dumps(content))
        turns = [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "2"}]
        assert render(turns, "mine") == "Q: 1?\nA: 2</s>"
        template_module._own_templates.cache_clear()
        (tmp_path / "other.json").write_text(json.dumps(content | {"aliases": ["mine"]}))
        with pytest.raises(TemplateError, match='the template name "mine" is used twice'):
            get_template("mine")
    finally:
        template_module._own_templates.cache_clear()


@pytest.mark.parametrize("name", ["plain", "v1", "llava_v1", "llava_llama_2"])
def test_templates_fit_the_tokenizer(tokenizer, name):
    check_template(name, tokenizer)


def test_templates_with_an_unknown_end_mark_are_refused(tokenizer, chat_tokenizer):
    check_template("mpt", chat_tokenizer)
    with pytest.raises(TemplateError, match="the tokenizer has no token '<|im_end|>'"):
        check_template("mpt", tokenizer)


def test_templates_that_do_not_round_trip_are_refused(tokenizer):
    class Upper:
        """A tokenizer that loses something: the case of letters."""

        token_to_id = tokenizer.token_to_id
        decode = staticmethod(lambda ids, skip_special_tokens=True: tokenizer.decode(ids, skip_special_tokens).upper())
        encode_with_starts = tokenizer.encode_with_starts

    with pytest.raises(TemplateError, match="does not round-trip this template: the answer 'It is 42"):
        check_template("v1", Upper())
    glued = Template(human="{text}\n", gpt="{text}", end="</s>", stop=("</s>",))
    with pytest.raises(TemplateError, match="does not round-trip"):
        check_template(glued, tokenizer)


HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}


@pytest.mark.parametrize(
    ("conversation", "template", "message"),
    [
        ({"id": 1}, "v1", '"conversations" is missing .the record has'),
        ({"conversations": []}, "v1", r'"conversations" is \[\]; expected a list'),
        ("text", "v1", "\"conversations\" is 'text'; expected a list"),
        ([GPT], "v1", "holds only a gpt turn"),
        (["Hi"], "v1", r"conversations\[0\] is 'Hi'; expected an object"),
        ([{"from": "human"}], "v1", r"conversations\[0\] is .* expected an object with"),
        ([{"from": "human", "value": 3}], "v1", r"conversations\[0\].value is 3; expected a text"),
        ([{"from": "bot", "value": "x"}], "v1", r"conversations\[0\].from is 'bot'; expected"),
        ([HUMAN, HUMAN], "v1", r'conversations\[1\] is from "human", expected "gpt"'),
        ([GPT, HUMAN, HUMAN], "v1", r'conversations\[2\] is from "human", expected "gpt"'),
        ({"image": "a", "images": ["a"], "conversations": [HUMAN]}, "v1", 'has both "image" and "images"'),
        ({"image": 3, "conversations": [HUMAN]}, "v1", '"image" is 3; expected the name of an image'),
        ({"image": [""], "conversations": [HUMAN]}, "v1", "expected the name of an image"),
        ([HUMAN, GPT], "plain", "a caption template takes .* found 2 turns with 0 images"),
        ([{"from": "human", "value": "<image>"}, GPT, HUMAN, GPT], "plain", "found 4 turns with 1 images"),
        ([{"from": "human", "value": ""}, GPT], "llava_llama_2", "the first human turn is empty"),
    ],
)
def test_bad_conversations(tokenizer, conversation, template, message):
    with pytest.raises(DataError, match=message):
        encode(conversation, tokenizer, template)


def test_bad_prompts():
    with pytest.raises(TemplateError, match="the prompt has no turns"):
        generation_prompt([], "v1")
    with pytest.raises(TemplateError, match="pair 0 of the prompt"):
        generation_prompt([("Hi", None), ("Ho", None)], "v1")
    with pytest.raises(TemplateError, match="pair 0 of the prompt"):
        generation_prompt([("Hi", "Ho")], "v1")


def test_describe_sample(tokenizer):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    text = describe_sample(*encode(turns, tokenizer, "v1"), tokenizer)
    assert text.endswith("USER: <image x 1> \nWhat? ASSISTANT:[[ A cat.</s>]]")


# A tokenizer with the special tokens of every template, and any character as bytes.
MARKS = {
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "internlm2_chat": ["<|im_start|>", "<|im_end|>"],
    "mpt": ["<|im_start|>", "<|im_end|>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    "llama_3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "mistral_instruct": [],
    "llava_llama_2": [],
    "v1": [],
    "v0": [],
}
SLOW_NAMES = sorted(MARKS)


@pytest.fixture(scope="session")
def marked(golden, tmp_path_factory):
    """(slow, fast): the golden tokenizer with all special tokens above, from tokenizer.model and as tokenizer.json."""
    import shutil

    import tokenizers

    from mindspeed_mm.data.tokenizer import load_tokenizer

    marks = list(dict.fromkeys(mark for names in MARKS.values() for mark in names))
    slow, fast = tmp_path_factory.mktemp("slow"), tmp_path_factory.mktemp("fast")
    shutil.copy(golden / "tokenizer/tokenizer.model", slow)
    config = json.loads((golden / "tokenizer/tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    config["additional_special_tokens"] = marks
    (slow / "tokenizer_config.json").write_text(json.dumps(config))
    library = tokenizers.Tokenizer.from_file(str(golden / "tokenizer/tokenizer.json"))
    library.add_special_tokens(marks)
    library.save(str(fast / "tokenizer.json"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (fast / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(slow), load_tokenizer(fast)


ODD = [*"aZ 9.\n\u732b\u00e9#", "USER:", " ASSISTANT:", "[/INST]", "### Human:", "<image>", "</s>", "<s>", "\n###"]
ODD += [mark for names in MARKS.values() for mark in names]
odd_texts = st.lists(st.sampled_from(ODD), min_size=1, max_size=8).map("".join)
odd_texts = odd_texts.filter(lambda text: text and text.strip() == text)


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(odd_texts, odd_texts), min_size=1, max_size=3),
    name=st.sampled_from(SLOW_NAMES),
    fast=st.booleans(),
)
def test_nothing_typed_breaks_the_structure(marked, pairs, name, fast):
    """Image tags, special tokens and role words in texts are text: the supervised tokens decode to the answers."""
    from mindspeed_mm.data.conversation import literal_turn
    from mindspeed_mm.data.encode import encode_turns

    tokenizer = marked[fast]
    turns = [literal_turn(role, text) for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]
    ids, labels = encode_turns(turns, tokenizer, name, "text")
    assert IMAGE_TOKEN_INDEX not in ids
    runs = supervised_runs(labels)
    assert len(runs) == len(pairs)
    template = get_template(name)
    for run, (_, answer) in zip(runs, pairs, strict=True):
        if not template.end_is_text:
            assert run.pop() == tokenizer.token_to_id(template.end)
        decoded = tokenizer.decode(run, skip_special_tokens=False)
        if template.end_is_text:
            decoded = decoded.removesuffix("\n" + template.end)
        assert decoded.strip() == answer, tokenizer.pieces(run)


@pytest.mark.parametrize("name", SLOW_NAMES)
def test_every_template_fits_slow_and_fast_tokenizers(marked, name):
    turns = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho."}] * 2
    for tokenizer in marked:
        check_template(name, tokenizer)
    slow, fast = (encode({"image": ["a", "b"], "conversations": turns}, tokenizer, name) for tokenizer in marked)
    assert [label != IGNORE_INDEX for label in slow[1]].count(True) > 0
    if name not in ("phi3", "qwen", "internlm2_chat", "mpt", "llama_3", "gemma"):  # no ids that only one of them has
        assert slow == fast


RENDERED = {
    "v0": "S\n\n### Human: Q\n### Assistant: A\n### Human: R\n### Assistant: B\n### ",
    "mistral_instruct": "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s>[INST] R [/INST] B </s>",
    "llama_3": "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nR<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>",
    "gemma": "<start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nR"
    "<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n",
    "internlm2_chat": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    "A<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nR<|end|>\n<|assistant|>\nB"
    "<|end|>\n",
    "v1": "S USER: Q ASSISTANT: A</s>USER: R ASSISTANT: B</s>",
    "llava_llama_2": "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST] B </s>",
}
RENDERED["qwen"] = RENDERED["internlm2_chat"]


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_rendering_with_a_system_text(name):
    from mindspeed_mm.data.rendering import render_turns

    turns = [Turn("system", "S"), Turn("human", "Q"), Turn("gpt", "A"), Turn("human", "R"), Turn("gpt", "B")]
    assert render_turns(turns, name) == RENDERED[name]


@pytest.mark.parametrize("name", SLOW_NAMES)
def test_an_answer_without_text_teaches_nothing(marked, name):
    """Not even the end marker that some templates put behind it."""
    _, labels = encode([HUMAN, GPT | {"value": ""}], marked[0], name)
    assert set(labels) == {IGNORE_INDEX}


def test_a_system_text_needs_a_place():
    from mindspeed_mm.data.rendering import render_turns

    turns = [Turn("system", "S"), Turn("human", "<image>"), Turn("gpt", "A")]
    with pytest.raises(TemplateError, match="a caption template takes|no place for a system text"):
        render_turns(turns, "plain")
    bare = Template(human="{text}", gpt="{text}", end="</s>", stop=("</s>",))
    with pytest.raises(TemplateError, match="no place for a system text"):
        render_turns(turns, bare)
    with pytest.raises(TemplateError, match="a system text alone is no conversation"):
        render_turns(turns[:1], "v1")


CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | "
    "trim + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_chat_template(tokenizer, source):
    import copy

    changed = copy.copy(tokenizer)
    changed._files = tokenizer._files | {"chat_template.jinja": source.encode()}
    return changed


def test_the_tokenizers_own_template(chat_tokenizer, tokenizer):
    chat = with_chat_template(chat_tokenizer, CHATML)
    own = get_template("tokenizer", chat)
    assert own.model_copy(update={"stop": (), "aliases": ()}) == get_template("internlm2_chat").model_copy(
        update={"stop": (), "aliases": (), "human_first": own.human_first, "trimmed": own.trimmed}
    )
    assert own.trimmed == ("human", "gpt", "system")
    assert own.stop == ("<|im_end|>", "</s>")
    check_template("tokenizer", chat)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert encode(turns, chat, "tokenizer") == encode(turns, chat, "internlm2_chat")
    with pytest.raises(TemplateError, match="has no chat template"):
        get_template("tokenizer", tokenizer)
    with pytest.raises(TemplateError, match='"tokenizer" needs the tokenizer that brings it'):
        render(turns, "tokenizer")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for", "is no valid Jinja"),
        ("{{ raise_exception('no') }}", "cannot be run: no"),
        ("{{ messages[9].content }}x", "cannot be run|leaves out or repeats a turn"),
        ("fixed text", "leaves out or repeats a turn"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no label mask can be proven"),
        ("{{ ''.__class__.__mro__ }}", "cannot be run|leaves out"),
    ],
)
def test_chat_templates_that_cannot_be_used(chat_tokenizer, source, message):
    with pytest.raises(TemplateError, match=f"({message}).*--template, or template_name in data.json"):
        get_template("tokenizer", with_chat_template(chat_tokenizer, source))


def test_a_chat_template_without_system_texts(chat_tokenizer):
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML
    own = get_template("tokenizer", with_chat_template(chat_tokenizer, source))
    assert own.with_system is None
