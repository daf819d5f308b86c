"""A clone alone is enough: nothing outside it is read, and a test is skipped only for what a machine may lack."""

import ast
import re

from house import ROOT, python_files, tree, where

# File -> what may be missing there. Another skip needs a line here.
SKIPS = {
    "tests/driver/test_boards.py": "wandb and swanlab, extras",
    "tests/driver/test_two_hosts.py": "network namespaces: iproute2 and the rights to make them",
    "tests/adapters/test_qlora.py": "bitsandbytes, an extra",
    "tests/driver/test_muon.py": "torch from 2.9 on",
    "tests/generation/test_quantized.py": "bitsandbytes, an extra",
    "tests/models/test_hidden_matrices.py": "torch from 2.9 on",
    "tests/serving/test_chat_completions.py": "curl",
    "tests/helpers/web_page.py": "playwright and a chromium",
    "tests/storage/conftest.py": "s3fs and moto's server, an extra",
    "tests/platform/test_platform.py": "a machine without the NPU stack",
}
SKIPPING = {"skip", "skipif", "importorskip", "xfail"}
OWN_NAME = "test_self_contained.py"
README_COUNT = re.compile(r"more than ([0-9,]+) tests")


def skips(path):
    """(line, name, has a reason) of every call of pytest that may leave a test out."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SKIPPING:
            if node.func.attr == "skip":
                yield node.lineno, node.func.attr, bool(node.args or node.keywords)
            else:
                yield node.lineno, node.func.attr, any(keyword.arg == "reason" for keyword in node.keywords)


def test_tests_are_skipped_for_devices_and_optional_programs_only():
    found = {where(path, line): reason for path in python_files("tests") for line, _, reason in skips(path)}
    assert found, "no skip found: this test looks for the wrong thing"
    assert not [place for place in found if place.rpartition(":")[0] not in SKIPS], "skips that SKIPS does not name"
    assert not [place for place, reason in found.items() if not reason], "skips without a reason"


def test_letter_t_nothing_beside_the_repository_is_read():
    outside = re.compile(r"""\.\./shared|\bshared/|/ ["']shared["']""")
    files = [*python_files(), *python_files("tests", "examples", "benchmarks")]
    for folder in ("scripts", "examples", ".ci"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".sh", ".json", ".sbatch", "")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.is_file() and path.name != OWN_NAME}
    assert not [str(path.relative_to(ROOT)) for path, text in texts.items() if outside.search(text)]


def test_the_readme_says_how_many_tests_run(request):
    said = int(README_COUNT.search((ROOT / "README.md").read_text(encoding="utf-8"))[1].replace(",", ""))
    collected = request.session.testscollected
    if collected > 1000:  # the whole suite, not this file alone
        assert said < collected < 1.2 * said, f"README.md says more than {said} tests; {collected} were collected"


def test_reference_data_is_binary_for_git():
    attributes = (ROOT / ".gitattributes").read_text(encoding="utf-8").splitlines()
    for folder in ("golden", "golden_eval", "golden_flamingo", "cases"):
        assert f"tests/data/{folder}/** -text" in attributes
