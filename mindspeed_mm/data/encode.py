"""Conversations as ids and labels.

Masks come from the turns themselves: every token takes the mask of the segment in which it starts. Nothing is ever
searched for in the rendered string, so no text of a user can shift a mask.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.conversation import conversation_turns, count_images
from mindspeed_mm.data.rendering import Segment, open_turns, segments_of
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.data.tokenizer_base import Tokenizer

SpecialText = Literal["tokens", "text"]
"""What the text of a special token ("</s>") becomes where a user or an answer holds it: the token, as in the original
LLaVA, or plain text, which cannot end a turn."""


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
    form = get_template(template, tokenizer)
    ids, labels = _tokenize(segments_of(turns, form), tokenizer, form, special_text)
    if form.ends_with_eos:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return ids, labels


def encode_prompt(
    turns: Sequence[Sequence[str | None]],
    tokenizer: Tokenizer,
    template: str | Template,
    *,
    system: str | None = None,
    special_text: SpecialText = "tokens",
) -> list[int]:
    """Ids of rendering.generation_prompt, one IMAGE_TOKEN_INDEX (-200) per `<image>`; `system` replaces the system."""
    opened = [Turn("system", system)] if system is not None else []
    form = get_template(template, tokenizer)
    segments = segments_of(opened + open_turns(turns), form, generation=True)
    return _tokenize(segments, tokenizer, form, special_text)[0]


def _tokenize(
    segments: Iterable[Segment], tokenizer: Tokenizer, form: Template, special_text: SpecialText
) -> tuple[list[int], list[int]]:
    """Tokenise the joined segments, cut at each image; every piece is encoded on its own, as LLaVA does."""
    segments = list(segments)
    text = "".join(segment.text for segment in segments)
    # One flag per character, one more for tokens without width at the very end.
    supervised = b"".join((b"\1" if segment.supervised else b"\0") * len(segment.text) for segment in segments) + b"\0"
    literal, plain = _places(segments, special_text)
    ids: list[int] = []
    labels: list[int] = []
    pieces = _pieces(segments, text, literal, form.answers_apart)
    first = 0
    while form.bos_behind_images and first + 1 < len(pieces) and pieces[first].begin == pieces[first].end:
        first += 1
    for index, (begin, end, behind_image) in enumerate(pieces):
        if behind_image:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        spans = [(start - begin, stop - begin) for start, stop in plain if start < end and stop > begin]
        chunk_ids, starts = tokenizer.encode_with_starts(text[begin:end], add_bos=index == first, plain=spans)
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


class _TextPiece(NamedTuple):
    """A stretch of the text that is encoded by itself."""

    begin: int
    end: int
    behind_image: bool


def _pieces(segments: Sequence[Segment], text: str, literal: set[int], answers_apart: bool) -> list[_TextPiece]:
    """The text before, between and behind the images, with `answers_apart` cut before and behind each answer, too."""
    pieces, begin, behind = [], 0, False
    for match in re.finditer(re.escape(IMAGE_TOKEN), text):
        if match.start() not in literal:
            pieces.append(_TextPiece(begin, match.start(), behind))
            begin, behind = match.end(), True
    pieces.append(_TextPiece(begin, len(text), behind))
    if not answers_apart:
        return pieces
    cuts, place = [], 0
    for segment in segments:
        cuts += [place, place + len(segment.text)] if segment.supervised else []
        place += len(segment.text)
    for cut in sorted(set(cuts)):
        number = next((n for n, piece in enumerate(pieces) if piece.begin < cut < piece.end), None)
        if number is not None:
            piece = pieces[number]
            pieces[number : number + 1] = [piece._replace(end=cut), _TextPiece(cut, piece.end, False)]
    return pieces
