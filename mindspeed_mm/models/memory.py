"""Media as memory for gated cross-attention: what each token sees, and how features reach later pipeline stages.

A medium is one placeholder in the text; its features stand beside the text. Places of media are found in host memory.

Legend: B rows, S positions, M media of the row with most (at least 1), L features of a medium, W their width,
K = M * L, I media of all rows, H width of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.fusion import image_positions
from mindspeed_mm.platform.segments import Segments


@dataclass(frozen=True)
class MediaPlaces:
    """Where the media of a batch stand."""

    before: torch.Tensor
    """[B, S] int64: media of the row up to each position, its own among them."""
    hidden: torch.Tensor
    """[B, S] int64: media of the row that belong to sequences before the position's own."""
    counts: tuple[int, ...]
    """[B] media of each row."""

    @classmethod
    def of(cls, input_ids: torch.Tensor, segments: Segments | None = None) -> MediaPlaces:
        """Of ids [B, S] with IMAGE_TOKEN_INDEX where media stand; `segments` are the sequences of a single row."""
        before = image_positions(input_ids).long().cumsum(dim=1)
        hidden = torch.zeros_like(before)
        if segments is not None:
            for place in segments.slices:
                if place.start:
                    hidden[:, place] = before[:, place.start - 1, None]
        return cls(before, hidden, tuple(before[:, -1].tolist()))

    @property
    def most(self) -> int:
        """M"""
        return max(*self.counts, 1)

    def mask(self, features: int, *, latest: bool, device: torch.device) -> torch.Tensor:
        """Which features each token may attend to, bool [B, 1, S, K].

        Args:
            features: L
            latest: a token sees the last medium up to itself alone; else all of its sequence up to itself.

        All False for tokens before the first medium of their sequence. (Not `latest`, open_flamingo gives these the
        mean over all media of the row, later ones as well. No released model is of that kind.)
        """
        number = torch.arange(1, self.most + 1)
        before, hidden = self.before[..., None], self.hidden[..., None]
        mask = (number == before if latest else number <= before) & (number > hidden)
        return mask.to(device, non_blocking=True).repeat_interleave(features, dim=2)[:, None]

    def gather(self, features: torch.Tensor, each: int) -> torch.Tensor:
        """The features of all media in reading order, [I * L, W], as memory [K, B, W], zeros behind a row's last.

        Depends on `features` even when there are none, so that every rank runs the same backward pass.

        Raises:
            DataError: another number of media than of places.
        """
        if features.shape[0] != sum(self.counts) * each:
            raise DataError(
                f"the batch has {sum(self.counts)} <image> in its text and {features.shape[0] // each} images; give "
                "one <image> for each image, where it belongs"
            )
        width, most = features.shape[-1], self.most
        media = torch.cat((features.view(-1, each, width), features.new_zeros(1, each, width)))
        index, start = torch.full((len(self.counts), most), len(media) - 1), 0
        for row, count in enumerate(self.counts):
            index[row, :count] = torch.arange(start, start + count)
            start += count
        chosen = media[index.to(features.device, non_blocking=True)]
        return chosen.flatten(1, 2).transpose(0, 1)

    def carried_rows(self, features: int, width: int, hidden: int) -> int:
        """Rows of H that the memory fills behind hidden states."""
        return -(-self.most * features * width // hidden)


def carry(hidden: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Memory [K, B, W] behind hidden states [S, B, H], as one tensor for the next pipeline stage."""
    flat = memory.transpose(0, 1).flatten(1)
    surplus = -flat.shape[1] % hidden.shape[2]
    rows = torch.nn.functional.pad(flat, (0, surplus)).unflatten(1, (-1, hidden.shape[2]))
    return torch.cat((hidden, rows.transpose(0, 1).to(hidden.dtype)))


def uncarry(tensor: torch.Tensor, rows: int, places: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states [S, B, H], memory [K, B, W]) of what `carry` gave; `rows` of its last are memory of K `places`."""
    length = tensor.shape[0] - rows
    flat = tensor[length:].transpose(0, 1).flatten(1)[:, : places * width]
    return tensor[:length], flat.unflatten(1, (places, width)).transpose(0, 1)


def row_memory(features: Sequence[torch.Tensor], *, latest: bool) -> torch.Tensor | None:
    """What a token behind all media of a row sees, of the features [L, W] of each; None: nothing."""
    if not features:
        return None
    return features[-1] if latest else torch.cat(list(features))


def pad_memory(memory: dict[int, torch.Tensor], rows: int) -> dict[str, torch.Tensor | None]:
    """Memory [K, R, W] and mask [R, 1, 1, K] of one token for each of the first `rows`, from `row_memory` by row;
    empty where none sees any."""
    found = [memory.get(row) for row in range(rows)]
    some = next((each for each in found if each is not None), None)
    if some is None:
        return {}
    lengths = [0 if each is None else len(each) for each in found]
    whole = torch.nn.utils.rnn.pad_sequence([some[:0] if each is None else each for each in found])
    places = torch.arange(max(lengths), device=some.device)
    mask = places < torch.tensor(lengths, device=some.device)[:, None]
    return {"memory": whole, "memory_mask": mask[:, None, None]}
