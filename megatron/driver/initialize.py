"""Process group, parallel layout, micro-batch count, seeds and log of a run."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import Store

from megatron.driver import preflight, reach, watch
from megatron.driver.arguments import DriverArguments
from megatron.driver.boards import check_boards
from megatron.driver.checkpoint import locks
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.platform import Platform

logger = logging.getLogger(__name__)

# Megatron's offset between the seeds of pipeline stages (megatron/training/initialize.py, _set_random_seed).
STAGE_SEED_STEP = 100


def initialize(args: DriverArguments, platform: Platform) -> None:
    """Bring up everything that is global to a process. Call `shutdown` at the end.

    Under torchrun its environment is used, and ranks that get lost are noticed; without torchrun a process group of
    one is made. A process group that exists already (tests) is kept.

    Raises:
        ConfigError: --distributed-backend is not the platform's, the world size is not the one that `args` holds, or
            `args` names virtual stages by their layers, which arguments.with_virtual_stages resolves, or a tracker
            whose library is not installed.
        TrainingError: the preflight failed: names the ranks that did not come, or what stands between those that did.
    """
    if args.distributed_backend not in ("nccl", platform.backend):
        raise ConfigError(
            f"--distributed-backend {args.distributed_backend} does not work on {platform.name}: "
            f"expected {platform.backend} (or nccl, which stands for the device's own)"
        )
    check_boards(args)
    if args.num_layers_per_virtual_pipeline_stage is not None:
        raise ConfigError("--num-layers-per-virtual-pipeline-stage needs the layers of the model: with_virtual_stages")
    with _meeting(args) as store:
        if not torch.distributed.is_initialized():
            _init_process_group(args, platform, store)
        world_size = torch.distributed.get_world_size()
        if world_size != args.world_size:
            raise ConfigError(f"the flags were checked for {args.world_size} process(es), {world_size} are running")
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
            context_parallel_size=args.context_parallel_size,
            distributed_timeout_minutes=args.distributed_timeout_minutes,
        )
        _configure_log()
        preflight.try_collective(args, platform)
        platform.settle()
    init_num_microbatches_calculator(
        rank=torch.distributed.get_rank(),
        rampup_batch_size=None,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
    )
    # Data-parallel ranks share the seed, so that weights that are not loaded begin equal on all of them.
    seed = args.seed + STAGE_SEED_STEP * parallel_state.get_pipeline_model_parallel_rank()
    platform.seed(seed)
    model_parallel_cuda_manual_seed(seed)
    for note in args.notes() if is_rank_0() else ():
        logger.info(note)


def _configure_log() -> None:
    """The driver logs from rank 0; other ranks speak of errors only. A handler is added where the caller has none."""
    driver = logging.getLogger("megatron.driver")
    driver.setLevel(logging.INFO if is_rank_0() else logging.ERROR)
    if not driver.hasHandlers():
        driver.addHandler(logging.StreamHandler())


@contextlib.contextmanager
def _meeting(args: DriverArguments) -> Iterator[Store]:
    """The store that the ranks meet at, once all have come; begins to watch them. Failures inside name ranks."""
    if "RANK" not in os.environ or torch.distributed.is_initialized():
        yield torch.distributed.HashStore()
        return
    store = preflight.open_store(args)
    rank, ranks, limit = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), args.preflight_timeout_seconds
    preflight.sign_in(store, rank, ranks, limit)
    if ranks > 1:
        watch.start(preflight.open_store(args), rank, ranks, args.distributed_timeout_minutes)
    with reach.naming_unreachable(preflight.open_store(args), rank, ranks, limit):
        yield store


def _init_process_group(args: DriverArguments, platform: Platform, store: Store) -> None:
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    timeout = datetime.timedelta(minutes=args.distributed_timeout_minutes)
    torch.distributed.init_process_group(platform.backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def shutdown() -> None:
    """Undo `initialize`. Harmless when nothing was initialised."""
    watch.stop()
    locks.release_all()
    parallel_state.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    RotaryEmbedding.forward.cache_clear()  # it holds on to models, whose process groups keep their threads
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_rank_0() -> bool:
    """True on the process that writes the log and the shared files."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
