"""A table's cells as VLMEvalKit sees them, on the way to a prompt and back from the spreadsheet it writes."""

from collections.abc import Sequence

from evaluation.pandas_rules import Value, read_column, seen, through_spreadsheet
from evaluation.tsv import Row, Table


def views_of_kit(table: Table, written: Sequence[Row] | None = None) -> dict[int | str, dict[str, str]]:
    """Cells by index, missing ones left out; after the spreadsheet for the rows `written`."""
    rows = table.rows if written is None else written
    views: dict[int | str, dict[str, str]] = {row.index: {} for row in rows}
    for column in table.all_cells[0]:
        values: Sequence[Value] = read_column([cells[column] for cells in table.all_cells])
        values = [values[row.position] for row in rows]
        if written is not None:
            values = through_spreadsheet(values)
        for row, value in zip(rows, values, strict=True):
            if value is not None:
                views[row.index][column] = seen(value)
    return views


def answers_of_kit(answers: Sequence[str]) -> list[str]:
    """Predictions as they come back from the spreadsheet."""
    return [seen(value) for value in through_spreadsheet(answers)]
