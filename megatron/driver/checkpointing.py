"""Saving a run. The layout of a save folder is described in storage.py."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as megatron_core_version
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron.driver import integrity, locks, rng, storage
from megatron.driver.arguments import DriverArguments
from megatron.driver.collectives import agree, gather
from megatron.driver.initialize import is_rank_0
from megatron.driver.optimizer_state import step_count
from megatron.driver.reading import FORMAT
from megatron.driver.sharding import content_hash, metadata, model_tensors, split_frozen, write_tensors
from megatron.driver.state import Hooks, TrainState
from mindspeed_mm.errors import CheckpointError

logger = logging.getLogger(__name__)

# What a full disk raises, on the rank where it happens or, through torch and megatron.core, on all of them.
_SAVING_ERRORS = (OSError, RuntimeError, CheckpointingException, torch.distributed.checkpoint.api.CheckpointException)


def prepare_folders(args: DriverArguments) -> None:
    """Tidy up after a killed run and fail at the start, not at the first save. Collective.

    Raises:
        CheckpointError: --save cannot be written to, or another run writes there.
    """

    def prepare() -> None:
        if args.save is None:
            return
        save = Path(args.save)
        storage.probe_writable(save)
        locks.acquire(save)
        storage.clean(save)
        if (save / storage.TRACKER).exists() and args.load is None:
            logger.warning(
                "--save %s holds checkpoints already and --load is not given: this run starts from scratch and "
                "replaces those of the same iterations",
                save,
            )

    agree(prepare)


def save_checkpoint(state: TrainState, args: DriverArguments, hooks: Hooks | None = None) -> Path:
    """Write SAVE/iter_%07d and move the tracker. Collective. A save that fails leaves what was there before.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the disk is full or not writable, or the model holds state that is no tensor.
    """
    hooks = hooks or Hooks()
    save = Path(args.save)
    final = storage.iteration_dir(save, state.iteration)
    try:
        agree(lambda: storage.clean(save))
        frozen = _save_frozen(state, save)
        agree(lambda: storage.begin(final))
        work = storage.work_dir(final)
        write_tensors(_training_tensors(state, args), work)
        if not args.no_save_rng:
            rng.save(work, state.platform)
        step = max(gather(step_count(state.optimizer)))
        checksums = integrity.digests(work)

        def finish() -> list[int]:
            run = _describe(state, args, hooks) | {"frozen": frozen, "files": storage.sizes(work)}
            run["optimizer"] = None if args.no_save_optim else optimizer_kind(args) | {"step": step}
            (work / storage.RUN_FILE).write_text(json.dumps(run, indent=1), encoding="utf-8")
            integrity.write(work, checksums)
            storage.publish(final)
            storage.write_text(save / storage.TRACKER, str(state.iteration))
            return storage.prune(save, args.keep_last, args.keep_every)

        deleted = agree(finish)
    except _SAVING_ERRORS as error:
        raise CheckpointError(
            f"iteration {state.iteration} could not be saved to {save}: {error}. Checkpoints written before are whole"
        ) from error
    if is_rank_0():
        logger.info("saved checkpoint %s", final)
        if deleted:
            logger.info("deleted old checkpoints of iterations %s", ", ".join(map(str, deleted)))
    return final


def _training_tensors(state: TrainState, args: DriverArguments) -> dict[str, Any]:
    everything = model_tensors(state.modules)
    content: dict[str, Any] = {}
    if not args.no_save_optim:
        content["optimizer"] = state.optimizer.sharded_state_dict(everything, metadata=metadata())
    content["model"], _ = split_frozen(everything)
    return content


def _save_frozen(state: TrainState, save: Path) -> dict[str, Any] | None:
    """Write the frozen parameters unless SAVE holds them already; what run.json says about them, on rank 0."""
    _, frozen = split_frozen(model_tensors(state.modules))
    if state.frozen_id is None:
        state.frozen_id = content_hash(frozen)
    if not state.frozen_id:
        return None
    final = storage.frozen_dir(save, state.frozen_id)
    if not agree(final.is_dir):
        agree(lambda: storage.begin(final))
        work = storage.work_dir(final)
        write_tensors({"model": frozen}, work)
        checksums = integrity.digests(work)

        def finish() -> None:
            integrity.write(work, checksums)
            storage.publish(final)

        agree(finish)
    return agree(lambda: {"id": state.frozen_id, "files": storage.sizes(final)})


def _describe(state: TrainState, args: DriverArguments, hooks: Hooks) -> dict[str, Any]:
    """What run.json says about the run itself."""
    return {
        "format": FORMAT,
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "skipped_iterations": state.skipped_iterations,
        "scheduler": state.scheduler.state_dict(),
        "rng": not args.no_save_rng,
        "layout": layout(args),
        "arguments": dataclasses.asdict(args),
        "versions": {"torch": torch.__version__, "megatron_core": megatron_core_version},
        "extra": hooks.extra(),
    }


def optimizer_kind(args: DriverArguments) -> dict[str, Any]:
    """What the form of saved optimizer state depends on."""
    return {name: getattr(args, name) for name in ("use_distributed_optimizer", "bf16", "fp16")}


def layout(args: DriverArguments) -> dict[str, Any]:
    """What the random states and the hash of frozen parameters of a checkpoint depend on."""
    names = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    return {name: getattr(args, name) for name in (*names, "bf16", "fp16")}
