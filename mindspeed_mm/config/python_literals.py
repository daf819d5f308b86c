"""Python files of configuration, read without running them: assignments of literals to names.

`name = ...` with numbers, texts, True, False, None, lists, tuples, objects and `dict(key=...)`, names assigned above,
and mmengine's `{{fileDirname}}`, `{{fileBasename}}` and `{{fileBasenameNoExtension}}`. All else is told with its line.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mindspeed_mm.config.load import config_bytes
from mindspeed_mm.errors import ConfigError


def read_python(path: Path) -> dict[str, Any]:
    """The values of a file's assignments, by name.

    Raises ConfigError for a file that is missing, too large or no Python, and for each statement that is no assignment
    of a literal, all of them at once.
    """
    path = Path(path)
    text = config_bytes(path, "Python").decode("utf-8", "replace")
    for name, value in _predefined(path).items():
        text = text.replace(f"{{{{{name}}}}}", value).replace(f"{{{{ {name} }}}}", value)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ConfigError(f"{path} is not Python ({error}); correct the file there") from error
    values: dict[str, Any] = {}
    problems: list[str] = []
    for number, statement in enumerate(tree.body):
        if number == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        try:
            name, node = _assignment(statement)
            values[name] = _literal(node, values)
        except _NoLiteralError as error:
            problems.append(f"{path}, line {error.line}: {error}")
    if problems:
        raise ConfigError(
            "\n  ".join(problems)
            + "\nThe file is read, never run: write the values as literals, such as model_args = dict(type='llava_v1')"
        )
    return values


class _NoLiteralError(Exception):
    """What is not read."""

    def __init__(self, node: ast.AST, found: str) -> None:
        super().__init__(f"found {found}; expected a literal")
        self.line = getattr(node, "lineno", 0)


def _predefined(path: Path) -> dict[str, str]:
    """mmengine's names of the file."""
    return {
        "fileDirname": str(path.parent),
        "fileBasenameNoExtension": path.stem,
        "fileBasename": path.name,
        "fileExtname": path.suffix,
    }


def _assignment(statement: ast.stmt) -> tuple[str, ast.expr]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        if isinstance(target, ast.Name):
            return target.id, statement.value
    raise _NoLiteralError(statement, f"`{ast.unparse(statement).splitlines()[0]:.60}`")


def _literal(node: ast.expr, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item, known) for item in node.elts]
    if isinstance(node, ast.Dict):
        return _object(zip(node.keys, node.values, strict=True), known)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return _object([(keyword.arg, keyword.value) for keyword in node.keywords], known)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, known)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    raise _NoLiteralError(node, f"`{ast.unparse(node):.60}`")


def _object(pairs: Any, known: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key is None:  # **name
            merged = _literal(value, known)
            if not isinstance(merged, dict):
                raise _NoLiteralError(value, f"`**{ast.unparse(value):.60}`, no object")
            found |= merged
            continue
        name = key if isinstance(key, str) else _literal(key, known)
        if not isinstance(name, str):
            raise _NoLiteralError(value, f"the key {name!r}, no text")
        found[name] = _literal(value, known)
    return found
