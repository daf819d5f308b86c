"""Flags of the optimizer, and which of them go together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron.driver.flags import flag, switch
from megatron.driver.ranges import option
from megatron.driver.schedule_flags import ScheduleArguments

ADAM, MUON = "adam", "muon"


@dataclass(frozen=True, kw_only=True)
class OptimizerArguments(ScheduleArguments):
    """The part of DriverArguments that says how parameters are moved."""

    weight_decay: float = flag(float, 0.01, "optimizer", "AdamW weight decay; biases and norms have none")
    clip_grad: float = flag(float, 1.0, "optimizer", "largest gradient norm; 0 does not clip")
    optimizer: str = flag(
        str,
        ADAM,
        "optimizer",
        "adam is AdamW; muon moves the matrices of linears by Muon",
        (ADAM, MUON),
    )
    adam_beta1: float = flag(float, 0.9, "optimizer", "decay of the first moment")
    adam_beta2: float = flag(float, 0.999, "optimizer", "decay of the second moment")
    adam_eps: float = flag(float, 1e-8, "optimizer", "added to the denominator")
    muon_momentum: float = flag(float, 0.95, "optimizer", "decay of Muon's momentum")
    muon_num_ns_steps: int = flag(int, 5, "optimizer", "Newton-Schulz steps that make Muon's update orthogonal")
    muon_adjust_lr: str = flag(
        str,
        "match_rms_adamw",
        "optimizer",
        "what Muon's learning rate is multiplied by: match_rms_adamw lets it share AdamW's",
        ("match_rms_adamw", "original"),
    )
    ema_decay: float | None = flag(
        float, None, "optimizer", "keep an exponential moving average of the trained weights, with this decay"
    )
    ema_validation: bool = switch(
        "optimizer", "also validate the moving average, and let early stop look at it instead of the weights"
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        bool, False, "optimizer", "on resume the checkpoint's schedule wins over the flags"
    )
    override_opt_param_scheduler: bool = switch("optimizer", "on resume the flags win without a warning")


def optimizer_problems(args: Any) -> list[str]:
    """One line for each flag of the optimizer that is out of its range or does not go with the others."""
    problems = []
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        problems.append(f"--ema-decay is {args.ema_decay}: expected a value between 0 and 1, such as 0.999")
    if args.ema_validation and args.ema_decay is None:
        problems.append("--ema-validation is given without --ema-decay: no moving average is kept. Give both")
    if not 0 <= args.muon_momentum < 1:
        problems.append(f"--muon-momentum is {args.muon_momentum}: expected at least 0 and below 1")
    if not 1 <= args.muon_num_ns_steps < 100:  # torch's limit
        problems.append(f"--muon-num-ns-steps is {args.muon_num_ns_steps}: expected 1 to 99")
    if args.optimizer == MUON:
        return problems + _muon_problems(args)
    given = [own for own in dataclasses.fields(OptimizerArguments) if own.name.startswith("muon_")]
    problems += [
        f"{option(own.name)} is given without --optimizer muon"
        for own in given
        if getattr(args, own.name) != own.default
    ]
    return problems


def _muon_problems(args: Any) -> list[str]:
    if args.use_distributed_optimizer:
        return [
            "--optimizer muon does not go with --use-distributed-optimizer, which gives each rank a flat piece of the "
            "parameters: Muon makes whole matrices orthogonal. Leave one of them out"
        ]
    return []
