"""The last layer's MLP on the positions that the head is asked about, which in training are those with a label.

No position reads what the last layer's MLP makes of another one, so that the others' output would only be thrown away:
in stage 1 those are all but the caption.

Legend: S sequence, B batch, H hidden size, n positions asked for.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.identity_op import IdentityOp


class AskedRows(IdentityOp):
    """Stands where a layer has its cross-attention, between self-attention and MLP. The block hands every layer the
    places as the mask of cross-attention, also where a layer is run again in the backward pass."""

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, **_unused) -> torch.Tensor:
        """[S, B, H] and places [n] int64, counted column by column, or None -> [n, 1, H], or all.

        The places may be in host memory.
        """
        if attention_mask is None:
            return hidden
        return hidden.flatten(0, 1).index_select(0, attention_mask.to(hidden.device, non_blocking=True)).unsqueeze(1)


class AskedDecoder:
    """A text decoder's last stage whose hidden states are those of the positions asked for already."""

    def __init__(self, decoder) -> None:
        self.vocab_size, self.logits = decoder.vocab_size, decoder.logits

    def picked(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """As TextDecoder.picked, of [n, 1, H]."""
        assert len(hidden) == len(places), (hidden.shape, places.shape)
        return hidden.squeeze(1)
