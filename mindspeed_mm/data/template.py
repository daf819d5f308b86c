"""Conversation templates: how turns become one string, which of its tokens are supervised, where an answer stops.

Templates are JSON files in the folder `templates`; a new one is a new file. Masks come from the turns themselves: the
rendered string is made of segments that know whether they are supervised, and every token takes the mask of the
segment in which it starts. Nothing is ever searched for in the rendered string, so no text of a user can shift a mask.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mindspeed_mm.config.load import StrictModel, load_config, nearest
from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.conversation import conversation_turns, count_images
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import TemplateError

FOLDER = Path(__file__).parent / "templates"

Segment = tuple[str, bool]
"""Text and whether it is supervised."""


class Template(StrictModel):
    """A template's file. `{text}` stands for the text of the turn. Wordings are those of LLaVA's conversation.py."""

    aliases: tuple[str, ...] = ()
    prefix: str = ""
    """What comes before the first turn."""

    human: str
    human_first: str | None = None
    """The first human turn where it differs (a system text inside)."""

    human_empty: str | None = None
    """A human turn without text; None: as any other."""

    gpt_header: str = ""
    """Opens an answer; not supervised."""

    gpt: str
    """An answer behind its header, end marker included; supervised."""

    gpt_empty: str = ""
    """An answer without text (LLaVA leaves the end marker out)."""

    end: str
    """The end marker of an answer."""

    stop: tuple[str, ...]
    """Strings that end generation."""

    captions_only: bool = False
    """The template is one image and its caption: the human text is dropped, exactly one answer follows."""


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
    return sorted(_templates())


def get_template(template: str | Template) -> Template:
    """The template of a name or alias (a Template is returned as it is). Raises TemplateError for an unknown name."""
    if isinstance(template, Template):
        return template
    templates = _templates()
    if template not in templates:
        close = nearest(template, templates)
        hint = f'did you mean "{close}"?' if close else f"known: {', '.join(sorted(templates))}"
        raise TemplateError(f'unknown template "{template}"; {hint}')
    return templates[template]


def render(conversation: Mapping[str, Any] | Sequence[Any], template: str | Template) -> str:
    """The string that a conversation is trained on (BOS aside). See `encode` for arguments and errors."""
    return render_turns(conversation_turns(conversation), template)


def render_turns(turns: Sequence[Turn], template: str | Template) -> str:
    """As `render`, for turns that `conversation_turns` has checked."""
    return "".join(text for text, _ in _segments(turns, get_template(template)))


def encode(
    conversation: Mapping[str, Any] | Sequence[Any],
    tokenizer: Tokenizer,
    template: str | Template,
    *,
    max_length: int | None = None,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a LLaVA record, or of its conversations list, as the original LLaVA preprocess gives them.

    One IMAGE_TOKEN_INDEX (-200) per image. Supervised is each answer from just after its header through its end marker;
    everything else, BOS and images have IGNORE_INDEX (-100). A text-only conversation is cut to `max_length` (default:
    the record's `model_max_length`, where it has one), one with images is not.
    Raises DataError for a broken record, TemplateError where the conversation does not fit the template.
    """
    turns = conversation_turns(conversation)
    ids, labels = _tokenize(_segments(turns, get_template(template)), tokenizer)
    if max_length is None and isinstance(conversation, Mapping):
        max_length = conversation.get("model_max_length")
    if max_length is not None and not count_images(turns):
        ids, labels = ids[:max_length], labels[:max_length]
    return ids, labels


def encode_turns(turns: Sequence[Turn], tokenizer: Tokenizer, template: str | Template) -> tuple[list[int], list[int]]:
    """As `encode`, for turns that `conversation_turns` has checked."""
    return _tokenize(_segments(turns, get_template(template)), tokenizer)


def generation_prompt(turns: Sequence[Sequence[str | None]], template: str | Template) -> str:
    """The prompt of (question, answer) pairs whose last answer is open (None). Texts are used as they are.

    Raises TemplateError when another answer is open or the last one is not.
    """
    return "".join(text for text, _ in _segments(_open_turns(turns), get_template(template), generation=True))


def encode_prompt(turns: Sequence[Sequence[str | None]], tokenizer: Tokenizer, template: str | Template) -> list[int]:
    """Ids of `generation_prompt`, one IMAGE_TOKEN_INDEX (-200) per `<image>`."""
    return _tokenize(_segments(_open_turns(turns), get_template(template), generation=True), tokenizer)[0]


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
    segments = [(template.prefix, False)]
    for index, turn in enumerate(turns):
        if turn.role == "human":
            segments.append((_human(turn.text, template, first=index == 0), False))
            continue
        segments.append((template.gpt_header, False))
        if not (generation and index == len(turns) - 1):
            body = template.gpt.replace("{text}", turn.text) if turn.text else template.gpt_empty
            segments.append((body, True))
    return segments


def _human(text: str, template: Template, first: bool) -> str:
    if not text and template.human_empty is not None:
        if first and template.human_first is not None:
            raise TemplateError("the first human turn is empty; this template puts its system text there. Add a text.")
        return template.human_empty
    form = template.human_first if first and template.human_first is not None else template.human
    return form.replace("{text}", text)


def _caption_turns(turns: Sequence[Turn]) -> list[Turn]:
    """An image and its caption: of the human turn only the images stay (LLaVA's preprocess_plain)."""
    images = turns[0].text.count(IMAGE_TOKEN)
    if len(turns) != 2 or not images:
        raise TemplateError(
            f"a caption template takes one human turn with an image and one gpt turn; found {len(turns)} turns with "
            f"{images} images in the first. Use a chat template such as v1 for this data."
        )
    return [Turn("human", IMAGE_TOKEN * images), turns[1]]


def _tokenize(segments: Iterable[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokenise the joined segments, cut at `<image>`; every piece is encoded on its own, as LLaVA does."""
    segments = list(segments)
    text = "".join(part for part, _ in segments)
    # One flag per character, one more for tokens without width at the very end.
    supervised = b"".join((b"\1" if flag else b"\0") * len(part) for part, flag in segments) + b"\0"
    ids: list[int] = []
    labels: list[int] = []
    position = 0
    for index, chunk in enumerate(text.split(IMAGE_TOKEN)):
        if index:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            position += len(IMAGE_TOKEN)
        chunk_ids, starts = tokenizer.encode_with_starts(chunk, add_bos=index == 0)
        ids += chunk_ids
        for token_id, start in zip(chunk_ids, starts, strict=True):
            labels.append(token_id if start >= 0 and supervised[position + start] else IGNORE_INDEX)
        position += len(chunk)
    return ids, labels


PROBE = ("Which number is it?\nSay it.", "It is 42, I think.\nYes.", "Sure?", "Yes: A.")
"""Question, answer, question, answer for the self-test of a template."""


def check_template(template: str | Template, tokenizer: Tokenizer) -> None:
    """Check that a template and a tokenizer fit: answers come back from their supervised tokens, and the end marker is
    one token of its own. Raises TemplateError otherwise; call it once before training or generation.
    """
    template = get_template(template)
    end_ids = _end_ids(template, tokenizer)
    pairs = [PROBE[:2]] if template.captions_only else [PROBE[:2], PROBE[2:]]
    turns = [turn for question, answer in pairs for turn in (Turn("human", question), Turn("gpt", answer))]
    if template.captions_only:
        turns[0] = Turn("human", IMAGE_TOKEN)
    _, labels = encode_turns(turns, tokenizer, template)
    for (_, answer), run in zip(pairs, supervised_runs(labels), strict=True):
        body = run[: -len(end_ids)]
        if run[-len(end_ids) :] != end_ids or tokenizer.decode(body).strip() != answer.strip():
            raise TemplateError(
                f"the tokenizer does not round-trip this template: the answer {answer!r} with its end marker "
                f"{template.end!r} comes back as {tokenizer.decode(run, skip_special_tokens=False)!r}. Use the "
                "tokenizer of the text decoder's checkpoint, or a template made for it."
            )


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
