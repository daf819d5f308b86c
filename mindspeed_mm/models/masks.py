"""Complete attention masks, for what plain causal attention cannot express. Legend: B rows, S tokens."""

from __future__ import annotations

import torch


def complete_mask(attention_mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor | None:
    """Causal mask with padded keys hidden.

    Args:
        attention_mask: [B, S], 0 at padding, or None.
        ids: [B, S], for length and device.

    Returns:
        bool [B, 1, S, S], True = may attend; None where plain causal attention is right: no padding, or padding on the
        right, which no real position attends to.
    """
    if attention_mask is None:
        return None
    keys = attention_mask.to(ids.device).bool()
    if bool((keys[:, :-1] >= keys[:, 1:]).all()):
        return None
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=ids.device)  # a padded query must attend to something
    return ((causal & keys[:, None, :]) | itself)[:, None]
