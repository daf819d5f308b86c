"""Beam search with stop strings and log-probabilities."""

import re

import pytest
import torch
import transformers

import mindspeed_mm as mm

QUESTIONS = ("Hi", "What is in the picture?", "Name it.")


@pytest.fixture(scope="module")
def vlm(golden):
    return mm.load(golden / "models" / "llava_hf", device="cpu")


@pytest.fixture(scope="module")
def engine(vlm):
    return vlm.engine()


def ask(engine, question, **options):
    from mindspeed_mm.generation.engine import GenerationRequest

    chosen = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 3} | options
    return engine.submit(GenerationRequest("a", turns=((question, None),)), chosen).wait()


@pytest.fixture(scope="module")
def theirs(golden):
    folder = golden / "models" / "llava_hf"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("early", [True, False])
def test_stop_strings_equal_transformers(engine, theirs, question, early):
    """The string is one that the best beam says, so that it ends some of the beams and not all."""
    model, tokenizer = theirs
    stop = re.findall("[a-z]{3}", ask(engine, question).text)[1]
    found = ask(engine, question, stop_strings=[stop], early_stopping=early, length_penalty=-1.0)
    from mindspeed_mm.generation.engine import GenerationRequest

    prompt = torch.tensor([engine.prepare(GenerationRequest("a", turns=((question, None),)))])
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        stop_strings=[stop],
        tokenizer=tokenizer,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=12,
        early_stopping=early,
        length_penalty=-1.0,  # short ones win
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    wanted = [[i for i in row if i != tokenizer.pad_token_id] for row in out.sequences[:, prompt.shape[1] :].tolist()]
    assert [list(sequence.token_ids) for sequence in found.sequences] == wanted
    assert [s.score for s in found.sequences] == pytest.approx(out.sequences_scores.tolist(), rel=1e-5)
    assert any(len(sequence.token_ids) < 12 for sequence in found.sequences)
    for sequence in found.sequences:
        whole = engine.tokenizer.decode(list(sequence.token_ids))
        assert sequence.text == whole.split(stop)[0].replace("</s>", "").strip()
        assert sequence.finish_reason == ("stop" if stop in whole or sequence.token_ids[-1] == 2 else "length")


def test_the_text_comes_at_the_end(engine):
    from mindspeed_mm.generation.engine import GenerationRequest

    said = []
    request = GenerationRequest("a", turns=(("Hi", None),))
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    handle = engine.submit(request, options, on_text=lambda *piece: said.append(piece))
    texts = [sequence.text for sequence in handle.wait().sequences]
    assert said == [(text, index) for index, text in enumerate(texts)] and all(texts)
    assert "".join(engine.submit(request, options)) == texts[0]


def test_logprobs_are_the_models_and_sum_to_the_score(vlm, engine):
    from mindspeed_mm.generation.engine import GenerationRequest

    result = ask(engine, "Hi", logprobs=2)
    prompt = engine.prepare(GenerationRequest("a", turns=(("Hi", None),)))
    for sequence in result.sequences:
        logits = vlm.logits(torch.tensor([[*prompt, *sequence.token_ids]]))[0]
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        wanted = [float(logprobs[i, token]) for i, token in enumerate(sequence.token_ids)]
        assert list(sequence.logprobs) == pytest.approx(wanted, abs=1e-4)
        assert sequence.score == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
        best = logprobs.topk(2)
        assert [set(top) for top in sequence.top_logprobs] == [set(row) for row in best.indices.tolist()]


def test_stop_strings_end_beams_of_ids_too(vlm, engine):
    prompt = [1, *range(300, 320)]
    free = vlm.generate(input_ids=prompt, num_beams=3, max_new_tokens=10)[0]
    stop = re.findall("[a-z]{3}", engine.tokenizer.decode(free))[0]
    options = {"num_beams": 3, "max_new_tokens": 10, "num_return_sequences": 3, "length_penalty": -1.0}
    ended = vlm.generate(input_ids=prompt, stop_strings=stop, **options)
    assert any(len(ids) < 10 and stop in engine.tokenizer.decode(ids) for ids in ended)
