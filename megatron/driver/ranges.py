"""Which values the flags of the driver may have, and what the flags of trackers need."""

from __future__ import annotations

import math
from typing import Any

from megatron.driver.schedule_flags import BY_EPOCHS, WARMUP_STEP


def option(name: str) -> str:
    """The flag of a field: micro_batch_size -> --micro-batch-size."""
    return "--" + name.replace("_", "-")


_AT_LEAST_ONE = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "micro_batch_size"),
    *("global_batch_size", "train_iters", "lr_decay_iters", "save_interval", "exit_interval", "log_interval"),
    *("keep_last", "keep_every", "iters_per_epoch"),
    *("loss_scale_window", "hysteresis", "seq_length"),
    *("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"),
)
_AT_LEAST_ZERO = (
    *(
        "lr",
        "min_lr",
        "lr_warmup_iters",
        "lr_warmup_init",
        "weight_decay",
        "clip_grad",
        "num_workers",
        "seed",
        "ckpt_step",
    ),
    *("adam_beta1", "adam_beta2"),
)
_ABOVE_ZERO = (
    "lr_decay_rate",
    "save_interval_minutes",
    "preflight_timeout_seconds",
    "adam_eps",
    "distributed_timeout_minutes",
    "loss_scale",
    "initial_loss_scale",
    "min_loss_scale",
)


def range_problems(args: Any) -> list[str]:
    """One line for each flag of arguments.DriverArguments whose value is out of its range."""
    problems = []
    for names, fits, expected in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (_AT_LEAST_ZERO, lambda value: value >= 0, "at least 0"),
        (_ABOVE_ZERO, lambda value: value > 0, "above 0"),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not (math.isfinite(value) and fits(value)):
                problems.append(f"{option(name)} is {value}: expected {expected}")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(args, name) >= 1:
            problems.append(f"{option(name)} is {getattr(args, name)}: expected a value below 1")
    return problems


def tracking_problems(args: Any) -> list[str]:
    """What is missing beside the flags of W&B and SwanLab."""
    problems = []
    for library in ("wandb", "swanlab"):
        project, name, folder = (getattr(args, f"{library}_{part}") for part in ("project", "exp_name", "save_dir"))
        if project is None:
            given = {"exp-name": name, "save-dir": folder}
            problems += [
                f"--{library}-{part} is given without --{library}-project"
                for part, value in given.items()
                if value is not None
            ]
        elif folder is None and args.save is None:
            problems.append(f"--{library}-project needs a folder: give --save or --{library}-save-dir")
    if args.online and args.wandb_project is None and args.swanlab_project is None:
        problems.append("--online is given without --wandb-project or --swanlab-project")
    return problems


def schedule_problems(args: Any) -> list[str]:
    """One line for each flag of the learning-rate schedule that is missing or does not go with the others."""
    problems = [f"{option(name)} is required" for name in ("lr", "train_iters") if getattr(args, name) is None]
    if args.lr is not None and args.min_lr > args.lr:
        problems.append(f"--min-lr is {args.min_lr}: expected at most --lr, which is {args.lr}")
    fraction = args.lr_warmup_fraction
    if fraction is not None and args.lr_warmup_iters:
        problems.append("--lr-warmup-fraction and --lr-warmup-iters are both given: keep one of them")
    if fraction is not None and not 0 <= fraction < 1:
        problems.append(f"--lr-warmup-fraction is {fraction}: expected at least 0 and below 1")
    elif args.train_iters is not None and args.warmup_steps >= max(args.decay_steps, 1) and not _by_epochs(args):
        problems.append(
            f"the warm-up takes {args.warmup_steps} of {args.decay_steps} decay steps: expected fewer; "
            "shorten --lr-warmup-iters / --lr-warmup-fraction or raise --lr-decay-iters"
        )
    return problems + _epoch_problems(args)


def _by_epochs(args: Any) -> bool:
    return args.lr_decay_style in BY_EPOCHS


def _epoch_problems(args: Any) -> list[str]:
    """Flags of the schedules by epochs, which need the steps of one and are nothing to the others."""
    style = f"--lr-decay-style {args.lr_decay_style}"
    if args.lr is not None and args.lr_warmup_init > args.lr:
        return [f"--lr-warmup-init is {args.lr_warmup_init}: expected at most --lr, which is {args.lr}"]
    if _by_epochs(args) and args.iters_per_epoch is None:
        return [f"{style} needs --iters-per-epoch"]
    idle = {"lr_decay_rate": args.lr_decay_rate != 1.0 and args.lr_decay_style != WARMUP_STEP}
    if not _by_epochs(args):
        idle |= {"iters_per_epoch": args.iters_per_epoch is not None, "lr_warmup_in_epoch": args.lr_warmup_in_epoch}
    return [f"{option(name)} has no meaning with {style}: leave it out" for name, given in idle.items() if given]
