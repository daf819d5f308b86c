"""Training checkpoints as one more weight layout; importing this module registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.driver.reading import Checkpoint, find_checkpoint, read_checkpoint
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.weights.layouts import OUR_MODEL, PROJECTOR, TEXT, VISION
from mindspeed_mm.weights.sources import PartSource, Source, register_detector

VOCABULARY_TENSORS = ("text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight")


class CheckpointFile:
    """Tensors of a training checkpoint in the form of a tensor file.

    The vocabulary is stored padded to a multiple of the tensor-parallel size it was trained at; rows behind
    `vocab_size` are cut.
    """

    def __init__(self, checkpoint: Checkpoint, vocab_size: int) -> None:
        self.path = checkpoint.path
        self.names = tuple(checkpoint.names)
        self._checkpoint, self._vocab_size = checkpoint, vocab_size

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        shape = self._checkpoint.shape(name)
        return (self._vocab_size, *shape[1:]) if name in VOCABULARY_TENSORS else shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        return self._checkpoint.dtype(name)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """The indices start..stop-1 of one axis. (Training itself reads slices through dist_checkpointing.)"""
        return self.get(name).narrow(axis, start, stop - start)

    def get(self, name: str) -> torch.Tensor:
        """Read one full tensor onto the CPU."""
        tensor = self._checkpoint.get(name)
        return tensor[: self._vocab_size].clone() if name in VOCABULARY_TENSORS else tensor


def open_training_checkpoint(path: Path) -> Source | None:
    """A save folder or one iteration's folder as a Source; None for anything else.

    `Source.config` is run.json's "extra": the model and data configs of the run.

    Raises:
        CheckpointError: the path is a checkpoint, but a damaged one.
    """
    if not path.is_dir() or find_checkpoint(path) is None:
        return None
    checkpoint = read_checkpoint(path)
    extra = checkpoint.run["extra"]
    if not isinstance(extra.get("model"), dict):
        raise CheckpointError(
            f"{checkpoint.path}: its run.json does not describe the model; expected a checkpoint of "
            "`mindspeed-mm train`. Give the model.json whose ckpt_path entries name the weights."
        )
    file = CheckpointFile(checkpoint, extra["model"]["text_decoder"]["language_vocab_size"])
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
    }[part]()


register_detector(open_training_checkpoint)
