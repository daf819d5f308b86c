"""Option names and values; choosing a token."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.options import GenerationOptions, generation_options

GUIDE = {  # keys of the guide's inference_llava.json with values that ask for nothing special
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "typical_p": 1.0,
    "early_stopping": False,
    "bad_words_ids": None,
    "use_cache": False,
    "return_dict_in_generate": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.2,
    "top_k": 50,
    "top_p": 1.0,
    "max_new_tokens": 512,
}


def test_guide_file_is_accepted():
    options = generation_options(GUIDE)
    assert (options.do_sample, options.temperature, options.top_k, options.eos_token_ids) == (True, 0.2, 50, (2,))


def test_unsupported_value_says_what_is_possible():
    with pytest.raises(ConfigError, match=r"guidance_scale: found 1.5, expected None: this option is not supported"):
        generation_options({"guidance_scale": 1.5})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_beam_groups": 2}, "num_beam_groups: found 2, .*diverse beam search: transformers 5 has it no more"),
        ({"diversity_penalty": 0.5}, "diversity_penalty: found 0.5, .*diverse beam search"),
        ({"force_words_ids": [[5]]}, "force_words_ids: .* Use prefix_allowed_tokens_fn in Python"),
        ({"penalty_alpha": 0.6}, "penalty_alpha: .*contrastive search"),
    ],
)
def test_ways_of_decoding_that_transformers_has_no_more(values, reason):
    with pytest.raises(ConfigError, match=reason):
        generation_options(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 2, "do_sample": True}, "num_beams 2 does not go with do_sample"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences 3 exceeds num_beams 2"),
        ({"num_return_sequences": 2}, "num_return_sequences 2 of greedy decoding would be equal"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens 5 exceeds max_new_tokens 4"),
        ({"temperature": 0.7}, "temperature 0.7 asks for sampling, and do_sample is False: set do_sample"),
        ({"top_p": 0.9, "do_sample": False}, "top_p 0.9 asks for sampling"),
        ({"forced_bos_token_id": 3, "suppress_tokens": [3, 4]}, "forced_bos_token_id 3 is also among suppress_tokens"),
        ({"typical_p": 0.4}, "typical_p 0.4 asks for sampling"),
        ({"min_length": 3, "min_new_tokens": 2}, "min_length 3 and min_new_tokens 2 both say"),
        ({"stop_strings": ["a", ""]}, "stop_strings: found an empty text"),
    ],
)
def test_options_that_contradict_each_other(values, message):
    with pytest.raises(ConfigError, match=message):
        generation_options(values)


def test_full_configuration_of_transformers_is_accepted():
    values = transformers.GenerationConfig(max_new_tokens=7, top_k=5, do_sample=True).to_dict()
    assert generation_options(values).top_k == 5


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="temperature"):
        generation_options({"temprature": 0.3})


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"max_new_tokens": 0},
        {"top_k": -1},
        {"length_penalty": 1e300},
        {"num_return_sequences": 10**6},
        {"eta_cutoff": 1.0, "do_sample": True},
        {"bad_words_ids": []},
        {"bad_words_ids": [[]]},
        {"suppress_tokens": [-1]},
        {"sequence_bias": [[[1], "much"]]},
        {"exponential_decay_length_penalty": [3, -1.0]},
    ],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        generation_options(values)


def test_options_must_be_an_object():
    with pytest.raises(ConfigError, match="generation options: found a list; expected an object"):
        generation_options(["max_new_tokens"])


@pytest.mark.parametrize("name", ["max_new_token", "num_beam", "stop_string", "top_pp", "min_new_token"])
def test_misspelt_names_are_told_the_right_one(name):
    with pytest.raises(ConfigError, match=f'{name}: unknown key; did you mean "{name[:5]}'):
        generation_options({name: 1})


def pick(logits, **options):
    from mindspeed_mm.generation.sampling import pick_token

    return pick_token(torch.tensor(logits), GenerationOptions(**options), torch.Generator().manual_seed(3))


def test_greedy_takes_the_likeliest():
    assert pick([0.1, 2.0, 1.0]) == 1
    assert pick([0.1, 2.0, 1.0], do_sample=True, temperature=0.0) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12), st.integers(1, 12), st.floats(0.05, 1.0))
def test_sampling_stays_within_top_k_and_top_p(logits, top_k, top_p):
    token = pick(logits, do_sample=True, temperature=1.0, top_k=top_k, top_p=top_p)
    ranked = torch.tensor(logits).sort(descending=True).values
    kept = ranked[: min(top_k, len(logits))]
    probabilities = torch.where(torch.tensor(logits) >= kept[-1], torch.tensor(logits), -torch.inf).softmax(-1)
    likelier = probabilities[probabilities > probabilities[token] + 1e-6].sum()
    assert logits[token] >= kept[-1] - 1e-6
    assert likelier < top_p + 1e-5


def test_same_seed_gives_the_same_token():
    logits = torch.randn(100).tolist()
    assert len({pick(logits, do_sample=True, temperature=1.0) for _ in range(5)}) == 1
