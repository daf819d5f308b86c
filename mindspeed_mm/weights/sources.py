"""Weights that were opened: the tensors of each part, under the names that its rules know. Values are read when asked
for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.weights.blockwise import StoredForm
from mindspeed_mm.weights.files import Span, TensorFile

_CONFIG = "config.json: "
"""How an error begins that whoever reads the values of a config.json raises, without knowing where it lies."""


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Errors about the config beside weights name the folder or file of these, unless they do already."""
    try:
        yield
    except (ConfigError, WeightError) as error:
        text = str(error)
        if text.startswith((f"{path}:", f"{path}/", f"{path} ")):
            raise
        where = path / "config.json" if text.startswith(_CONFIG) else path
        raise type(error)(f"{where}: {text.removeprefix(_CONFIG)}") from error


@dataclass(frozen=True)
class PartSource:
    """The tensors of one part, under the names that the rules of `dialect` know.

    dialect: the key of the part's rules that know the names ("hf", "ours", ...).
    config: the part's HF config (for "ours": its block of a model.json), or None where the layout has none.
    assumed: keys of the config that the converter had to assume (the head count of an OpenAI archive).
    model_id: the part that the layout stands for, where the config does not say it.
    """

    part: str
    dialect: str
    path: Path
    config: dict[str, Any] | None
    _files: TensorFile
    _stored: dict[str, str]
    assumed: tuple[str, ...] = ()
    model_id: str | None = None

    @property
    def files(self) -> TensorFile:
        """The file or files that hold the tensors, which may hold other parts too."""
        return self._files

    @property
    def names(self) -> tuple[str, ...]:
        """All names, also of tensors that are not used."""
        return tuple(self._stored)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU, in its stored type."""
        return self._files.get(self._stored[name])

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis of a tensor onto the CPU."""
        return self._files.get_slice(self._stored[name], axis, start, stop)

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor in its file; None where they lie in another order than row by row."""
        return self._files.span(self._stored[name])

    def stored_form(self, name: str) -> StoredForm | None:
        """A tensor in 4 or 8 bits, as it lies in its file; None for one that is whole there."""
        read = getattr(self._files, "stored_form", None)
        return None if read is None else read(self._stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._files.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        return self._files.dtype(self._stored[name])

    def stored_name(self, name: str) -> str:
        """The name that a tensor has in its file."""
        return self._stored[name]

    def changed(self, files: TensorFile) -> "PartSource":
        """The same tensors, their values those of `files`."""
        return replace(self, _files=files)

    def meta(self, name: str) -> Tensor:
        """A tensor without values: its shape and type alone."""
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")


@dataclass(frozen=True)
class Source:
    """Weights at a path.

    config: the folder's config.json (of layout mindspeed-mm: its model.json), or None.
    dropped: stored names that belong to no part of ours (CLIP's text encoder, say).
    family: model_id of the family whose layout it is; None for the layout of a part, and for our own.
    advice: what to do about slots that are not here, where it is known.
    """

    path: Path
    layout: str
    config: dict[str, Any] | None
    part_sources: dict[str, PartSource]
    dropped: tuple[str, ...] = ()
    family: str | None = None
    advice: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that can be read from here."""
        return tuple(self.part_sources)

    def part(self, part: str) -> PartSource:
        """The tensors of one part. Raises WeightError when they are not here."""
        if part in self.part_sources:
            return self.part_sources[part]
        cure = self.advice.get(part, f"Give the path of the {part}'s own weights.")
        if self.layout == "projector":
            cure = (
                "Stage 1 trains the projector alone; join it with the models that it was trained between: mindspeed-mm "
                f"convert --text-decoder DECODER --vision-encoder ENCODER --projector {self.path} TARGET --to llava, "
                "then give TARGET."
            )
        raise WeightError(
            f"{self.path}: found layout {self.layout} with {', '.join(self.parts)}; expected a {part}. {cure}"
        )
