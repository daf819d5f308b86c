"""What must hold between the flags of --profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.driver.arguments import DriverArguments


def profile_problems(args: DriverArguments) -> list[str]:
    """One sentence for each profile flag that cannot be used."""
    if not args.profile:
        return []
    problems = []
    if not 1 <= args.profile_step_start < args.profile_step_end:
        problems.append(
            f"--profile-step-start {args.profile_step_start} and --profile-step-end {args.profile_step_end}: expected "
            "a first step from 1 on, and an end behind it"
        )
    if args.train_iters is not None and args.profile_step_start > args.train_iters:
        problems.append(f"--profile-step-start {args.profile_step_start} is behind --train-iters {args.train_iters}")
    strange = [rank for rank in args.profile_ranks if not -1 <= rank < args.world_size]
    if strange:
        problems.append(f"--profile-ranks {strange[0]}: expected a rank below {args.world_size}, or -1 for all")
    if args.save is None and args.profile_dir is None:
        problems.append("--profile needs a folder for the trace: give --save or --profile-dir")
    return problems
