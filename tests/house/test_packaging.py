"""What a wheel holds, and the two files that must stay in step with it."""

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
from house import LIBRARY, ROOT, imported_modules, python_files
from packaging.requirements import Requirement


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    """The keyword arguments that setup.py gives to setuptools."""
    script = (
        "import json, runpy, setuptools\n"
        "setuptools.setup = lambda **arguments: print(json.dumps(arguments))\n"
        "runpy.run_path('setup.py')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_megatron_stays_a_namespace():
    assert not (ROOT / "megatron" / "__init__.py").exists(), "megatron/__init__.py would hide megatron.core"


def test_packages_are_exactly_the_folders_with_code(setup_arguments):
    folders = {path.parent.relative_to(ROOT) for path in python_files()}
    expected = {".".join(folder.parts) for folder in folders}
    listed = set(setup_arguments["packages"])
    with_data_only = {name for name in listed - expected if any((ROOT / name.replace(".", "/")).glob("*.*"))}
    assert listed - with_data_only == expected
    assert not [name for name in listed if name.startswith("megatron") and not name.startswith("megatron.driver")]


def test_packages_outside_the_namespace_have_an_init_file(setup_arguments):
    missing = [
        name
        for name in setup_arguments["packages"]
        if list((ROOT / name.replace(".", "/")).glob("*.py"))
        and not (ROOT / name.replace(".", "/") / "__init__.py").exists()
    ]
    assert not missing


def test_every_data_file_of_a_package_is_packed(setup_arguments):
    patterns = setup_arguments["package_data"][""]
    left_out = [
        str(path.relative_to(ROOT))
        for name in setup_arguments["packages"]
        for path in (ROOT / name.replace(".", "/")).iterdir()
        if path.is_file() and path.suffix not in (".py", ".pyc") and not any(path.match(rule) for rule in patterns)
    ]
    assert not left_out, f"add their pattern to package_data in setup.py: {left_out}"


def pins_of(name):
    """Package -> version of a file of constraints."""
    lines = [line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonical(pin.name): next(iter(pin.specifier)).version for pin in pins}


def test_constraints_of_the_object_storage_add_to_the_others(setup_arguments):
    """They are a second step: one version differs, since botocore takes no other."""
    first, second = pins_of("constraints.txt"), pins_of("constraints-storage.txt")
    assert {name for name in second if name in first} == {"python-dateutil"}
    for requirement in map(Requirement, setup_arguments["extras_require"]["storage-test"]):
        name = canonical(requirement.name)
        assert (second.get(name) or first[name]) in requirement.specifier, requirement


def test_constraints_fit_the_requirements(setup_arguments):
    """Every requirement is pinned, inside its range, without a local version such as a CPU build's."""
    versions = pins_of("constraints.txt")
    extras = setup_arguments["extras_require"]
    wanted = (
        setup_arguments["install_requires"] + extras["evaluate"] + extras["quickstart"] + extras["dev"] + extras["docs"]
    )
    for requirement in map(Requirement, wanted):
        assert canonical(requirement.name) in versions, f"{requirement.name} is not in constraints.txt"
        assert versions[canonical(requirement.name)] in requirement.specifier, requirement
    assert not [version for version in versions.values() if "+" in version]
    assert versions["torch"] == "2.13.0" and versions["megatron-core"] == "0.16.1"


def test_imported_packages_are_required(setup_arguments):
    """Third-party modules that the library imports are among the requirements (extras included)."""
    extras = setup_arguments["extras_require"]
    wanted = setup_arguments["install_requires"] + [line for lines in extras.values() for line in lines]
    required = {canonical(Requirement(line).name) for line in wanted}
    owners = importlib.metadata.packages_distributions()
    optional = {"torch_npu", "mindspeed", "transformer_engine", "flash_attn", "apex"}  # used where present
    unknown = set()
    for path in python_files():
        for _, module in imported_modules(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in LIBRARY or top in optional:
                continue
            if not {canonical(name) for name in owners.get(top, [top])} & required:
                unknown.add(top)
    assert not unknown, f"not in setup.py: {sorted(unknown)}"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(tmp_path):
    """Builds and installs a wheel into a new venv (requirements borrowed from this one) and runs it elsewhere."""
    venv, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    target = next((venv / "lib").glob("python*")) / "site-packages"
    here = importlib.metadata.distribution("torch").locate_file("")
    (target / "borrowed.pth").write_text(f"{here}\n", encoding="utf-8")
    python = venv / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-q",
        "--no-deps",
        "--ignore-installed",
        ROOT,
    ]
    subprocess.run(install, check=True, cwd=elsewhere)
    where = subprocess.run(
        [python, "-c", "import mindspeed_mm, megatron.driver, megatron.core, evaluation; print(mindspeed_mm.__file__)"],
        check=True,
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert str(venv) in where.stdout
    helped = subprocess.run([venv / "bin" / "mindspeed-mm", "--help"], cwd=elsewhere, capture_output=True, text=True)
    assert helped.returncode == 0 and "train" in helped.stdout, helped.stderr
