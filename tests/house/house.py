"""What the tests of this folder share: the project's root and its Python files."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("mindspeed_mm", "megatron", "checkpoint_converters", "evaluation")


def python_files(*folders: str) -> list[Path]:
    """The Python files of top-level folders (default: the library's), sorted; a folder that is absent has none."""
    return sorted(path for folder in folders or LIBRARY for path in (ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """The dotted name a file is imported by: `mindspeed_mm.data.sample`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of a file, those inside functions too; relative ones made absolute.

    `from a import b` gives `a.b`, because b may be a module; whoever asks compares by prefix. Modules named in
    `import_module("...")` count as well.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node) == "import_module" and node.args:
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def where(path: Path, line: int) -> str:
    """file:line, relative to the root."""
    return f"{path.relative_to(ROOT)}:{line}"
