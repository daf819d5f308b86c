"""What is known of parts and families without importing them: it is what they say, and a start imports only its own."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from house import ROOT

from mindspeed_mm.models.known import Known, known, said_by
from mindspeed_mm.models.part import ALL_SLOTS
from mindspeed_mm.models.spec import FAMILIES
from mindspeed_mm.registry import find_all, register
from tests.parallel.test_command import COMMON, describe_data, folder  # noqa: F401  a fixture

PACKAGES = {FAMILIES: "FAMILY"} | {f"mindspeed_mm.models.{slot}": "PART" for slot in ALL_SLOTS}
START = """
import json, sys
from mindspeed_mm.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]))
"""
UNUSED = ("torch._dynamo", "jinja2", "transformers", "mindspeed_mm.data.chat_template")
"""Large packages that a plain run on the CPU has no use for."""


@pytest.mark.parametrize("package", PACKAGES)
def test_the_table_says_what_the_files_say(package):
    found = {name: said_by(each) for name, each in find_all(package, PACKAGES[package]).items()}
    assert known(package, PACKAGES[package]) == found


def test_what_the_table_lacks_is_asked(monkeypatch):
    package = "mindspeed_mm.models.vision_projector"
    part = find_all(package, "PART")["mlp"]
    monkeypatch.setattr("mindspeed_mm.registry._REGISTERED", {})
    register(package, "another_mlp", part)
    assert known(package, "PART")["another_mlp"] == Known((), (part.layouts[0].markers,))


def test_a_start_imports_its_own_parts_and_no_others(golden, folder):  # noqa: F811
    """With a projector's file, which is recognised among the files of all parts and families."""
    describe_data(golden, folder)
    files = ["--mm-model", f"{folder}/model.json", "--mm-data", f"{folder}/data.json", "--train-iters", "1"]
    done = subprocess.run(
        [sys.executable, "-c", START, "train", *COMMON.split(), *files],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr[-2000:]
    listed = {f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).KNOWN}
    found = {name.removeprefix("mindspeed_mm.models.") for name in listed & set(modules)}
    # The block of the ancestor's interaction is the only part of its slot.
    own = {"families.llava", "text_decoder.llama", "vision_encoder.clip", "vision_projector.mlp"}
    assert found == own | {"interaction.post_block"}
    assert not set(UNUSED) & set(modules)
