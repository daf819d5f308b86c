"""`mindspeed-mm chat` over a pipe, its commands, dropped files."""

import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.cli.chat import dropped_files, local_path, words
from mindspeed_mm.cli.main import main


@pytest.fixture
def chat(golden, monkeypatch, capsys):
    def run(*lines, flags=()):
        end, start = os.pipe()
        with open(start, "w") as file:
            file.writelines(f"{line}\n" for line in lines)
        model = ["--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--max-new-tokens", "4"]
        with open(end) as file, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", file)
            code = main(["chat", *model, *flags, "--json"])
        return code, capsys.readouterr()

    return run


def conversation(output):
    return json.loads(output.out.splitlines()[-1])["conversation"]


def test_turns_images_and_save(chat, golden, tmp_path):
    image = tmp_path / "my view.png"
    shutil.copy(golden / "images" / "src" / "gray.png", image)
    saved = tmp_path / "chat.json"
    code, output = chat("Hi", "", f"'{image}' What is it?", "/help", "And now?", f"/save {saved}")
    assert code == 0 and "/reset" in output.err
    assert "USER" not in output.out and "ASSISTANT" not in output.out  # answers alone
    record = conversation(output)
    assert [turn["value"] for turn in record["conversations"][::2]] == ["Hi", "<image>\nWhat is it?", "And now?"]
    assert record["image"] == str(image) and json.loads(saved.read_text()) == [record]
    assert output.out.splitlines()[0] == record["conversations"][1]["value"]


def test_the_prompt_is_the_training_template(chat, golden):
    import mindspeed_mm as mm
    from mindspeed_mm.data.encode import encode
    from mindspeed_mm.generation.chat import ChatSession

    engine = mm.load(golden / "models" / "llava_hf", device="cpu").engine()
    session = ChatSession(engine, {"max_new_tokens": 3})
    first = "".join(session.ask("Hi"))
    seen = []
    submit = engine.submit
    engine.submit = lambda request, *rest: (seen.append(engine.prepare(request)), submit(request, *rest))[1]
    list(session.ask("More?"))
    turns = [("human", "Hi"), ("gpt", first), ("human", "More?"), ("gpt", "x")]
    record = [{"from": role, "value": text} for role, text in turns]
    trained, labels = encode(record, engine.tokenizer, "v1", special_text="text")
    last = max(i for i, label in enumerate(labels) if label == -100) + 1
    assert seen == [trained[:last]]


def test_reset_and_system_start_anew(chat, golden):
    image = golden / "images" / "src" / "gray.png"
    code, output = chat("Hi", "/reset", "/system Be brief.", "Yes?", flags=["--image", str(image)])
    assert code == 0
    values = [turn["value"] for turn in conversation(output)["conversations"]]
    assert values[:2] == ["Be brief.", "Yes?"] and len(values) == 3


def test_failed_lines_are_told_and_the_talk_goes_on(chat, tmp_path):
    lines = (
        "/image https://example.org/a.png",
        f"/image {tmp_path}/none.png",
        "/image",
        "/save",
        "/imagee x",
        "<image> what?",
        "word " * 3000,
        "Hi",
    )
    code, output = chat(*lines)
    assert code == 1 and "7 of the lines failed" in output.err
    for part in (
        "is an address",
        "none.png is missing",
        "/image needs a file",
        "/save needs one file",
        "is no command",
        "found 0 images and 1 <image> placeholders",
        "exceed the model's context of 2048 tokens",
    ):
        assert part in output.err
    assert len([line for line in output.out.splitlines() if not line.startswith('{"error"')]) == 1


def test_saving_overwrites_nothing(chat, tmp_path):
    (tmp_path / "a.json").write_text("mine")
    code, output = chat(f"/save {tmp_path}/a.json")
    assert code == 1 and "File exists" in output.err and (tmp_path / "a.json").read_text() == "mine"


def test_refused_settings(chat, monkeypatch):
    assert "leave num_beams" in chat(flags=["--option", "num_beams=2"])[1].err
    code, output = chat(flags=["--template", "llava_llama_2", "--system", "x"])
    assert code == 0 or "no place for a system text" in output.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes would all do the same: spread the model over them" in chat()[1].err


def test_answer_closed_early_is_kept_as_far_as_it_came(golden):
    import mindspeed_mm as mm
    from mindspeed_mm.generation.chat import ChatSession

    session = ChatSession(mm.load(golden / "models" / "llava_hf", device="cpu").engine(), {"max_new_tokens": 50})
    pieces = session.ask("Hi")
    said = next(pieces)
    pieces.close()
    assert len(session.turns) == 1 and session.turns[0][1].startswith(said)
    assert session.result.sequences[0].finish_reason == "cancelled"


def test_template_without_system_text():
    from types import SimpleNamespace

    from mindspeed_mm.errors import TemplateError
    from mindspeed_mm.generation.chat import ChatSession
    from mindspeed_mm.generation.defaults import ModelDefaults

    engine = SimpleNamespace(template=SimpleNamespace(with_system=None), defaults=ModelDefaults())
    session = ChatSession(engine, {})
    with pytest.raises(TemplateError, match="no place for a system text"):
        session.set_system("x")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("'/a b/c.png' What?", (["/a b/c.png"], "What?")),
        (r"/a\ b/c.JPG", (["/a b/c.JPG"], "")),
        ('"/a/b.png" /c/d.webp so?', (["/a/b.png", "/c/d.webp"], "so?")),
        ("What is a.png?", ([], "What is a.png?")),
        ("a.png is what?", ([], "a.png is what?")),
        ("it's", ([], "it's")),
        ("file:///a%20b.png", (["file:///a%20b.png"], "")),
    ],
)
def test_dropped_files(line, found):
    assert dropped_files(line) == found


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab /.png'\"\\", max_size=30))
def test_no_line_breaks_the_parsers(line):
    files, rest = dropped_files(line)
    assert all(file.lower().endswith(".png") for file in files) and rest == rest.strip()
    words(line)


def test_file_addresses():
    assert local_path("file:///a%20b.png") == "/a b.png"


def test_a_long_talk_forgets_its_oldest_turns(golden):
    import mindspeed_mm as mm
    from mindspeed_mm.data.image import load_image
    from mindspeed_mm.generation.chat import ChatSession

    engine = mm.load(golden / "models" / "llava_hf", device="cpu").engine()
    seen, submit = [], engine.submit
    engine.submit = lambda request, *rest: (seen.append(request), submit(request, *rest))[1]
    shown = load_image(golden / "images" / "src" / "gray.png")
    whole = ChatSession(engine, {"max_new_tokens": 3})
    session = ChatSession(engine, {"max_new_tokens": 3}, max_context=None)
    for talk in (whole, session):
        talk.add_image("gray.png", shown)
        for question in ("One?", "Two, which is long?", "Three?"):
            list(talk.ask(question))
    longest = len(engine.prepare(seen[2])) + 3
    session = ChatSession(engine, {"max_new_tokens": 3}, max_context=longest - 1)
    session.add_image("gray.png", shown)
    seen.clear()
    for question in ("One?", "Two, which is long?", "Three?"):
        list(session.ask(question))
    assert [question for question, _ in seen[2].turns] == ["<image>\nOne?", "Three?"] and len(seen[2].images) == 1
    assert session.forgotten == 1 and len(session.turns) == 3
    session.add_image("again.png", shown)
    list(session.ask("Four?"))
    assert [question for question, _ in seen[3].turns][-1] == "<image>\nFour?"
    assert len(seen[3].images) == sum("<image>" in question for question, _ in seen[3].turns)
    assert len(engine.prepare(seen[3])) + 3 <= longest - 1


def test_a_context_that_is_too_short_is_refused(chat):
    code, output = chat("Hi", flags=["--max-context-len", "4"])
    assert code == 1 and "--max-context-len: found 4, expected more than max_new_tokens 4" in output.err
    code, output = chat("Hi", "And now?", flags=["--max-context-len", "60"])
    assert code == 0 and "[1 earlier turns no longer fit and were not seen]" in output.err
