"""The same tokens as transformers' generate, on a random tiny model, for every option that decides them."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspeed_mm as mm
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.generation.rules import process
from mindspeed_mm.generation.sampling import warp
from tests.models.test_transformers_parity import batch, save_random_llava

IMAGE = 130
CASES = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "reward for repetition": {"repetition_penalty": 0.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "no repeated token": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 11, "eos_token_id": list(range(3, 40))},
    "several stop ids": {"eos_token_id": list(range(3, 14))},
    "beams": {"num_beams": 3},
    "beams, stop early": {"num_beams": 4, "early_stopping": True, "eos_token_id": list(range(3, 20))},
    "beams, stop never": {"num_beams": 3, "early_stopping": "never", "eos_token_id": list(range(3, 20))},
    "beams, short": {"num_beams": 3, "length_penalty": -1.0, "eos_token_id": list(range(3, 20))},
    "beams, long": {"num_beams": 3, "length_penalty": 2.0, "eos_token_id": list(range(3, 30))},
    "beams, several": {"num_beams": 4, "num_return_sequences": 3, "eos_token_id": [5, 9, 11]},
    "beams, rules": {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 4},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    theirs = save_random_llava(folder, {"num_key_value_heads": 2})
    return theirs, mm.load(folder, device="cpu")


def prompts() -> list[tuple[list[int], torch.Tensor | None]]:
    """(ids, images) of different lengths, with two images, one and none."""
    ids, pixels = batch()
    row = ids[0].tolist()
    return [(row, pixels), (row[:20], pixels[:1]), (row[13:40], None), (row[2:9], None)]


def expected(model, ids, pixels, **options) -> list[list[int]]:
    """New ids of transformers' generate, cut behind the first stop id."""
    stops = options.pop("eos_token_id", [2])
    config = transformers.GenerationConfig(
        max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=stops, **options
    )
    rows = torch.tensor([ids])
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    inputs |= {} if pixels is None else {"pixel_values": pixels}
    out = model.generate(**inputs, generation_config=config)
    new = out[:, len(ids) :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in new]


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_transformers(models, case):
    theirs, ours = models
    options = {"eos_token_id": [2], **CASES[case]}
    wanted = [row for ids, pixels in prompts() for row in expected(theirs, ids, pixels, **options)]
    images = [image for _, pixels in prompts() if pixels is not None for image in pixels]
    found = ours.generate(input_ids=[ids for ids, _ in prompts()], images=images, max_new_tokens=14, **options)
    assert found == wanted


def test_beam_scores_equal_transformers(models):
    theirs, ours = models
    ids, pixels = prompts()[1]
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8, "eos_token_id": [7, 8, 9]}
    rows = torch.tensor([ids])
    out = theirs.generate(
        input_ids=rows,
        attention_mask=torch.ones_like(rows),
        pixel_values=pixels,
        return_dict_in_generate=True,
        output_scores=True,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    from mindspeed_mm.generation.beam import BeamJob
    from mindspeed_mm.generation.decode import Decoder
    from mindspeed_mm.generation.images import ImageFeatures
    from mindspeed_mm.generation.scheduler import Entry, Scheduler

    decoder = Decoder(ours.model)
    job = BeamJob(ids, GenerationOptions(**options), [7, 8, 9])
    prompt = [-200 if token == IMAGE else token for token in ids]
    images = ImageFeatures(decoder, None)
    scheduler = Scheduler(decoder, images)
    scheduler.submit(Entry(job, prompt, len(ids) + 8, list(pixels), lambda error: None))
    while scheduler.step():
        pass
    found = [sequence.score for sequence in job.sequences]
    assert found == pytest.approx(out.sequences_scores.tolist(), abs=1e-4)


LOGITS = st.lists(st.floats(-12, 12, width=32), min_size=2, max_size=20)
WARPERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.1, 3.0),
        "top_k": st.integers(1, 25),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 1.0),
    },
)


@settings(max_examples=60, deadline=None)
@given(LOGITS, WARPERS)
def test_warpers_equal_transformers(logits, options):
    scores = torch.tensor([logits])
    wanted = scores
    for name, cls in (
        ("temperature", transformers.TemperatureLogitsWarper),
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
        ("min_p", transformers.MinPLogitsWarper),
    ):
        if name in options:
            wanted = cls(options[name])(None, wanted)
    torch.testing.assert_close(warp(scores[0], GenerationOptions(do_sample=True, **options)), wanted[0])


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.lists(st.integers(0, 6), min_size=1, max_size=15), st.floats(0.2, 4.0), st.integers(0, 4))
def test_rules_equal_transformers(logits, history, penalty, ngram):
    scores = torch.tensor([[*logits, *[0.5] * 8]])
    ids = torch.tensor([history])
    wanted = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    if ngram:
        wanted = transformers.NoRepeatNGramLogitsProcessor(ngram)(ids, wanted)
    options = GenerationOptions(repetition_penalty=penalty, no_repeat_ngram_size=ngram, min_new_tokens=2)
    wanted = wanted[0].clone()
    assert torch.equal(process(scores[0], history, 2, options, [1]), wanted)
    wanted[1] = -torch.inf
    assert torch.equal(process(scores[0], history, 1, options, [1]), wanted)
