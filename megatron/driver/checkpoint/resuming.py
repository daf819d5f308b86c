"""Resuming a run, or beginning one with the weights of another."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron.driver import rng
from megatron.driver.arguments import DriverArguments
from megatron.driver.averaging import tell_left_behind
from megatron.driver.checkpoint import integrity, storage
from megatron.driver.checkpoint.checkpointing import layout, optimizer_kind
from megatron.driver.checkpoint.optimizer_state import provide_step_count, set_step_count
from megatron.driver.checkpoint.reading import (
    Checkpoint,
    SafeReader,
    check_folders,
    find_checkpoint,
    folders,
    missing,
    open_checkpoint,
    read_run,
    reading_errors,
    split_averaged,
)
from megatron.driver.checkpoint.sharding import (
    FLAT,
    RESHARDABLE,
    built,
    chunk_name,
    metadata,
    model_tensors,
    split_frozen,
)
from megatron.driver.collectives import agree, gather
from megatron.driver.initialize import is_rank_0
from megatron.driver.optimizer_flags import ADAM
from megatron.driver.optimizer_kinds import ask_other_kind, complete
from megatron.driver.schedule_flags import BY_EPOCHS
from megatron.driver.state import Hooks, TrainState
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.platform.core_optimizer import sharded_state
from mindspeed_mm.run_folders import AVERAGED

logger = logging.getLogger(__name__)

LISTED = 10
"""Problems that an error message shows at most."""

_GROUP_SETTINGS = ("max_lr", "min_lr", "start_wd", "end_wd", "betas", "eps", "lr_mult")
"""Settings of a parameter group that the flags decide on resume; `lr` and `weight_decay` follow from the schedule."""


def load_checkpoint(state: TrainState, args: DriverArguments, hooks: Hooks | None = None) -> Path | None:
    """Bring `state` to the checkpoint that the flags name. Collective.

    --load resumes. With --finetune, or from --pretrained-checkpoint while --load holds none, only weights are taken.

    Returns:
        The checkpoint's folder, None where no checkpoint is loaded.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, unsafe, or does not fit the model or the flags.
    """
    hooks = hooks or Hooks()
    path, weights_only = agree(lambda: _choose(args))
    if path is None:
        return None
    run = agree(lambda: read_run(path))
    agree(lambda: _refuse_differences(path, hooks.compare(run["extra"])))
    integrity.check(agree(lambda: folders(path, run)), together=True)
    agree(lambda: open_checkpoint(path, run).names)
    _load_model(state, args, open_checkpoint(path, run), hooks.added, weights_only)
    if weights_only or args.no_load_optim:
        state.optimizer.reload_model_params()
    else:
        _load_optimizer(state, args, path, run)
    if state.average is not None and weights_only:
        state.average.begin()
    elif state.average is not None:
        state.average.load(model_tensors(state.modules), path)
    elif not weights_only:
        tell_left_behind(path)
    if not weights_only:
        _resume(state, args, path, run)
    if is_rank_0():
        taken = "the weights" if weights_only else "the run"
        logger.info("loaded %s from %s; %d steps are done", taken, path, state.iteration)
    return path


def _choose(args: DriverArguments) -> tuple[Path | None, bool]:
    """(folder or None, whether only its weights are wanted)."""
    for flag, given in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if given is not None and split_averaged(given)[1]:
            raise CheckpointError(
                f"{flag} {given} means the moving averages of a checkpoint, which no run goes on from; expected the "
                f"path without {AVERAGED}. Or give the averages as ckpt_path of the parts"
            )
    check_folders(args)
    if args.load is not None:
        path = find_checkpoint(args.load, args.ckpt_step)
        if path is not None:
            _tell_newer(path, args)
            return path, args.finetune or path.name == storage.RELEASE
        text = missing("--load", args.load, "to go on from the last one")
        pretrained = args.pretrained_checkpoint
        begins = "the model config's weights" if pretrained is None else f"the weights of {pretrained}"
        logger.warning("%s: the run begins at step 0 with %s", text, begins)
    if args.pretrained_checkpoint is None:
        return None, False
    return find_checkpoint(args.pretrained_checkpoint), True


def _tell_newer(path: Path, args: DriverArguments) -> None:
    """Iterations behind the tracker's: it was set back, or the run was killed just before it would have moved."""
    number = path.name.removeprefix("iter_")
    newer = [other for other in storage.iterations(path.parent) if number.isdigit() and other > int(number)]
    if newer and args.ckpt_step is None:
        logger.warning(
            "%s names %d, but there are newer iterations: %s; --ckpt-step %d goes on from the last of them",
            *(path.parent / storage.TRACKER, int(number), ", ".join(map(str, newer)), newer[-1]),
        )


def _refuse_differences(path: Path, differences: list[str]) -> None:
    if differences:
        raise CheckpointError(
            f"checkpoint {path} has another architecture than the model: {_some(differences)}. "
            "Use the description it was trained with"
        )


def _load_model(
    state: TrainState,
    args: DriverArguments,
    checkpoint: Checkpoint,
    added: Callable[[str], bool],
    weights_only: bool,
) -> None:
    """Fill parameters and buffers from the iteration's folder and its frozen folder, whatever is frozen now. With
    `weights_only` what is `added` to the model may be missing there, and stays as it is."""
    tensors = model_tensors(state.modules)
    beside = {item.key for item in built(tensors) if added(item.key) and item.key not in checkpoint.sources}
    if beside and not weights_only:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} has no {_some(sorted(beside))}: the run that saved it did not train that. "
            "Give the folder as --pretrained-checkpoint, which takes its weights alone"
        )
    tensors = {name: item for name, item in tensors.items() if item.key not in beside}
    _check_model(args, checkpoint, built(tensors))
    places = {}
    for chunk, module in enumerate(state.modules):
        held = dict(module.named_parameters()) | dict(module.named_buffers())
        places |= {chunk_name(chunk, name): tensor for name, tensor in held.items()}
    for folder in sorted({reader.path for reader in checkpoint.sources.values()}):
        part = {name: item for name, item in tensors.items() if checkpoint.sources[item.key].path == folder}
        with reading_errors(checkpoint.path):
            loaded = dist_checkpointing.load({"model": part}, str(folder)).get("model", {})
        with torch.no_grad():
            for name in part:
                places[name].copy_(loaded[name])
    _keep_frozen(state, args, checkpoint)


def _check_model(args: DriverArguments, checkpoint: Checkpoint, wanted: list[ShardedTensor]) -> None:
    """Names and full shapes of the model and of the checkpoint must agree. Collective."""
    problems = []
    # Vocabularies are padded to a multiple of the tensor-parallel size, so their rows may differ by less than that.
    padding = max(checkpoint.run["layout"]["tensor_model_parallel_size"], args.tensor_model_parallel_size)
    for item in wanted:
        if item.key not in checkpoint.sources:
            problems.append(f"{item.key} is missing{_near(item.key, checkpoint.names)}")
            continue
        found, expected = list(checkpoint.shape(item.key)), list(item.global_shape)
        padded = item.allow_shape_mismatch and found[1:] == expected[1:] and abs(found[0] - expected[0]) < padding
        if found != expected and not padded:
            problems.append(f"{item.key} has shape {found}, the model has {expected}")
    known = {key for rank in gather([item.key for item in wanted]) for key in rank}
    problems += [f"{name} is not in the model" for name in checkpoint.names if name not in known]
    _raise_together(
        problems, f"checkpoint {checkpoint.path} does not fit the model", "use the description it was trained with"
    )


def _keep_frozen(state: TrainState, args: DriverArguments, checkpoint: Checkpoint) -> None:
    """Go on with the stored frozen parameters where the same ones are frozen, whatever the layout. Collective."""
    saved = checkpoint.run["frozen"]
    held = {name for name, reader in checkpoint.sources.items() if saved and reader.path.name == saved["id"]}
    frozen = split_frozen(model_tensors(state.modules))[1]
    now = {key for rank in gather([item.key for item in built(frozen)]) for key in rank}
    precision = {name: checkpoint.run["layout"][name] for name in ("bf16", "fp16")}
    if held and held == now and precision == {"bf16": args.bf16, "fp16": args.fp16}:
        state.frozen_id = saved["id"]


def _raise_together(problems: list[str], what: str, cure: str) -> None:
    """Raise on every rank when any rank has a problem. Collective."""
    everywhere = list(dict.fromkeys(problem for rank in gather(problems) for problem in rank))
    if everywhere:
        raise CheckpointError(f"{what}: {_some(everywhere)}; {cure}")


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.8)
    return f" (it holds {near[0]})" if near else ""


def _some(problems: list[str]) -> str:
    more = len(problems) - LISTED
    return "; ".join(problems[:LISTED]) + (f"; and {more} more" if more > 0 else "")


def _load_optimizer(state: TrainState, args: DriverArguments, path: Path, run: dict[str, Any]) -> None:
    if not run["optimizer"]:
        raise CheckpointError(
            f"checkpoint {path} holds no optimizer state (it was saved with --no-save-optim): "
            "give --no-load-optim to resume without it, or --finetune to take only the weights"
        )
    kind, saved_kind = optimizer_kind(args), run["optimizer"]
    differing = [name for name in ("bf16", "fp16") if saved_kind[name] != kind[name]]
    if differing:
        flags = ", ".join("--" + name.replace("_", "-") for name in differing)
        raise CheckpointError(
            f"the optimizer state of {path} was saved with another setting of {flags}: use the same, or give "
            "--no-load-optim to resume without it"
        )
    if saved_kind.get("optimizer", ADAM) != kind["optimizer"]:  # older checkpoints are all AdamW's
        raise CheckpointError(
            f"the optimizer state of {path} was saved with --optimizer {saved_kind.get('optimizer', ADAM)}, this run "
            f"has {kind['optimizer']}: use the same, or give --no-load-optim to resume without it"
        )
    settings = [
        {name: group[name] for name in _GROUP_SETTINGS if name in group} for group in state.optimizer.param_groups
    ]
    sharded = sharded_state(state.optimizer, model_tensors(state.modules), metadata(), is_loading=True)
    sharding = sharded.get("param_state_sharding_type")
    saved_sharding = saved_kind.get("sharding", RESHARDABLE if saved_kind["use_distributed_optimizer"] else None)
    if FLAT in (sharding, saved_sharding) and sharding != saved_sharding:
        raise CheckpointError(
            f"the optimizer state of {path} is laid out as {saved_sharding or 'whole tensors'}, this run needs "
            f"{sharding or 'whole tensors'}: megatron-core 0.12 and its distributed optimizer read and write no other "
            "layout. Use the same megatron-core and the same setting of --use-distributed-optimizer, or give "
            "--no-load-optim to resume without it"
        )
    if saved_kind["use_distributed_optimizer"] != kind["use_distributed_optimizer"]:
        ask_other_kind(
            sharded,
            saved_distributed=saved_kind["use_distributed_optimizer"],
            full_precision=not (args.bf16 or args.fp16),
        )
    held = SafeReader(path).read_metadata().state_dict_metadata
    _raise_together(
        [f"{item.key} is missing" for item in built({"optimizer": sharded}) if item.key not in held],
        f"the optimizer state of {path} does not fit what is trained now (other parts are frozen)",
        "give --no-load-optim to resume without it, or --finetune to take only the weights",
    )
    with reading_errors(path):
        loaded = dist_checkpointing.load({"optimizer": sharded}, str(path))["optimizer"]
    loaded = complete(loaded, state.optimizer, saved_kind["step"])
    if sharding is not None:
        loaded["param_state_sharding_type"] = sharding
    provide_step_count(loaded, saved_kind["step"])
    state.optimizer.load_state_dict(loaded)
    set_step_count(state.optimizer, run["optimizer"]["step"])
    for group, given in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(given)


def _resume(state: TrainState, args: DriverArguments, path: Path, run: dict[str, Any]) -> None:
    """Step, samples, schedule and random states. The schedule goes on even where optimizer state is not loaded."""
    state.iteration = run["iteration"]
    state.consumed_samples = run["consumed_samples"]
    state.skipped_iterations = run["skipped_iterations"]
    _resume_schedule(state, args, run["scheduler"])
    if args.no_load_rng or not run["rng"]:
        return
    if run["layout"] != layout(args):
        logger.warning("random states of %s are not loaded: it was saved at another parallel layout or precision", path)
        return
    rng.load(path, state.platform)


def _resume_schedule(state: TrainState, args: DriverArguments, saved: dict[str, Any]) -> None:
    scheduler = state.scheduler
    current = scheduler.state_dict()
    differing = [name for name, value in saved.items() if name != "num_steps" and current.get(name) != value]
    if args.use_checkpoint_opt_param_scheduler:
        style = saved["lr_decay_style"]
        if (style in BY_EPOCHS) != (args.lr_decay_style in BY_EPOCHS):
            raise CheckpointError(
                f"--use-checkpoint-opt-param-scheduler: the checkpoint's schedule is {style}; expected "
                f"--lr-decay-style {style}. Give it, or leave the switch out"
            )
        for name in differing:
            setattr(scheduler, name, saved[name])
        for group in state.optimizer.param_groups:
            if group.get("default_config", True):  # others have a learning rate of their own
                group.update(max_lr=saved["max_lr"], min_lr=saved["min_lr"])
    elif differing and not args.override_opt_param_scheduler and is_rank_0():
        changes = ", ".join(f"{name} {saved[name]} -> {current.get(name)}" for name in differing)
        logger.warning(
            "the learning-rate schedule differs from the checkpoint's (%s): the flags' is used; "
            "--use-checkpoint-opt-param-scheduler keeps the checkpoint's",
            changes,
        )
    scheduler.num_steps = 0
    scheduler.step(saved["num_steps"])
