"""AdamW with one operator for each parameter: npu_apply_adam_w."""

from __future__ import annotations

from collections.abc import Callable

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NpuAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, whose step is npu_apply_adam_w where the operator takes the parameter, else torch's own.

    The state is torch's: `step` in host memory, so that no step waits for the device, `exp_avg` and `exp_avg_sq`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update every parameter that has a gradient."""
        if not all(self._is_taken(group) for group in self.param_groups):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    @staticmethod
    def _is_taken(group: dict) -> bool:
        """Whether the operator can update this group: its types, in plain AdamW."""
        plain = not (group["amsgrad"] or group["maximize"] or group["capturable"] or group["differentiable"])
        taken = (
            p.dtype in DTYPES and p.grad.dtype == p.dtype and not p.grad.is_sparse
            for p in group["params"]
            if p.grad is not None
        )
        return plain and isinstance(group["lr"], float) and all(taken)

    def _update(self, parameter: torch.nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        done = int(state["step"])
        beta1, beta2 = group["betas"]
        torch.ops.npu.npu_apply_adam_w.out(
            beta1**done,  # the operator multiplies by beta once more before it uses them
            beta2**done,
            group["lr"],
            group["weight_decay"],
            beta1,
            beta2,
            group["eps"],
            parameter.grad,
            None,
            False,
            False,
            out=[parameter, state["exp_avg"], state["exp_avg_sq"]],
        )
        state["step"] += 1
