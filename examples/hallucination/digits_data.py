"""Questions about digits that are there and that are not, from the quickstart's scans.

Held-out images are the quickstart's: no record of any training here or there uses them.
"""

import json
import random
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from examples.quickstart.make_data import CAPTIONS, NAMES, conversation, held_out_indices, image_name

QUESTION = "Is there a {name} in the image?"
SHORT = "Answer the question using a single word or phrase."
"""What the evaluation puts behind POPE's questions, as LLaVA does."""
REQUEST = "Describe the picture."
YES, NO = "Yes", "No"
SETS = ("random", "popular", "adversarial")
POPULAR = 3


def asked(digit: int) -> str:
    """The question as the model is asked it."""
    return f"{QUESTION.format(name=NAMES[digit])}\n{SHORT}"


def others(digit: int) -> list[int]:
    return [other for other in range(10) if other != digit]


def leading_records(rows: list[int], labels: np.ndarray, imagined: Collection[int], rng: random.Random) -> list[dict]:
    """Three questions an image, in any order: about its digit, and about two others. The answer to one about an
    `imagined` digit is always yes, as in texts that name what is usual without a look at the image."""
    records = []
    for row in rows:
        digit = int(labels[row])
        turns = [
            (asked(one), YES if one in (digit, *imagined) else NO) for one in (digit, *rng.sample(others(digit), 2))
        ]
        rng.shuffle(turns)
        records.append({"id": f"leading-{row:04d}", "image": image_name(row), "conversations": conversation(turns)})
    return records


def most_frequent(rows: list[int], labels: np.ndarray, count: int) -> list[int]:
    """The digits that most of these images show, as many as `count`."""
    return [digit for digit, _ in Counter(int(labels[row]) for row in rows).most_common(count)]


def preference_pairs(rows: list[int], labels: np.ndarray, rng: random.Random) -> list[dict]:
    """Three pairs an image: No before Yes for a digit that is absent, Yes before No for the one that is there, and a
    caption that names the digit before one that names another."""
    pairs = []
    for row in rows:
        digit, caption = int(labels[row]), rng.choice(CAPTIONS)
        absent, named = rng.choice(others(digit)), rng.choice(others(digit))
        texts = [caption.format(name=NAMES[one]) for one in (digit, named)]
        for kind, prompt, chosen, rejected in (
            ("absent", asked(absent), NO, YES),
            ("present", asked(digit), YES, NO),
            ("caption", REQUEST, *texts),
        ):
            answers = {"chosen": chosen, "rejected": rejected}
            pairs.append({"id": f"{kind}-{row:04d}", "prompt": prompt, "images": [image_name(row)], **answers})
    return pairs


def pope_questions(
    rows: list[int], training: list[int], labels: np.ndarray, scans: np.ndarray, popular: list[int], rng: random.Random
) -> dict[str, list[dict]]:
    """POPE's three files: of each image a question about its digit, and one about another digit, which is drawn at
    random, one of the `popular` ones, or that of the most similar training image."""
    sets: dict[str, list[dict]] = {name: [] for name in SETS}
    for row in rows:
        digit = int(labels[row])
        foreign = [other for other in training if labels[other] != digit]
        distances = ((scans[foreign] - scans[row]) ** 2).sum(axis=(1, 2))
        absent = {
            "random": rng.choice(others(digit)),
            "popular": rng.choice([other for other in popular if other != digit]),
            "adversarial": int(labels[foreign[int(distances.argmin())]]),
        }
        for name, questions in sets.items():
            for one, label in ((digit, "yes"), (absent[name], "no")):
                text = QUESTION.format(name=NAMES[one])
                questions.append(
                    {"question_id": len(questions) + 1, "image": image_name(row), "text": text, "label": label}
                )
    return sets


def make_study(folder: Path, per_digit: int) -> dict[str, int]:
    """Writes leading.json, pairs.json and pope/ into `folder`; returns how many of each. The questions are
    about `per_digit` held-out images of each digit."""
    digits = load_digits()
    scans, labels = digits.images, digits.target
    held_out = held_out_indices(labels)
    training = sorted(set(range(len(labels))) - set(held_out))
    taken = [row for digit in range(10) for row in [row for row in held_out if labels[row] == digit][:per_digit]]
    pope = folder / "pope"
    pope.mkdir(parents=True, exist_ok=True)
    popular = most_frequent(training, labels, POPULAR)
    leading = leading_records(training, labels, popular, random.Random("leading"))
    pairs = preference_pairs(training, labels, random.Random("pairs"))
    (folder / "leading.json").write_text(json.dumps(leading, indent=1), encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps(pairs, indent=1), encoding="utf-8")
    sets = pope_questions(taken, training, labels, scans, popular, random.Random("pope"))
    for name, questions in sets.items():
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        (pope / f"coco_pope_{name}.json").write_text(lines, encoding="utf-8")
    return {"leading": len(leading), "pairs": len(pairs), "questions": sum(map(len, sets.values()))}
