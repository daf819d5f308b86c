"""Expand each image placeholder to one position a feature, so that shapes are known before the model runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.encode import SpecialText, encode_turns
from mindspeed_mm.data.image import image_size
from mindspeed_mm.data.media import ItemPlan, MediaProcessor
from mindspeed_mm.data.sample import Sample
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import DataError


@dataclass(frozen=True)
class Encoding:
    """How samples become tokens."""

    tokenizer: Tokenizer
    template: Template
    media: MediaProcessor
    special_text: SpecialText = "text"

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids and labels of a sample with one IMAGE_TOKEN_INDEX an image.

        An answer of white space alone counts as empty: nothing is learned from it.
        """
        turns = [turn if turn.role != "gpt" or turn.text.strip() else replace(turn, text="") for turn in sample.turns]
        ids, labels = encode_turns(turns, self.tokenizer, self.template, self.special_text)
        if not any(turn.text for turn in turns if turn.role == "gpt"):  # the line feed behind an empty caption
            labels = [IGNORE_INDEX] * len(ids)
        return ids, labels

    def plans(self, sample: Sample) -> list[ItemPlan]:
        """The plan of each image. Sizes are looked at only where they decide.

        Raises:
            ImageError: the size of an image cannot be read, or is none that the model takes.
        """
        if self.media.fixed is not None:
            return [self.media.fixed] * len(sample.images)
        return [self.media.plan(*image_size(image)) for image in sample.images]

    def of(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Expanded ids and labels of a sample, of any length. Raises ImageError as `plans` does."""
        return expand_images(*self.tokens(sample), self.plans(sample))

    @property
    def key(self) -> dict[str, Any]:
        """What lengths depend on besides the records."""
        fixed = self.media.fixed
        return {
            "tokenizer": self.tokenizer.digest,
            "template": self.template.digest,
            "media": self.media.settings if fixed is None else fixed.ids_key,
            "special_text": self.special_text,
        }


def expand_images(
    input_ids: Sequence[int], labels: Sequence[int], plans: Sequence[ItemPlan]
) -> tuple[list[int], list[int]]:
    """Put the tokens of its plan in the place of every IMAGE_TOKEN_INDEX; labels there are IGNORE_INDEX.

    Raises:
        DataError: another number of plans than of placeholders.
    """
    found = input_ids.count(IMAGE_TOKEN_INDEX)
    if found != len(plans):
        raise DataError(f"has {found} image placeholders for {len(plans)} images; give one <image> for each image")
    ids_out: list[int] = []
    labels_out: list[int] = []
    following = iter(plans)
    for token_id, label in zip(input_ids, labels, strict=True):
        if token_id == IMAGE_TOKEN_INDEX:
            ids = next(following).ids
            ids_out += ids
            labels_out += [IGNORE_INDEX] * len(ids)
        else:
            ids_out.append(token_id)
            labels_out.append(label)
    return ids_out, labels_out


def fit_length(input_ids: list[int], labels: list[int], max_length: int, policy: str) -> tuple[list[int], list[int]]:
    """Apply the policy for a sample longer than `max_length` (expanded): "error", or "truncate" at the end.

    Raises DataError when the policy says so, when an image would be cut, or when no supervised token would be left.
    """
    length = len(input_ids)
    if length <= max_length:
        return input_ids, labels
    if policy == "error":
        raise DataError(
            f"has {length} tokens with its images, more than the maximum of {max_length}. Raise --seq-length, set "
            '"overlong": "truncate" or "drop" in dataset_param, or remove the record.'
        )
    if IMAGE_TOKEN_INDEX in input_ids[max_length:]:
        raise DataError(
            f"has {length} tokens with its images, and cutting it to {max_length} would cut an image. Raise "
            "--seq-length or remove the record."
        )
    kept = labels[:max_length]
    if any(label != IGNORE_INDEX for label in labels) and all(label == IGNORE_INDEX for label in kept):
        raise DataError(
            f"has {length} tokens, and cutting it to {max_length} would leave none that is supervised. Raise "
            "--seq-length or remove the record."
        )
    return input_ids[:max_length], kept
