"""Ids to text: whole characters, stop strings across the borders of tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspeed_mm as mm
from mindspeed_mm.generation.text import REPLACEMENT, TextStream

TEXTS = st.text(alphabet="ab \n.#\U0001f600\u732b\u00e9", max_size=20)


@pytest.fixture(scope="module", params=["sentencepiece", "fast"])
def tokenizer(request, golden, tmp_path_factory):
    if request.param == "sentencepiece":
        return mm.load_tokenizer(golden / "tokenizer")
    return mm.load_tokenizer(golden / "models" / "llava_hf")


def pieces(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    parts = [stream.add(token) for token in ids]
    return [*parts, stream.finish()], stream


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_bos=False)
    parts, stream = pieces(tokenizer, ids)
    assert "".join(parts) == stream.text == tokenizer.decode(ids).strip()
    assert not any(REPLACEMENT in part for part in parts)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, stop=st.text(alphabet="ab .#\U0001f600", min_size=1, max_size=4))
def test_stop_strings_do_not_care_for_tokens(tokenizer, text, stop):
    ids = tokenizer.encode(text, add_bos=False)
    parts, stream = pieces(tokenizer, ids, (stop,))
    whole = tokenizer.decode(ids)
    assert "".join(parts) == stream.text == whole.split(stop)[0].strip()
    assert stream.stopped == (stop in whole)


def test_emoji_comes_in_one_piece(tokenizer):
    ids = tokenizer.encode("\U0001f600", add_bos=False)
    assert len(ids) > 3
    parts, _ = pieces(tokenizer, ids)
    assert [part for part in parts if part] == ["\U0001f600"]


def test_what_may_begin_a_stop_string_waits(tokenizer):
    stream = TextStream(tokenizer, ("###",))
    said = "".join(stream.add(token) for token in tokenizer.encode("a ##", add_bos=False))
    assert said == "a" and stream.finish() == " ##"


def test_broken_bytes_are_told_at_the_end(tokenizer):
    half = tokenizer.encode("\U0001f600", add_bos=False)[:-1]
    parts, stream = pieces(tokenizer, half)
    assert set("".join(parts)) == {REPLACEMENT} == set(stream.text)
