"""torch's fused AdamW without torch's compiler.

torch keeps `add_param_group` and `step` out of compiled graphs by functions around them, which load the whole compiler
first: 0.9 s of processor time in each start. Nothing is compiled on the CPU, so what is inside of them is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_ADD_GROUP = inspect.unwrap(torch.optim.AdamW.add_param_group)
_STEP = inspect.unwrap(torch.optim.AdamW.step)


class HostAdamW(torch.optim.AdamW):
    """torch.optim.AdamW in one pass over memory for each parameter instead of ten."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, fused=True, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""
        _ADD_GROUP(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update every parameter that has a gradient."""
        return _STEP(self, closure)
