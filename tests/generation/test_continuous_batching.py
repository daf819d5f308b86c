"""Rows come and go; nobody's tokens depend on who else is there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.platform import get_platform

get_platform("cpu")  # before megatron.core is imported

QUESTIONS = ("Hi", "What is in the picture?", "word " * 30 + "?", "Name it.", "a b c d e f g", "word " * 33 + "!")


@pytest.fixture(scope="module")
def vlm(golden):
    return mm.load(golden / "models" / "llava_hf", device="cpu")


@pytest.fixture(scope="module")
def engine(vlm):
    return vlm.engine(batch_size=4)


def image(number=0):
    return Image.new("RGB", (30, 20), (200, 30 * number, 90))


def request(index, **fields):
    from mindspeed_mm.generation.engine import GenerationRequest

    images = (image(index),) if index % 2 else ()
    turns = ((QUESTIONS[index], None),)
    return GenerationRequest(str(index), **({"turns": turns, "images": images} | fields))


def options(index):
    """Requests of all kinds side by side."""
    kinds = (
        {"max_new_tokens": 9},
        {"max_new_tokens": 4},
        {"max_new_tokens": 7, "do_sample": True, "num_return_sequences": 2, "seed": 5, "temperature": 1.3},
        {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 12, "repetition_penalty": 1.3, "logprobs": 2},
        {"max_new_tokens": 1},
    )
    return kinds[index]


@pytest.fixture(scope="module")
def alone(engine):
    return [engine.submit(request(i), options(i)).wait() for i in range(len(QUESTIONS))]


def rows(result):
    return [(sequence.token_ids, sequence.text) for sequence in result.sequences]


@settings(max_examples=16, deadline=None)
@given(
    order=st.lists(st.integers(0, 5), min_size=2, max_size=9),
    size=st.integers(1, 6),
    pause=st.integers(0, 3),
    packs=st.booleans(),
)
def test_tokens_do_not_depend_on_the_batch(engine, alone, order, size, pause, packs):
    engine._scheduler.max_rows, engine._decoder.packs = size, packs
    handles = []
    for index in order:
        handles.append((index, engine.submit(request(index), options(index))))
        for _ in range(pause):
            engine.step()
    for index, handle in handles:
        assert rows(handle.wait()) == rows(alone[index])
    assert not engine.busy
    engine._scheduler.max_rows, engine._decoder.packs = 4, False


def test_cache_changes_no_token(vlm):
    ids = [1, *range(300, 330)]
    expected = list(ids)
    for _ in range(8):
        logits = vlm.logits(torch.tensor([expected]))
        expected.append(int(logits[0, -1].argmax()))
    assert vlm.generate(input_ids=ids, max_new_tokens=8, eos_token_id=-1) == [expected[len(ids) :]]


@pytest.mark.parametrize("variant", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}, {"head_dim": 12}])
def test_lean_steps_equal_the_modules(variant, tmp_path):
    from mindspeed_mm.generation.decode import Decoder
    from tests.models.test_transformers_parity import save_random_llava

    save_random_llava(tmp_path, variant)
    decoder = Decoder(mm.load(tmp_path, device="cpu").model)
    assert decoder._single_token is not None
    found = []
    for single_token in (decoder._single_token, None):
        decoder._single_token = single_token
        decoder.cache.reserve(2, 20)
        decoder.prefill([[5, 6, 7], [8, 9, 10, 11, 12]], (), 0)
        found.append([decoder.step([3, 4], [3, 5]), decoder.step([6, 7], [4, 6])])
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("starts", [(3, 3), (7, 7), (8, 8), (2, 5)], ids=["causal", "half", "mask", "own masks"])
def test_prompts_filled_in_by_parts_have_the_logits_of_whole_ones(vlm, starts, packs):
    from mindspeed_mm.generation.decode import Decoder

    prompts = [list(range(5, 19)), list(range(20, 34))]
    decoder = Decoder(vlm.model)
    decoder.cache.reserve(2, 32)
    whole = decoder.prefill(prompts, (), 0)
    decoder.packs = packs
    for row, start in enumerate(starts):
        decoder.prefill([prompts[row][:start]], (), row)
    rest = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
    torch.testing.assert_close(decoder.prefill(rest, (), 0, starts), whole, atol=1e-5, rtol=1e-5)


def test_changed_layers_go_through_their_modules(vlm):
    from mindspeed_mm.generation.single_token import SingleTokenStep

    decoder = vlm.model.text_decoder
    assert SingleTokenStep.fits(decoder)
    hook = decoder.decoder.layers[1].mlp.linear_fc1.register_forward_hook(lambda *_: None)
    assert not SingleTokenStep.fits(decoder)
    hook.remove()


def test_an_image_goes_through_the_vision_encoder_once(vlm):
    engine = vlm.engine()
    shown = image(1)
    requests = [request(index, images=(shown,)) for index in (0, 1, 3)]
    list(engine.generate([*requests, request(4, images=(shown.copy(), image(2)))], {"max_new_tokens": 2}, 2))
    assert engine.image_features.computed == 2


def test_stream_joins_to_the_text(engine):
    seen = []
    handle = engine.submit(request(2), {"max_new_tokens": 20}, on_text=lambda piece, index: seen.append((piece, index)))
    text = "".join(handle)
    assert text == handle.result.text == "".join(piece for piece, _ in seen) and {i for _, i in seen} == {0}
    assert handle.result.sequences[0].finish_reason == "length"


def test_cancelled_request_keeps_what_it_said(engine, alone):
    other = engine.submit(request(0), options(0))
    handle = engine.submit(request(4), {"max_new_tokens": 400})
    for _ in range(3):
        engine.step()  # the first one fills in the prompt and gives two tokens
    handle.cancel()
    result = handle.wait()
    assert result.sequences[0].finish_reason == "cancelled" and len(result.token_ids) == 4
    assert rows(other.wait()) == rows(alone[0]) and not engine.busy
    waiting = engine.submit(request(4), {"max_new_tokens": 400})
    waiting.cancel()
    assert waiting.wait().token_ids == ()


def test_interrupted_steps_lose_what_ran_and_nothing_else(vlm, alone):
    """Ctrl-C in the middle of a step, or a callback that raises."""
    engine = vlm.engine(batch_size=2)

    def interrupt(piece, index):
        raise KeyboardInterrupt

    lost = engine.submit(request(4), options(4), on_text=interrupt)
    with pytest.raises(KeyboardInterrupt):
        lost.wait()
    with pytest.raises(RuntimeError, match="request 4 is lost: an earlier step of the engine was interrupted"):
        lost.wait()
    assert rows(engine.submit(request(0), options(0)).wait()) == rows(alone[0])


def test_stop_string_ends_the_answer(engine):
    whole = engine.submit(request(2), {"max_new_tokens": 20}).wait()
    stop = whole.text[3:6]
    result = engine.submit(request(2), {"max_new_tokens": 20, "stop_strings": [stop]}).wait()
    assert result.text == whole.text.split(stop)[0].strip() and result.sequences[0].finish_reason == "stop"
    assert result.token_ids == whole.token_ids[: len(result.token_ids)] and len(result.token_ids) < 20


def test_logprobs_are_the_models(vlm, engine):
    result = engine.submit(request(0), {"max_new_tokens": 3, "logprobs": 2}).wait()
    ids = [*engine.prepare(request(0)), *result.token_ids]
    logprobs = vlm.logits(torch.tensor([ids]))[0].log_softmax(-1)[-4:-1]
    sequence = result.sequences[0]
    assert list(sequence.logprobs) == pytest.approx([float(logprobs[i, t]) for i, t in enumerate(ids[-3:])], abs=1e-4)
    assert [max(top, key=top.get) for top in sequence.top_logprobs] == list(result.token_ids)
    assert all(len(top) == 2 for top in sequence.top_logprobs)


def test_same_seed_same_answer(engine):
    draw = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "num_return_sequences": 3}
    first, again = (rows(engine.submit(request(1), {**draw, "seed": 3}).wait()) for _ in range(2))
    assert first == again and len(set(first)) == 3
    assert rows(engine.submit(request(1), {**draw, "seed": 4}).wait()) != first


def bad_requests(tmp_path):
    """name -> (request fields, options, error)"""
    text = tmp_path / "text.png"
    text.write_text("no image")
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(huge)
    long = ("word " * 3000, None)
    return {
        "text file": ({"images": (str(text),)}, {}, "cannot be decoded"),
        "missing": ({"images": (str(tmp_path / "none.png"),)}, {}, "is missing"),
        "20000 x 20000": (
            {"images": (str(huge),)},
            {},
            r"huge.png cannot be decoded \(Image size \(400000000 pixels\) exceeds limit",
        ),
        "address": ({"images": ("https://example.org/a.png",)}, {}, "is an address, and nothing is downloaded"),
        "no image": ({"turns": (("<image>\nHi", None),)}, {}, "found 0 images and 1 <image> placeholders"),
        "two images": (
            {"turns": (("<image>\nHi", None),), "images": (image(), image())},
            {},
            "found 2 images and 1 <image> placeholders",
        ),
        "empty": ({"turns": (("  ", None),)}, {}, "the prompt is empty; give it a text"),
        "empty with an image": ({"turns": (("", None),), "images": (image(),)}, {}, "<image> alone for an image"),
        "empty raw": ({"turns": (), "prompt": ""}, {}, "the prompt is empty; give it a text$"),
        "nothing": ({"turns": ()}, {}, "neither turns nor a prompt"),
        "NaN": ({}, {"temperature": float("nan")}, "temperature"),
        "unknown option": ({}, {"temprature": 1.0}, "temprature"),
        "overflow": ({}, {"temperature": 1e-44, "do_sample": True}, "has no finite probabilities: temperature 1e-44"),
        "penalty": (
            {},
            {"repetition_penalty": 1e-40, "do_sample": True},
            "and repetition_penalty 1e-40 take the scores",
        ),
        "long": ({"turns": (long,)}, {}, r"a prompt of \d+ tokens and max_new_tokens \d+ exceed .* of 2048 tokens"),
    }


def test_bad_requests_fail_alone(engine, alone, tmp_path):
    import re

    good = engine.submit(request(0), options(0))
    for name, (fields, wrong, message) in bad_requests(tmp_path).items():
        handle = engine.submit(request(0, **fields), wrong)
        with pytest.raises((DataError, ConfigError), match=message):
            handle.wait()
        assert re.search(message, handle.result.error), name
    assert rows(good.wait()) == rows(alone[0])


def test_generate_returns_or_raises_errors(engine, tmp_path):
    requests = [request(0), request(1, images=(str(tmp_path / "none.png"),)), request(5)]
    results = list(engine.generate(requests, {"max_new_tokens": 2}, 2, on_error="return"))
    assert [result.error is None for result in results] == [True, False, True]
    with pytest.raises(DataError, match="is missing"):
        list(engine.generate(requests, {"max_new_tokens": 2}, 2))
    assert {r.id for r in engine.generate(requests, {"max_new_tokens": 2}, 2, on_error="return", ordered=False)} == {
        "0",
        "1",
        "5",
    }
    engine.step()
    assert not engine.busy


def test_tiny_image_is_fine(engine):
    assert engine.submit(request(0, images=(Image.new("L", (1, 1)),)), {"max_new_tokens": 2}).wait().error is None


def test_typed_special_tokens_stay_text(engine):
    ids = engine.prepare(request(0, turns=(("a </s> b", None),)))
    assert engine.tokenizer.eos_token_id not in ids


def test_system_text_takes_the_place_of_the_templates(engine):
    ids = engine.prepare(request(0, system="Be brief."))
    assert engine.tokenizer.decode(ids).startswith("Be brief. USER: Hi ASSISTANT:")


def test_letter_g_an_error_of_the_model_names_the_requests_that_it_was_answering(vlm, monkeypatch):
    own = vlm.engine(batch_size=2)
    handle = own.submit(request(0), options(0))
    own.step()

    def broken(*_):
        raise RuntimeError("no such shape")

    monkeypatch.setattr(own._scheduler.decoder, "step", broken)
    with pytest.raises(RuntimeError, match="no such shape") as caught:
        own.step()
    assert caught.value.__notes__ == [f"The model was answering: request {handle.id}"]
