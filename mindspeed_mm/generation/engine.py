"""Requests in, texts out: renders prompts, prepares images, batches, decodes. No terminal and no files here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from mindspeed_mm.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.expand import expand_images as expand_with_labels
from mindspeed_mm.data.image import ImageProcessor, preprocess
from mindspeed_mm.data.template import Template, encode_prompt, get_template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.decode import Decoder
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.models.vlm import VLM


@dataclass(frozen=True)
class GenerationRequest:
    """One thing to answer.

    Give either `turns`, which are rendered with the engine's template, or `prompt`, which is tokenised as it is. Each
    IMAGE_TOKEN in them stands for one image; images without any placeholder go in front of the first question.
    """

    id: str
    turns: tuple[tuple[str, str | None], ...] = ()
    """(question, answer) pairs, the last answer None."""
    prompt: str | None = None
    images: tuple[Image.Image, ...] = field(default=())


@dataclass(frozen=True)
class GenerationResult:
    """`text` is the answer without stop marks, `token_ids` everything that was generated."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int


class GenerationEngine:
    """Answers requests in batches."""

    def __init__(
        self, vlm: VLM, tokenizer: Tokenizer, image_processor: ImageProcessor, template: str | Template, *, pad: bool
    ) -> None:
        self.vlm, self.tokenizer, self.image_processor = vlm, tokenizer, image_processor
        self.template = get_template(template, tokenizer)
        self.pad = pad
        self.tokens_per_image = vlm.spec.vision_encoder.num_image_tokens

    def generate(
        self, requests: Sequence[GenerationRequest], options: GenerationOptions, batch_size: int = 1
    ) -> Iterator[GenerationResult]:
        """Yield one result for each request, in the order of `requests`."""
        for start in range(0, len(requests), batch_size):
            yield from self._batch(requests[start : start + batch_size], options)

    def prepare(self, request: GenerationRequest) -> tuple[list[int], list[torch.Tensor]]:
        """Expanded prompt ids and preprocessed images [3, H, W] of a request.

        Raises:
            DataError: the number of images is not that of the placeholders, or an image cannot be used.
        """
        if request.prompt is not None:
            ids = self._encode_text(self._with_images(request.prompt, len(request.images)))
        else:
            (question, answer), *rest = request.turns
            turns = [(self._with_images(question, len(request.images), request.turns), answer), *rest]
            ids = encode_prompt(turns, self.tokenizer, self.template)
        found = ids.count(IMAGE_TOKEN_INDEX)
        if found != len(request.images):
            raise DataError(
                f"request {request.id}: found {len(request.images)} images and {found} {IMAGE_TOKEN} placeholders; "
                "give one image for each placeholder, or no placeholder at all"
            )
        images = [preprocess(image, self.image_processor, pad=self.pad) for image in request.images]
        return expand_images(ids, self.tokens_per_image), images

    @staticmethod
    def _with_images(text: str, images: int, turns: Sequence[tuple[str, str | None]] = ()) -> str:
        placed = text.count(IMAGE_TOKEN) + sum((question or "").count(IMAGE_TOKEN) for question, _ in turns[1:])
        return f"{IMAGE_TOKEN}\n" * images + text if images and not placed else text

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, piece in enumerate(text.split(IMAGE_TOKEN)):
            if index:
                ids.append(IMAGE_TOKEN_INDEX)
            ids += self.tokenizer.encode(piece, add_bos=index == 0)
        return ids

    def _batch(self, requests: Sequence[GenerationRequest], options: GenerationOptions) -> Iterator[GenerationResult]:
        prepared = [self.prepare(request) for request in requests]
        images = [image for _, row in prepared for image in row]
        stop_ids = options.eos_token_ids or (self.tokenizer.eos_token_id,)
        decoder = Decoder(self.vlm, stop_ids)
        outputs = decoder.generate([ids for ids, _ in prepared], torch.stack(images) if images else None, options)
        for request, (ids, _), output in zip(requests, prepared, outputs, strict=True):
            yield GenerationResult(request.id, self.text_of(output, stop_ids), tuple(output), len(ids))

    def text_of(self, token_ids: Sequence[int], stop_ids: Sequence[int]) -> str:
        """Answer text of generated ids: cut at the stop id or at the template's stop string."""
        ids = list(token_ids[:-1] if token_ids and token_ids[-1] in stop_ids else token_ids)
        text = self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size]).strip()
        for stop in self.template.stop:
            text = text.split(stop)[0]
        return text.strip()


def expand_images(ids: Sequence[int], tokens_per_image: int) -> list[int]:
    """Each IMAGE_TOKEN_INDEX becomes `tokens_per_image` of them."""
    return expand_with_labels(ids, ids, tokens_per_image)[0]


def as_prompts(input_ids: Sequence[Sequence[int]], images: int, tokens_per_image: int) -> list[list[int]]:
    """Prompts given as ids, with one placeholder an image or already expanded, in expanded form.

    Raises:
        ConfigError: the number of placeholders fits neither form.
    """
    found = sum(list(row).count(IMAGE_TOKEN_INDEX) for row in input_ids)
    if found == images:
        return [expand_images(row, tokens_per_image) for row in input_ids]
    if found == images * tokens_per_image:
        return [list(row) for row in input_ids]
    raise ConfigError(
        f"input_ids hold {found} image tokens for {images} images; expected {images} (one an image) or "
        f"{images * tokens_per_image} (expanded)"
    )
