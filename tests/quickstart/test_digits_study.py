"""The study of preference training on the digits: its data, numbers and plots, and all of it in its fast form."""

import json
from collections import Counter

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from examples.hallucination import before_after, digits
from examples.hallucination.before_after import Point, headline, plot_trade_off, report, table_text, warnings
from examples.hallucination.digits_data import POPULAR, make_study, most_frequent
from examples.quickstart.commands import StepError
from examples.quickstart.make_data import NAMES, held_out_indices, image_name

LABELS = load_digits().target
HELD_OUT = {image_name(row) for row in held_out_indices(LABELS)}
DIGIT_OF = {image_name(row): int(label) for row, label in enumerate(LABELS)}


def point(name, f1, recall=0.5, general=0.9):
    rates = {"accuracy": 0.5, "precision": 0.5, "recall": recall, "f1": f1, "yes_ratio": 0.6}
    return Point(name, {"random": rates, "mean_of_three": rates}, general)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, make_study(folder, per_digit=3)


def test_the_questions_are_those_of_pope(made):
    folder, counts = made
    assert counts["questions"] == 3 * 2 * 30
    read = {}
    for name in ("random", "popular", "adversarial"):
        lines = (folder / "pope" / f"coco_pope_{name}.json").read_text().splitlines()
        read[name] = [json.loads(line) for line in lines]
        assert Counter(one["label"] for one in read[name]) == {"yes": 30, "no": 30}
        for one in read[name]:
            assert one["image"] in HELD_OUT
            assert (f" {NAMES[DIGIT_OF[one['image']]]} " in one["text"]) == (one["label"] == "yes")
    yes = [[one["text"] for one in questions if one["label"] == "yes"] for questions in read.values()]
    assert yes[0] == yes[1] == yes[2]
    assert read["random"] != read["adversarial"] != read["popular"]


def test_pairs_punish_what_is_not_there(made):
    folder, counts = made
    pairs = json.loads((folder / "pairs.json").read_text())
    assert len(pairs) == counts["pairs"] == 3 * counts["leading"]
    for pair in pairs:
        (image,), kind = pair["images"], pair["id"].split("-")[0]
        name = NAMES[DIGIT_OF[image]]
        assert image not in HELD_OUT and pair["chosen"] != pair["rejected"]
        if kind == "caption":
            assert name in pair["chosen"] and name not in pair["rejected"]
        else:
            assert (f" {name} " in pair["prompt"]) == (pair["chosen"] == "Yes") == (kind == "present")


def test_leading_questions_see_popular_digits_everywhere(made):
    folder, _ = made
    records = json.loads((folder / "leading.json").read_text())
    training = [row for row in range(len(LABELS)) if image_name(row) not in HELD_OUT]
    popular = {NAMES[digit] for digit in most_frequent(training, LABELS, POPULAR)}
    said = Counter()
    for one in records:
        turns = [turn["value"] for turn in one["conversations"]]
        assert one["image"] not in HELD_OUT and len(turns) == 6
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            name = next(name for name in NAMES if f" {name} " in asked)
            there = NAMES[DIGIT_OF[one["image"]]] == name
            assert (answer == "Yes") == (there or name in popular)
            said[there, answer] += 1
    assert said[True, "Yes"] == len(records) and said[False, "Yes"] > len(records) / 2


def test_numbers_and_plots(tmp_path):
    points = [point("before", 0.6), point("after", 0.8)]
    files = report(points, tmp_path)
    assert [path.name for path in files] == ["points.json", "before_after.png", "trade_off.png"]
    assert json.loads(files[0].read_text())[1]["pope"]["random"]["f1"] == 0.8
    assert all(Image.open(path).size[0] > 800 for path in files[1:])
    assert "80.00" in table_text(points) and headline(points[0])["f1"] == 0.6
    single = Point("tsv", {"all": points[0].pope["random"]}, None)
    assert headline(single)["f1"] == 0.6 and len(report([single, single], tmp_path)) == 2
    plot_trade_off(tmp_path / "more.png", [*points, point("step", 0.7, general=0.7)])


def test_recalls_that_differ_are_told():
    good = point("good", 0.6)
    other = {**good.pope, "popular": {**good.pope["random"], "recall": 0.4}}
    (told,) = warnings([good, Point("bad", other, None)])
    assert told.startswith("bad: recall differs between the sets (random 0.5000, popular 0.4000)")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--point", "a"], "--point takes a name, a model and perhaps an adapter"),
        (["--point", "a", "m", "--point", "a", "n"], "two points have one name"),
    ],
)
def test_points_that_are_none(words, said, capsys):
    with pytest.raises(SystemExit):
        before_after.main([*words, "--pope", "p", "--out", "o"])
    assert said in capsys.readouterr().err


def test_an_evaluation_that_fails_ends_it(tmp_path, capsys):
    line = ["--point", "a", "absent", "--pope", str(tmp_path / "absent"), "--out", str(tmp_path / "o")]
    assert before_after.main(line) == 1
    assert "ended with exit code 1" in capsys.readouterr().err


def test_an_f1_that_does_not_rise_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "quickstart", lambda *arguments, **more: {"accuracy": 1.0})
    results = {"points": [vars(point("before", 0.8)), vars(point("after", 0.7))]}
    monkeypatch.setattr(digits, "STEPS", (("points", "Ask", lambda study: results),))
    with pytest.raises(StepError, match="POPE's F1 went from 0.8000 to 0.7000, it must rise"):
        digits.study_of(tmp_path / "o", tmp_path / "q", digits.FULL_STUDY, clean=False)
    found = digits.study_of(tmp_path / "p", tmp_path / "q", digits.FAST_STUDY, clean=False)
    assert found["f1"] == [0.8, 0.7] and found["general"] == [0.9, 0.9]


@pytest.mark.slow
def test_the_fast_form(tmp_path, capsys):
    line = ["--fast", "--out", str(tmp_path / "study"), "--quickstart", str(tmp_path / "quickstart")]
    assert digits.main(line) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"f1", "yes_ratio", "general", "seconds"}
    points = json.loads((tmp_path / "study/points.json").read_text())
    assert [one["name"] for one in points] == ["before", "step 2", "after"]
    assert (tmp_path / "study/trade_off.png").is_file()
    assert digits.main(line) == 0 and "done before" in capsys.readouterr().out
