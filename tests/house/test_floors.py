"""Imports go down the floors of docs/architecture.md only, whether they stand at the top of a file or in a function."""

import graphlib

import pytest
from house import LIBRARY, ROOT, imported_modules, module_name, python_files, where

# Lower floor first. A unit (one line's item) imports lower floors and itself; units of one floor are siblings that
# never import each other. A unit below another one's name (trainer.out_of_memory) stands on its own floor.
FLOORS = (
    ("mindspeed_mm.constants", "mindspeed_mm.errors", "mindspeed_mm.logging_utils", "mindspeed_mm.ending"),
    ("mindspeed_mm.registry", "mindspeed_mm.host", "mindspeed_mm.run_folders"),
    ("mindspeed_mm.platform", "mindspeed_mm.weights"),
    ("mindspeed_mm.config",),
    ("mindspeed_mm.models",),
    ("mindspeed_mm.data",),
    ("mindspeed_mm.models.family",),  # a family knows parts and how images become pixels; both find it by the registry
    ("mindspeed_mm.models.families",),
    ("mindspeed_mm.objectives", "mindspeed_mm.generation", "megatron.driver"),
    ("checkpoint_converters",),
    ("mindspeed_mm.inference",),
    ("mindspeed_mm.trainer",),
    ("mindspeed_mm.planning",),
    ("mindspeed_mm.trainer.out_of_memory",),  # its remedies are plans
    ("mindspeed_mm.trainer.plan_verdict",),  # it shows those remedies
    ("mindspeed_mm.serving", "mindspeed_mm.doctor", "evaluation"),
    ("mindspeed_mm.cli",),
    ("mindspeed_mm",),
)
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
# Third-party packages that heavy floors bring in and that these units do without.
LIGHT = (
    "mindspeed_mm.constants",
    "mindspeed_mm.ending",
    "mindspeed_mm.errors",
    "mindspeed_mm.registry",
    "mindspeed_mm.host",
    "mindspeed_mm.run_folders",
    "mindspeed_mm.config",
)
HEAVY = ("torch", "transformers", "megatron")
DRIVER_MAY = (
    "mindspeed_mm.ending",
    "mindspeed_mm.errors",
    "mindspeed_mm.platform",
    "mindspeed_mm.run_folders",
    "megatron.core",
    "megatron.driver",
)
GLUE = (
    "mindspeed_mm.cli",
    "mindspeed_mm.doctor",
    "mindspeed_mm.trainer",
    "mindspeed_mm.trainer.out_of_memory",
    "mindspeed_mm.trainer.plan_verdict",
    "mindspeed_mm.planning",
    "checkpoint_converters.checkpoint",
    "evaluation",
    "megatron.driver",
)


def unit_of(module: str) -> str | None:
    """The longest unit that a module belongs to; None when it is not ours."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in FLOOR), None)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def our_imports():
    for path in python_files():
        for line, module in imported_modules(path):
            yield path, line, unit_of(module_name(path)), module


def test_every_module_stands_on_a_floor():
    homeless = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if unit_of(module_name(path)) in (None, "mindspeed_mm") and path.name not in ("__init__.py", "__main__.py")
    ]
    assert not homeless, f"add these to FLOORS here and in docs/architecture.md: {homeless}"


def test_imports_go_down():
    wrong = []
    for path, line, unit, module in our_imports():
        target = unit_of(module) if module.split(".")[0] in LIBRARY else None
        if target is None or target == unit:
            continue
        if module in ("mindspeed_mm", "mindspeed_mm.__version__"):  # the version; the rest of it is lazy
            continue
        if FLOOR[target] >= FLOOR[unit]:
            wrong.append(f"{where(path, line)}: {unit} imports {module}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_no_module_needs_itself():
    """No circle of imports inside a floor either, not even one that a function's import hides."""
    files = {module_name(path): path for path in python_files()}
    graph = {}
    for name, path in files.items():
        found = {module_of(imported, files) for _, imported in imported_modules(path)}
        graph[name] = found - {None, name, "mindspeed_mm"}  # the package gives its version; the rest of it is lazy
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def module_of(imported: str, files) -> str | None:
    """`a.b` of "a.b.name"; None where it is not ours."""
    while imported and imported not in files:
        imported = imported.rpartition(".")[0]
    return imported or None


def test_the_lowest_floors_are_light():
    wrong = [
        f"{where(path, line)} imports {module}"
        for path, line, unit, module in our_imports()
        if unit in LIGHT and any(is_in(module, package) for package in HEAVY)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_driver_knows_nothing_multimodal():
    wrong = [
        f"{where(path, line)} imports {module}"
        for path, line, unit, module in our_imports()
        if unit == "megatron.driver" and module.split(".")[0] in LIBRARY
        if module != "mindspeed_mm" and not any(is_in(module, package) for package in DRIVER_MAY)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_glue_imports_the_driver():
    wrong = [
        f"{where(path, line)} imports {module}"
        for path, line, unit, module in our_imports()
        if is_in(module, "megatron.driver") and not any(is_in(module_name(path), package) for package in GLUE)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "unit"),
    [
        ("mindspeed_mm.data.sample", "mindspeed_mm.data"),
        ("mindspeed_mm.database", "mindspeed_mm"),
        ("megatron.driver.loop", "megatron.driver"),
        ("megatron.core.tensor_parallel", None),
        ("torch.nn", None),
    ],
)
def test_unit_of_a_module(module, unit):
    assert unit_of(module) == unit


def test_files_of_commands_hold_no_shared_logic():
    """What commands share is a floor below, but for their flags."""
    assert not [
        str(path.relative_to(ROOT))
        for path in (ROOT / "mindspeed_mm" / "cli").rglob("_*.py")
        if path.name != "__init__.py"
    ]
