"""Conversation templates: how turns become one string, which of its tokens are supervised, where an answer stops.

Templates are JSON files in the folder `templates`; a new one is a new file. The name "tokenizer" stands for the chat
template that comes with the tokenizer (see chat_template.py). Masks come from the turns themselves: the rendered string
is made of segments that know whether they are supervised, and every token takes the mask of the segment in which it
starts. Nothing is ever searched for in the rendered string, so no text of a user can shift a mask.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mindspeed_mm.config.load import StrictModel, load_config, nearest
from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.conversation import conversation_turns, count_images
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import TemplateError

FOLDER = Path(__file__).parent / "templates"

OWN_TEMPLATE = "tokenizer"
"""The name that stands for the tokenizer's own chat template."""

SLOT = "{text}"
SYSTEM_SLOT = "{system}"

SpecialText = Literal["tokens", "text"]
"""What the text of a special token ("</s>") becomes where a user or an answer holds it: the token, as in the original
LLaVA, or plain text, which cannot end a turn."""


class Segment(NamedTuple):
    """A piece of the rendered string."""

    text: str
    supervised: bool = False
    start: int = 0
    """Where the turn's own text begins in `text`, and where it ends; the rest is the template's."""
    end: int = 0
    literal: tuple[int, ...] = ()
    """Where in `text` an `<image>` begins that is no image."""


class Template(StrictModel):
    """A template's file. `{text}` stands for the text of the turn, once in each form. Wordings are those of LLaVA's
    conversation.py where it has the template."""

    aliases: tuple[str, ...] = ()
    prefix: str = ""
    """What comes before the first turn."""

    human: str
    human_first: str | None = None
    """The first human turn where it differs (a system text inside)."""

    with_system: str | None = None
    """Start of a conversation that brings its own system text: prefix and first human turn with `{system}` and
    `{text}`; None: such a conversation is refused."""

    human_empty: str | None = None
    """A human turn without text; None: as any other."""

    gpt_header: str = ""
    """Opens an answer; not supervised."""

    gpt: str
    """An answer behind its header, end marker included; supervised."""

    gpt_empty: str = ""
    """An answer without text (LLaVA leaves the end marker out)."""

    gpt_footer: str = ""
    """What follows an answer; not supervised."""

    suffix: str = ""
    """What ends a conversation; not supervised."""

    end: str
    """The end marker of an answer: one token, unless `end_is_text`."""

    end_is_text: bool = False
    """The end marker is ordinary text, of any number of tokens."""

    stop: tuple[str, ...]
    """Strings that end generation."""

    captions_only: bool = False
    """The template is one image and its caption: the human text is dropped, exactly one answer follows."""

    @cached_property
    def digest(self) -> str:
        """Changes with any field."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@lru_cache(maxsize=1)
def _templates() -> dict[str, Template]:
    """Every template by its name (the file's) and its aliases."""
    found: dict[str, Template] = {}
    for path in sorted(FOLDER.glob("*.json")):
        template = load_config(Template, path, what="template")
        for name in (path.stem, *template.aliases):
            if name in found:
                raise TemplateError(f'the template name "{name}" is used twice, the second time in {path.name}.')
            found[name] = template
    return found


def template_names() -> list[str]:
    """Names and aliases of all templates."""
    return sorted([*_templates(), OWN_TEMPLATE])


def get_template(template: str | Template, tokenizer: Tokenizer | None = None) -> Template:
    """The template of a name or alias (a Template is returned as it is).

    "tokenizer" is the chat template of the `tokenizer` that is given. Raises TemplateError for an unknown name, or
    where the tokenizer has no chat template or one that is not made of turns.
    """
    if isinstance(template, Template):
        return template
    if template == OWN_TEMPLATE:
        if tokenizer is None:
            raise TemplateError('the template "tokenizer" needs the tokenizer that brings it; name another one here.')
        from mindspeed_mm.data.chat_template import template_from_tokenizer

        return template_from_tokenizer(tokenizer)
    templates = _templates()
    if template not in templates:
        close = nearest(template, template_names())
        hint = f'did you mean "{close}"?' if close else f"known: {', '.join(sorted(templates))}"
        raise TemplateError(f'unknown template "{template}"; {hint}')
    return templates[template]


def render(conversation: Mapping[str, Any] | Sequence[Any], template: str | Template) -> str:
    """The string that a conversation is trained on (BOS aside). See `encode` for arguments and errors."""
    return render_turns(conversation_turns(conversation), template)


def render_turns(turns: Sequence[Turn], template: str | Template) -> str:
    """As `render`, for turns that `conversation_turns` has checked."""
    return "".join(segment.text for segment in _segments(turns, get_template(template)))


def encode(
    conversation: Mapping[str, Any] | Sequence[Any],
    tokenizer: Tokenizer,
    template: str | Template,
    *,
    max_length: int | None = None,
    special_text: SpecialText = "tokens",
) -> tuple[list[int], list[int]]:
    """Ids and labels of a LLaVA record, or of its conversations list, as the original LLaVA preprocess gives them.

    One IMAGE_TOKEN_INDEX (-200) per image. Supervised is each answer from just after its header through its end marker;
    everything else, BOS and images have IGNORE_INDEX (-100). A text-only conversation is cut to `max_length` (default:
    the record's `model_max_length`, where it has one), one with images is not.
    `special_text="text"` keeps special tokens that someone typed plain text, which the original LLaVA does not.
    Raises DataError for a broken record, TemplateError where the conversation does not fit the template.
    """
    turns = conversation_turns(conversation)
    ids, labels = encode_turns(turns, tokenizer, template, special_text)
    if max_length is None and isinstance(conversation, Mapping):
        max_length = conversation.get("model_max_length")
    if max_length is not None and not count_images(turns):
        ids, labels = ids[:max_length], labels[:max_length]
    return ids, labels


def encode_turns(
    turns: Sequence[Turn], tokenizer: Tokenizer, template: str | Template, special_text: SpecialText = "tokens"
) -> tuple[list[int], list[int]]:
    """As `encode`, for turns that have been checked."""
    return _tokenize(_segments(turns, get_template(template, tokenizer)), tokenizer, special_text)


def generation_prompt(turns: Sequence[Sequence[str | None]], template: str | Template) -> str:
    """The prompt of (question, answer) pairs whose last answer is open (None). Texts are used as they are.

    Raises TemplateError when another answer is open or the last one is not.
    """
    segments = _segments(_open_turns(turns), get_template(template), generation=True)
    return "".join(segment.text for segment in segments)


def encode_prompt(
    turns: Sequence[Sequence[str | None]],
    tokenizer: Tokenizer,
    template: str | Template,
    *,
    system: str | None = None,
    special_text: SpecialText = "tokens",
) -> list[int]:
    """Ids of `generation_prompt`, one IMAGE_TOKEN_INDEX (-200) per `<image>`; `system` replaces the system text."""
    opened = [Turn("system", system)] if system is not None else []
    segments = _segments(opened + _open_turns(turns), get_template(template, tokenizer), generation=True)
    return _tokenize(segments, tokenizer, special_text)[0]


def _open_turns(pairs: Sequence[Sequence[str | None]]) -> list[Turn]:
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


def _segments(turns: Sequence[Turn], template: Template, generation: bool = False) -> list[Segment]:
    """The rendered string in pieces. In `generation` the last answer is open: only its header is there."""
    if template.captions_only:
        turns = _caption_turns(turns)
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
            body = _fill(template.gpt, turn, supervised=True) if turn.text else Segment(template.gpt_empty, True)
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
    system, human = template.with_system.split(SLOT)[0], SLOT + template.with_system.split(SLOT)[1]
    before, after = system.split(SYSTEM_SLOT)
    return [_fill(before + SLOT, turns[0]), _fill(after + human, turns[1])]


def _human(turn: Turn, template: Template, form: str) -> Segment:
    if not turn.text and template.human_empty is not None:
        if form == template.human_first:
            raise TemplateError("the first human turn is empty; this template puts its system text there. Add a text.")
        return Segment(template.human_empty)
    return _fill(form, turn)


def _fill(form: str, turn: Turn, supervised: bool = False) -> Segment:
    """A form with the text of a turn in its slot."""
    before, after = form.split(SLOT)
    start = len(before)
    literal = tuple(start + place for place in turn.literal)
    return Segment(before + turn.text + after, supervised, start, start + len(turn.text), literal)


def _caption_turns(turns: Sequence[Turn]) -> list[Turn]:
    """An image and its caption: of the human turn only the images stay (LLaVA's preprocess_plain)."""
    images = turns[0].text.count(IMAGE_TOKEN)
    if len(turns) != 2 or not images:
        raise TemplateError(
            f"a caption template takes one human turn with an image and one gpt turn; found {len(turns)} turns with "
            f"{images} images in the first. Use a chat template such as v1 for this data."
        )
    return [Turn("human", IMAGE_TOKEN * images), turns[1]]


def _tokenize(
    segments: Iterable[Segment], tokenizer: Tokenizer, special_text: SpecialText = "tokens"
) -> tuple[list[int], list[int]]:
    """Tokenise the joined segments, cut at each image; every piece is encoded on its own, as LLaVA does."""
    segments = list(segments)
    text = "".join(segment.text for segment in segments)
    # One flag per character, one more for tokens without width at the very end.
    supervised = b"".join((b"\1" if segment.supervised else b"\0") * len(segment.text) for segment in segments) + b"\0"
    literal, plain = _places(segments, special_text)
    ids: list[int] = []
    labels: list[int] = []
    for index, (begin, end) in enumerate(_between_images(text, literal)):
        if index:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        spans = [(start - begin, stop - begin) for start, stop in plain if start < end and stop > begin]
        chunk_ids, starts = tokenizer.encode_with_starts(text[begin:end], add_bos=index == 0, plain=spans)
        ids += chunk_ids
        for token_id, start in zip(chunk_ids, starts, strict=True):
            labels.append(token_id if start >= 0 and supervised[begin + start] else IGNORE_INDEX)
    return ids, labels


def _places(segments: Sequence[Segment], special_text: SpecialText) -> tuple[set[int], list[tuple[int, int]]]:
    """Where in the joined segments an `<image>` is text, and which spans hold no special tokens."""
    literal: set[int] = set()
    plain: list[tuple[int, int]] = []
    position = 0
    for segment in segments:
        literal.update(position + place for place in segment.literal)
        if special_text == "text" and segment.end > segment.start:
            plain.append((position + segment.start, position + segment.end))
        else:  # a literal <image> is no special token either
            plain += [(position + place, position + place + len(IMAGE_TOKEN)) for place in segment.literal]
        position += len(segment.text)
    return literal, plain


def _between_images(text: str, literal: set[int]) -> list[tuple[int, int]]:
    """(begin, end) of the text before, between and behind the images."""
    spans, begin = [], 0
    for match in re.finditer(re.escape(IMAGE_TOKEN), text):
        if match.start() not in literal:
            spans.append((begin, match.start()))
            begin = match.end()
    return [*spans, (begin, len(text))]


PROBE = ("Which number is it?\nSay it.", "It is 42, I think.\nYes.", "Sure?", "Yes: A.")
"""Question, answer, question, answer for the self-test of a template."""


def check_template(template: str | Template, tokenizer: Tokenizer) -> None:
    """Check that a template and a tokenizer fit: answers come back from their supervised tokens, and the end marker is
    one token of its own. Raises TemplateError otherwise; call it once before training or generation.
    """
    template = get_template(template, tokenizer)
    end_ids = None if template.end_is_text else _end_ids(template, tokenizer)
    pairs = [PROBE[:2]] if template.captions_only else [PROBE[:2], PROBE[2:]]
    turns = [turn for question, answer in pairs for turn in (Turn("human", question), Turn("gpt", answer))]
    if template.captions_only:
        turns[0] = Turn("human", IMAGE_TOKEN)
    _, labels = encode_turns(turns, tokenizer, template)
    runs = supervised_runs(labels)
    if len(runs) != len(pairs) or not all(
        _comes_back(run, answer, end_ids, template, tokenizer) for run, (_, answer) in zip(runs, pairs, strict=True)
    ):
        shown = [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
        raise TemplateError(
            f"the tokenizer does not round-trip this template: the answer {pairs[0][1]!r} with its end marker "
            f"{template.end!r} comes back as {shown[0] if shown else ''!r}. Use the tokenizer of the text decoder's "
            "checkpoint, or a template made for it."
        )


def _comes_back(
    run: list[int], answer: str, end_ids: list[int] | None, template: Template, tokenizer: Tokenizer
) -> bool:
    """Whether the supervised tokens are the answer and its end marker."""
    if end_ids is None:
        return tokenizer.decode(run).strip() == template.gpt.replace(SLOT, answer).strip()
    return run[-len(end_ids) :] == end_ids and tokenizer.decode(run[: -len(end_ids)]).strip() == answer.strip()


def _end_ids(template: Template, tokenizer: Tokenizer) -> list[int]:
    """Ids of the end marker. A visible marker must be one token, a line feed may be several bytes."""
    token_id = tokenizer.token_to_id(template.end)
    if token_id is not None:
        return [token_id]
    if template.end.strip():
        raise TemplateError(
            f"the tokenizer has no token {template.end!r}, which ends an answer in this template. Use the tokenizer of "
            "the text decoder's checkpoint, add the token, or choose another template."
        )
    behind_letter = tokenizer.encode("a" + template.end, add_bos=False)
    return behind_letter[len(tokenizer.encode("a", add_bos=False)) :]


def supervised_runs(labels: Sequence[int]) -> list[list[int]]:
    """Runs of adjacent supervised labels: one per answer, as headers part them."""
    runs: list[list[int]] = []
    previous = IGNORE_INDEX
    for label in labels:
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return runs


def describe_sample(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer) -> str:
    """A sample in readable form for the start-up log: supervised stretches in [[ ]], runs of images as <image x N>."""
    parts: list[str] = []
    index = 0
    while index < len(input_ids):
        stop = index
        kind = _kind(input_ids[index], labels[index])
        while stop < len(input_ids) and _kind(input_ids[stop], labels[stop]) == kind:
            stop += 1
        if kind == "image":
            parts.append(f"<image x {stop - index}>")
        else:
            text = "".join(tokenizer.pieces(input_ids[index:stop])).replace("\u2581", " ").replace("<0x0A>", "\n")
            parts.append(f"[[{text}]]" if kind == "supervised" else text)
        index = stop
    return "".join(parts)


def _kind(token_id: int, label: int) -> str:
    if token_id == IMAGE_TOKEN_INDEX:
        return "image"
    return "supervised" if label != IGNORE_INDEX else "context"
