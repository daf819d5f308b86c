"""Whether a template and a tokenizer fit, and what a sample looks like to the loss."""

from collections.abc import Sequence

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.encode import encode_turns
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.template_form import SLOT, Template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import TemplateError

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
    runs = supervised_runs(labels[:-1] if template.ends_with_eos else labels)
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
