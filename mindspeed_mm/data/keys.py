"""Keys of records, turns and messages: those a reader honours, those that are harmless, and all others.

A key that nothing reads is dropped, so a mistyped "Image" would train without the image. An unknown key is therefore an
error where it is one typing error away from a key that is read, or is known to change training in other suites; any
other is counted and told once.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_mm.errors import DataError, UnknownKeyError

HARMLESS = frozenset(
    (
        *("id", "ids", "uid", "uuid", "key", "hash", "md5", "sha256", "idx", "index", "qid"),
        *("source", "sources", "dataset", "dataset_name", "data_name", "origin", "subset", "split", "license"),
        *("category", "categories", "task", "task_type", "type", "topic", "tag", "tags", "domain", "language", "lang"),
        *("url", "urls", "link", "author", "model", "generator", "created", "created_at", "date", "timestamp"),
        *("version", "width", "height", "size", "sizes", "image_size", "length", "exif", "status", "error_message"),
        *("num_tokens", "token_count", "num_turns", "n_turns", "score", "scores", "rating", "ratings", "quality"),
        *("confidence", "similarity", "difficulty", "metadata", "meta", "info", "comment", "comments", "note", "notes"),
        *("caption", "blip_caption", "question_type", "answer_type", "score_chosen", "score_rejected", "punsafe"),
    )
)
"""Keys that describe a record, in public data sets, and change nothing anywhere."""

HARMLESS_ENDINGS = ("_id", "_source", "_score", "_size", "_width", "_height", "_url", "_hash", "_similarity")

MEDIA = "videos and audio are not trained on"
IMAGE = "images have another key here"
SYSTEM = "this format has no system text under that key"
TOOLS = "tools and their calls are not trained on"
MARK = "a mark belongs on the turn, not here"
MASK = 'it says what is not learned; marks here are "loss", "train" or "weight" of a turn, with true or false'
TEXT = "the text under it would not be trained on"
PAIR = 'preferences are read by the dataset_type "preference"'
PROMPT = "prompts are written by the template alone (template_name), which takes no further options"
PIXELS = "the size of an image is the image processor's"

FILE_WORDS = "path paths frame frames clip clips file files name names url urls list bytes base64".split()
IMAGE_WORDS = ("image", "img", "photo")

CHANGING = {
    **dict.fromkeys(("video", "videos", "audio", "audios", "speech", "frames"), MEDIA),
    **{f"{kind}_{word}": MEDIA for kind in ("video", "audio") for word in FILE_WORDS},
    **{f"{kind}{end}": IMAGE for kind in IMAGE_WORDS for end in ("", "s")},
    **{f"{kind}_{word}": IMAGE for kind in IMAGE_WORDS for word in FILE_WORDS},
    **dict.fromkeys(("file_name", "filename", "pixel_values"), IMAGE),
    **dict.fromkeys(("system", "system_prompt", "system_message"), SYSTEM),
    **dict.fromkeys(("tools", "functions", "tool_calls", "tool_call_id", "function_call"), TOOLS),
    **dict.fromkeys(("conversations", "messages", "history", "instruction", "input", "output", "query"), TEXT),
    **dict.fromkeys(("response", "reasoning_content", "reasoning", "thinking", "thought"), TEXT),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking"), PROMPT),
    **dict.fromkeys(("chosen", "rejected", "reject", "rejected_response", "rejected_messages", "kto_tag"), PAIR),
    **dict.fromkeys(("loss", "train", "training", "learnable", "trainable", "weight", "loss_weight"), MARK),
    **dict.fromkeys(("loss_scale", "output_with_loss", "sample_weight", "train_detail"), MARK),
    **dict.fromkeys(("train_on_turn", "is_train", "do_train", "is_trained", "learn", "learned"), MARK),
    **dict.fromkeys(("compute_loss", "calculate_loss", "supervised"), MARK),
    **dict.fromkeys(("mask", "masked", "loss_mask", "no_loss", "ignore_loss", "skip_loss", "train_on_input"), MASK),
    **dict.fromkeys(("min_pixels", "max_pixels", "resized_height", "resized_width"), PIXELS),
    "objects": 'boxes are not filled in; expected them in the text, without "objects"',
}
"""Keys that change training in other suites, and why a value there cannot be ignored. Those on masks are NeMo's and
torchtune's."""

SOURCE_ENDINGS = ("_url", "_urls", "_name", "_names", "_path", "_paths", "filename")
"""Of keys that name an image only where nothing else does; beside an image they say where it comes from."""

IMAGE_NAMES = (
    *("image", "images", "img_path", "image_filename", "img_fn", "file_path", "imageId", "image_id", "image_ids"),
    *("image_path", "path", "url", "image_url"),
)
"""Keys by which readers find images."""

MARKS = (
    "loss",
    "train",
    "training",
    "learnable",
    "trainable",
    "output_with_loss",
    "weight",
    "loss_weight",
    "loss_scale",
)
"""Keys of a turn that say whether it is learned: ms-swift and XTuner (loss), axolotl (train, training), OpenAI's format
and axolotl (weight), XTuner's older form (output_with_loss), LLaMA-Factory (loss_weight)."""


@dataclass(frozen=True)
class Keys:
    """The keys of one kind of object."""

    what: str
    """For messages: "a record"."""

    honoured: frozenset[str]

    texts: frozenset[str] = frozenset()
    """Keys under which other formats have the text of such an object."""

    has_image: bool = False
    """Whether an image belongs to it though none of its keys names one."""

    marks: str = MARK
    """Why a mark cannot stand here."""

    def unused(self, found: Mapping[str, Any], place: str, policy: str) -> list[str]:
        """The keys of `found` that nothing reads and that are not known to be harmless.

        `place` names the object in messages, empty for the record itself. Raises UnknownKeyError for a key that may
        change training, unless `policy` is "warn". A key without a value (null, "", [], {}) says nothing.
        """
        if found.keys() <= self.honoured:
            return []
        ignored = []
        for key, value in found.items():
            if key in self.honoured or value is None or value in ("", [], {}, "[]", "{}"):
                continue
            if not isinstance(key, str):
                continue
            why = self._changing(key, found)
            # "image_id" describes a record, but not in place of "image_ids".
            is_harmless = why is None and (key in HARMLESS or key.endswith(HARMLESS_ENDINGS))
            if is_harmless and self._meant(key, without=found) is None:
                continue
            if (why == MARK and value in (True, 1)) or (why == MASK and value in (False, 0)):  # as without a mark
                continue
            if policy == "error":
                self._refuse(key, place, why)
            ignored.append(key)
        return ignored

    def _changing(self, key: str, found: Mapping[str, Any]) -> str | None:
        """Why a value under a key cannot be ignored, in whatever case and with whatever separators it is written."""
        name = plain_name(key)
        first = _COUNTED.sub("", name)  # "image_1" and "image2" are images, too; "train_2017" is something else
        if CHANGING.get(first) in (IMAGE, MEDIA):
            name = first
        why = TEXT if name in self.texts else CHANGING.get(name)
        if why == IMAGE and name.endswith(SOURCE_ENDINGS):
            shows = self.has_image or any(found.get(own) for own in self.honoured.intersection(IMAGE_NAMES))
            return None if shows else why
        return why

    def _refuse(self, key: str, place: str, why: str | None) -> None:
        shown = f"{place + '.' if place else ''}{key!a:.80}"
        advice = 'Correct the data, or set "unknown_keys": "warn" in dataset_param.'
        if why is not None and (self._meant(key) is None or key in CHANGING):
            raise UnknownKeyError(f"{shown} is not read here: {self._why(why)}. {advice}")
        close = self._meant(key)
        if close is not None:
            raise UnknownKeyError(f'{shown} is no key of {self.what}; did you mean "{close}"? {advice}')

    def _meant(self, key: str, without: Iterable[str] = ()) -> str | None:
        """The key that is one typing error away, of those that are not in `without`."""
        names = sorted(self.honoured.difference(without))
        return next((name for name in names if one_typing_error(key, name)), None)

    def _why(self, why: str) -> str:
        if why == MARK:
            return self.marks
        if why != IMAGE:
            return why
        names = [f'"{name}"' for name in sorted(self.honoured) if name in IMAGE_NAMES]
        return f"{self.what} names images by {' or '.join(names)}" if names else f"{self.what} has no image"


def keys(what: str, *honoured: str, **options: Any) -> Keys:
    """Keys of a kind of object; `options` are further fields of Keys."""
    return Keys(what, frozenset(honoured), **options)


TEXTS = frozenset(("value", "content", "text"))
OTHER_MARK = "marks of a turn are " + ", ".join(f'"{name}"' for name in MARKS)
LLAVA_TURN = keys("a turn", "from", "value", *MARKS, texts=TEXTS, marks=OTHER_MARK)
MESSAGE = keys("a message", "role", "content", *MARKS, texts=TEXTS, marks=OTHER_MARK)
TEXT_PART = keys("a text part", "type", "text", texts=TEXTS)
IMAGE_PART = keys("an image part", "type", "image", "path", "url", "image_url", "index", texts=TEXTS)
IMAGE_URL = keys("an image_url", "url")
IMAGE_FILE = keys("an image", "bytes", "path")
"""Hugging Face's Image feature."""


def unused_of_turns(entries: Iterable[Any], allowed: Keys, key: str, policy: str) -> list[str]:
    """As Keys.unused, for each object of the list under `key`; names come with the list's."""
    ignored = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Mapping) and not entry.keys() <= allowed.honoured:
            ignored += [f"{key}[].{name}" for name in allowed.unused(entry, f"{key}[{index}]", policy)]
    return ignored


_COUNTED = re.compile(r"_?[0-9]+$")
"""A number behind a key, for the first, second, ... of its kind."""


def plain_name(key: str) -> str:
    """A key in small letters with underscores: "videoPath" and "Video-Path" are "video_path"."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.strip())
    return parted.casefold().replace("-", "_").replace(" ", "_")


def one_typing_error(found: str, known: str) -> bool:
    """Whether two different keys differ in case and separators alone, or by one letter more, less, other or swapped."""
    found, known = (name.strip().casefold().replace("-", "_").replace(" ", "_") for name in (found, known))
    if found == known:
        return True
    if len(known) < 4 or abs(len(found) - len(known)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(found, known, strict=False)) if a != b), min(len(found), len(known)))
    left, right = found[start:], known[start:]
    swapped = len(left) > 1 and len(right) > 1 and left[0] == right[1] and left[1] == right[0]
    return left[1:] == right[1:] or left[1:] == right or left == right[1:] or (swapped and left[2:] == right[2:])


def digest(ignored: Iterable[str]) -> int:
    """A number for a set of keys, 0 for none: what a record's facts hold of its unused keys."""
    names = "\0".join(sorted(set(ignored)))
    return (binascii.crc32(names.encode("utf-8", "replace")) & 0x7FFFFFFF or 1) if names else 0


def is_learned(entry: Mapping[str, Any], role: str, place: str) -> bool:
    """Whether the marks of a turn let it be learned (as they do where there is none).

    Raises DataError for a mark other than true, false, 1 and 0, for marks that disagree, and for one that asks to learn
    a turn that is no answer.
    """
    said: dict[str, bool] = {}
    for key in MARKS:
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"{place}.{key} is {value!r:.80}; expected true, false, 1 or 0: an answer is learned or it is not, "
                "other weights are not computed here. Correct the mark."
            )
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise DataError(f"{place} has marks that disagree: {said}; keep one of them.")
    learned = next(iter(said.values()), True)
    if said and learned and role != "gpt":
        raise DataError(
            f"{place}.{next(iter(said))} asks to learn a turn that is no answer; expected marks of true on answers "
            "only. Remove the mark."
        )
    return learned
