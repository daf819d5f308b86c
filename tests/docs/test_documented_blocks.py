"""Letter E: every command and every Python block of README, docs/ and the examples' pages is run.

A block is run in a folder of stand-ins (stand_ins.py): a small model lies under the name of LLaVA-1.5 7B, and training
takes two steps. What stands in for torchrun, the launchers' torchrun and the two long scripts is in executor.py.
"""

import importlib
import json
import re
import shutil
from contextlib import nullcontext

import pytest

from mindspeed_mm.cli.main import command_names
from tests.docs.executor import ELSEWHERE as LEFT_OUT
from tests.docs.executor import PageReader
from tests.docs.pages import PAGES, ROOT, Block, blocks, blocks_of, unread_fences
from tests.docs.stand_ins import make_stand_ins
from tests.docs.test_coming_from import flags_of
from tests.helpers.loopback import app_on_loopback
from tests.helpers.scripted_server import scripted_app

RUN = {"bash", "python"}
SHOWN = {"text", "json", "toml", "mermaid"}
OURS = ("mindspeed-mm ", "torchrun ", "bash ", "python ", "pip ", "import ", "curl ")
ELSEWHERE = {"tests/families/test_outside.py": "# outside/"}
"""A test that takes blocks of a page as files, and how their first line begins."""


TRANSLATIONS = {
    "README.zh.md": "README.md",
    "docs/zh/llava1.5.md": "examples/llava1.5/README.md",
    "docs/zh/ascend.md": "docs/ascend.md",
}
"""A page, and the one whose blocks it repeats: only those that differ in more than texts and comments are run again."""


def wordless(block: Block) -> str:
    """A block without quoted texts and comments."""
    return re.sub(r'"[^"\n]*"| *#.*', "", block.text)


def is_run_here(block: Block) -> bool:
    if block.language not in RUN or any(block.text.startswith(start) for start in ELSEWHERE.values()):
        return False
    original = TRANSLATIONS.get(block.page)
    return original is None or wordless(block) not in {wordless(each) for each in blocks(original)}


EXECUTED = [page for page in PAGES if any(is_run_here(block) for block in blocks(page))]


@pytest.fixture(scope="module")
def stand_ins(golden, tmp_path_factory):
    return make_stand_ins(golden, tmp_path_factory.mktemp("stand-ins"))


@pytest.mark.parametrize("page", EXECUTED)
def test_letter_e_every_block_of_the_page_runs(page, stand_ins, ranks, single_process, tmp_path):
    folder = tmp_path / "reader"
    shutil.copytree(stand_ins, folder, symlinks=True)
    reader = PageReader(folder, ranks)
    for block in blocks(page):
        if is_run_here(block) or block.language == "json":
            reader.run(block)


@pytest.mark.parametrize("command", command_names())
def test_letter_e_the_example_of_the_help_runs(command, stand_ins, ranks, single_process, tmp_path):
    folder = tmp_path / "reader"
    shutil.copytree(stand_ins, folder, symlinks=True)
    if command == "plot":  # in its folders runs have been
        for name in ("save_dir", "save_dir_finetune"):
            shutil.copytree(folder / "other_dir", folder / name)
    example = importlib.import_module(f"mindspeed_mm.cli.{command}").EXAMPLE
    with app_on_loopback(scripted_app()[0]) if command == "bench_serve" else nullcontext() as server:
        if server is not None:
            example = example.replace("http://127.0.0.1:8000", server.address)
        PageReader(folder, ranks).run(Block(f"{command} --help", 1, "bash", example))


def untried(block: Block) -> str:
    """What is wrong with a block that nothing runs; "" where nothing is."""
    if block.language in RUN:
        return ""
    if block.language not in SHOWN:
        return f"its language is {block.language!r}; expected bash or python, which are run, or one of {sorted(SHOWN)}"
    hidden = [line for line in block.text.splitlines() if line.startswith(OURS)]
    if block.language == "text" and hidden:
        return f"{hidden[0]!r} is a command, but the block says text; expected bash or python"
    try:
        if block.language == "json" and not block.text.startswith("# "):
            text = block.text if block.text.lstrip().startswith(("{", "[")) else "{" + block.text + "}"
            json.loads(text)
    except ValueError as error:
        return f"it is no {block.language}: {error}"
    return ""


def test_letter_e_no_block_dodges_the_tests():
    problems = {block.place: untried(block) for page in PAGES for block in blocks(page)}
    assert not {place: problem for place, problem in problems.items() if problem}
    unread = {page: unread_fences((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
    assert not {page: lines for page, lines in unread.items() if lines}


@pytest.mark.parametrize(
    "text", ["- ```bash\n  ls\n  ```", "> ```bash\n> ls\n> ```", "\t```bash\n\tls\n\t```", "```bash\nls"]
)
def test_a_fence_that_is_not_read_is_told(text):
    assert unread_fences(f"Text.\n\n{text}\n") and not unread_fences("Text.\n\n  ```bash\n  ls\n  ```\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```\nls\n```", "its language is ''"),
        ("```console\n$ ls\n```", "its language is 'console'"),
        ("```text\nmindspeed-mm train\n```", "is a command"),
        ('```json\n{"a": }\n```', "it is no json"),
        ("```bash\nls\n```", ""),
    ],
)
def test_a_block_that_dodges_is_told(text, problem):
    (block,) = blocks_of("page.md", f"Text.\n\n{text}\n")
    assert untried(block).startswith(problem) if not problem else problem in untried(block)


@pytest.mark.parametrize(
    "command",
    [
        *("mindspeed-mm no-such-command", "frobnicate now", "bash none.sh", 'pip install ".[x]"'),
        *("pip install -c none.txt -e .", "sbatch none.sbatch", "curl http://127.0.0.1:8000/v1/none"),
    ],
)
def test_a_wrong_command_fails(command, stand_ins, ranks):
    (block,) = blocks_of("page.md", f"```bash\n{command}\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:1: "):
        PageReader(stand_ins, ranks).run(block)


def test_blocks_that_other_tests_take_are_taken():
    for path, start in ELSEWHERE.items():
        test = (ROOT / path).read_text(encoding="utf-8")
        (page,) = {block.page for each in PAGES for block in blocks(each) if block.text.startswith(start)}
        assert page in test and "outside/" in test


def test_flags_that_are_left_out_exist_and_are_tested():
    for flag, (_, test) in LEFT_OUT.items():
        assert (ROOT / test).exists() and any(flag in flags_of(name.replace("_", "-")) for name in command_names())
