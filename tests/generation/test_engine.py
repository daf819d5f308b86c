"""Requests to answers: placeholders, batches, stop marks, limits."""

import gc
import io
import weakref

import pytest
from PIL import Image

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError, ContextError, DataError
from mindspeed_mm.generation.options import GenerationOptions

SHORT = GenerationOptions(max_new_tokens=5)


@pytest.fixture(scope="module")
def engine(golden):
    return mm.load(golden / "models" / "llava_hf", device="cpu").engine()


@pytest.fixture
def image():
    return Image.new("RGB", (30, 20), (200, 30, 90))


def request(name, text, *images, **fields):
    from mindspeed_mm.generation.engine import GenerationRequest

    return GenerationRequest(name, turns=((text, None),), images=images, **fields)


def test_images_without_placeholder_go_in_front(engine, image):
    bare = engine.prepare(request("a", "What?", image))
    placed = engine.prepare(request("b", "<image>\nWhat?", image))
    assert bare == placed and bare.count(-200) == 16


def test_prompt_is_the_training_prompt(engine, image):
    from mindspeed_mm.data.encode import encode
    from mindspeed_mm.data.expand import expand_images
    from tests.helpers.media import fixed_plan

    ids = engine.prepare(request("a", "What is it?", image))
    conversation = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A."}]
    trained, labels = expand_images(*encode(conversation, engine.tokenizer, "v1"), [fixed_plan(16)])
    answer_start = next(i for i, label in enumerate(labels) if label != -100)
    assert ids == trained[:answer_start]


def test_raw_prompt_is_tokenised_as_it_is(engine, image):
    from mindspeed_mm.generation.engine import GenerationRequest

    ids = engine.prepare(GenerationRequest("a", prompt="USER: <image>\nHi ASSISTANT:", images=(image,)))
    assert ids[:1] == [engine.tokenizer.bos_token_id] and ids.count(-200) == 16


def test_wrong_number_of_images_names_the_request(engine, image):
    with pytest.raises(DataError, match="request q7: found 2 images and 1 <image> placeholders"):
        engine.prepare(request("q7", "<image>\nWhat?", image, image))
    with pytest.raises(DataError, match="request q8: found 0 images and 1 <image> placeholders"):
        engine.prepare(request("q8", "<image>\nWhat?"))


def test_batches_do_not_change_answers(engine, image):
    requests = [request(str(i), "word " * i + "what?", *([image] if i % 2 else [])) for i in range(1, 6)]
    alone = {r.id: r.token_ids for r in engine.generate(requests, SHORT, batch_size=1)}
    together = {r.id: r.token_ids for r in engine.generate(requests, SHORT, batch_size=3)}
    assert alone == together and list(together) == ["1", "2", "3", "4", "5"]


def test_sampling_does_not_depend_on_the_batch(engine):
    options = GenerationOptions(max_new_tokens=5, do_sample=True, temperature=1.0, seed=11)
    requests = [request(str(i), "word " * i + "what?") for i in range(1, 4)]
    alone = [r.token_ids for r in engine.generate(requests, options, batch_size=1)]
    assert alone == [r.token_ids for r in engine.generate(requests, options, batch_size=3)]


def test_too_long_prompt_gives_the_numbers(engine):
    with pytest.raises(ConfigError, match=r"a prompt of \d+ tokens and max_new_tokens 5 exceed .* 2048 tokens"):
        list(engine.generate([request("a", "word " * 3000)], SHORT))
    with pytest.raises(ContextError, match=r"^request b: a prompt of \d+ tokens"):  # letter G: of several, which it is
        list(engine.generate([request("a", "Hi"), request("b", "word " * 3000)], SHORT))


@pytest.mark.parametrize(
    ("text", "more", "failed"),
    [
        ("Hi", {}, False),
        ("Hi", {"num_beams": 2}, False),
        ("word " * 3000, {}, True),  # too long, known at once
        ("Hi", {"broken": True}, True),  # known when its turn comes
    ],
)
def test_what_a_request_held_is_free_when_it_has_ended(engine, image, text, more, failed):
    """Its images above all: no circle of references keeps them until the garbage collector comes to it."""
    from mindspeed_mm.data.sample import ImageBytes

    file, broken = io.BytesIO(), more.pop("broken", False)
    image.save(file, "PNG")
    encoded = ImageBytes("image", file.getvalue()[:-30] if broken else file.getvalue())
    held, told = weakref.ref(encoded), []
    gc.collect()
    gc.disable()
    try:
        handle = engine.submit(request("a", text, encoded), {"max_new_tokens": 3, **more}, on_end=told.append)
        while handle.result is None:
            engine.step()
        assert (handle.error is not None) == failed and told == [handle]
        if not failed:
            assert len(handle.so_far(0).token_ids) == len(handle.result.token_ids)
        del encoded, handle
        told.clear()
        engine.submit(request("b", "Next"), {"max_new_tokens": 1}).wait()
        assert held() is None
    finally:
        gc.enable()
