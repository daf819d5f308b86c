"""The toy set: fixed split, honest questions, the files' forms."""

import base64
import csv
import io
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from evaluation.benchmarks import find_benchmark
from evaluation.tsv import read_table
from examples.quickstart.make_data import (
    HELD_OUT_PER_DIGIT,
    IMAGE_SIZE,
    LETTERS,
    NAMES,
    TSV_COLUMNS,
    choice_question,
    held_out_indices,
    image,
    make_data,
    options,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    counts = make_data(folder, questions_per_digit=2)
    return folder, counts


def records(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def rows(folder):
    with (folder / "digits_mcq.tsv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_counts(data):
    assert data[1] == {"images": 1797, "captions": 4 * 1437, "questions": 2 * 1437, "benchmark": 360}


def test_split_is_stratified_and_fixed():
    labels = load_digits().target
    held_out = held_out_indices(labels)
    assert Counter(labels[held_out].tolist()) == dict.fromkeys(range(10), HELD_OUT_PER_DIGIT)
    assert held_out == sorted(set(held_out)) == held_out_indices(labels)


def test_no_held_out_image_is_trained_on(data):
    folder, _ = data
    trained = {
        record["image"] for name in ("stage1.json", "stage2.json", "parity.json") for record in records(folder, name)
    }
    held_out = {f"digit_{row:04d}.png" for row in held_out_indices(load_digits().target)}
    assert len(trained) == 1437 and not trained & held_out
    assert all((folder / "images" / name).exists() for name in trained | held_out)


def test_same_files_every_time(data, tmp_path):
    make_data(tmp_path, questions_per_digit=2)
    for name in ("stage1.json", "stage2.json", "digits_mcq.tsv", "images/digit_0000.png"):
        assert (tmp_path / name).read_bytes() == (data[0] / name).read_bytes()


def test_the_third_act_asks_for_parity(data):
    with (data[0] / "parity_mcq.tsv").open(newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream, delimiter="\t"))
    labels = load_digits().target
    for row, digit in zip(table, labels[held_out_indices(labels)], strict=True):
        assert {row["A"], row["B"]} == {"odd", "even"} and not row["C"] + row["D"]
        assert row[row["answer"]] == ("odd" if digit % 2 else "even")
    assert Counter(row["answer"] for row in table) == {"A": 180, "B": 180}
    asked = [turn["value"] for record in records(data[0], "stage2.json") for turn in record["conversations"]]
    assert not any("odd" in text for text in asked), "the first two acts never ask it"
    for record in records(data[0], "parity.json"):
        question, answer = (turn["value"] for turn in record["conversations"])
        digit = labels[int(record["image"][6:10])]
        assert f"{answer}. {'odd' if digit % 2 else 'even'}" in question


def test_benchmark_is_balanced_and_right(data):
    table = rows(data[0])
    labels = load_digits().target
    assert tuple(table[0]) == TSV_COLUMNS
    assert Counter(row["answer"] for row in table) == dict.fromkeys(LETTERS, 90)
    for row, digit in zip(table, labels[held_out_indices(labels)], strict=True):
        assert row[row["answer"]] == row["category"] == NAMES[digit]
        assert len({row[letter] for letter in LETTERS}) == 4


def test_benchmark_holds_the_images(data):
    row = rows(data[0])[0]
    shown = Image.open(io.BytesIO(base64.b64decode(row["image"])))
    first = held_out_indices(load_digits().target)[0]
    written = Image.open(data[0] / "images" / f"digit_{first:04d}.png")
    assert shown.size == (IMAGE_SIZE, IMAGE_SIZE) and np.array_equal(np.asarray(shown), np.asarray(written))


def test_conversations_are_llava_records_with_true_answers(data):
    labels = load_digits().target
    for record in records(data[0], "stage2.json")[:300]:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) and len(turns) == 6
        assert [turn["value"].count("<image>") for turn in turns[::2]] == [1, 0, 0]
        name = NAMES[labels[int(record["image"][6:10])]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            chosen = re.search(rf"^{answer['value']}\. (.*)$", question["value"], re.MULTILINE)
            assert (chosen[1] if chosen else answer["value"]) == name


def test_captions_name_the_digit(data):
    labels = load_digits().target
    for record in records(data[0], "stage1.json")[:200]:
        assert NAMES[labels[int(record["image"][6:10])]] in record["conversations"][1]["value"]


@settings(max_examples=30, deadline=None)
@given(digit=st.integers(0, 9), answer=st.sampled_from(LETTERS), seed=st.integers(0, 99))
def test_options_hold_the_answer_once(digit, answer, seed):
    choices = options(digit, answer, random.Random(seed))
    assert list(choices) == list(LETTERS) and len(set(choices.values())) == 4
    assert [letter for letter, name in choices.items() if name == NAMES[digit]] == [answer]


def test_evaluation_asks_what_training_asked(data):
    table = read_table(data[0] / "digits_mcq.tsv")
    prompts = find_benchmark("digits_mcq", table).prompts(table, "official")
    for row in rows(data[0])[:20]:
        question = choice_question(row["question"], {letter: row[letter] for letter in LETTERS})
        assert prompts[int(row["index"])].turns == ((f"<image>\n{question}", None),)


def test_ink_is_dark():
    scan = np.zeros((8, 8))
    scan[:, :4] = 16
    grey = np.asarray(image(scan))
    assert grey[:, 0].max() < 20 and grey[:, -1].min() > 235
