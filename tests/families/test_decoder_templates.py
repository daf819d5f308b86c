"""Our templates against the chat template that each family's tokenizer_config.json brings, rendered by Jinja."""

import jinja2
import pytest

from mindspeed_mm.data.rendering import generation_prompt, render_turns
from mindspeed_mm.data.sample import Turn

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THEIRS = {
    # google/gemma-2b-it, gemma-2-2b-it
    "gemma": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' "
    "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}",
    # internlm/internlm2-chat-7b
    "internlm2_chat": "{{ bos_token }}" + CHATML,
    # Qwen/Qwen2-7B-Instruct
    "qwen": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' "
    "}}{% endif %}" + CHATML,
    # microsoft/Phi-3-mini-4k-instruct (behind a whole conversation it says <|endoftext|>, which training does without)
    "phi3": "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # meta-llama/Meta-Llama-3-8B-Instruct
    "llama_3": "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # mistralai/Mistral-7B-Instruct-v0.2
    "mistral_instruct": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% endif %}{% endfor %}",
}
TURNS = [("What is it?", "A cat."), ("Where is it?", "On the mat."), ("Why?", None)]
WITH_SYSTEM = ("internlm2_chat", "qwen", "phi3", "llama_3")
"""Gemma's and Mistral's own templates refuse a system text."""


def rendered(name, system=None, *, last=False):
    """What the family's template makes of TURNS; `last`: up to where the last answer begins."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in TURNS if last else TURNS[:-1]:
        messages.append({"role": "user", "content": question})
        messages += [{"role": "assistant", "content": answer}] if answer else []
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(THEIRS[name])
    return template.render(messages=messages, bos_token="", eos_token="</s>", add_generation_prompt=last)


def conversation(system=None):
    """TURNS with answers, for us."""
    turns = [Turn("system", system)] if system else []
    return turns + [turn for pair in TURNS[:-1] for turn in (Turn("human", pair[0]), Turn("gpt", pair[1]))]


@pytest.mark.parametrize("name", sorted(set(THEIRS) - {"mistral_instruct"}))
def test_a_conversation(name):
    assert render_turns(conversation(), name) == rendered(name)
    assert generation_prompt(TURNS, name) == rendered(name, last=True)


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_text(name):
    assert render_turns(conversation("Be short."), name) == rendered(name, "Be short.")


def test_mistral_differs_in_the_blanks_around_an_answer():
    """LLaVA's mistral_instruct, which its checkpoints are tuned with, puts a blank before and behind it."""
    ours, theirs = render_turns(conversation(), "mistral_instruct"), rendered("mistral_instruct")
    assert ours.replace("] A cat. <", "]A cat.<").replace("] On the mat. <", "]On the mat.<") == theirs
    assert generation_prompt(TURNS[2:], "mistral_instruct") == "[INST] Why? [/INST]"
