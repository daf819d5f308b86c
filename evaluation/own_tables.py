"""Tables of a user's own: which kind of questions they ask, read from columns and answers.

What differs from a known form by letter case, spaces or a full stop only is read as meant, or refused with both
readings where both make sense; nothing is scored as another kind because of it.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmark import refuse_missing_answers
from evaluation.benchmarks.mcq._choice import MultipleChoice, options_of, refuse_rotations
from evaluation.benchmarks.vqa._open import OWN_QUESTIONS, OpenQuestions
from evaluation.benchmarks.yesno._yesno import YES_NO_WORDS, YesNo
from evaluation.scorers.cells import strict_answers
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError

_MARKS = " \t\r\n.,;:!()[]\"'\u3002"
"""What may stand around an answer without changing it."""

_OPTION = re.compile(
    r"\W*(option|opt|choice|answer|ans)[\s_-]*([a-z]|[0-9]{1,2})\W*|\W+[a-z]\W*|[a-z]\W+", re.IGNORECASE
)
_OPTIONS = frozenset(("options", "choices", "candidates", "option", "choice"))
"""Names of columns that may be one option, or all of them."""

_LISTED = re.compile(r"\s*\[\s*['\"].*", re.DOTALL)
"""How a list of texts begins."""


@dataclass(frozen=True)
class OwnChoice(MultipleChoice):
    """Multiple choice whose letters are also read as "a", "A." or "(A)", where an option has that letter."""

    def truth(self, cells: Mapping[str, str]) -> str:
        """The letter that an answer cell means."""
        return _letter(cells.get("answer", ""), options_of(cells)) or cells.get("answer", "").strip()

    def kit_truth(self, view: Mapping[str, str]) -> str | None:
        """The same letter: VLMEvalKit has no rule for answers that are none."""
        return self.truth(view) or None

    def check(self, table: Table) -> None:
        """Raise DataError for an answer that is no letter of an option, or may be a letter and an option's text."""
        refuse_rotations(self.name, table)
        refuse_missing_answers(table)
        for row in table.rows:
            answer, options = row.cells.get("answer", ""), options_of(row.cells)
            if not answer.strip() or (not options and re.fullmatch(r"\s*[A-Z]\s*", answer)):
                continue
            where = f'{table.path}, row with index {row.index}: the answer is "{answer[:40]}"'
            letter, same = _letter(answer, options), _options_with_text(answer, options)
            if letter is None:
                text = f" It is the text of option {same[0]}." if len(same) == 1 else ""
                found = ", ".join(options) or "none"
                raise DataError(
                    f"{where}; expected the letter of an option, here {found}.{text} Replace texts in column answer "
                    "by letters; for questions whose answer is a text, rename columns A, B, ..."
                )
            if answer.strip() != letter and same and same != [letter]:
                raise DataError(
                    f"{where}, which may mean option {letter} or option {same[0]}, whose text it is; write the capital "
                    "letter of the right one."
                )


@dataclass(frozen=True)
class OwnYesNo(YesNo):
    """Yes-no questions whose answers may be written in any case and with a full stop."""

    def truth(self, cells: Mapping[str, str]) -> str:
        """ "yes" or "no"."""
        return plain_word(cells["answer"])


def own_benchmark(name: str, table: Table) -> MultipleChoice | YesNo | OpenQuestions | None:
    """A benchmark for a table of the user's own; None for one without questions.

    Raises DataError when the columns or answers can be taken for two kinds.
    """
    columns = set(table.columns)
    if "question" not in columns:
        return None
    if {"A", "B"} <= columns:
        return OwnChoice(name)
    _refuse_half_options(table)
    answers = [row.cells.get("answer", "") for row in table.rows]
    given = [answer for answer in answers if answer.strip()]
    if not given or not all(plain_word(answer) in YES_NO_WORDS for answer in given):
        _refuse_near_answers(table, given)
        return OWN_QUESTIONS(name)
    empty = [row.index for row, answer in zip(table.rows, answers, strict=True) if not answer.strip()]
    if empty:
        raise DataError(
            f"{table.path}: {len(empty)} rows have no answer, for example index {empty[0]}, and all others are Yes or "
            "No. Read as yes-no questions, those rows lack their answer: fill it in, or remove them. Read as open "
            "questions, an empty text is the right answer there: write the others as lists, ['Yes']."
        )
    return OwnYesNo(name)


def option_columns(table: Table) -> list[str]:
    """Columns that are options (A, B), or may be: a, b in lower case, A without B, option_a, or all of them in one."""
    single = [name for name in table.columns if re.fullmatch("[A-Za-z]", name)]
    lower = {name for name in single if name.islower()}
    named = [name for name in table.columns if _OPTION.fullmatch(name) or name.strip().lower() in _OPTIONS]
    return single + named if {"a", "b"} <= lower or {"A", "B"} & set(single) or named else []


def _refuse_half_options(table: Table) -> None:
    """Columns that may be options, but are not called A and B."""
    found = option_columns(table)
    if not found:
        return
    raise DataError(
        f"{table.path} has columns {', '.join(found)}. Read as multiple choice, the columns of the options are called "
        "A, B, ...: rename them so, and give at least two. Read as open questions, they are no options: give them "
        "other names."
    )


def _refuse_near_answers(table: Table, given: Sequence[str]) -> None:
    """Answers that are no texts but nearly yes and no, or nearly a list of accepted texts."""
    if {plain_word(answer) for answer in given} == {"y", "n"}:
        raise DataError(
            f"{table.path}: all answers are Y or N. Read as yes-no questions, they are written Yes and No: write them "
            "so. Read as open questions, only Y and N would be right: write them as lists, ['Y']."
        )
    for row in table.rows:
        answer = row.cells.get("answer", "")
        if _LISTED.match(answer) and strict_answers(answer) == [answer]:
            raise DataError(
                f'{table.path}, row with index {row.index}: the answer is "{answer[:40]}". Read as a list, it is '
                "not whole: write each text in quotes, ['3', '4']. Read as one text, put it in a list of one."
            )


def plain_word(answer: str) -> str:
    """An answer in lower case, without the marks around it: "yes" for "Yes."."""
    return unicodedata.normalize("NFKC", answer).strip(_MARKS).lower()


def _letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer cell names by its letter; None if none has it."""
    if answer.strip() in options:
        return answer.strip()
    letter = answer.strip(_MARKS).upper()
    return letter if letter in options else None


def _options_with_text(answer: str, options: Mapping[str, str]) -> list[str]:
    wanted = answer.strip().lower()
    return [letter for letter, text in options.items() if text.strip().lower() == wanted]
