"""How likely given answers to a prompt are: the mean loss of a token, by which MiniGPT-4's multi_select ranks them.

Prompt and images are computed once: the answers are branches of one sequence (platform/segments.BranchedSegments).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN
from mindspeed_mm.data.expand import Encoding
from mindspeed_mm.data.media import MediaProcessor
from mindspeed_mm.data.pairs import joined, pair_positions
from mindspeed_mm.data.rendering import questions_of
from mindspeed_mm.data.sample import Sample, Turn
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.platform.segments import BranchedSegments


def answer_losses(
    vlm: VLM, encoding: Encoding, prompt: str, images: Sequence[Any], answers: Sequence[str]
) -> list[float]:
    """See LoadedVLM.answer_losses; `encoding` says how prompt and answers become tokens."""
    if not answers:
        raise ConfigError("answer_losses got no answers; expected one text at least")
    if not (vlm.pre_process and vlm.post_process):
        raise ConfigError(
            "answer_losses needs the whole model on each pipeline stage; load it with pipeline_model_parallel_size 1"
        )
    question = prompt if IMAGE_TOKEN in prompt else f"{IMAGE_TOKEN}\n" * len(images) + prompt
    samples = [
        Sample(answer, (Turn("human", question), Turn("gpt", answer)), tuple(images), "the prompt")
        for answer in answers
    ]
    plans, sides = encoding.plans(samples[0]), []
    for sample in samples:
        ids, labels = encoding.of(sample)
        if all(label == IGNORE_INDEX for label in labels):
            raise DataError(f"the answer {sample.id!r:.80} has no token to be judged; expected a text")
        sides.append((ids, labels))
    longest, most = max(sides, key=lambda side: len(side[0]))[0], vlm.spec.text_decoder.language_max_sequence_length
    if len(longest) > most:
        raise ConfigError(f"prompt and answer have {len(longest)} tokens; expected at most {most}, the model's context")
    ids, labels, branches = joined(sides)
    positions = None
    if vlm.spec.family.multimodal_positions:
        grids = torch.tensor([plan.grid for plan in plans], dtype=torch.int64).reshape(-1, 3)
        positions = vlm.spec.family.positions(vlm.spec, torch.tensor(longest), grids)
    device = next(vlm.parameters()).device
    items = _items(encoding.media, samples[0])
    losses = vlm(
        torch.tensor([ids]),
        pair_positions(branches, positions).unsqueeze(-2).to(device),
        labels=torch.tensor([[*labels[1:], IGNORE_INDEX]]),
        media=Media.join(items).to(device) if items else None,
        segments=BranchedSegments.of_branches([branches], device),
    )
    counts = [sum(label != IGNORE_INDEX for label in labels) for _, labels in sides]
    return [float(own.mean()) for own in losses.split(counts)]


def _items(media: MediaProcessor, sample: Sample) -> list[Media]:
    """The images, with the question about each where the projector reads it."""
    items = [media.item(image) for image in sample.images]
    if not media.reads_instructions:
        return items
    asked = (media.instruction(text) for text in questions_of(sample.turns))
    return [replace(item, instructions=(words,)) for item, words in zip(items, asked, strict=True)]
