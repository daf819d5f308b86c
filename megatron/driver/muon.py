"""Muon (--optimizer muon): torch.optim.Muon for the matrices of linears, AdamW for all other parameters.

A parameter that Muon moves has an attribute `matrices`, which says how the tensors of the tensor-parallel ranks become
the matrices that are each made orthogonal (q, k and v are three), and back. Each rank gathers the momentum of the
others and computes the whole matrices, so that the update is the same at every layout. Momentum and Newton-Schulz
steps are torch's: its optimizer moves a stand-in for each matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron.driver.arguments import DriverArguments
from megatron.driver.held_parameters import held_parameters
from mindspeed_mm.errors import ConfigError


class Matrices(Protocol):
    """How a parameter is divided."""

    split: bool
    """Whether tensor-parallel ranks hold a share each."""

    def whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """The shares of all ranks in order -> the matrices, [rows, columns] each."""

    def share(self, matrices: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The matrices -> what one of `size` ranks holds of them."""


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose parameters with matrices are moved by Muon. Both take learning rate and weight decay of their group.

    matrices: how the parameters are divided that Muon moves.
    momentum, steps, adjust_lr: as torch.optim.Muon has them (Nesterov's momentum).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: Mapping[Tensor, Matrices],
        *,
        momentum: float,
        steps: int,
        adjust_lr: str,
        **adam: Any,
    ) -> None:
        self._matrices, self._momentum = dict(matrices), momentum
        self._options = {"ns_steps": steps, "adjust_lr_fn": adjust_lr}
        super().__init__(groups, **adam)

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        names = ("momentum_buffer",) if parameter in self._matrices else ("exp_avg", "exp_avg_sq")
        step = torch.zeros((), dtype=torch.float32)
        return {"step": step} | {name: torch.zeros_like(parameter) for name in names}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all parameters with gradients."""
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._matrices and parameter.grad is not None:
                    self._move(parameter, group)
                    gradients[parameter], parameter.grad = parameter.grad, None  # AdamW passes over it
        super().step(closure)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if not self.state[parameter]:
            self.state[parameter] = self.first_state(parameter)
        state = self.state[parameter]
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - self._momentum)
        update = parameter.grad.lerp(buffer, self._momentum)
        layout, rank, size = self._matrices[parameter], 0, 1
        shares = [update]
        if layout.split:
            rank = parallel_state.get_tensor_model_parallel_rank()
            size = parallel_state.get_tensor_model_parallel_world_size()
            shares = _gathered(update, size)
        moved = [self._orthogonal(matrix) for matrix in layout.whole(shares)]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(layout.share(moved, rank, size), alpha=-group["lr"])

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        """What Muon subtracts at a learning rate of 1: torch's optimizer moves zeros by it."""
        place = torch.nn.Parameter(torch.zeros_like(matrix))
        place.grad = matrix
        torch.optim.Muon([place], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **self._options).step()
        return -place.detach()


def _gathered(tensor: Tensor, size: int) -> list[Tensor]:
    """The tensors of all tensor-parallel ranks."""
    if size == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(size)]
    torch.distributed.all_gather(found, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return found


def use_muon(optimizer: MegatronOptimizer, args: DriverArguments) -> None:
    """Put MuonAdamW in the place of the AdamW inside megatron.core's optimizer. Collective.

    Raises:
        ConfigError: a torch without Muon, or no trained parameter that it moves.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"--optimizer muon: torch {torch.__version__} has no Muon; expected 2.9 or newer. Install it")
    matrices = {
        held.main: held.model.matrices
        for held in held_parameters(optimizer)
        if getattr(held.model, "matrices", None) is not None
    }
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, len(matrices))
    if not sum(found):
        raise ConfigError(
            "--optimizer muon: found no matrix of a linear among the trained parameters (embeddings, heads, norms and "
            "biases are AdamW's); expected one. Train linears, or leave the flag out"
        )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None or not part.optimizer.param_groups:
            continue
        part.optimizer = MuonAdamW(
            part.optimizer.param_groups,
            matrices,
            momentum=args.muon_momentum,
            steps=args.muon_num_ns_steps,
            adjust_lr=args.muon_adjust_lr,
            lr=args.lr,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_eps,
            weight_decay=args.weight_decay,
        )
