"""Files and functions stay small enough to read in one go."""

import ast

from house import python_files, tree, where

FILE_LINES = 400
FUNCTION_LINES = 60
LOOP_LINES = 120  # the training loop reads best as one piece
LOOPS = {"megatron/driver/loop.py"}
FOLDERS = ("mindspeed_mm", "megatron", "checkpoint_converters", "evaluation", "examples", "tests")


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*FOLDERS)}
    assert not [f"{where(path, 1)}: {length} lines" for path, length in lengths.items() if length > FILE_LINES]


def test_functions_are_short():
    long = []
    for path in python_files(*FOLDERS):
        limit = LOOP_LINES if where(path, 0)[: -len(":0")] in LOOPS else FUNCTION_LINES
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > limit:
                    long.append(f"{where(path, node.lineno)}: {node.name} has {length} lines, at most {limit}")
    assert not long, "\n".join(long)
