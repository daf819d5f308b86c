"""The toy set: 1,797 real scans of handwritten digits (scikit-learn's `load_digits`) as a LLaVA-format data set.

Writes images as PNG files, captions for stage 1, multi-turn questions for stage 2, and a VLMEvalKit
multiple-choice TSV over the 360 digits that no training record uses. The same files come out on every machine.
"""

import base64
import csv
import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT_PER_DIGIT = 36
IMAGE_SIZE = 32  # pixels; the scans have 8, so one scanned pixel is a block of 4 x 4
LETTERS = "ABCD"
# VLMEvalKit's wording, which the evaluation puts behind the options.
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "a handwritten {name}",
    "the digit {name} written by hand",
    "a scan of the number {name}",
    "this picture shows the digit {name}",
)
NAMING = ("Which digit is this?", "What number was written here?", "Read the digit.")
CHOOSING = ("Which digit is shown?", "Which digit is in the picture?", "What number was written here?")
PARITIES = ("even", "odd")
PARITY_QUESTION = "Is the digit odd or even?"
TSV_COLUMNS = ("index", "question", *LETTERS, "answer", "category", "split", "image")


def held_out_indices(labels: np.ndarray) -> list[int]:
    """Rows kept for the evaluation: 36 of every digit, chosen by a hash of the row number, whatever the run's seed."""
    chosen = []
    for digit in range(10):
        rows = [int(row) for row in np.flatnonzero(labels == digit)]
        rows.sort(key=lambda row: hashlib.sha256(f"digit {row}".encode()).hexdigest())
        chosen += rows[:HELD_OUT_PER_DIGIT]
    return sorted(chosen)


def image(scan: np.ndarray) -> Image.Image:
    """A scan (8 x 8, values 0 to 16, ink is high) as a grey image of IMAGE_SIZE with dark ink on white."""
    grey = np.round(255.0 * (1.0 - scan / 16.0)).astype(np.uint8)
    return Image.fromarray(grey).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)


def options(digit: int, answer: str, rng: random.Random) -> dict[str, str]:
    """Option texts by letter: the digit's name at `answer`, three other names drawn for the other letters."""
    others = rng.sample([name for name in NAMES if name != NAMES[digit]], len(LETTERS) - 1)
    return {letter: NAMES[digit] if letter == answer else others.pop() for letter in LETTERS}


def choice_question(question: str, choices: dict[str, str]) -> str:
    """The multiple-choice prompt as the evaluation words it."""
    lines = [question, *(f"{letter}. {choice}" for letter, choice in choices.items()), LETTER_INSTRUCTION]
    return "\n".join(lines)


def choice_turn(digit: int, rng: random.Random) -> tuple[str, str]:
    answer = rng.choice(LETTERS)
    return choice_question(rng.choice(CHOOSING), options(digit, answer, rng)), answer


def naming_turn(digit: int, rng: random.Random) -> tuple[str, str]:
    return rng.choice(NAMING), NAMES[digit]


def parity_turn(digit: int, rng: random.Random) -> tuple[str, str]:
    """A question that the first two stages never ask: which of two words, in either order."""
    words = rng.sample(PARITIES, 2)
    return choice_question(PARITY_QUESTION, dict(zip("AB", words, strict=True))), "AB"[words.index(parity(digit))]


def parity(digit: int) -> str:
    """Its word in PARITIES."""
    return PARITIES[digit % 2]


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA's turn list, with the image tag at the front of the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        value = f"<image>\n{question}" if number == 0 else question
        messages += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return messages


def caption_records(rows: list[int], labels: np.ndarray) -> list[dict]:
    """Stage 1: one record per training digit and caption form."""
    return [
        record(row, f"caption-{number}", [("Describe the picture.", text.format(digit=digit, name=NAMES[digit]))])
        for row in rows
        for digit in [int(labels[row])]
        for number, text in enumerate(CAPTIONS)
    ]


def question_records(rows: list[int], labels: np.ndarray, per_digit: int, rng: random.Random) -> list[dict]:
    """Stage 2: `per_digit` records per training digit, each of four turns in random order, two of them choices."""
    records = []
    for row in rows:
        digit = int(labels[row])
        for number in range(per_digit):
            turns = [make(digit, rng) for make in (choice_turn, choice_turn, naming_turn)]
            rng.shuffle(turns)
            records.append(record(row, f"questions-{number}", turns))
    return records


def parity_records(rows: list[int], labels: np.ndarray, rng: random.Random) -> list[dict]:
    """The third act: one record per training digit."""
    return [record(row, "parity", [parity_turn(int(labels[row]), rng)]) for row in rows]


def record(row: int, kind: str, turns: list[tuple[str, str]]) -> dict:
    return {"id": f"digit-{row:04d}-{kind}", "image": image_name(row), "conversations": conversation(turns)}


def image_name(row: int) -> str:
    return f"digit_{row:04d}.png"


def benchmark_rows(rows: list[int], labels: np.ndarray, scans: np.ndarray, rng: random.Random) -> list[dict]:
    """The multiple-choice TSV: every held-out digit once, each letter right equally often."""
    answers = [LETTERS[number % len(LETTERS)] for number in range(len(rows))]
    rng.shuffle(answers)
    table = []
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        digit = int(labels[row])
        buffer = io.BytesIO()
        image(scans[row]).save(buffer, format="PNG")
        table.append(
            {
                "index": index,
                "question": CHOOSING[0],
                **options(digit, answer, rng),
                "answer": answer,
                "category": NAMES[digit],
                "split": "test",
                "image": base64.b64encode(buffer.getvalue()).decode("ascii"),
            }
        )
    return table


def parity_rows(table: list[dict]) -> list[dict]:
    """The same held-out digits, asked whether they are odd or even; each letter is right equally often."""
    rows = []
    for row in table:
        right = parity(NAMES.index(row["category"]))
        other = next(word for word in PARITIES if word != right)
        first = row["index"] % 4 < 2  # the table's letters change with the index modulo 4, digits do not
        words = (right, other) if first else (other, right)
        choices = dict(zip("AB", words, strict=True)) | {"C": "", "D": ""}
        rows.append(row | choices | {"question": PARITY_QUESTION, "answer": "A" if first else "B"})
    return rows


def write_tsv(path: Path, table: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, TSV_COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def make_data(folder: Path, questions_per_digit: int) -> dict[str, int]:
    """Writes images/, three files of records and two tables into `folder` and returns how many of each."""
    digits = load_digits()
    scans, labels = digits.images, digits.target
    held_out = held_out_indices(labels)
    training = sorted(set(range(len(labels))) - set(held_out))
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for row, scan in enumerate(scans):
        image(scan).save(images / image_name(row))
    captions = caption_records(training, labels)
    questions = question_records(training, labels, questions_per_digit, random.Random("stage 2"))
    table = benchmark_rows(held_out, labels, scans, random.Random("benchmark"))
    (folder / "stage1.json").write_text(json.dumps(captions, indent=1), encoding="utf-8")
    (folder / "stage2.json").write_text(json.dumps(questions, indent=1), encoding="utf-8")
    parities = parity_records(training, labels, random.Random("parity"))
    (folder / "parity.json").write_text(json.dumps(parities, indent=1), encoding="utf-8")
    write_tsv(folder / "digits_mcq.tsv", table)
    write_tsv(folder / "parity_mcq.tsv", parity_rows(table))
    return {"images": len(labels), "captions": len(captions), "questions": len(questions), "benchmark": len(table)}
