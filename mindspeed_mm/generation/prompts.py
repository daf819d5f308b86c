"""Requests to expanded prompt ids, with the training template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mindspeed_mm.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.encode import encode_prompt
from mindspeed_mm.data.expand import expand_images
from mindspeed_mm.data.media import ItemPlan
from mindspeed_mm.data.rendering import questions_of
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.models.spec import ModelSpec


@dataclass(frozen=True)
class GenerationRequest:
    """One thing to answer.

    Give either `turns`, which are rendered with the engine's template, or `prompt`, which is tokenised as it is. Each
    IMAGE_TOKEN in them stands for one image; images without any placeholder go in front of the first question. The text
    of special tokens inside `turns` and `system` is plain text.
    """

    id: str
    turns: tuple[tuple[str, str | None], ...] = ()
    """(question, answer) pairs, the last answer None."""
    prompt: str | None = None
    images: tuple[Any, ...] = field(default=())
    """PIL images, paths, or encoded bytes (ImageBytes), in reading order."""
    system: str | None = None
    """Takes the place of the template's system text."""


def prompt_ids(
    request: GenerationRequest, tokenizer: Tokenizer, template: Template, *, after_image: str = "\n"
) -> list[int]:
    """Ids with one IMAGE_TOKEN_INDEX an image; `after_image` follows images that have no place.

    Raises:
        DataError: an empty prompt, or another number of images than of placeholders.
        TemplateError: turns that the template cannot render.
    """
    images = len(request.images)
    if request.prompt is not None:
        if not request.prompt.strip():
            raise DataError(f"request {request.id}: the prompt is empty; give it a text")
        ids = _encode_text(_with_images(request.prompt, images, after=after_image), tokenizer)
    else:
        if not request.turns:
            raise DataError(f"request {request.id}: there are neither turns nor a prompt; give it a question")
        (question, answer), *rest = request.turns
        if not (request.turns[-1][0] or "").strip():
            raise DataError(
                f"request {request.id}: the prompt is empty; give it a text ({IMAGE_TOKEN} alone for an image alone)"
            )
        turns = [(_with_images(question, images, request.turns, after=after_image), answer), *rest]
        ids = encode_prompt(turns, tokenizer, template, system=request.system, special_text="text")
    found = ids.count(IMAGE_TOKEN_INDEX)
    if found != images:
        raise DataError(
            f"request {request.id}: found {images} images and {found} {IMAGE_TOKEN} placeholders; "
            "give one image for each placeholder, or no placeholder at all"
        )
    return ids


def questions(request: GenerationRequest) -> list[str]:
    """For each image of a request the text of the turn that it stands in, or its prompt.

    Raises:
        DataError: another number of images than of placeholders.
    """
    images = len(request.images)
    if request.prompt is not None:
        texts = [_with_images(request.prompt, images)]
    else:
        asked = [question or "" for question, _ in request.turns]
        texts = [_with_images(asked[0], images, request.turns), *asked[1:]] if asked else []
    found = questions_of([Turn("human", text) for text in texts])
    if len(found) != images:
        raise DataError(
            f"request {request.id}: found {images} images and {len(found)} {IMAGE_TOKEN} placeholders; "
            "give one image for each placeholder, or no placeholder at all"
        )
    return found


def _with_images(text: str, images: int, turns: Sequence[tuple[str, str | None]] = (), *, after: str = "\n") -> str:
    placed = text.count(IMAGE_TOKEN) + sum((question or "").count(IMAGE_TOKEN) for question, _ in turns[1:])
    return f"{IMAGE_TOKEN}{after}" * images + text if images and not placed else text


def _encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for index, piece in enumerate(text.split(IMAGE_TOKEN)):
        if index:
            ids.append(IMAGE_TOKEN_INDEX)
        ids += tokenizer.encode(piece, add_bos=index == 0)
    return ids


def stop_rules(template: Template, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(stop ids, stop strings) of a template: a stop string that is one special token is never seen as text."""
    ids, texts = [], []
    for stop in template.stop:
        token_id = tokenizer.token_to_id(stop)
        if token_id is not None and token_id in tokenizer.special_ids:
            ids.append(token_id)
        else:
            texts.append(stop)
    return tuple(ids), tuple(texts)


def expand(ids: Sequence[int], plans: Sequence[ItemPlan]) -> list[int]:
    """The tokens of its plan in the place of each IMAGE_TOKEN_INDEX."""
    return expand_images(ids, ids, plans)[0]


def prompt_positions(spec: ModelSpec, prompt: Sequence[int], plans: Sequence[ItemPlan]) -> torch.Tensor | None:
    """[3, length] positions of an expanded prompt for a family with multimodal positions; None where they count up."""
    if not spec.family.multimodal_positions:
        return None
    grids = torch.tensor([plan.grid for plan in plans], dtype=torch.int64).reshape(-1, 3)
    return spec.family.positions(spec, torch.tensor(prompt), grids)


def with_image_ids(prompt: Sequence[int], image_token_id: int | None) -> list[int]:
    """The ids that rules see which look back at an expanded prompt: image positions as the model's own id, where it has
    one."""
    return [image_token_id if i == IMAGE_TOKEN_INDEX and image_token_id is not None else i for i in prompt]


def as_prompts(input_ids: Sequence[Sequence[int]], plans: Sequence[ItemPlan]) -> list[list[int]]:
    """Prompts given as ids, with one placeholder an image or already expanded, in expanded form. Tags around an image
    are what the ids hold.

    Raises:
        ConfigError: the number of placeholders fits neither form.
    """
    found, features = sum(list(row).count(IMAGE_TOKEN_INDEX) for row in input_ids), sum(plan.count for plan in plans)
    if found == features:
        return [list(row) for row in input_ids]
    if found == len(plans):
        following = iter(ItemPlan(plan.grid, (IMAGE_TOKEN_INDEX,) * plan.count) for plan in plans)
        return [expand(row, [next(following) for _ in range(list(row).count(IMAGE_TOKEN_INDEX))]) for row in input_ids]
    raise ConfigError(
        f"input_ids hold {found} image tokens for {len(plans)} images; expected {len(plans)} (one an image) or "
        f"{features} (expanded)"
    )
