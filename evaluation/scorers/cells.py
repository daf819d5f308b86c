"""What the text of an answer cell stands for: one answer, or a list of accepted answers."""

import ast
import operator

_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_MAX_CELL = 1_000_000
"""Longer cells are one text; the parser of a list needs memory of many times the text."""


def kit_answers(cell: str) -> list:
    """Accepted answers as VLMEvalKit finds them, which evaluates the cell as Python and takes any list it gives.

    Nothing is run here: literals are read, and sums and products of numbers are computed ("[1+1]" is [2]).
    """
    tree = _parse(cell)
    if not isinstance(tree, ast.List):
        return [cell]
    try:
        return _value(tree)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        return [cell]


def literal_answers(cell: str) -> list:
    """Accepted answers as MindSpeed-MM finds them: a list of literals, nothing computed."""
    if not isinstance(_parse(cell), ast.List):
        return [cell]
    try:
        return ast.literal_eval(cell.strip())
    except ValueError:
        return [cell]


def strict_answers(cell: str) -> list[str]:
    """Accepted answers: only a list of quoted texts is a list of alternatives, "[62, 23]" is one text."""
    tree = _parse(cell)
    if not isinstance(tree, ast.List) or not tree.elts:
        return [cell]
    if not all(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in tree.elts):
        return [cell]
    return [node.value for node in tree.elts]


def _parse(cell: str) -> ast.expr | None:
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > _MAX_CELL:
        return None
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr):
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        values = [_value(item) for item in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _number(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_number(node.left), _number(node.right))
    raise ValueError("no literal")


def _number(node: ast.expr) -> int | float:
    value = _value(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("no number")
    return value
