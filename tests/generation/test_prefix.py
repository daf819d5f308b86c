"""Prompts that begin alike are computed once, and nobody's tokens change by it."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mindspeed_mm as mm
from mindspeed_mm.errors import DataError
from mindspeed_mm.platform import get_platform
from tests.helpers.media import fixed_plan

get_platform("cpu")  # before megatron.core is imported

VOCABULARY, PATCHES = 50, 4


class FakeCache:
    """Rows hold what went into them; nothing is checked here."""

    def __init__(self):
        self.data = np.zeros((0, 0), dtype=np.int64)

    @property
    def rows(self):
        return len(self.data)

    def reserve(self, rows, length):
        old = self.data
        self.data = np.full((max(rows, old.shape[0]), max(length, old.shape[1])), -7)
        self.data[: old.shape[0], : old.shape[1]] = old

    def copy_rows(self, sources, targets, length):
        self.data[targets, :length] = self.data[sources, :length]


class FakeDecoder:
    """A decoder whose next token is a hash of all that its cache row holds."""

    interacts = beside_text = False

    def __init__(self, packs=False):
        self.cache, self.computed, self.packs = FakeCache(), 0, packs
        self.groups = []

    def prefill(self, prompts, features, first_row, starts, positions, shown):
        assert positions is None
        self.groups.append(sorted(map(len, prompts)))
        features, width = list(features), 0 if self.packs else max(map(len, prompts))
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True), start=first_row):
            shown = [features.pop(0) for _ in range(prompt.count(-200) // PATCHES)]
            values = [shown.pop(0) if i % PATCHES == 0 else -1 for i in range(prompt.count(-200))]
            values = [token if token != -200 else values.pop(0) for token in prompt]
            self.cache.data[row, start : start + width] = -9  # padding
            self.cache.data[row, start : start + len(prompt)] = values
            self.computed += len(prompt)
        assert not features
        return torch.stack([self._logits(row + first_row, starts[row] + len(p)) for row, p in enumerate(prompts)])

    def step(self, tokens, lengths, positions, shown):
        assert positions == lengths
        for row, (token, length) in enumerate(zip(tokens, lengths, strict=True)):
            self.cache.data[row, length] = token
        return torch.stack([self._logits(row, length + 1) for row, length in enumerate(lengths)])

    def _logits(self, row, length):
        return fake_logits(self.cache.data[row, :length])


def fake_logits(values):
    seed = int.from_bytes(hashlib.blake2b(np.asarray(values, dtype=np.int64).tobytes(), digest_size=6).digest(), "big")
    return torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(seed))


class FakeImageFeatures:
    """Images are numbers, which are their features."""

    def find(self, images):
        from mindspeed_mm.generation.images import FoundImage

        return [FoundImage(bytes([image] * 16), image, fixed_plan(PATCHES)) for image in images]

    def features(self, requests):
        from mindspeed_mm.generation.decode import ItemFeatures

        return [[ItemFeatures(found.source) for found in images] for images in requests]


def alone(prompt, images, options):
    """The tokens of one row that nothing but its own content decides."""
    shown, ids = list(images), []
    values = [
        (shown.pop(0) if prompt[:i].count(-200) % PATCHES == 0 else -1) if t == -200 else t
        for i, t in enumerate(prompt)
    ]
    for _ in range(options["max_new_tokens"]):
        ids.append(int(fake_logits([*values, *ids]).argmax()))
        if ids[-1] in (0, 1, 2):
            break
    return ids


PIECES = st.lists(st.sampled_from([[-200] * PATCHES, [5] * 9, [6, 7] * 10, [8], [9] * 30]), min_size=1, max_size=5)
PROMPTS = st.tuples(PIECES, st.lists(st.integers(20, 21), min_size=5, max_size=5), st.integers(1, 9))


@settings(max_examples=150, deadline=None)
@given(
    work=st.lists(st.tuples(PROMPTS, st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=12),
    rows=st.integers(1, 5),
    packs=st.booleans(),
)
def test_rows_hold_what_their_requests_said(work, rows, packs):
    """Greedy requests come and go, some cancelled, some with several rows: each token depends on its own row alone."""
    from mindspeed_mm.generation.jobs import SampleJob
    from mindspeed_mm.generation.options import GenerationOptions
    from mindspeed_mm.generation.scheduler import Entry, Scheduler

    scheduler = Scheduler(FakeDecoder(packs), FakeImageFeatures(), rows)
    asked = []
    for (pieces, given_images, new_tokens), pause, cancel in work:
        prompt = [token for piece in pieces for token in piece]
        images = given_images[: prompt.count(-200) // PATCHES]
        options = {"max_new_tokens": new_tokens}
        job = SampleJob(prompt, GenerationOptions(**options), (0, 1, 2))
        entry = Entry(job, prompt, len(prompt) + new_tokens, images, lambda error: None)
        scheduler.submit(entry)
        asked.append((entry, alone(prompt, images, options)))
        for _ in range(pause):
            scheduler.step()
        if cancel == 0:
            asked[len(asked) // 2][0].cancelled = True
    while scheduler.step():
        pass
    for entry, wanted in asked:
        found = entry.job.sequences[0].token_ids
        assert found == wanted[: len(found)] and (entry.cancelled or len(found) == len(wanted))
    computed = sum(len(entry.prompt) - entry.start for entry, _ in asked if entry.job.sequences[0].token_ids)
    assert scheduler.decoder.computed == computed


@pytest.mark.parametrize(
    ("packs", "most", "groups"),
    [
        (False, 99, [[3], [20, 21], [40]]),
        (True, 99, [[3, 20, 21, 40]]),
        (True, 50, [[3, 20, 21], [40]]),
    ],
    ids=["padded", "packed", "packed, but for what is too much"],
)
def test_prompts_of_any_lengths_go_together_where_they_are_packed(packs, most, groups):
    from mindspeed_mm.generation.jobs import SampleJob
    from mindspeed_mm.generation.options import GenerationOptions
    from mindspeed_mm.generation.scheduler import Entry, Scheduler

    scheduler = Scheduler(FakeDecoder(packs), FakeImageFeatures(), 8)
    scheduler._prefill_tokens = most
    for number, length in enumerate((3, 20, 21, 40)):
        prompt = [5 + number] * length
        job = SampleJob(prompt, GenerationOptions(max_new_tokens=1), ())
        scheduler.submit(Entry(job, prompt, length + 1, (), lambda error: None))
    scheduler.step()
    assert scheduler.decoder.groups == groups


@pytest.fixture(scope="module")
def vlm(golden):
    return mm.load(golden / "models" / "llava_hf", device="cpu")


def image_of(number):
    return Image.new("RGB", (30, 20), (200, 60 * number, 90))


TEXTS = ("What?", "What is in the picture, and where is it?", "word " * 40, "word " * 40 + "end")


def request(index, size=4):
    """Two images or none, four questions that partly begin alike."""
    from mindspeed_mm.generation.engine import GenerationRequest

    shown = () if index % 3 == 0 else (image_of(index % 3),)
    return GenerationRequest(str(index), turns=((TEXTS[index % 4], None),), images=shown)


OPTIONS = (
    {"max_new_tokens": 7},
    {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2},
    {"max_new_tokens": 6, "do_sample": True, "temperature": 1.4, "num_return_sequences": 2},
)


def rows(result):
    return [sequence.token_ids for sequence in result.sequences]


@pytest.fixture(scope="module")
def without_reuse(vlm):
    """Answers of engines that have seen nothing before."""
    return [[rows(vlm.engine().submit(request(index), options).wait()) for options in OPTIONS] for index in range(12)]


@settings(max_examples=16, deadline=None)
@given(
    order=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 2)), min_size=2, max_size=10),
    size=st.integers(1, 6),
    pause=st.integers(0, 4),
    packs=st.booleans(),
)
def test_tokens_do_not_depend_on_what_was_asked_before(engine, without_reuse, order, size, pause, packs):
    engine._scheduler.max_rows, engine._decoder.packs = size, packs
    handles = []
    for index, kind in order:
        handles.append((index, kind, engine.submit(request(index), OPTIONS[kind])))
        for _ in range(pause):
            engine.step()
    for index, kind, handle in handles:
        assert rows(handle.wait()) == without_reuse[index][kind]


@pytest.fixture(scope="module")
def engine(vlm):
    return vlm.engine(batch_size=4)


def test_questions_about_one_image_share_it(vlm):
    engine = vlm.engine(batch_size=8)
    requests = [request(1, 8)] * 3 + [request(5, 8)]
    results = list(engine.generate([*requests, request(4)], {"max_new_tokens": 3}, 8))
    cached = [result.cached_tokens for result in results]
    first = engine.prepare(request(1))
    shared = next(i for i, (a, b) in enumerate(zip(first, engine.prepare(request(4)), strict=False)) if a != b)
    # The first is computed whole; the same question again but for its last token; other questions up to themselves.
    assert cached[0] == 0 and cached[1] == cached[2] == len(first) - 1
    assert cached[4] == shared > 16 + first.count(-200)
    assert engine.image_features.computed == 2


def test_a_turn_goes_on_where_the_last_one_ended(vlm):
    from mindspeed_mm.generation.chat import ChatSession

    engine = vlm.engine(batch_size=1)
    session = ChatSession(engine, {"max_new_tokens": 8})
    session.add_image("a", image_of(1))
    fresh = ChatSession(vlm.engine(), {"max_new_tokens": 8})
    fresh.add_image("a", image_of(1))
    for question in ("What is it?", "And where?", "Why?"):
        before = session.result
        list(session.ask(question))
        if before is not None:
            assert session.result.cached_tokens >= before.prompt_tokens
        fresh._engine = vlm.engine()
        list(fresh.ask(question))
        assert session.result.token_ids == fresh.result.token_ids and fresh.result.cached_tokens == 0


def test_talks_in_turn_keep_their_rows(vlm):
    from mindspeed_mm.generation.chat import ChatSession

    engine = vlm.engine(batch_size=4)
    sessions = [ChatSession(engine, {"max_new_tokens": 4}) for _ in range(3)]
    for number, session in enumerate(sessions):
        session.set_system("word " * 10 * (number + 1))
        list(session.ask("Hi"))
    for session in (*sessions, *reversed(sessions)):
        before = session.result.prompt_tokens
        list(session.ask("More?"))
        assert session.result.cached_tokens >= before


def test_free_rows_are_bounded_by_the_batch(vlm):
    engine = vlm.engine(batch_size=2)
    for index in range(6):
        engine.submit(request(index), {"max_new_tokens": 2}).wait()
    assert engine._decoder.cache.rows == 2


def test_an_image_is_taken_whole_or_not_at_all(vlm):
    """A row that holds one image and a half of another one's key."""
    from mindspeed_mm.generation.engine import GenerationRequest

    engine = vlm.engine()
    shown = [GenerationRequest("a", prompt="<image>" * n, images=(image_of(1),) * n) for n in (1, 2)]
    found = [engine.submit(r, {"max_new_tokens": 3}).wait() for r in shown]
    assert [result.cached_tokens for result in found] == [0, 17]
    again = engine.submit(shown[1], {"max_new_tokens": 3}).wait()
    assert again.cached_tokens == 17 and again.token_ids == found[1].token_ids  # the last position is computed


def test_positions_must_be_those_of_the_images():
    from mindspeed_mm.generation.images import FoundImage
    from mindspeed_mm.generation.prefix import content

    with pytest.raises(DataError, match="a prompt has 3 image positions for 1 images; expected 4"):
        content([1, -200, -200, -200], [FoundImage(bytes(16), None, fixed_plan(4))])
    values = content([1, *[-200] * 4, 9], [FoundImage(bytes(range(16)), None, fixed_plan(4))])
    assert values[0] == 1 and values[5] == 9 and (values[1:5] < 0).all() and values[1] != values[2]


def test_a_prompt_begins_again_in_front_of_an_image_that_would_be_cut():
    from mindspeed_mm.generation.images import FoundImage
    from mindspeed_mm.generation.prefix import whole_images

    images = [FoundImage(bytes(16), None, fixed_plan(count)) for count in (2, 3)]
    prompt = [1, -200, -200, 5, 7, -200, -200, -200, 6]
    starts = [whole_images(prompt, images, start) for start in range(len(prompt) + 1)]
    assert starts == [(0, 0), (1, 0), (1, 0), (3, 1), (4, 1), (5, 1), (5, 1), (5, 1), (8, 2), (9, 2)]
