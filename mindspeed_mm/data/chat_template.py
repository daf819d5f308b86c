"""The chat template that comes with a tokenizer, turned into a Template.

A chat template is a program (Jinja). It is run in a sandbox, on conversations of marks instead of texts, and the forms
of a Template are read off what stands between the marks. A template whose turns do not have one fixed form is refused,
because no mask could be proven for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mindspeed_mm.data.template_form import SLOT, SYSTEM_SLOT, Template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import TemplateError

_CURE = "name one of the templates instead (--template, or template_name in data.json)."
MARKS = ("aMARKa", "bMARKb", "cMARKc", "dMARKd")
_GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")
"""transformers' marks around answers, which print nothing."""

ROLES = ("user", "assistant", "user", "assistant")
TURNS = (("human", "user", ROLES[:2]), ("gpt", "assistant", ROLES[:2]), ("system", "system", ("system", "user")))
"""A turn of ours, its role in a chat template, and the roles of the shortest talk that has it."""


def template_from_tokenizer(tokenizer: Tokenizer) -> Template:
    """Raises TemplateError where there is no chat template, or none that is made of turns of one form."""
    sources = tokenizer.chat_templates
    if not sources:
        raise TemplateError(
            "the tokenizer has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja); "
            f"{_CURE}"
        )
    errors: list[TemplateError] = []
    for source in sources:
        for content in (_as_text, _as_parts):  # those of processors take a list of parts
            try:
                return _read(_Program(source, tokenizer, content))
            except TemplateError as error:
                errors.append(error)
    raise errors[0]


def _read(program: _Program) -> Template:
    one, two = program.run(1), program.run(3)
    opening, before = program.run(0, generation=True), program.run(0)
    first, tail = opening[0], one[2]
    close = before[1]
    header = opening[1].removeprefix(close)
    end = tail.rstrip()
    later = two[2].removeprefix(tail)
    fits = (
        opening[1].startswith(close)
        and one[:2] == [first, close + header]
        and two[:2] == one[:2]
        and two[2].startswith(tail)
        and two[3:] == [close + header, tail]
        and end.strip() == end != ""
    )
    if not fits:
        raise TemplateError(
            "the tokenizer's chat template does not give every turn the same form and every answer an end mark, so no "
            f"label mask can be proven for it; {_CURE}"
        )
    human = later + SLOT + close
    return Template(
        human_first=first + SLOT + close,
        human=human,
        with_system=program.with_system(close),
        gpt_header=header,
        gpt=SLOT + end,
        gpt_empty=end,
        gpt_footer=tail[len(end) :],
        end=end,
        stop=tuple(dict.fromkeys((end, program.eos))),
        trimmed=program.trimmed(),
    )


class _Program:
    """A chat template that can be run on marks."""

    def __init__(self, source: str, tokenizer: Tokenizer, content: Callable[[str], Any]):
        self._content = content
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        # strftime_now stays undefined: prompts must not depend on the day.
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(_GENERATION.sub(_as_condition, source))
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"the tokenizer's chat template is no valid Jinja: {error}. Correct it, or {_CURE}"
            ) from error
        bos = tokenizer.bos_token_id
        self._bos = "" if bos is None else tokenizer.pieces([bos])[0]
        self.eos = tokenizer.pieces([tokenizer.eos_token_id])[0]
        self._adds_bos = bos is not None and tokenizer.encode("a")[0] == bos

    def run(self, last: int, generation: bool = False) -> list[str]:
        """What stands before, between and behind the marks of the turns 0 to `last`."""
        messages = [{"role": ROLES[index], "content": self._content(MARKS[index])} for index in range(last + 1)]
        return self._between(self._render(messages, generation), MARKS[: last + 1])

    def with_system(self, close: str) -> str | None:
        """The form of a system text and the first question; None where the template has no place for it."""
        system, user = self._content(MARKS[1]), self._content(MARKS[0])
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            before, between, behind = self._between(self._render(messages, False), (MARKS[1], MARKS[0]))
        except TemplateError:
            return None  # the template itself refuses system texts, or leaves them out
        return before + SYSTEM_SLOT + between + SLOT + behind if behind == close else None

    def trimmed(self) -> tuple[str, ...]:
        """Turns from whose texts the template takes white space at both ends."""
        return tuple(turn for turn, role, roles in TURNS if self._trims(role, roles))

    def _trims(self, role: str, roles: tuple[str, ...]) -> bool:
        texts = []
        for blank in ("", " \n"):
            marks = [blank + MARKS[0] + blank if role == other else MARKS[1] for other in roles]
            talk = [{"role": other, "content": self._content(mark)} for other, mark in zip(roles, marks, strict=True)]
            try:
                texts.append(self._render(talk, False))
            except TemplateError:  # no place for system texts
                return False
        return texts[0] == texts[1] and MARKS[0] in texts[0]

    def _render(self, messages: list[dict[str, Any]], generation: bool) -> str:
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=generation, bos_token=self._bos, eos_token=self.eos
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateError(
                f"the tokenizer's chat template cannot be run: {error}. Correct it, or {_CURE}"
            ) from error
        # The tokenizer puts BOS in front by itself where its checkpoint has it.
        return text.removeprefix(self._bos) if self._adds_bos else text

    @staticmethod
    def _between(text: str, marks: tuple[str, ...]) -> list[str]:
        pieces = []
        for mark in marks:
            if text.count(mark) != 1:
                raise TemplateError(f"the tokenizer's chat template leaves out or repeats a turn; {_CURE}")
            before, text = text.split(mark)
            pieces.append(before)
        return [*pieces, text]


def _as_condition(mark: re.Match[str]) -> str:
    """A statement without effect in the place of a mark, which takes away the same blanks."""
    return f"{mark[1]}{'endif' if mark[2] else 'if true'}{mark[3]}"


def _as_text(text: str) -> str:
    return text


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
