"""Every module of the library can be imported first, and all of them in any order."""

import os
import random
import subprocess
import sys

import pytest
from house import ROOT, module_name, python_files

MODULES = [module_name(path) for path in python_files() if path.name != "__main__.py"]
EACH_FIRST = """
import os, sys, importlib, torch
for name in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"{name}: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def python(code: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("seed", [0, 1])
def test_letter_e_all_modules_in_any_order(seed):
    modules = random.Random(seed).sample(MODULES, len(MODULES))
    python("import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *modules)


@pytest.mark.slow
def test_letter_e_each_module_first():
    assert python(EACH_FIRST, *MODULES) == ""


@pytest.mark.parametrize(
    "first",
    [
        "from mindspeed_mm.generation.engine import GenerationRequest",
        pytest.param("from megatron.driver import loop", marks=pytest.mark.slow),
    ],
)
def test_the_platform_may_be_asked_for_after_the_imports(first):
    """As in the example of docs/generation.md: an import before `mm.load`."""
    check = "from mindspeed_mm.platform import get_platform; print(get_platform('cpu').name)"
    assert python(f"{first}\n{check}").strip() == "cpu"


def test_a_chosen_platform_stays():
    choose = "from mindspeed_mm.platform import get_platform; chosen = get_platform('cpu')"
    assert python(f"{choose}\nimport megatron.driver.loop\nprint(get_platform() is chosen)").strip() == "True"
