"""A tiny random model of every family, made and saved by transformers, with its media and samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.models.spec import find_family
from tests.helpers import flamingo_reference, tiny_blip, tiny_llava, tiny_minigpt4, tiny_qwen
from tests.helpers.tiny_llava import image, sample

SHOWN = [image(30, 50), image(60, 20), image(40, 41)]


@dataclass(frozen=True)
class TinyFamily:
    """A model of transformers, its folder, and what ours makes of it."""

    theirs: Any
    folder: Path
    spec: Any
    media: Any
    inputs: Callable[..., dict[str, torch.Tensor]]
    """How transformers takes a sample."""
    untouched: str = "$^"
    """Regular expression of tensors that no loss depends on."""

    @property
    def family(self):
        return self.spec.family

    @property
    def names(self):
        """The layout of the names that `theirs` has."""
        return find_family(THEIR_NAMES.get(self.family.name, self.family.name)).layouts[0]

    def rows(self, counts: tuple[int, ...]) -> list[Encoded]:
        """A sample for each number of images."""
        found = []
        for number, count in enumerate(counts):
            shown = SHOWN[:count]
            encoded = sample(self.media, shown, (5 + number, *(4,) * count), seed=7 * number)
            if self.family.multimodal_positions:
                grids = [self.media.plan(each.height, each.width).grid for each in shown]
                ids, grids = torch.tensor(encoded.input_ids), torch.tensor(grids).view(-1, 3)
                encoded = replace(encoded, positions=self.family.positions(self.spec, ids, grids))
            if self.media.reads_instructions:
                encoded = asked(encoded)
            found.append(encoded)
        return found

    def their_loss(self, samples: list[Encoded]) -> torch.Tensor:
        """transformers' mean over the supervised tokens of all rows."""
        total, count = 0.0, 0
        for encoded in samples:
            own = sum(label != IGNORE_INDEX for label in encoded.labels[1:])
            given = self.inputs(self.family, self.spec, encoded)
            # BLIP's classes take no text without an image.
            alone = hasattr(self.theirs, "query_tokens") and not encoded.media
            model = self.theirs.language_model if alone else self.theirs
            total = total + model(**given, labels=torch.tensor([encoded.labels])).loss * own
            count += own
        return total / count


def asked(encoded: Encoded) -> Encoded:
    """The same with a question about each image, each of another length."""
    questions = [tuple(range(4, 6 + number)) for number in range(len(encoded.media))]
    media = zip(encoded.media, questions, strict=True)
    return replace(encoded, media=tuple(replace(item, instructions=(question,)) for item, question in media))


def _llava(folder: Path):
    theirs = tiny_llava.llava(tiny_llava.clip(), "qwen3")
    return theirs, tiny_llava.save(theirs, folder, tiny_llava.fixed_processor("clip")), tiny_llava.inputs


def _llava_next(folder: Path):
    theirs = tiny_llava.llava_next(tiny_llava.siglip(), **tiny_llava.FULL)
    return theirs, tiny_llava.save(theirs, folder, tiny_llava.tile_processor()), tiny_llava.inputs


def _qwen(folder: Path):
    theirs = tiny_qwen.qwen()
    return theirs, tiny_qwen.save(theirs, folder), tiny_qwen.inputs


def _blip2(folder: Path):
    theirs = tiny_blip.blip2()
    return theirs, tiny_blip.save(theirs, folder), tiny_llava.inputs


def _instructblip(folder: Path):
    theirs = tiny_blip.instructblip()
    return theirs, tiny_blip.save(theirs, folder), tiny_llava.inputs


def _minigpt4(folder: Path):
    return *tiny_minigpt4.with_qformer(folder), tiny_llava.inputs


def _flamingo(folder: Path):
    theirs = flamingo_reference.FlamingoReference().eval()
    return theirs, flamingo_reference.save(theirs, folder), tiny_llava.inputs


MAKERS = {
    "blip2": _blip2,
    "flamingo": _flamingo,
    "instructblip": _instructblip,
    "llava": _llava,
    "llava_next": _llava_next,
    "minigpt4": _minigpt4,
    "qwen2_5_vl": _qwen,
}
"""By model_id; a new family adds its own."""

THEIR_NAMES = {"minigpt4": "blip2"}
"""Families that transformers has no class of, and the one whose class computes the same."""

UNTOUCHED = {"instructblip": r"qformer\.encoder\.layer\.2\.(intermediate|output)\."}
"""Words behind the last layer of the Q-Former are not looked at."""


def make_family(model_id: str, folder: Path) -> TinyFamily:
    """The tiny model of a family, saved in a folder."""
    from mindspeed_mm.models.describe import describe_model
    from mindspeed_mm.models.sources import open_source

    theirs, folder, inputs = MAKERS[model_id](folder)
    spec = describe_model(open_source(folder))
    assert spec.model_id == model_id
    media = spec.family.media_processor(spec, folder)
    return TinyFamily(theirs, folder, spec, media, inputs, UNTOUCHED.get(model_id, "$^"))
