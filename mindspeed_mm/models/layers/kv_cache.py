"""Preallocated key/value cache of one decoding batch.

Legend: B rows, G key/value heads of this rank, L cache length, S new tokens, D head size.
"""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of every decoder layer of this pipeline stage.

    Rows may have different lengths: row b holds its tokens at 0..length[b]-1. `begin` states where the next tokens go,
    then one forward pass of the decoder writes and reads them.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, length: int, head_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, rows, heads, length, head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._positions: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._span = 0

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def begin(self, position_ids: torch.Tensor) -> None:
        """State the positions of the tokens of the next forward pass.

        Args:
            position_ids: [B, S] int64, the cache slot of each new token. When prompts of different lengths are filled
                in together, a shorter row's surplus slots hold padding, which later tokens overwrite.
        """
        self._positions = position_ids
        self._span = int(position_ids.max()) + 1
        if self._span > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, position {self._span - 1} was asked for")
        slots = torch.arange(self._span, device=position_ids.device)
        self._mask = slots[None, None, None, :] <= position_ids[:, None, :, None]

    def update(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Store the new keys and values of a layer and return all that the new tokens may attend to.

        Args:
            layer: index within this pipeline stage.
            key, value: [B, G, S, D].

        Returns:
            keys, values [B, G, K, D] and the mask [B, 1, S, K], True = may attend, K = highest position + 1.
        """
        index = self._positions[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        self.keys[layer].scatter_(2, index, key)
        self.values[layer].scatter_(2, index, value)
        return self.keys[layer, :, :, : self._span], self.values[layer, :, :, : self._span], self._mask

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop finished rows: keep those listed in `rows` [R] int64, in that order."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)
