"""Training checkpoints as one more weight layout; importing this module registers it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint_converters.checkpoint.adapters import merged
from checkpoint_converters.checkpoint.stored_base import CODES, whole_weights
from megatron.driver.checkpoint.reading import Checkpoint, find_checkpoint, read_checkpoint, split_averaged
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.models.adapters.targets import ADAPTER
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.weights.files import Span
from mindspeed_mm.weights.layouts import INTERACTION, OUR_MODEL, PROJECTOR, TEXT, VISION
from mindspeed_mm.weights.sources import PartSource, Source
from mindspeed_mm.weights.torch_file import TorchFile

VOCABULARY_TENSORS = ("text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight")


class CheckpointFile:
    """Tensors of a training checkpoint in the form of a tensor file.

    The vocabulary is stored padded to a multiple of the tensor-parallel size it was trained at; rows behind
    `vocab_size` are cut.
    """

    record = None

    def __init__(self, checkpoint: Checkpoint, vocab_size: int) -> None:
        self.path = checkpoint.path
        self.names = tuple(checkpoint.names)
        self.bytes_read = 0
        self._checkpoint, self._vocab_size = checkpoint, vocab_size

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        shape = self._checkpoint.shape(name)
        return (self._vocab_size, *shape[1:]) if name in VOCABULARY_TENSORS else shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        return self._checkpoint.dtype(name)

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor that was written in one piece, else None."""
        pieces = self._pieces(name)
        if len(pieces) > 1 or not self.shape(name) or name in self._checkpoint.averages:
            return None
        span = pieces[0].open().span("")
        return span and Span(span.path, span.offset, math.prod(self.shape(name)) * self.dtype(name).itemsize)

    def get(self, name: str) -> torch.Tensor:
        """Read one full tensor onto the CPU."""
        return self.get_slice(name, 0, 0, self.shape(name)[0])

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Read the indices start..stop-1 of one axis and no other bytes, whatever ranks wrote them.

        Raises:
            CheckpointError: the checkpoint does not hold all of them.
        """
        shape = list(self.shape(name))
        shape[axis] = stop - start
        result = torch.empty(shape, dtype=self.dtype(name))
        found = 0
        for piece in self._pieces(name):
            begin, end = max(start, piece.offsets[axis]), min(stop, piece.offsets[axis] + piece.sizes[axis])
            if begin >= end:
                continue
            file = piece.open()
            values = file.get_slice("", axis, begin - piece.offsets[axis], end - piece.offsets[axis])
            self.bytes_read += file.bytes_read
            place = result.narrow(axis, begin - start, end - begin)
            for other, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                if other != axis:
                    real = min(size, shape[other] - offset)  # the rest are the padding rows of a vocabulary
                    values, place = values.narrow(other, 0, real), place.narrow(other, offset, real)
            found += place.copy_(values).numel()
        if found != result.numel():
            raise CheckpointError(
                f"{self.path}: {name} holds {found} of {result.numel()} values; expected all, each once. "
                "Load another iteration."
            )
        return result

    def _pieces(self, name: str) -> list[_Piece]:
        reader, name = self._checkpoint.sources[name], self._checkpoint.stored(name)
        metadata = reader.read_metadata()
        pieces = []
        for chunk in metadata.state_dict_metadata[name].chunks:
            place = next(
                place
                for index, place in metadata.storage_data.items()
                if index.fqn == name and (index.offset is None or tuple(index.offset) == tuple(chunk.offsets))
            )
            file, end = Path(reader.path) / place.relative_path, place.offset + place.length
            pieces.append(_Piece(file, end, tuple(chunk.offsets), tuple(chunk.sizes)))
        return pieces


@dataclass(frozen=True)
class _Piece:
    """What one rank wrote of a tensor: a file of torch.save that ends at `end` of a file, and its place."""

    path: Path
    end: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def open(self) -> TorchFile:
        """Its values."""
        file = TorchFile(self.path, self.end)
        if file.shape("") != self.sizes:
            raise CheckpointError(
                f"{self.path}: a tensor has shape {list(file.shape(''))}; expected {list(self.sizes)}. "
                "Load another iteration."
            )
        return file


def open_training_checkpoint(path: Path) -> Source | None:
    """A save folder or one iteration's folder as a Source, or the averages in it (see read_checkpoint); None for
    anything else.

    `Source.config` is run.json's "extra": the model and data configs of the run. Adapters of a LoRA run are merged into
    the weights as these are read, and weights in 4 or 8 bits are made whole.

    Raises:
        CheckpointError: the path is a checkpoint, but a damaged one.
    """
    folder, _ = split_averaged(path)
    if not folder.is_dir() or find_checkpoint(folder) is None:
        return None
    checkpoint = read_checkpoint(path)
    extra = checkpoint.run["extra"]
    if not isinstance(extra.get("model"), dict):
        raise CheckpointError(
            f"{checkpoint.path}: its run.json does not describe the model; expected a checkpoint of "
            "`mindspeed-mm train`. Give the model.json whose ckpt_path entries name the weights."
        )
    file = CheckpointFile(checkpoint, extra["model"]["text_decoder"]["language_vocab_size"])
    if any(ADAPTER in name or name.endswith(CODES) for name in file.names):
        spec = load_model_spec(extra["model"], context=f"{checkpoint.path}: model in run.json")
        file = merged(whole_weights(file, spec, checkpoint.run["layout"], OUR_MODEL.written), spec)
    split, _, _ = OUR_MODEL.split(file.names)
    parts = {
        part: PartSource(part, "ours", checkpoint.path, _block(extra["model"], part), file, names)
        for part, names in split.items()
    }
    return Source(checkpoint.path, "checkpoint", extra, parts)


def _block(model: dict[str, Any], part: str) -> dict[str, Any]:
    return {
        TEXT: lambda: model["text_decoder"],
        VISION: lambda: model["image_encoder"]["vision_encoder"],
        PROJECTOR: lambda: model["image_encoder"]["vision_projector"],
        INTERACTION: lambda: model["interaction"],
    }[part]()
