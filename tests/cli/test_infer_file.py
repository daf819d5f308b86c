"""`mindspeed-mm infer` with a file of requests: answers, errors of single lines, resuming."""

import json
import os
import re
import shutil

import pytest

from mindspeed_mm.cli.main import main

LOGPROBS = ("token_ids", "logprobs", "top_logprobs")


@pytest.fixture
def command(golden, tmp_path):
    def run(*flags, lines=None, output="answers.jsonl"):
        source = tmp_path / "requests.jsonl"
        if lines is not None:
            texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
            source.write_text("".join(texts), encoding="utf-8")
        model = ["--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--max-new-tokens", "3"]
        return main(["infer", *model, "--input", str(source), "--output", str(tmp_path / output), *flags])

    return run


def answers(tmp_path):
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").open(encoding="utf-8")]


def test_letter_g_answers_stand_in_order_and_bad_lines_fail_alone(golden, command, tmp_path, capsys):
    image = str(golden / "images" / "src" / "gray.png")
    (tmp_path / "bad.png").write_text("x")
    lines = [
        {"id": "long", "prompt": "word " * 30, "image": image},
        {"prompt": "Hi", "image": "bad.png"},
        "{not json}\n",
        {"prompt": "Hi", "image": "https://example.org/a.png"},
        {"prompt": "Hi", "options": {"temperature": -1}},
        {"prompt": ""},
        {"prompt": "<image> and <image>", "image": image},
        {"prompt": "Hi", "extra": 1},
        [{"prompt": "Hi"}],
        {"id": 10, "prompt": "Hi", "system": "Be brief.", "options": {"max_new_tokens": 2, "num_beams": 2}},
        '{"prompt": "one \u2028 line \x85", "options": {"logprobs": 2}}\n',
    ]
    assert command(lines=lines) == 1
    assert re.search(r"8 of 11 requests failed; .*\(first, id \w+: ", capsys.readouterr().err)
    found = answers(tmp_path)
    assert [record["id"] for record in found] == ["long", *map(str, range(2, 12))]
    errors = [record.get("error") for record in found]
    assert errors[0] is errors[9] is None and found[9]["tokens"] == 2 and found[0]["finish_reason"] == "length"
    assert len(found[10]["logprobs"]) == found[10]["tokens"] == 3 and "logprobs" not in found[0]
    for token, value, likeliest in zip(*(found[10][name] for name in LOGPROBS), strict=True):
        assert likeliest[str(token)] == value == max(likeliest.values()) and len(likeliest) == 2
    for error, part in zip(
        errors[1:9],
        (
            "cannot be decoded",
            "line 3 is not JSON",
            "is an address",
            "temperature",
            "is empty",
            "found 1 images and 2",
            "extra",
            "line 9 is a list: give each of its objects a line",
        ),
        strict=True,
    ):
        assert part in error


def test_interrupted_run_goes_on(command, tmp_path, capsys):
    lines = [{"prompt": "Hi"}, {"prompt": "word"}, {"prompt": "What?"}]
    assert command("--json", lines=lines) == 0
    first = answers(tmp_path)
    file = tmp_path / "answers.jsonl"
    kept = file.read_text().splitlines()[0] + "\n" + '{"id": "2", "prom'  # killed while it wrote
    file.write_text(kept)
    assert command("--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["resumed"] == 1
    assert answers(tmp_path) == first
    assert command("--temperature", "1") == 1
    assert "holds answers of another model, template or other options (different: options)" in capsys.readouterr().err
    file.write_text("[]\n")
    assert command() == 1
    assert "line 1 is no answer" in capsys.readouterr().err


def test_only_what_has_changed_is_answered_again(golden, command, tmp_path, capsys):
    """An image's file, a request's options, its system text and its images count as its prompt does."""
    sources = [golden / "images" / "src" / name for name in ("gray.png", "landscape.png")]
    for number in range(2):
        shutil.copy(sources[0], tmp_path / f"{number}.png")
    lines = [{"prompt": "Hi", "image": f"{number}.png"} for number in range(2)] + [{"prompt": "a"}, {"prompt": "b"}]

    def resumed():
        assert command("--json", lines=lines) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["resumed"]

    assert [resumed(), resumed()] == [0, 4]
    before = answers(tmp_path)
    shutil.copy(sources[1], tmp_path / "1.png")
    assert resumed() == 3
    after = answers(tmp_path)
    assert [a["request"] == b["request"] for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    lines[2]["options"] = {"max_new_tokens": 2}
    lines[3]["system"] = "Be brief."
    assert resumed() == 2 and answers(tmp_path)[2]["tokens"] == 2


def test_other_weights_are_told(golden, tmp_path, capsys):
    """Files of the same name that changed are another model; other files may come and go."""
    folder = shutil.copytree(golden / "models" / "llava_hf", tmp_path / "model")
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hi"}\n')
    line = ["infer", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "2"]
    line += ["--input", str(tmp_path / "in.jsonl"), "--output", str(folder / "answers.jsonl")]
    assert main(line) == 0
    (folder / "README.txt").write_text("x")
    assert main(line) == 0
    shard = next(folder.glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    assert main(line) == 1
    assert "(different: weights)" in capsys.readouterr().err


def test_weights_that_a_file_names_count(tmp_path):
    from mindspeed_mm.inference.request_file import weights_stamp

    (tmp_path / "a.bin").write_text("x")
    (tmp_path / "spec.json").write_text(json.dumps({"part": [{"ckpt_path": str(tmp_path / "a.bin")}]}))
    before = weights_stamp(tmp_path / "spec.json")
    assert before == weights_stamp(tmp_path / "spec.json")
    (tmp_path / "a.bin").write_text("longer")
    assert before != weights_stamp(tmp_path / "spec.json")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no request"),
        ([{"id": 1, "prompt": "a"}, {"prompt": "b", "id": "1"}], "line 2: the id 1 is there twice"),
    ],
)
def test_unusable_files(command, lines, message, capsys):
    assert command(lines=lines) == 1
    assert message in capsys.readouterr().err


def test_unreadable_files(command, tmp_path, capsys):
    assert command() == 1
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "requests.jsonl").write_bytes(b"\xff\xfe")
    assert command() == 1
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_flags_that_do_not_fit(command, golden, capsys):
    assert main(["infer", "--model", "x", "--input", "a"]) == 1
    assert "--input and --output go together" in capsys.readouterr().err
    assert command("--batch-size", "0", lines=[{"prompt": "a"}]) == 1
    assert "--batch-size is 0; expected at least 1" in capsys.readouterr().err
    assert command("--option", "num_beams", lines=[{"prompt": "a"}]) == 1
    assert "expected NAME=VALUE" in capsys.readouterr().err


def test_one_bad_prompt_among_several(golden, capsys, tmp_path):
    line = ["infer", "--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--max-new-tokens", "2"]
    line += ["--image", str(golden / "images" / "src" / "gray.png"), "--image", str(tmp_path / "no.png")]
    assert main([*line, "--prompt", "What?", "--option", "num_return_sequences=2", "--temperature", "1"]) == 1
    found = capsys.readouterr()
    assert (
        found.out.count("ASSISTANT:") == 2 and "1 of 2 prompts could not be answered:\n  request 2: image" in found.err
    )


def test_several_images_for_one_prompt():
    from mindspeed_mm.config.inference import InferenceConfig

    config = InferenceConfig(prompts="<image> or <image>?", image_path=["a.png", "b.png"])
    assert config.questions == [("<image> or <image>?", ("a.png", "b.png"))]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--top-p", "0.9"], {"top_p": 0.9, "do_sample": True, "max_new_tokens": 7}),
        (["--top-k", "5", "--temperature", "0.5"], {"top_k": 5, "temperature": 0.5, "do_sample": True}),
        (["--temperature", "0"], {"temperature": 0.0, "do_sample": False}),
        (["--option", "num_beams=4", "--option", "stop_strings=###"], {"num_beams": 4, "stop_strings": "###"}),
    ],
)
def test_flags_say_whether_to_sample(flags, found):
    """On top of a file that draws with top_p."""
    import argparse

    from mindspeed_mm.cli.flags.model import add_option_arguments, given_options
    from mindspeed_mm.generation.options import generation_options

    parser = argparse.ArgumentParser()
    add_option_arguments(parser)
    file = {"max_new_tokens": 7} | ({} if "--option" in flags else {"do_sample": True, "top_p": 0.7})
    given = given_options(parser.parse_args(flags), file)
    assert {name: given[name] for name in found} == found
    assert generation_options(given).greedy == (not found.get("do_sample", False))


def test_letter_g_a_line_with_a_key_twice_fails_alone(tmp_path):
    from mindspeed_mm.inference.request_file import read_requests

    lines = ['{"prompt": "a"}', '{"prompt": "b", "prompt": "c"}']
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + "\n")
    found = read_requests(tmp_path / "requests.jsonl")
    assert list(found) == ["1", "2"] and found["1"].prompt == "a"
    assert 'requests.jsonl, line 2: key "prompt" is given twice' in str(found["2"])
