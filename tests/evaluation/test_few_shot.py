"""Examples in front of questions: which ones, in which order, and what a model is asked."""

import json
import re

import pytest
from evaluation_helpers import FakeEngine, choice_rows, image_cell, on_ranks, write_table

import mindspeed_mm as mm
from evaluation.few_shot import Shots
from evaluation.model_engine import ModelEngine
from evaluation.runner import run
from evaluation.tsv import read_table
from mindspeed_mm.cli.main import main
from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.engine import GenerationRequest
from mindspeed_mm.generation.options import GenerationOptions
from tests.helpers.tiny_flamingo import ANSWER, END, golden_folder

COLOURS = ("red", "green", "blue", "white", "black", "gray", "pink", "gold")


def question_rows(count, name, **more):
    return [
        {
            "index": str(number),
            "image": image_cell(COLOURS[number % 8], size=(4 + number, 3)),
            "question": f"{name} {number}?",
            "answer": repr(["no", f"it is {number}", f"it is {number}"]),
        }
        | more
        for number in range(count)
    ]


@pytest.fixture
def tables(tmp_path):
    """A table of 4 questions, and a support table of 6; its rows 1 and 2 ask what the first one does."""
    asked, support = question_rows(4, "What"), question_rows(6, "Which")
    support[1] = asked[2] | {"index": "1"}
    support[2] = asked[3] | {"index": "2"}
    return write_table(tmp_path / "asked.tsv", asked), write_table(tmp_path / "support.tsv", support)


def ask(path, out, shots, engine=None, **options):
    engine = engine or FakeEngine({number: "it is 0" for number in range(8)})
    return run("mine", path, engine, out, model="m", progress=False, shots=shots, **options), engine


def test_what_a_model_is_asked(tables, tmp_path):
    table, support = tables
    _, engine = ask(table, tmp_path / "o", Shots(2, support, seed=5))
    rows = {row.cells["question"]: row for row in read_table(support).rows}
    for request, images in zip(engine.asked, engine.images, strict=True):
        *examples, (question, nothing) = request.turns
        assert question.startswith(f"<image>\nWhat {request.id}?\nAnswer the question") and nothing is None
        shown = [rows[text.split("\n")[1]] for text, _ in examples]
        assert len({row.index for row in shown}) == 2
        assert [answer for _, answer in examples] == [f"it is {row.cells['answer'][-3]}" for row in shown]
        sizes = [read_table(support).images(row)[0].size for row in shown] + [(4 + request.id, 3)]
        assert [image.size for image in images] == sizes
        assert f"What {request.id}?" not in "".join(text for text, _ in examples), "the question itself is never shown"
    assert len({request.image for request in engine.asked}) == 4, "no images are taken for another's"


def test_draws_depend_on_seed_and_question_alone(tables, tmp_path):
    table, support = tables

    def turns(seed, limit=None):
        _, engine = ask(table, tmp_path / f"{seed}-{limit}", Shots(3, support, seed=seed), limit=limit)
        return {request.id: request.turns for request in engine.asked}

    first = turns(0)
    assert turns(0, limit=2) == {index: first[index] for index in (0, 1)}
    assert turns(1) != first
    engines = [FakeEngine({number: "a" for number in range(4)}) for _ in range(2)]
    on_ranks(
        2,
        lambda rank: ask(table, tmp_path / "ranks", Shots(3, support), engines[rank.rank], communicator=rank),
    )
    assert {request.id: request.turns for engine in engines for request in engine.asked} == first
    assert all(engine.asked for engine in engines)


def test_the_report_names_them_and_none_is_unchanged(tables, tmp_path):
    table, support = tables
    result, _ = ask(table, tmp_path / "o", Shots(2, support, seed=3))
    plain, engine = ask(table, tmp_path / "o", None)
    other, _ = ask(table, tmp_path / "o", Shots(2, support, seed=4))
    reports = [json.loads(one.files["report"].read_text()) for one in (result, plain, other)]
    assert len({report["fingerprint"] for report in reports}) == 3 and plain.resumed == other.resumed == 0
    assert reports[0]["shots"] == 2 and reports[0]["shots_seed"] == 3 and reports[0]["shots_table"] == "support.tsv"
    assert reports[0]["shots_table_sha256"] == read_table(support).sha256
    assert not [key for key in reports[1] if key.startswith("shots")]
    assert engine.asked[0].turns[0][1] is None
    again, _ = ask(table, tmp_path / "o", Shots(2, support, seed=3))
    assert again.resumed == 4
    page = result.files["report"].with_suffix(".html").read_text()
    assert "2 of support.tsv, seed 3" in page


def test_a_tables_own_split_and_choices(tmp_path):
    rows = [row | {"split": "train" if number % 2 else "test"} for number, row in enumerate(choice_rows())]
    path = write_table(tmp_path / "own.tsv", rows)
    _, engine = ask(path, tmp_path / "o", Shots(2))
    for request in engine.asked:
        texts = [text for text, _ in request.turns[:-1]]
        assert {answer for _, answer in request.turns[:-1]} == {"B"}, "rows 1, 3 and 5 are of the split train"
        assert not any(f"Question {request.id} " in f"{text} " for text in texts)


def test_captions(tmp_path):
    rows = [
        {"index": str(number), "image": image_cell(size=(4 + number, 3)), "answer": repr([f"a {number}", "b"])}
        for number in range(4)
    ]
    path = write_table(tmp_path / "c.tsv", rows)
    engine = FakeEngine({number: "a" for number in range(4)})
    run("captions", path, engine, tmp_path, model="m", progress=False, shots=Shots(3, path))
    for request in engine.asked:
        others = {f"a {number}" for number in range(4) if number != request.id}
        assert {answer for _, answer in request.turns[:-1]} == others


def test_what_cannot_be_shown(tables, tmp_path):
    table, support = tables
    for number in (0, 65):
        with pytest.raises(DataError, match=f"found {number} shots; expected 1 to 64"):
            Shots(number, support)
    with pytest.raises(DataError, match='has 0 rows with an answer and "train" in column split; expected at least 2'):
        ask(table, tmp_path, Shots(2))
    with pytest.raises(DataError, match="has 3 examples for the question with index 0, once that question is left out"):
        ask(table, tmp_path, Shots(4, table))
    with pytest.raises(DataError, match="found prompt style 'vlmevalkit' with shots; expected official"):
        ask(table, tmp_path, Shots(1, support), prompt_style="vlmevalkit")
    boxes = tmp_path / "rec.jsonl"
    read_table(table).images(read_table(table).rows[0])[0].save(tmp_path / "1.png")
    boxes.write_text(json.dumps({"img_path": "1.png", "expression": "it", "bbox": [0, 0, 1, 1]}))
    with pytest.raises(DataError, match="REC has no examples: its answers are no texts of the table"):
        run("rec", boxes, FakeEngine({}), tmp_path, model="m", shots=Shots(1, support))


def test_the_command_and_a_model(golden, tables, tmp_path, capsys):
    table, support = tables
    model = golden / "models" / "llava_hf"
    line = [
        *("evaluate", "--model", str(model), "--dataset-path", str(table), "--evaluation-dataset", "mine"),
        *("--result-output-path", str(tmp_path / "o"), "--max-new-tokens", "3", "--device", "cpu", "--json"),
    ]
    given = ["--shots", "2", "--shots-table", str(support), "--shots-seed", "7", "--batch-size", "4"]
    assert main([*line, *given]) == 0
    report = json.loads((tmp_path / "o" / "llava_hf_mine_report.json").read_text())
    assert (report["shots"], report["shots_seed"], report["empty_answers"]) == (2, 7, 0)
    _, fake = ask(table, tmp_path / "fake", Shots(2, support, seed=7))
    engine = mm.load(model, device="cpu").engine()
    answers = {row["index"]: row["prediction"] for row in report["rows"]}
    for request, images in zip(fake.asked, fake.images, strict=True):
        asked = GenerationRequest("a", request.turns, images=tuple(images))
        handle = engine.submit(asked, GenerationOptions(max_new_tokens=3))
        assert handle.wait().text == answers[request.id]
    for flags, message in (
        (["--shots-seed", "1"], "--shots-seed is given without --shots"),
        (["--shots", "1", "--shots-image-root", "x"], "--shots-image-root is given without --shots-table"),
        (["--shots", "1", "--predictions", "x.json"], "--shots changes what a model is asked"),
        (["--shots", "-1"], "found -1 shots; expected 1 to 64, or none"),
    ):
        assert main([*line, *flags]) == 1
        assert message in capsys.readouterr().err


def what_an_engine_is_asked(loaded, monkeypatch) -> list:
    """The turns that its next engines are given."""
    asked, real = [], loaded.engine

    def engine(*args, **options):
        made = real(*args, **options)
        submit = made.submit
        made.submit = lambda request, *rest, **more: (asked.append(request.turns), submit(request, *rest, **more))[1]
        return made

    monkeypatch.setattr(loaded, "engine", engine)
    return asked


def test_flamingo_is_asked_with_its_examples(tmp_path, monkeypatch):
    model = golden_folder("llama_every1_latest", tmp_path / "m")
    rows = [
        row | {"question": f"w{number + 3} w{number + 10}", "answer": f"w{number + 20}"}
        for number, row in enumerate(question_rows(4, "w3"))
    ]
    path = write_table(tmp_path / "a.tsv", rows)
    loaded = mm.load(model, device="cpu")
    found = []
    for batch_size in (1, 4):
        engine = ModelEngine(loaded, GenerationOptions(max_new_tokens=4))
        result, _ = ask(path, tmp_path / f"{batch_size}", Shots(2, path), engine, batch_size=batch_size)
        found.append(result.predictions)
    assert found[0] == found[1] and all(found[0].values())
    asked = what_an_engine_is_asked(loaded, monkeypatch)
    engine = ModelEngine(loaded, GenerationOptions(max_new_tokens=1), template="flamingo")
    ask(path, tmp_path / "short", Shots(1, path), engine)
    # open_flamingo's prompt: the words for a short answer are the template's.
    assert all(re.fullmatch(r"<image>w\d+ w\d+", question) for turns in asked for question, _ in turns)
    rows = [{"index": row["index"], "image": row["image"], "answer": repr([row["answer"]])} for row in rows]
    table = write_table(tmp_path / "c.tsv", rows)
    engine = ModelEngine(loaded, GenerationOptions(max_new_tokens=2), template="flamingo_caption")
    result = run("captions", table, engine, tmp_path, model="m", progress=False, shots=Shots(2, table))
    assert len(result.predictions) == 4
    _, fake = ask(path, tmp_path / "fake", Shots(2, path))
    for request, images in zip(fake.asked, fake.images, strict=True):
        ids = loaded.engine().prepare(GenerationRequest("a", request.turns, images=tuple(images)))
        answers = [int(answer.removeprefix("w")) for _, answer in request.turns[:-1]]
        # Each answer stands between <answer> and <|endofchunk|>, each question behind its image; the last one is open.
        places = [place for place, token in enumerate(ids) if token == ANSWER]
        assert [ids[place + 1 : place + 3] for place in places] == [*([answer, END] for answer in answers), []]
        assert ids.count(IMAGE_TOKEN_INDEX) == 3
