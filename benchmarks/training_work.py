"""The work of the training benchmarks: samples of random words whose lengths follow LLaVA's own sets.

- stage1: an image and a caption of 10 to 40 tokens, which is supervised (LLaVA-Pretrain's captions).
- equal: an image and 448 tokens of text, half of it supervised.
- mixed: like the 665k mix of LLaVA-1.5. Of 16 samples 10 are short visual questions (40 to 160 tokens of text, a sixth
  supervised), 5 long conversations about an image (200 to 600, two thirds supervised) and one is text only (700 to
  1900, two thirds supervised; the mix has 40k ShareGPT conversations, cut at 2048 tokens, in 665k).
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from llava_shapes import IMAGE_SIZE, IMAGE_TOKENS, SHAPES

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.packing import first_fit_decreasing
from mindspeed_mm.data.sample import Batch, Encoded
from mindspeed_mm.models.media import Media

FIRST_WORD = 10
PAD = 0
ROW_LENGTH = 2048
"""Of packed rows, LLaVA-1.5's longest sample."""
KINDS = ("stage1", "equal", "mixed")
TRAINED = {
    "stage1": ("vision_projector",),
    "equal": ("text_decoder", "vision_projector"),
    "mixed": ("text_decoder", "vision_projector"),
}


class TrainingWork(NamedTuple):
    """What both sides train on, in micro-batches of one optimizer step each."""

    ours: list[Batch]
    padded: list[Batch]
    """The same samples, one in a row."""


def make_work(kind: str, size: str, batch: int, steps: int) -> TrainingWork:
    """`steps` batches of `batch` samples; for "mixed" ours are packed into rows, spread evenly over as many steps."""
    samples = make_samples(kind, size, batch * steps)
    collate = Collator(PAD)
    padded = [collate(samples[start : start + batch]) for start in range(0, len(samples), batch)]
    if kind != "mixed":
        return TrainingWork(padded, padded)
    lengths = torch.tensor([len(sample.input_ids) for sample in samples]).numpy()
    rows = [[samples[index] for index in row] for row in first_fit_decreasing(lengths, ROW_LENGTH)]
    pack = Collator(PAD, row_length=ROW_LENGTH)
    return TrainingWork([pack(rows[step::steps]) for step in range(steps)], padded)


def make_samples(kind: str, size: str, count: int) -> list[Encoded]:
    """The first `count` samples of a kind; always the same."""
    draw = random.Random(kind)
    return [_sample(kind, number, size, draw) for number in range(count)]


def _sample(kind: str, number: int, size: str, draw: random.Random) -> Encoded:
    if kind == "stage1":
        text, supervised, with_image = draw.randint(10, 40), 1.0, True
    elif kind == "equal":
        text, supervised, with_image = 448, 0.5, True
    else:
        place = (number * 5) % 16  # kinds alternate: each batch of 8 has about its share of each
        ranges = ((700, 1900, 2 / 3, False),) + ((200, 600, 2 / 3, True),) * 5 + ((40, 160, 1 / 6, True),) * 10
        low, high, supervised, with_image = ranges[place]
        text = draw.randint(low, high)
    words = [draw.randrange(FIRST_WORD, SHAPES[size].image_token_id) for _ in range(text)]
    answer = max(1, round(text * supervised))
    front = [1] + [IMAGE_TOKEN_INDEX] * (IMAGE_TOKENS if with_image else 0)
    ids = front + words
    labels = [IGNORE_INDEX] * (len(ids) - answer) + ids[len(ids) - answer :]
    generator = torch.Generator().manual_seed(number)
    image = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Encoded(f"{kind}-{number}", ids, labels, (Media.of_images(image[None]),) if with_image else ())


def transformers_inputs(batch: Batch, size: str) -> dict[str, torch.Tensor]:
    """What LlavaForConditionalGeneration takes, of a padded batch: it shifts labels by itself."""
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN_INDEX, SHAPES[size].image_token_id)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, 1:] = batch.labels[:, :-1]
    mask = torch.zeros_like(ids)
    for row, length in enumerate(batch.lengths):
        mask[row, :length] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return inputs | ({} if batch.media is None else {"pixel_values": batch.media.pixels})
