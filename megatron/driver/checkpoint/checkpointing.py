"""Saving a run. The layout of a save folder is described in storage.py."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as megatron_core_version
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed import ProcessGroup

from megatron.driver import rng
from megatron.driver.arguments import DriverArguments
from megatron.driver.checkpoint import integrity, locks, storage
from megatron.driver.checkpoint.optimizer_state import step_count
from megatron.driver.checkpoint.reading import FORMAT, first_line
from megatron.driver.checkpoint.sharding import (
    AVERAGES,
    Content,
    collect,
    content_hash,
    metadata,
    model_tensors,
    split_frozen,
    write_tensors,
)
from megatron.driver.collectives import agree, gather
from megatron.driver.initialize import is_rank_0
from megatron.driver.state import Hooks, TrainState
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.platform.core_optimizer import sharded_state

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
            begins = "the model config's weights" if args.pretrained_checkpoint is None else args.pretrained_checkpoint
            logger.warning(
                "--save %s holds checkpoints already and --load is not given: this run begins at step 0 with %s and "
                "replaces those of the same iterations",
                *(save, begins),
            )

    agree(prepare)


@dataclass(frozen=True)
class Snapshot:
    """Everything that one checkpoint will hold."""

    iteration: int
    trained: Content
    frozen: Content | None
    """None where nothing is frozen."""
    frozen_id: str
    rng: bytes | None
    run: dict[str, Any]
    """What run.json says, but for the files."""


def save_checkpoint(state: TrainState, args: DriverArguments, hooks: Hooks | None = None) -> Path:
    """Write SAVE/iter_%07d and move the tracker. Collective. A save that fails leaves what was there before.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the disk is full or not writable, or the model holds state that is no tensor.
    """
    return write_snapshot(take_snapshot(state, args, hooks or Hooks(), copy=False), args)


def take_snapshot(state: TrainState, args: DriverArguments, hooks: Hooks, *, copy: bool) -> Snapshot:
    """What a checkpoint of this moment holds. Collective.

    Args:
        copy: take what training changes to host memory; else the snapshot holds as long as nothing is trained.
    """
    everything = model_tensors(state.modules)
    optimizer: dict[str, Any] = {}
    if not args.no_save_optim:
        optimizer["optimizer"] = sharded_state(state.optimizer, everything, metadata())
    trained, frozen = split_frozen(everything)
    if state.average is not None:
        optimizer[AVERAGES] = state.average.sharded(trained)
    if state.frozen_id is None:
        state.frozen_id = content_hash(frozen)
    step = max(gather(step_count(state.optimizer)))
    run = agree(lambda: _describe(state, args, hooks))
    sharding = optimizer.get("optimizer", {}).get("param_state_sharding_type")
    run["optimizer"] = None if args.no_save_optim else optimizer_kind(args) | {"step": step, "sharding": sharding}
    return Snapshot(
        iteration=state.iteration,
        trained=collect(optimizer | {"model": trained}, copy=copy),
        frozen=collect({"model": frozen}, copy=False) if state.frozen_id else None,
        frozen_id=state.frozen_id,
        rng=None if args.no_save_rng else rng.collect(state.platform),
        run=run,
    )


def write_snapshot(snapshot: Snapshot, args: DriverArguments, group: ProcessGroup | None = None) -> Path:
    """Write a snapshot as SAVE/iter_%07d and move the tracker when it is whole on every rank. Collective over `group`.

    Returns, Raises: see save_checkpoint.
    """
    save = Path(args.save)
    final = storage.iteration_dir(save, snapshot.iteration)
    try:
        agree(lambda: storage.clean(save), group)
        frozen = _write_frozen(snapshot, save, group)
        agree(lambda: storage.begin(final), group)
        work = storage.work_dir(final)
        write_tensors(snapshot.trained, work, group)
        checksums = integrity.digests(work, group)

        def finish() -> list[int]:
            if snapshot.rng is not None:
                (work / rng.RNG_FILE).write_bytes(snapshot.rng)
            run = snapshot.run | {"frozen": frozen, "files": storage.sizes(work)}
            (work / storage.RUN_FILE).write_text(json.dumps(run, indent=1), encoding="utf-8")
            integrity.write(work, checksums)
            storage.publish(final)
            storage.write_text(save / storage.TRACKER, str(snapshot.iteration))
            return storage.prune(save, args.keep_last, args.keep_every)

        deleted = agree(finish, group)
    except _SAVING_ERRORS as error:
        left = storage.discard(final) if is_rank_0() else storage.free(save)
        raise CheckpointError(
            f"iteration {snapshot.iteration} could not be saved to {save}: {first_line(error)} ({left}). "
            "Checkpoints written before are whole"
        ) from error
    if is_rank_0():
        logger.info("saved checkpoint %s", final)
        if deleted:
            logger.info("deleted old checkpoints of iterations %s", ", ".join(map(str, deleted)))
    return final


def _write_frozen(snapshot: Snapshot, save: Path, group: ProcessGroup | None) -> dict[str, Any] | None:
    """Write the frozen parameters unless SAVE holds them already; what run.json says about them."""
    if snapshot.frozen is None:
        return None
    final = storage.frozen_dir(save, snapshot.frozen_id)
    if not agree(final.is_dir, group):
        agree(lambda: storage.begin(final), group)
        work = storage.work_dir(final)
        write_tensors(snapshot.frozen, work, group)
        checksums = integrity.digests(work, group)

        def finish() -> None:
            integrity.write(work, checksums)
            storage.publish(final)

        agree(finish, group)
    seal = agree(lambda: integrity.digest(final / storage.CHECKSUMS), group)
    return {"id": snapshot.frozen_id, "files": agree(lambda: storage.sizes(final), group), "checksums": seal}


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
    return {name: getattr(args, name) for name in ("optimizer", "use_distributed_optimizer", "bf16", "fp16")}


def layout(args: DriverArguments) -> dict[str, Any]:
    """What the random states of a checkpoint depend on."""
    names = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    return {name: getattr(args, name) for name in (*names, "bf16", "fp16")}
