"""Conversations as one string: what a template makes of turns, in pieces that know whether they are supervised."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.conversation import conversation_turns
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.template_form import IMAGES_SLOT, SLOT, SYSTEM_SLOT, Template
from mindspeed_mm.errors import TemplateError


class Segment(NamedTuple):
    """A piece of the rendered string."""

    text: str
    supervised: bool = False
    start: int = 0
    """Where the turn's own text begins in `text`, and where it ends; the rest is the template's."""
    end: int = 0
    literal: tuple[int, ...] = ()
    """Where in `text` an `<image>` begins that is no image."""


def render(conversation: Mapping[str, Any] | Sequence[Any], template: str | Template) -> str:
    """The string that a conversation is trained on (BOS aside). See `encode` for arguments and errors."""
    return render_turns(conversation_turns(conversation), template)


def render_turns(turns: Sequence[Turn], template: str | Template) -> str:
    """As `render`, for turns that `conversation_turns` has checked."""
    return "".join(segment.text for segment in segments_of(turns, get_template(template)))


def generation_prompt(turns: Sequence[Sequence[str | None]], template: str | Template) -> str:
    """The prompt of (question, answer) pairs whose last answer is open (None). Texts are used as they are.

    Raises TemplateError when another answer is open or the last one is not.
    """
    segments = segments_of(open_turns(turns), get_template(template), generation=True)
    return "".join(segment.text for segment in segments)


def open_turns(pairs: Sequence[Sequence[str | None]]) -> list[Turn]:
    """Turns of (question, answer) pairs whose last answer is open (None). Raises TemplateError."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        last = index == len(pairs) - 1
        if question is None or (answer is None) != last:
            raise TemplateError(
                f"pair {index} of the prompt is {(question, answer)!r}; expected (question, answer) pairs with an "
                "answer of None in the last pair only."
            )
        turns += [Turn("human", question), Turn("gpt", answer or "")]
    if not turns:
        raise TemplateError("the prompt has no turns; expected at least one (question, None) pair.")
    return turns


def segments_of(turns: Sequence[Turn], template: Template, generation: bool = False) -> list[Segment]:
    """The rendered string in pieces. In `generation` the last answer is open: only its header is there."""
    if template.captions_only:
        turns = _caption_turns(turns, template)
    turns = [_trimmed(turn) if turn.role in template.trimmed else turn for turn in turns]
    if turns[0].role == "system":
        segments, turns = _opening(turns, template), turns[2:]
    else:
        first = template.human if template.human_first is None else template.human_first
        segments = [Segment(template.prefix), _human(turns[0], template, first)]
        turns = turns[1:]
    for index, turn in enumerate(turns):
        if turn.role == "human":
            segments.append(_human(turn, template, template.human))
            continue
        segments.append(Segment(template.gpt_header))
        if not (generation and index == len(turns) - 1):
            # To end at once is not to be learned; LLaVA's captions alone have it.
            empty = Segment(template.gpt_empty, template.captions_only)
            body = _fill(template.gpt, turn, supervised=turn.learned) if turn.text else empty
            segments += [body, Segment(template.gpt_footer)]
    if not generation:
        segments.append(Segment(template.suffix))
    return segments


def _opening(turns: Sequence[Turn], template: Template) -> list[Segment]:
    """A system text and the first human turn."""
    if template.with_system is None:
        raise TemplateError("this template has no place for a system text; remove it, or choose another template.")
    if len(turns) < 2:
        raise TemplateError("a system text alone is no conversation; expected a human turn behind it.")
    form, turn = _with_images(template.with_system, turns[1], template)
    system, human = form.split(SLOT)[0], SLOT + form.split(SLOT)[1]
    before, after = system.split(SYSTEM_SLOT)
    return [_fill(before + SLOT, turns[0]), _fill(after + human, turn)]


def _human(turn: Turn, template: Template, form: str) -> Segment:
    if not turn.text and template.human_empty is not None:
        if form == template.human_first:
            raise TemplateError("the first human turn is empty; this template puts its system text there. Add a text.")
        return Segment(template.human_empty)
    return _fill(*_with_images(form, turn, template))


def _with_images(form: str, turn: Turn, template: Template) -> tuple[str, Turn]:
    """A human turn's form with its images in their place, and the turn without them."""
    if template.image is None:
        return form, turn
    turn, images = without_images(turn)
    return form.replace(IMAGES_SLOT, template.image * images), turn


def without_images(turn: Turn) -> tuple[Turn, int]:
    """A turn without its images and the white space around them, and how many it had."""
    text, literal, begin, images = "", [], 0, 0
    for found in re.finditer(rf"\s*{re.escape(IMAGE_TOKEN)}\s*", turn.text):
        start = found.start() + found[0].index(IMAGE_TOKEN)
        if start in turn.literal:
            continue
        literal += [len(text) + place - begin for place in turn.literal if begin <= place < found.start()]
        text += turn.text[begin : found.start()]
        text += " " if text and found.end() < len(turn.text) else ""
        begin, images = found.end(), images + 1
    literal += [len(text) + place - begin for place in turn.literal if begin <= place]
    text += turn.text[begin:]
    return replace(turn, text=text, literal=tuple(literal)), images


def _trimmed(turn: Turn) -> Turn:
    """A turn without white space at the ends of its text."""
    start = len(turn.text) - len(turn.text.lstrip())
    return replace(turn, text=turn.text.strip(), literal=tuple(place - start for place in turn.literal))


def questions_of(turns: Sequence[Turn]) -> list[str]:
    """For each image the text of the turn that it stands in."""
    found = (without_images(turn) for turn in turns)
    return [turn.text for turn, images in found for _ in range(images)]


def _fill(form: str, turn: Turn, supervised: bool = False) -> Segment:
    """A form with the text of a turn in its slot."""
    before, after = form.split(SLOT)
    start = len(before)
    literal = tuple(start + place for place in turn.literal)
    return Segment(before + turn.text + after, supervised, start, start + len(turn.text), literal)


def _caption_turns(turns: Sequence[Turn], template: Template) -> list[Turn]:
    """Images and captions: of the human turns only the images stay (LLaVA's preprocess_plain)."""
    several = template.captions_in_context
    images = [turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "human"]
    if [turn.role for turn in turns] != ["human", "gpt"] * (len(turns) // 2 if several else 1) or 0 in images:
        found = " and ".join(map(str, images if several else images[:1])) or "0"
        before = ", behind others as examples" if several else ""
        raise TemplateError(
            f"a caption template takes one human turn with an image and one gpt turn{before}; found {len(turns)} turns "
            f"with {found} images. Use a chat template such as v1 for this data."
        )
    counts = iter(images)
    return [Turn("human", IMAGE_TOKEN * next(counts)) if turn.role == "human" else turn for turn in turns]
