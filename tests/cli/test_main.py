"""The command line itself: help, errors, exit codes."""

import json
import re
import subprocess
import sys

import pytest

import mindspeed_mm.cli.main as command_line
from mindspeed_mm.cli.main import build_parser, command_names, main


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name.replace("_", "-"), "--help"])
    assert stop.value.code == 0
    assert "example:" in capsys.readouterr().out


def test_the_list_of_commands_waits_for_no_library():
    """A process of its own: this one has imported everything."""
    ask = (
        "import contextlib, sys; from mindspeed_mm.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "sys.exit(str({'torch', 'numpy', 'PIL', 'megatron.core', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    assert "check-data" in found.stdout and found.stderr == "set()\n"


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_unknown_flag_names_the_nearest(capsys):
    assert main(["infer", "--lod", "x"]) == 1
    assert "unknown flag --lod: did you mean --load" in capsys.readouterr().err


def test_missing_model_is_a_message_not_a_traceback(tmp_path, capsys):
    assert main(["infer", "--model", str(tmp_path / "nothing"), "--prompt", "hi"]) == 1
    error = capsys.readouterr().err
    assert "nothing: no such file or folder" in error and "Traceback" not in error


def test_other_ranks_leave_config_errors_to_the_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["infer", "--prompt", "hi"]) == 1
    assert capsys.readouterr().err == ""
    assert main(["infer", "--model", str(tmp_path / "nothing"), "--prompt", "hi"]) == 1
    assert "[rank 1]" in capsys.readouterr().err


def test_infer_answers_and_ends_with_json(golden, capsys):
    image = str(golden / "images" / "src" / "gray.png")
    model = str(golden / "models" / "llava_hf")
    line = ["infer", "--model", model, "--image", image, "--prompt", "Hi?", "--prompt", "You?", "--json"]
    assert main([*line, "--max-new-tokens", "3", "--device", "cpu"]) == 0
    output = capsys.readouterr().out.splitlines()
    result = json.loads(output[-1])
    assert [answer["prompt"] for answer in result["answers"]] == ["Hi?", "You?"]
    assert any(line.startswith("ASSISTANT: ") for line in output)


def test_infer_reads_the_guides_json(golden, tmp_path, capsys):
    from tests.helpers.golden_model import model_json

    config = model_json(golden) | {
        "pipeline_class": "LlavaPipeline",
        "tokenizer": {"hub_backend": "hf", "from_pretrained": str(golden / "tokenizer")},
        "image_processer_path": str(golden / "models" / "clip_hf"),
        "image_path": str(golden / "images" / "src" / "gray.png"),
        "prompts": "What is it?",
        "generation_config": {"max_new_tokens": 2, "do_sample": False, "num_beams": 1, "use_cache": False},
        "dtype": "fp32",
        "device": "cpu",
    }
    path = tmp_path / "inference_llava.json"
    path.write_text(json.dumps(config))
    assert main(["infer", "--mm-model", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 2
    path.write_text(json.dumps(config | {"prompt": "x"}))
    assert main(["infer", "--mm-model", str(path)]) == 1
    assert "prompt" in capsys.readouterr().err


def test_lists_must_fit(golden, capsys):
    model = str(golden / "models" / "llava_hf")
    image = str(golden / "images" / "src" / "gray.png")
    line = ["infer", "--model", model, "--image", image, "--image", image]
    assert main([*line, "--prompt", "a", "--prompt", "b", "--prompt", "c"]) == 1
    assert "2 images for 3 prompts" in capsys.readouterr().err


def test_an_empty_prompt_fails_alone(golden, tmp_path, capsys):
    line = ["infer", "--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--max-new-tokens", "2"]
    assert main([*line, "--prompt", "", "--prompt", "Hi", "--json"]) == 1
    output = capsys.readouterr()
    result = json.loads(output.out.splitlines()[-1])
    assert [answer["prompt"] for answer in result["answers"]] == ["Hi"] and "1 of 2 prompts" in result["error"]
    assert "request 1: the prompt is empty" in output.err
    (tmp_path / "none.json").write_text('{"prompts": []}')
    assert main([*line, "--mm-model", str(tmp_path / "none.json")]) == 1
    assert "there is no prompt: give at least one" in capsys.readouterr().err


def test_parser_is_filled_for_one_command_only():
    assert build_parser(only="infer").parse_args(["infer", "--prompt", "x"]).prompt == ["x"]


def test_unknown_command_gets_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "unknown command 'trian': did you mean train?" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and "mindspeed-mm 0." in capsys.readouterr().out


def test_config_error_is_told_once_a_host(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["infer", "--prompt", "hi"]) == 1
    assert "nothing to load" in capsys.readouterr().err


def test_flags_of_the_ancestors_launcher_are_understood(golden, capsys):
    model = str(golden / "models" / "llava_hf")
    line = ["infer", "--model", model, "--prompt", "Hi?", "--max-new-tokens", "2", "--device", "cpu"]
    given = "--bf16 --tensor-model-parallel-size 1 --context-parallel-size 1 --seq-length 2048 --use-flash-attn"
    assert main([*line, *given.split(), "--no-load-optim", "--distributed-backend", "nccl"]) == 0
    assert "without an effect here" in capsys.readouterr().err
    assert main([*line, "--context-parallel-size", "2"]) == 1
    assert "--context-parallel-size above 1 is not supported by this command" in capsys.readouterr().err


def test_two_models_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["infer", "--model", "a", "--load", "b", "--prompt", "x"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_letter_k_ctrl_c_while_libraries_are_imported(capsys, monkeypatch):
    def interrupted(only):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "build_parser", interrupted)
    assert main(["check-data"]) == 130
    assert capsys.readouterr().err == "mindspeed-mm check-data: interrupted\n"


@pytest.mark.parametrize(
    ("error", "gone", "words"),
    [
        (
            OSError(28, "No space left on device"),
            False,
            "No space left on device: .*Make room where the command writes",
        ),
        (BrokenPipeError(32, "Broken pipe"), True, "Broken pipe: whoever read what the command prints has ended"),
        (BrokenPipeError(32, "Broken pipe"), False, None),
        (ConnectionResetError(104, "Connection reset by peer"), True, None),
    ],
)
def test_letter_j_errors_of_the_machine_are_one_line(capsys, monkeypatch, error, gone, words):
    """Others keep their traceback."""

    def failing(namespace):
        raise error

    monkeypatch.setattr("mindspeed_mm.cli.doctor.run", failing)
    monkeypatch.setattr("mindspeed_mm.ending.nobody_reads", lambda: gone)
    if words is None:
        with pytest.raises(type(error)):
            main(["doctor"])
    else:
        assert main(["doctor"]) == 1
        assert re.fullmatch(rf"mindspeed-mm doctor: error: \[Errno \d+\] {words}.*\n", capsys.readouterr().err)


def test_letter_j_a_full_disk_is_told_with_the_file_and_in_json(golden, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "Hi"}\n')
    (tmp_path / "out.jsonl.tmp").symlink_to("/dev/full")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--device", "cpu"]
    assert main(["infer", "--model", str(golden / "models" / "llava_hf"), *files, "--json"]) == 1
    printed = capsys.readouterr()
    told = rf"\[Errno 28\] No space left on device: '{tmp_path}/out.jsonl': a file could not be written to its end"
    assert re.search(told, printed.err)
    assert re.match(told, json.loads(printed.out.splitlines()[-1])["error"])


def test_json_tells_the_error_too(tmp_path, capsys):
    assert main(["infer", "--model", str(tmp_path / "nothing"), "--prompt", "hi", "--json"]) == 1
    assert "no such file" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
