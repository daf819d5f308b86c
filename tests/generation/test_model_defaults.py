"""Letter B: the decoding options of a model's own generation_config.json hold below what the user says."""

import functools
import json
import logging
import shutil

import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.data.tokenizer_keys import DECODING
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.chat import ChatSession
from mindspeed_mm.generation.defaults import ModelDefaults
from mindspeed_mm.generation.engine import GenerationRequest
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.protocol import ChatRequest, options_of

DRAWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "repetition_penalty": 1.05}
FIRST = {"do_sample": True, "top_k": 1, "repetition_penalty": 1.7, "max_new_tokens": 6, "temperature": 0.7}
"""Sampling with one outcome, which no other path gives."""

PROMPT = [1, 5, 6, 7, 5, 6]


def copy_with(source, target, **settings):
    """A copy of a folder with a generation_config.json of its own."""
    shutil.copytree(source, target)
    content = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | settings
    (target / "generation_config.json").write_text(json.dumps(content))
    return target


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    return copy_with(golden / "models" / "llava_hf", tmp_path_factory.mktemp("defaults") / "model", **FIRST)


@pytest.fixture(scope="module")
def vlm(folder):
    return mm.load(folder, device="cpu")


def test_letter_b_every_decoding_key_is_an_option():
    """The table of the file's keys names each option of ours but the ids and what transformers does not know."""
    own = {"bos_token_id", "eos_token_id", "pad_token_id", "seed", "logprobs"}
    assert set(DECODING) == set(GenerationOptions.model_fields) - own


SAID = [
    {},
    {"max_new_tokens": 3},
    {"repetition_penalty": 1.0},
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.0},
    {"do_sample": False, "num_beams": 3},
    {"min_new_tokens": 5},
]


@pytest.mark.parametrize("said", SAID, ids=str)
def test_letter_b_generate_takes_the_files_options_as_transformers_does(folder, vlm, said):
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.tensor([PROMPT])
    wanted = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **said)[0, ids.shape[1] :].tolist()
    assert vlm.generate(input_ids=ids, **said) == [wanted]
    request = GenerationRequest("1", turns=(("What is it?", None),))
    own, plain = vlm.engine(), vlm.engine()
    plain.defaults = ModelDefaults()
    spelled = {"seed": 0, **vlm.defaults.under(said)}
    assert own.submit(request, said).wait().token_ids == plain.submit(request, spelled).wait().token_ids


def test_letter_b_the_files_options_matter(vlm):
    ids = torch.tensor([PROMPT])
    assert vlm.generate(input_ids=ids) != vlm.generate(input_ids=ids, do_sample=False, repetition_penalty=1.0)
    assert len(vlm.generate(input_ids=ids, eos_token_id=-1)[0]) == 6


CASES = [
    (DRAWN, {}),
    (DRAWN, {"temperature": 0.2}),
    (DRAWN, {"top_k": 7}),
    (DRAWN, {"top_k": None, "top_p": None}),
    (DRAWN, {"do_sample": False}),
    ({"temperature": 0.9, "top_p": 0.6}, {}),
    ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "top_k": 50}),
    ({"num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3}, {}),
    ({"num_beams": 4}, {"num_beams": 1}),
    ({"suppress_tokens": [5], "min_new_tokens": 2, "max_new_tokens": 9}, {"max_new_tokens": 4}),
]


@pytest.mark.parametrize(("file", "said"), CASES, ids=str)
def test_letter_b_merged_options_are_those_of_transformers(file, said):
    """Option by option against the config that transformers' generate makes of the same file and arguments."""
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=9)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.generation_config = transformers.GenerationConfig(**file)
    wanted, _ = theirs._prepare_generation_config(None, **said)
    found = ModelDefaults(file, "file").options(said)
    sampled = ("temperature", "top_k", "top_p")
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
    assert found.do_sample == bool(wanted.do_sample)
    for name in DECODING:
        if name in sampled and not found.do_sample or name in ("max_new_tokens", "do_sample", "stop_strings"):
            continue
        ours, other = getattr(found, name), getattr(wanted, name, None)
        ours, other = (neutral.get(name, value) if value is None else value for value in (ours, other))
        assert (ours or 0) == (other or 0), name
    if "max_new_tokens" in {**file, **said}:
        assert found.max_new_tokens == wanted.max_new_tokens


@pytest.mark.parametrize(
    ("file", "said", "found"),
    [
        (DRAWN, {"num_beams": 3}, {"do_sample": False, "num_beams": 3, "temperature": None}),  # ours are not sampled
        ({"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_beams": 1}),
        (DRAWN, {"temperature": 0}, {"temperature": 0, "top_p": None}),
        ({"min_new_tokens": 8}, {"max_new_tokens": 4}, {"min_new_tokens": 4}),
        ({"min_length": 8}, {"min_new_tokens": 3}, {"min_length": 0, "min_new_tokens": 3}),
    ],
    ids=str,
)
def test_letter_b_what_the_user_says_excludes_what_the_file_says(file, said, found):
    options = ModelDefaults(file, "file").options(said)
    assert {name: getattr(options, name) for name in found} == found


def test_letter_b_wrong_options_of_the_file_are_refused_with_its_name(golden, tmp_path):
    folder = copy_with(golden / "models" / "llava_hf", tmp_path / "model", temperature="hot")
    with pytest.raises(ConfigError, match=r"generation_config\.json(.|\n)*temperature"):
        mm.load(folder, device="cpu")
    with pytest.raises(ConfigError, match=r"defaults of file(.|\n)*num_beams 4 does not go with do_sample"):
        ModelDefaults({"do_sample": True, "num_beams": 4}, "file").options({})


def test_letter_b_the_files_options_are_told_once(golden, tmp_path, caplog):
    found = mm.load(copy_with(golden / "models" / "llava_hf", tmp_path / "model", **DRAWN), device="cpu")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found.generate(input_ids=[PROMPT], max_new_tokens=2)
    assert caplog.text.count("generation_config.json: do_sample True, temperature 0.6, top_p 0.8") == 1
    assert ModelDefaults({"do_sample": False, "temperature": 1.0, "top_k": 50, "num_beams": 1}).asked == ""


def test_letter_b_a_long_answer_of_the_file_is_cut_to_the_context(vlm):
    vlm.defaults.values["max_new_tokens"] = 10**6
    try:
        length = len(vlm.generate(input_ids=[PROMPT], eos_token_id=-1)[0]) + len(PROMPT)
        assert length == vlm.engine().max_length
        assert vlm.engine().submit(GenerationRequest("1", turns=(("What?", None),))).wait().token_ids
        with pytest.raises(ConfigError, match="context"):
            vlm.generate(input_ids=[PROMPT], max_new_tokens=10**6)
    finally:
        vlm.defaults.values["max_new_tokens"] = FIRST["max_new_tokens"]


def test_letter_b_a_talk_takes_the_files_options(vlm):
    session = ChatSession(vlm.engine(), {})
    assert "".join(session.ask("What is it?")) == vlm.generate("What is it?")[0]
    assert len(session.result.token_ids) <= 6


def test_letter_b_infer_takes_the_files_options(vlm, folder, capsys):
    common = ["infer", "--model", str(folder), "--device", "cpu", "--json", "--prompt", "What is it?"]
    assert main(common) == 0
    (answer,) = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert [answer["answer"]] == vlm.generate("What is it?")
    assert main([*common, "--temperature", "0", "--option", "repetition_penalty=1.0", "--max-new-tokens", "9"]) == 0
    (answer,) = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    said = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 9}
    assert [answer["answer"]] == vlm.generate("What is it?", **said)


def test_letter_b_a_tokenizer_from_elsewhere_leaves_the_models_file(golden, folder):
    """Case: --tokenizer DIR made end ids and options of the model's own folder go."""
    other = mm.load(folder, device="cpu", tokenizer=golden / "tokenizer")
    assert other.defaults.values == mm.load(folder, device="cpu").defaults.values == FIRST


def test_letter_b_a_training_run_keeps_the_options(folder, tmp_path):
    load_tokenizer(folder).save(tmp_path / "kept")
    kept = load_tokenizer(tmp_path / "kept")
    assert kept.generation.options == FIRST and kept.end_ids == (2,)


def asked(**fields):
    message = {"role": "user", "content": "Hi"}
    return ChatRequest(model="m", messages=[message], **fields)


def test_letter_b_the_server_leaves_to_the_file_what_a_request_does_not_say():
    of = functools.partial(options_of, limits=ServingLimits(), vocabulary=100)
    found = of(asked(seed=1), usual_temperature=0.6)
    assert found == {"do_sample": True, "temperature": 0.6, "num_beams": 1, "num_return_sequences": 1, "seed": 1}
    merged = ModelDefaults(DRAWN, "file").options(found)
    assert (merged.temperature, merged.top_p, merged.repetition_penalty) == (0.6, 0.8, 1.05)
    said = of(asked(temperature=0.9, top_p=0.5, seed=1), usual_temperature=0.6)
    assert (said["temperature"], said["top_p"]) == (0.9, 0.5)
    greedy = ModelDefaults(DRAWN | {"num_beams": 4}, "file").options(of(asked(temperature=0)))
    assert greedy.greedy and greedy.num_beams == 1 and greedy.repetition_penalty == 1.05
    assert of(asked(seed=1))["temperature"] == 1.0
