"""Shikra's words of boxes and points added to a model: ordinary tokens, whose rows are the mean of the old ones.

The source is read as if it had them already: a tensor file with further rows, and tokenizer files with further entries.
So every layout that a conversion can write gets them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from checkpoint_converters.companions import TOKENIZER_FILES
from checkpoint_converters.fast_tokenizer import TOKEN_FLAGS, added_token
from checkpoint_converters.targets import Conversion
from checkpoint_converters.write import write_json
from mindspeed_mm.data.grounding.notation import BinNotation
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import part_of_source
from mindspeed_mm.models.part import PartSpec
from mindspeed_mm.weights.files import Span, TensorFile, read_json_object
from mindspeed_mm.weights.layouts import TEXT
from mindspeed_mm.weights.sources import PartSource

WORDS = BinNotation().words
"""In the order of their ids."""


@dataclass(frozen=True)
class GrownFile:
    """A tensor file in which the matrices `grown` have `rows` rows.

    Rows `first` to `first + added` are the mean of those before, in float32 and rounded once. Rows of the file behind
    `first`, which belong to no token, are overwritten there and kept behind it.
    """

    base: TensorFile
    grown: frozenset[str]
    first: int
    added: int
    rows: int
    record: None = None

    @property
    def path(self) -> Path:
        """As the base's."""
        return self.base.path

    @property
    def names(self) -> tuple[str, ...]:
        """As the base's."""
        return self.base.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        found = self.base.shape(name)
        return (self.rows, *found[1:]) if name in self.grown else found

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        return self.base.dtype(name)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        tensor = self.base.get(name)
        if name not in self.grown:
            return tensor
        result = tensor.new_zeros(self.rows, *tensor.shape[1:])
        result[: tensor.shape[0]] = tensor
        end = self.first + self.added
        result[self.first : end] = tensor[: self.first].mean(dim=0, dtype=torch.float32).to(tensor.dtype)
        return result

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis of a tensor."""
        if name not in self.grown:
            return self.base.get_slice(name, axis, start, stop)
        return self.get(name).narrow(axis, start, stop - start).contiguous()

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor in its file; None for a grown one, which no file holds."""
        return None if name in self.grown else self.base.span(name)


@contextmanager
def with_box_tokens(conversion: Conversion) -> Iterator[Conversion]:
    """The same conversion of a model that has the words. Raises WeightError where it cannot get them."""
    folder = conversion.companions.tokenizer_folder()
    if TEXT not in conversion.parts or folder is None:
        raise WeightError(
            "box tokens belong to a text decoder and its tokenizer, and one of them is missing; expected both. Give a "
            "source that has them, or --tokenizer (tokenizer=)."
        )
    spec, source = conversion.specs[TEXT], conversion.parts[TEXT]
    tokenizer, rows = load_tokenizer(folder), spec.geometry.vocab_size
    known = sum(tokenizer.token_to_id(word) is not None for word in WORDS)
    first = tokenizer.vocab_size
    if known:
        raise WeightError(f"{folder}: the tokenizer has {known} of the words already, such as {WORDS[0]}; leave it.")
    if rows is None or rows < first:
        raise WeightError(
            f"{folder}: the tokenizer has ids up to {first - 1}, and the text decoder {rows} rows; expected at least "
            f"{first}. Give the tokenizer of these weights."
        )
    total = max(rows, first + len(WORDS))
    grown = source.changed(GrownFile(source.files, _matrices(source, spec), first, len(WORDS), total))
    with TemporaryDirectory() as temporary:
        enlarge(folder, Path(temporary), first)
        yield replace(
            conversion,
            parts=conversion.parts | {TEXT: grown},
            specs=conversion.specs | {TEXT: spec.model_copy(update={"language_vocab_size": total})},
            companions=replace(conversion.companions, folders=[Path(temporary), *conversion.companions.folders]),
        )


def _matrices(source: PartSource, spec: PartSpec) -> frozenset[str]:
    """Stored names of the embedding and the head, a tied copy included."""
    rules = part_of_source(source).rules[source.dialect]
    steps = rules.match(source.names, spec.geometry, where=f"{source.path} ({source.part})").steps
    names = {name for step in steps if step.rule.padded for name in step.sources}
    names |= {name for pair in rules.tied_sources() or () for name in pair if name in source.names}
    return frozenset(source.stored_name(name) for name in names)


def enlarge(source: Path, folder: Path, first: int) -> None:
    """Tokenizer files with the words as ordinary tokens, from id `first` on."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    ids = {word: first + number for number, word in enumerate(WORDS)}
    plain: dict[str, Any] = dict.fromkeys(TOKEN_FLAGS, False) | {"special": False}
    for name, key, entries in (
        ("added_tokens.json", None, ids),
        (
            "tokenizer_config.json",
            "added_tokens_decoder",
            {str(n): {"content": word, **plain} for word, n in ids.items()},
        ),
    ):
        content = read_json_object(folder / name) if (folder / name).is_file() else {}
        write_json(folder / name, content | (entries if key is None else {key: (content.get(key) or {}) | entries}))
    fast = folder / "tokenizer.json"
    if fast.is_file():
        content = read_json_object(fast)
        added = [*(content.get("added_tokens") or []), *(added_token(n, word) | plain for word, n in ids.items())]
        text = json.dumps(content | {"added_tokens": added}, ensure_ascii=False, indent=2)
        fast.write_text(text, encoding="utf-8")
