"""`infer` and `chat` on two tensor-parallel ranks and two pipeline stages: the answers of one process, told once."""

import io
import json
import os
import sys

import pytest

LAYOUTS = {"TP2": ["--tensor-model-parallel-size", "2"], "PP2": ["--pipeline-model-parallel-size", "2"]}


def commands(golden, folder, name, flags):
    """(code, stdout, result) of commands on this rank, with the variables that torchrun sets."""
    import torch

    from mindspeed_mm.cli.main import main

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    image = str(golden / "images" / "src" / "gray.png")
    model = ["--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--max-new-tokens", "4", *flags]
    questions = ["--image", image, "--prompt", "What is it?", "--prompt", "Why?", "--json"]
    file = ["--input", str(folder / "in.jsonl"), "--output", str(folder / f"{name}.jsonl")]
    talk = f"Hi\n'{image}' What is it?\n/image none.png\n/save {folder}/{name}.json\nAnd now?\n"
    try:
        return [
            captured(main, ["infer", *model, *questions]),
            captured(main, ["infer", *model, *file, "--batch-size", "2"]),
            # Only the first rank has the lines.
            captured(main, ["chat", *model, "--json"], talk if rank == 0 else ""),
        ]
    finally:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]


def captured(main, line, text=""):
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(text), io.StringIO(), io.StringIO()
    try:
        code = main(line)
        return code, sys.stdout.getvalue()
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    image = str(golden / "images" / "src" / "gray.png")
    lines = [{"prompt": "Hi"}, {"prompt": "What?", "image": image}, {"prompt": "", "id": "bad"}, {"prompt": "Where?"}]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_do_what_one_process_does(ranks, golden, folder, layout):
    single = ranks(1).run(commands, golden, folder, "alone", [])[0]
    first, second = ranks(2).run(commands, golden, folder, layout, LAYOUTS[layout])
    assert [code for code, _ in single] == [code for code, _ in first] == [0, 1, 1]
    for (_, alone), (_, spread), (_, other) in zip(single, first, second, strict=True):
        assert without_time(spread) == without_time(alone) and other == ""
    files = [folder / f"{name}.jsonl" for name in ("alone", layout)]
    assert files[0].read_text() == files[1].read_text() and '"error"' in files[0].read_text()
    for path in (folder / "alone.json", folder / f"{layout}.json"):
        conversation = json.loads(path.read_text())[0]["conversations"]
        assert [turn["value"] for turn in conversation[::2]] == ["Hi", "<image>\nWhat is it?"]
        path.unlink()


def without_time(text):
    """Lines of stdout; the last one without the seconds."""
    *lines, last = text.splitlines() or [""]
    found = json.loads(last) if last else {}
    return lines, {key: value for key, value in found.items() if key != "seconds"}
