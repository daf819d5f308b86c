"""What must hold between the flags of --profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ProfileFlags(Protocol):
    """What the checks need of the flags (arguments.DriverArguments has it)."""

    profile: bool
    profile_step_start: int
    profile_step_end: int
    profile_ranks: Sequence[int]
    profile_dir: str | None
    save: str | None
    train_iters: int | None
    world_size: int


def profile_problems(args: ProfileFlags) -> list[str]:
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
