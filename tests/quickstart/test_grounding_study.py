"""The study of boxes on the digits: its canvases, questions, tokenizer and sheet, and all of it in its fast form."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoTokenizer

from evaluation.benchmarks.grounding.rec import TEMPLATE
from examples.grounding import digits
from examples.grounding.digits_data import (
    QUESTION,
    SIDE,
    SIZE,
    STEP,
    WHITE,
    Scans,
    apart,
    rows_of,
    write_lessons,
    write_questions,
)
from examples.grounding.digits_models import waves
from examples.grounding.digits_sheet import draw_sheet
from examples.quickstart.commands import StepError
from examples.quickstart.make_data import NAMES, held_out_indices
from examples.quickstart.make_models import SYSTEM_TEXT

LABELS = load_digits().target


def canvases(count, digits=3, held_out=True):
    scans, rng = Scans(rows_of(held_out)), random.Random(0)
    return [scans.canvas(digits, rng) for _ in range(count)]


def test_scans_are_the_quickstarts_split():
    held_out, trained = rows_of(held_out=True), rows_of(held_out=False)
    assert held_out == held_out_indices(LABELS)
    assert sorted(held_out + trained) == list(range(len(LABELS)))


def test_boxes_hold_all_ink_and_nothing_else_does():
    made = canvases(50)
    for canvas in made:
        assert len(set(canvas.digits)) == 3 and canvas.pixels.shape == (SIDE, SIDE)
        rest = canvas.pixels.copy()
        for number, (left, top, right, bottom) in enumerate(canvas.boxes):
            assert 0 <= left and 0 <= top and right <= SIDE and bottom <= SIDE
            assert right - left == bottom - top == SIZE and left % STEP == top % STEP == 0
            assert all(apart(canvas.boxes[number], other) for other in canvas.boxes[:number])
            assert rest[top:bottom, left:right].min() < WHITE / 2
            rest[top:bottom, left:right] = WHITE
        assert np.all(rest == WHITE)
    assert {box[0] for canvas in made for box in canvas.boxes} == set(range(0, SIDE - SIZE + 1, STEP))


def test_equal_seeds_give_equal_canvases():
    for one, two in zip(canvases(3), canvases(3), strict=True):
        assert one.boxes == two.boxes and np.array_equal(one.pixels, two.pixels)


def test_questions_are_shikras(tmp_path):
    made = canvases(4)
    assert write_questions(tmp_path, "first", made) == 4
    for line, canvas in zip((tmp_path / "first.jsonl").read_text().splitlines(), made, strict=True):
        record = json.loads(line)
        assert record["expression"] == f"the {NAMES[canvas.digits[0]]}" and record["bbox"] == list(canvas.boxes[0])
        assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / record["img_path"])), canvas.pixels)
    assert QUESTION == TEMPLATE.format(expression="<expr>", image="<image>")


def test_lessons_ask_for_every_digit_and_say_it_again_before_its_box(tmp_path):
    made = canvases(2)
    assert write_lessons(tmp_path, "all", made) == 2 * 3
    records = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    for number, record in enumerate(records):
        canvas, place = made[number // 3], number % 3
        asked, answer = record["conversations"]
        phrase = f"the {NAMES[canvas.digits[place]]}"
        assert record["target"]["boxes"] == [list(canvas.boxes[place])] and answer["boxes_seq"] == [[0]]
        assert asked["value"] == TEMPLATE.format(expression=phrase, image="<image>")
        assert answer["value"] == f"{phrase} <boxes>"


def test_waves_tell_places_apart():
    places = waves(4, 16)
    assert places.shape == (16, 16) and torch.cdist(places, places).fill_diagonal_(9).min() > 0.5
    assert torch.equal(places[1, :8], places[0, :8]) and torch.equal(places[4, 8:], places[0, 8:])


def test_a_phrase_and_a_number_are_one_token_each(tmp_path):
    study = digits.GroundingRun(digits.RunFolder(tmp_path / "out", "x"), digits.FAST)
    study.folder.open(clean=False)
    digits.models(study)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/models/vicuna")
    answer = tokenizer.tokenize(" ASSISTANT: the six [0.250,0.750,0.500,1.000]")
    assert answer[-6:] == ["\u2581the\u2581six", "\u2581[0.250,", "0.750,", "0.500,", "1.000", "]"]
    asked = tokenizer.tokenize(f"{SYSTEM_TEXT} USER: Where is the six in ")
    assert len(asked) < 7 and "\u2581the\u2581six" in asked
    shown = json.loads((tmp_path / "out/configs/data.json").read_text())
    assert shown["dataset_param"]["dataset_type"] == "grounding"
    assert "template_string" not in shown["dataset_param"]["basic_parameters"]["grounding"]


def test_the_sheet_shows_right_wrong_and_unreadable_answers(tmp_path):
    write_questions(tmp_path, "held_out", canvases(3))
    records = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    answers = []
    for record, said in zip(records, (None, "Answer: [0.000,0.000,0.100,0.100] .", "no box"), strict=True):
        target = f"Answer: [{','.join(f'{value / SIDE:.3f}' for value in record['bbox'])}] ."
        answers.append({"pred": said or target, "target": target})
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    draw_sheet(tmp_path / "boxes.png", tmp_path / "held_out.jsonl", tmp_path / "said.jsonl")
    assert Image.open(tmp_path / "boxes.png").size[0] > 800


def test_a_failed_command_ends_it(tmp_path, monkeypatch, capsys):
    def failing(study):
        raise StepError("the command above ended with exit code 1")

    monkeypatch.setattr(digits, "STEPS", (("train", "Train", failing),))
    assert digits.main(["--fast", "--out", str(tmp_path / "o")]) == 1
    assert "ended with exit code 1" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert digits.main(["--fast", "--out", str(tmp_path)]) == 1
    assert "is not empty and holds no state.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_fast_form_finds_boxes_or_says_so(tmp_path, capsys):
    line = ["--fast", "--out", str(tmp_path / "study")]
    assert digits.main(line) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["n"] == digits.FAST.questions and 0 <= result["accuracy"] <= 1
    assert (tmp_path / "study/boxes.png").is_file()
    assert digits.main(line) == 0 and "done before" in capsys.readouterr().out
