"""Every rule and warper beside transformers' own: scores, texts of a tiny model, what is refused."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.options import GenerationOptions, generation_options
from mindspeed_mm.generation.rules import process_rows
from mindspeed_mm.generation.sampling import warp
from tests.generation.test_transformers_generate import LOGITS, expected, prompts
from tests.models.test_transformers_parity import save_random_llava

VOCABULARY, STOPS = 24, [1, 2]
IDS = st.integers(0, 7)
SEQUENCES = st.lists(st.lists(IDS, min_size=1, max_size=3), min_size=1, max_size=5)
RULES = st.fixed_dictionaries(
    {},
    optional={
        "sequence_bias": st.lists(
            st.tuples(st.lists(IDS, min_size=1, max_size=3), st.floats(-5, 5, width=32)).map(list),
            min_size=1,
        ),
        "encoder_repetition_penalty": st.floats(0.5, 2.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "no_repeat_ngram_size": st.integers(1, 3),
        "encoder_no_repeat_ngram_size": st.integers(1, 3),
        "bad_words_ids": SEQUENCES,
        "min_length": st.integers(1, 9),
        "forced_bos_token_id": IDS,
        "forced_eos_token_id": st.one_of(IDS, st.lists(IDS, min_size=1, max_size=2)),
        "remove_invalid_values": st.booleans(),
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(0.5, 2.0)),
        "suppress_tokens": st.lists(IDS, min_size=1, max_size=4),
        "begin_suppress_tokens": st.lists(IDS, min_size=1, max_size=4),
        "renormalize_logits": st.booleans(),
    },
)
CUTS = {
    "top_h": st.floats(0.05, 1.0),
    "top_p": st.floats(0.3, 1.0),
    "typical_p": st.floats(0.05, 1.0),
    "epsilon_cutoff": st.floats(0.0, 0.9),
    "eta_cutoff": st.floats(0.0, 0.9),
    "renormalize_logits": st.booleans(),
}
CASES = {
    "sequence_bias": {"sequence_bias": [[[9], 3.0], [[9, 17], -4.0], [[20, 21], 5.0]]},
    "bad_words_ids": {"bad_words_ids": [[7], [9, 17], [2]]},
    "suppressed": {"suppress_tokens": list(range(3, 60)), "begin_suppress_tokens": list(range(60, 100))},
    "forced end": {"forced_eos_token_id": 2},
    "min_length": {"min_length": 30, "eos_token_id": list(range(3, 60))},
    "decay": {"exponential_decay_length_penalty": (2, 1.7), "eos_token_id": list(range(3, 9))},
    "prompt's tokens": {"encoder_repetition_penalty": 1.8, "encoder_no_repeat_ngram_size": 2},
    "allowed": {"prefix_allowed_tokens_fn": lambda index, ids: [3 + index, int(ids[-1]) % 90 + 5, 40, 77, 99]},
    "all at once": {
        "suppress_tokens": [11, 12],
        "bad_words_ids": [[40]],
        "prefix_allowed_tokens_fn": lambda index, ids: list(range(10 + index, 80)),
        "exponential_decay_length_penalty": (3, 1.2),
        "renormalize_logits": True,
        "remove_invalid_values": True,
    },
}


class TransformersRules(transformers.GenerationMixin):
    """The processors that transformers' generate would make, without a model."""

    config = transformers.LlamaConfig()

    def processors(self, prompt: list[int], options: dict, allowed=None) -> transformers.LogitsProcessorList:
        config = transformers.GenerationConfig(num_beams=1, **options)
        config._eos_token_tensor = torch.tensor(STOPS)
        config.max_length = len(prompt) + options.get("max_new_tokens", 0)
        rows = torch.tensor([prompt])
        return self._get_logits_processor(
            config, len(prompt), rows, prefix_allowed_tokens_fn=allowed, device="cpu", model_kwargs={}
        )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-12, 12, width=32), min_size=VOCABULARY, max_size=VOCABULARY),
    st.lists(IDS, min_size=1, max_size=8),
    st.lists(IDS, max_size=5),
    RULES,
    st.one_of(st.none(), st.lists(IDS, min_size=1, max_size=4)),
)
def test_rules_give_transformers_scores(logits, prompt, answer, options, allowed):
    options = {name: value for name, value in options.items() if not overlaps(name, value, options)}
    history, scores = prompt + answer, torch.tensor([logits])
    options = {**options, "max_new_tokens": 6}
    theirs = TransformersRules().processors(prompt, options, None if allowed is None else lambda index, ids: allowed)
    wanted = theirs(torch.tensor([history]), scores)
    ours = None if allowed is None else lambda ids: allowed
    if not wanted.isfinite().any():  # nothing is left, of which log-probabilities are NaN
        with pytest.raises(DataError, match="the options forbid every next token"):
            process_rows(scores, [history], len(answer), generation_options(options), STOPS, ours)
        return
    found = process_rows(scores, [history], len(answer), generation_options(options), STOPS, ours)
    torch.testing.assert_close(found, wanted)


def overlaps(name: str, value, options: dict) -> bool:
    """Whether a token is forced that is also forbidden, which both sides refuse."""
    forced = options.get("forced_bos_token_id"), options.get("forced_eos_token_id")
    ids = {i for group in forced for i in (group if isinstance(group, list) else [group])}
    return name == "suppress_tokens" and bool(ids & set(value))


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.fixed_dictionaries({}, optional=CUTS), st.booleans())
def test_cuts_give_transformers_scores(logits, options, one_is_out):
    scores = torch.tensor([logits + [-torch.inf] * one_is_out])
    wanted = TransformersRules().processors([1], {"do_sample": True, **options})(torch.tensor([[1]]), scores)
    torch.testing.assert_close(warp(scores[0], GenerationOptions(do_sample=True, **options)), wanted[0])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    theirs = save_random_llava(folder, {"num_key_value_heads": 2})
    return theirs, mm.load(folder, device="cpu")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_transformers_under_rules(models, case, beams):
    theirs, ours = models
    options = {"eos_token_id": [2], "num_beams": beams, **CASES[case]}
    given_rows, wanted = prompts(), []
    for index, (ids, pixels) in enumerate(given_rows):
        changed = dict(options)
        if "prefix_allowed_tokens_fn" in options:  # transformers is asked for one prompt at a time
            changed["prefix_allowed_tokens_fn"] = lambda _, row, n=index: options["prefix_allowed_tokens_fn"](n, row)
        wanted += continued(theirs, ids, pixels, **changed)
    images = [image for _, pixels in given_rows if pixels is not None for image in pixels]
    found = ours.generate(input_ids=[ids for ids, _ in given_rows], images=images, max_new_tokens=14, **options)
    assert found == wanted


def continued(theirs, ids, pixels, prefix_allowed_tokens_fn=None, **options) -> list[list[int]]:
    """`expected`, with the function that generate takes beside its configuration."""
    if prefix_allowed_tokens_fn is None:
        return expected(theirs, ids, pixels, **options)

    class Constrained:
        """A model whose generate always gets the function."""

        @staticmethod
        def generate(**inputs):
            return theirs.generate(**inputs, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn)

    return expected(Constrained, ids, pixels, **options)


@pytest.mark.parametrize("prompt", [[5], [5, 6, 7]])
def test_first_token_is_forced_behind_a_prompt_of_one_token_only(models, prompt):
    theirs, ours = models
    options = {"forced_bos_token_id": 42, "begin_suppress_tokens": list(range(3, 70)), "eos_token_id": [2]}
    found = ours.generate(input_ids=[prompt], max_new_tokens=14, **options)
    assert found == expected(theirs, prompt, None, **options)
    assert (found[0][0] == 42) == (len(prompt) == 1)


@pytest.mark.parametrize(
    "cut", [{"typical_p": 0.4}, {"epsilon_cutoff": 0.009}, {"eta_cutoff": 0.02}, {"top_h": 0.5}, {"min_p": 0.5}]
)
def test_drawn_tokens_equal_transformers(models, cut):
    """Both draw with torch.multinomial; one sequence, the same seed."""
    theirs, ours = models
    (ids, _), options = prompts()[2], {"do_sample": True, "temperature": 0.8, **cut}
    torch.manual_seed(11)
    config = transformers.GenerationConfig(max_new_tokens=14, top_k=0, pad_token_id=0, eos_token_id=[2], **options)
    rows = torch.tensor([ids])
    out = theirs.generate(input_ids=rows, attention_mask=torch.ones_like(rows), generation_config=config)
    found = ours.generate(input_ids=[ids], max_new_tokens=14, seed=11, eos_token_id=[2], **options)
    assert found == out[:, len(ids) :].tolist()


def test_bias_takes_transformers_older_form():
    options = generation_options({"sequence_bias": {(3, 4): -1.5, (5,): 2.0}})
    assert options.sequence_bias == [([3, 4], -1.5), ([5], 2.0)]


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_bias": [[[3, 10**6], 1.0]]},
        {"bad_words_ids": [[10**6]]},
        {"suppress_tokens": [10**6]},
        {"begin_suppress_tokens": [10**6]},
        {"forced_bos_token_id": 10**6},
        {"forced_eos_token_id": [10**6]},
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(models, options):
    with pytest.raises(ConfigError, match=rf"{next(iter(options))}: found token 1000000; the model has 0 to \d+"):
        models[1].generate(input_ids=[[5, 6]], eos_token_id=2, **options)


@pytest.mark.parametrize(
    ("allowed", "message"),
    [([], "gave no token that may follow"), ([10**6], r"gave tokens 1000000 to 1000000; the model has 0 to \d+")],
)
def test_impossible_continuations_are_told(models, allowed, message):
    def answer(index, ids):
        return allowed

    with pytest.raises(DataError, match=f"prefix_allowed_tokens_fn {message}"):
        models[1].generate(input_ids=[[5, 6]], max_new_tokens=3, eos_token_id=2, prefix_allowed_tokens_fn=answer)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("renormalize", [False, True])
def test_options_that_leave_no_token_are_told(models, beams, renormalize):
    options = {"num_beams": beams, "renormalize_logits": renormalize, "suppress_tokens": [7], "eos_token_id": 2}
    with pytest.raises(DataError, match="the options forbid every next token"):
        models[1].generate(
            input_ids=[[5, 6]], max_new_tokens=3, prefix_allowed_tokens_fn=lambda index, ids: [7], **options
        )


def test_a_beam_without_a_token_left_stays_out():
    options = GenerationOptions(num_beams=2, renormalize_logits=True, no_repeat_ngram_size=1)
    found = process_rows(torch.zeros(2, 3), [[0, 1, 2], [0, 1, 1]], 1, options, STOPS)
    assert found.tolist() == [[-torch.inf] * 3, [-torch.inf, -torch.inf, 0.0]]
