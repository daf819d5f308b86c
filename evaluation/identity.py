"""Is a table the one that the user named? What its columns, answers, name, size and MD5 sum say is compared.

Columns, answers and the MD5 sum are proof. A file's name and its number of rows are signs only, which the user may
overrule: a part of a public table is a table of that benchmark, too.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from evaluation.own_tables import option_columns, plain_word
from evaluation.public_tables import PUBLIC_TABLES
from evaluation.scorers.cells import kit_answers
from evaluation.scorers.circular import ROTATION_OFFSET
from evaluation.scorers.text import is_cjk
from evaluation.scorers.yesno import MME_PERCEPTION, MME_REASONING, POPE_SETS
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

CHOICE, YES_NO, TEXT, BOXES, CAPTIONS = "multiple choice", "yes-no questions", "open questions", "boxes", "captions"
MME_CATEGORIES = frozenset([*MME_PERCEPTION, *MME_REASONING])
OWN_COLUMNS = {"ChartQA_TEST": "split", "MMMU_DEV_VAL": "split"}
"""A column that each table of a benchmark has and scores of its parts are made from, and few others have."""

CHARTQA_SPLITS = frozenset(["test_human", "test_augmented"])
ONE_ANSWER = ("GQA_TestDev_Balanced", "OCRVQA_TEST")
"""Open questions with one accepted answer each."""

ANNOTATORS = 10
"""Answers a question has in VQAv2, TextVQA and VizWiz."""
_LETTER = re.compile("[a-z]")
_YES_NO = ("yes", "no")


class Named(Protocol):
    """What is needed of a benchmark (evaluation.benchmarks.Benchmark). Without `kind` only the MD5 sum is compared."""

    name: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Why a table is not the one that was named."""

    reason: str
    right: tuple[str, ...] = ()
    """Benchmarks that it may be instead; one if that is sure."""
    proof: bool = True
    """False for signs that the user may overrule."""


def refuse_other_table(
    benchmark: Named, table: Table, known: Mapping[str, Named], *, accept_table: bool = False
) -> None:
    """Raise DataError, naming the right benchmark, when `table` is another one's than `benchmark`, a known one.

    `known` holds every benchmark by lower-case name. With `accept_table` the name of the file and its number of rows
    are not looked at.
    """
    if known.get(benchmark.name.lower()) is not benchmark:
        return
    verdict = _proof(benchmark, table, known)
    if verdict is None and not accept_table:
        verdict = _sign(benchmark, table, known)
        form = None if verdict or table.is_json_lines else _form(benchmark, table)
        if form is not None:
            logger.warning(
                "%s is scored as %s, whose public table has another form: %s", table.path, benchmark.name, form
            )
    if verdict is None:
        return
    overrule = "" if verdict.proof else f" If it is {benchmark.name} all the same, say so with --accept-table."
    raise DataError(
        f"{table.path} is no table of {benchmark.name}: {verdict.reason}. {_advice(verdict.right)}{overrule}"
    )


def advice_for(benchmark: Named, table: Table, known: Mapping[str, Named]) -> str:
    """A sentence that names the right benchmark for a table that `benchmark` cannot use; "" if nothing speaks for one.

    It is for the errors of a benchmark's own check.
    """
    if known.get(benchmark.name.lower()) is not benchmark:
        return ""
    verdict = _md5(benchmark, table) or _other_marks(benchmark, table) or _sign(benchmark, table, known)
    kind = kind_of(table)
    right = verdict.right if verdict else ()
    if not right and kind not in (None, getattr(benchmark, "kind", None)):
        right = _of_kind(kind, known)
    return _advice(right) if right else ""


def told_identity(benchmark: Named, table: Table) -> str:
    """What a reader should know of a table before comparing numbers with published ones."""
    public = PUBLIC_TABLES.get(benchmark.name)
    rows = _rows_with_image(table)
    if public is None:
        return f"{rows:,} rows"
    if table.md5 == public.md5:
        return f"the public table ({rows:,} rows, MD5 as in VLMEvalKit 0.2rc1)"
    if public.rows is None or table.is_json_lines:
        return f"{rows:,} rows; not the file of VLMEvalKit 0.2rc1"
    if rows < public.rows:
        return f"{rows:,} of the {public.rows:,} rows of the public table; not comparable with published scores"
    return f"{rows:,} rows, as many as the public table, but not the file of VLMEvalKit 0.2rc1"


def kind_of(table: Table) -> str | None:
    """What the columns and answers of a table are for, however they are written; None if it has no questions."""
    columns = set(table.columns)
    if {"expression", "bbox"} <= columns:
        return BOXES
    if "question" not in columns:
        return None
    answers = [row.cells.get("answer", "") for row in table.rows]
    given = [answer for answer in answers if answer.strip()]
    options = _first_options(table)
    if options:
        with_options = sum(all(row.cells[name] for name in options) for row in table.rows)
        letters = sum(bool(_LETTER.fullmatch(plain_word(answer))) for answer in given)
        meant = {"A", "B"} <= columns or letters
        if meant and 2 * with_options >= len(table.rows) and 2 * letters >= len(given):
            return CHOICE
    if given and all(plain_word(answer) in _YES_NO for answer in given):
        return YES_NO
    return TEXT


def _proof(benchmark: Named, table: Table, known: Mapping[str, Named]) -> Verdict | None:
    kind = getattr(benchmark, "kind", None)
    verdict = _md5(benchmark, table)
    if verdict is None and kind is not None:
        verdict = _other_kind(kind, table, known) or _other_marks(benchmark, table)
    if verdict is None and kind == TEXT:
        verdict = _other_answers(benchmark, table, known)
    if verdict is None and kind == CHOICE:
        verdict = _rotations(benchmark, table) or _language(benchmark, table)
    return verdict


def _md5(benchmark: Named, table: Table) -> Verdict | None:
    for name, public in PUBLIC_TABLES.items():
        if table.md5 == public.md5 and name != benchmark.name:
            return Verdict(f"its MD5 sum {public.md5} is that of {name}", (name,))
    return None


def _other_kind(kind: str, table: Table, known: Mapping[str, Named]) -> Verdict | None:
    found = kind_of(table)
    if (found in (CHOICE, BOXES) and kind != found) or (found == YES_NO and kind == CAPTIONS):
        signs = {BOXES: "it has boxes", YES_NO: "all answers are yes or no"}
        sign = signs.get(found) or _choice_sign(table)
        named = tuple(filter(None, [_by_file_name(table, known), _by_rows(table, known)]))
        named = tuple(name for name in dict.fromkeys(named) if getattr(known[name.lower()], "kind", None) == found)
        return Verdict(f"it is {found} ({sign}), and that benchmark asks {kind}", named or _of_kind(found, known))
    return None


def _first_options(table: Table) -> list[str]:
    """Columns that hold the first options, or all of them."""
    return ["A", "B"] if {"A", "B"} <= set(table.columns) else option_columns(table)[:2]


def _choice_sign(table: Table) -> str:
    options = _first_options(table)
    rename = "" if options == ["A", "B"] else ", which are called A, B, ... here: rename them,"
    column = f"column {options[0]} holds" if len(options) == 1 else f"columns {' and '.join(options)} hold"
    return f"{column} options{rename} and the answers are letters"


def _other_marks(benchmark: Named, table: Table) -> Verdict | None:
    """Categories and splits that only one benchmark has."""
    kind = kind_of(table)
    categories = {name for row in table.rows for name in row.cells.get("category", "").split(",") if name.strip()}
    splits = {row.cells["split"] for row in table.rows if row.cells.get("split")}
    marks = (
        ("POPE", YES_NO, "categories", categories, frozenset(POPE_SETS)),
        ("MME", YES_NO, "categories", categories, MME_CATEGORIES),
        ("ChartQA_TEST", TEXT, "splits", splits, CHARTQA_SPLITS),
    )
    for name, own_kind, what, found, own in marks:
        if kind == own_kind and found and _folded(found) <= _folded(own) and name != benchmark.name:
            return Verdict(f"its {what} ({', '.join(sorted(found)[:3])}) are those of {name}", (name,))
    return None


def _folded(names: Iterable[str]) -> set[str]:
    """Names whose case and spaces make no difference."""
    return {name.strip().lower() for name in names}


def _other_answers(benchmark: Named, table: Table, known: Mapping[str, Named]) -> Verdict | None:
    """Open questions: one accepted answer, or those of ten people. A single row tells nothing."""
    by_people = getattr(benchmark, "metric", "") == "VQA accuracy"
    answers = [row.cells.get("answer", "") for row in table.rows]
    if len(answers) < 2 or not all(answers):
        return None
    counts = {len(kit_answers(answer)) for answer in answers}
    others = [one for one in _main(known) if getattr(one, "kind", None) == TEXT]
    if by_people and counts == {1}:
        right = tuple(one.name for one in others if getattr(one, "metric", "") != "VQA accuracy")
        reason = "each row has one accepted answer, and VQA accuracy needs those of several people"
        return Verdict(reason, _narrowed(right, table, known))
    if not by_people and counts == {ANNOTATORS}:
        right = tuple(one.name for one in others if getattr(one, "metric", "") == "VQA accuracy")
        reason = f"each row has the answers of {ANNOTATORS} people, which are for VQA accuracy"
        return Verdict(reason, _narrowed(right, table, known))
    return None


def _rotations(benchmark: Named, table: Table) -> Verdict | None:
    wanted = getattr(benchmark, "rotations", None)
    if wanted is None or len(table.rows) < 2:
        return None
    indices = {row.index for row in table.rows if isinstance(row.index, int)}
    rotated = [index for index in indices if index >= ROTATION_OFFSET and index % ROTATION_OFFSET in indices]
    if rotated and not wanted:
        return Verdict(
            f"it asks each question in rotated forms ({len(rotated)} rows with an index of {ROTATION_OFFSET:,} and "
            "more), which count only together",
            ("MMBench_DEV_EN", "CCBench"),
        )
    if wanted and not rotated:
        return Verdict(
            f"no row has an index of {ROTATION_OFFSET:,} or more, so no question is asked in rotated forms, and every "
            "one would count as wrong",
            ("AI2D_TEST", "MMStar", "SEEDBench_IMG"),
        )
    return None


def _language(benchmark: Named, table: Table) -> Verdict | None:
    """MMBench's two languages have different instructions."""
    chinese = getattr(benchmark, "chinese", None)
    if chinese is None or len(table.rows) < 2:
        return None
    share = sum(any(map(is_cjk, row.cells["question"])) for row in table.rows) / len(table.rows)
    if (share > 0.5) == chinese:
        return None
    there, other = ("_EN", "_CN") if share > 0.5 else ("_CN", "_EN")
    language = "Chinese" if share > 0.5 else "not Chinese"
    return Verdict(f"most of its questions are {language}", (benchmark.name.replace(there, other),))


def _sign(benchmark: Named, table: Table, known: Mapping[str, Named]) -> Verdict | None:
    """What the name of the file and the number of rows say."""
    named = _by_file_name(table, known, benchmark)
    if named is not None and named != benchmark.name:
        return Verdict(f"the name of the file says {named}", (named,), proof=False)
    rows, own = _rows_with_image(table), PUBLIC_TABLES.get(benchmark.name)
    if own is None or own.rows is None or rows == own.rows or named == benchmark.name or table.is_json_lines:
        return None
    same = _by_rows(table, known)
    if same is not None:
        return Verdict(f"it has {rows:,} rows, as {same} has, and not {own.rows:,}", (same,), proof=False)
    if rows > own.rows:
        kind = kind_of(table)
        reason = f"it has {rows:,} rows, more than the {own.rows:,} of the public table"
        return Verdict(reason, tuple(name for name in _of_kind(kind, known) if name != benchmark.name), proof=False)
    return None


def _form(benchmark: Named, table: Table) -> str | None:
    """What a table lacks of the form of the public one, as one's own may. A single row tells nothing."""
    column = OWN_COLUMNS.get(benchmark.name)
    if len(table.rows) < 2:
        return None
    if column is not None and column not in table.columns:
        return f"it has no column {column}"
    answers = [answer for row in table.rows if (answer := row.cells.get("answer", ""))]
    if getattr(benchmark, "metric", "") == "VQA accuracy" and answers:
        most = max(len(kit_answers(answer)) for answer in answers)
        if most < ANNOTATORS:
            return f"no row has the answers of {ANNOTATORS} people, {most} at most"
    if problem := _other_form_of_answers(benchmark, table, answers):
        return problem
    questions = {question for row in table.rows if (question := row.cells.get("question", "").strip())}
    if getattr(benchmark, "kind", None) == CAPTIONS and 1 < len(questions) and len(table.rows) < 4 * len(questions):
        return f"its rows ask {len(questions)} different questions, and captions answer one"
    return None


def _other_form_of_answers(benchmark: Named, table: Table, answers: list[str]) -> str | None:
    """Answers or categories that no public table of the benchmark has."""
    if benchmark.name in ONE_ANSWER and any(len(set(kit_answers(answer))) > 1 for answer in answers):
        return "rows have several accepted answers, and that one has one"
    if getattr(benchmark, "metric", "") == "ANLS" and answers and not any(answer.startswith("[") for answer in answers):
        return "no answer is a list of accepted texts"
    own = {"POPE": _folded(POPE_SETS), "MME": _folded(MME_CATEGORIES)}.get(benchmark.name)
    categories = _folded(
        name for row in table.rows for name in row.cells.get("category", "").split(",") if name.strip()
    )
    if own is not None and categories and not categories & own:
        return f"none of its categories ({', '.join(sorted(categories)[:3])}) is one of {benchmark.name}"
    if getattr(benchmark, "kind", None) == CHOICE:
        lost = [row.index for row in table.rows if _has_no_option(row.cells)]
        if lost:
            return f"the right answer of {len(lost)} rows is no option, which counts as wrong (index {lost[0]})"
    return None


def _has_no_option(cells: Mapping[str, str]) -> bool:
    """Whether the answer is a letter, and a row with options has none under it."""
    answer = cells.get("answer", "").strip()
    return len(answer) == 1 and answer.isupper() and bool(cells.get("A")) and not cells.get(answer)


def _by_file_name(table: Table, known: Mapping[str, Named], benchmark: Named | None = None) -> str | None:
    """The benchmark whose name the file's name is, or begins with (AI2D_TEST_part2.tsv). A name of a family, such as
    MMBench, does not speak against `benchmark`, one of its sets."""
    stem = table.path.stem.lower()
    fits = [name for name in known if re.fullmatch(rf"{re.escape(name)}(?:[^a-z0-9].*)?", stem)]
    if not fits:
        return None
    name = max(fits, key=len)
    if benchmark is not None and benchmark.name.lower().startswith(name):
        return benchmark.name
    return known[name].name


def _by_rows(table: Table, known: Mapping[str, Named]) -> str | None:
    """The benchmark of the table's kind whose public table has as many rows."""
    kind, rows = kind_of(table), _rows_with_image(table)
    for name, public in PUBLIC_TABLES.items():
        if public.rows == rows and getattr(known[name.lower()], "kind", None) == kind:
            return name
    return None


def _rows_with_image(table: Table) -> int:
    return sum(row.image_count > 0 for row in table.rows)


def _narrowed(names: tuple[str, ...], table: Table, known: Mapping[str, Named]) -> tuple[str, ...]:
    """One of `names` if the file's name or its number of rows speaks for it, else all."""
    for found in (_by_file_name(table, known), _by_rows(table, known)):
        if found in names:
            return (found,)
    return names


def _of_kind(kind: str | None, known: Mapping[str, Named]) -> tuple[str, ...]:
    return tuple(one.name for one in _main(known) if getattr(one, "kind", None) == kind)


def _main(known: Mapping[str, Named]) -> Iterable[Named]:
    """Every benchmark once, by name."""
    return sorted({one.name: one for one in known.values()}.values(), key=lambda one: one.name)


def _advice(right: tuple[str, ...]) -> str:
    own = "give a name of your own to score it by its columns"
    if len(right) == 1:
        return f"Score it as {right[0].lower()} (--evaluation-dataset), or {own}."
    if right:
        return f"It may be {', '.join(name.lower() for name in right)}: give the right one, or {own}."
    return f"Correct --evaluation-dataset or --dataset-path, or {own}."
