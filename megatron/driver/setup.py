"""Model, optimizer and learning-rate schedule of a run, as megatron.core provides them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron.driver.arguments import DriverArguments
from megatron.driver.averaging import WeightAverage
from megatron.driver.checkpoint.checkpointing import prepare_folders
from megatron.driver.checkpoint.optimizer_state import begin_state
from megatron.driver.checkpoint.resuming import load_checkpoint
from megatron.driver.initialize import is_rank_0
from megatron.driver.muon import use_muon
from megatron.driver.optimizer_flags import ADAM, MUON
from megatron.driver.parameter_groups import make_optimizer
from megatron.driver.part_gradients import PartGradients
from megatron.driver.schedule_flags import BY_EPOCHS
from megatron.driver.schedules import EpochScheduler
from megatron.driver.state import Hooks, TrainState, compute_dtype
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.platform import Platform
from mindspeed_mm.platform.core_optimizer import Scheduler, finalize_gradients
from mindspeed_mm.platform.core_versions import takes
from mindspeed_mm.run_folders import AVERAGED

logger = logging.getLogger(__name__)

ModelProvider = Callable[..., MegatronModule]


def setup(
    args: DriverArguments, model_provider: ModelProvider, platform: Platform, hooks: Hooks | None = None
) -> TrainState:
    """Build what trains, and load the checkpoint that the flags name. `initialize` comes first.

    Args:
        model_provider: (pre_process, post_process) -> the module of this pipeline stage, weights and requires_grad set;
            with virtual stages (pre_process, post_process, vp_stage), called for each chunk of this stage. A parameter
            may have an attribute `optimizer_values` (see parameter_groups.py).
        hooks: the caller's part; its `compare` guards against a checkpoint of another architecture.

    Raises:
        ConfigError: no trainable parameter, or a parallel size that the run cannot use; no seq_length with stages.
        CheckpointError: --save is not writable, or the checkpoint cannot be used.
    """
    hooks = hooks or Hooks()
    if args.pipeline_model_parallel_size > 1 and args.seq_length is None:
        raise ConfigError(
            "--pipeline-model-parallel-size above 1 needs --seq-length: stages exchange tensors of that size"
        )
    prepare_folders(args)
    model = _build_model(args, model_provider, platform)
    config = _optimizer_config(args)
    optimizer = make_optimizer(config, model)
    if args.optimizer == MUON:
        use_muon(optimizer, args)
    begin_state(optimizer)
    scheduler = _scheduler(args, optimizer)
    _connect(args, model, optimizer)
    state = TrainState(model, optimizer, scheduler, platform)
    state.part_gradients = PartGradients(state.modules, optimizer)
    if args.ema_decay is not None:
        state.average = WeightAverage(optimizer, args.ema_decay)
        if is_rank_0():
            behind = f"; {args.save}/{AVERAGED} reads it" if args.save else ""
            logger.info("keeping a moving average of the trained weights, decay %g%s", args.ema_decay, behind)
    load_checkpoint(state, args, hooks)
    return state


def _scheduler(args: DriverArguments, optimizer: MegatronOptimizer) -> Scheduler:
    """megatron.core's schedule, or the one by epochs."""
    settings = {
        "init_lr": args.lr_warmup_init,
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": args.warmup_steps,
        "lr_decay_steps": args.decay_steps,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.weight_decay,
        "end_wd": args.weight_decay,
        "wd_incr_steps": args.decay_steps,
        "wd_incr_style": "constant",
    }
    if args.lr_decay_style not in BY_EPOCHS:
        return Scheduler(optimizer, **settings)
    own = {"epoch_steps": args.iters_per_epoch, "decay_rate": args.lr_decay_rate, "in_epoch": args.lr_warmup_in_epoch}
    return EpochScheduler(optimizer, **own, **settings)


def _build_model(
    args: DriverArguments, model_provider: ModelProvider, platform: Platform
) -> list[DistributedDataParallel]:
    modules = _provide(args, model_provider)
    _check_trainable(modules, platform)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
    )
    chunks = []
    for number, module in enumerate(modules):
        config = module.config
        config.bf16, config.fp16 = args.bf16, args.fp16
        config.params_dtype = config.pipeline_dtype = compute_dtype(args)
        # Gradients are sums over tokens; finalize_model_grads divides them by the tokens of the global batch.
        config.calculate_per_token_loss = True
        module = module.to(platform.device())
        if args.bf16 or args.fp16:
            module = Float16Module(config, module)
        # The reduction of later chunks is hidden behind the work on earlier ones, so they need no small buckets.
        chunk = DistributedDataParallel(config, ddp_config, module, disable_bucketing=number > 0)
        chunk.broadcast_params()
        chunk.train()
        chunks.append(chunk)
    return chunks


def _provide(args: DriverArguments, model_provider: ModelProvider) -> list[MegatronModule]:
    """The bare modules of this stage; several where the run has virtual stages."""
    if args.num_virtual_stages_per_pipeline_rank is None:
        return [model_provider(parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())]
    return [
        model_provider(
            parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage,
        )
        for vp_stage in range(args.num_virtual_stages_per_pipeline_rank)
    ]


def _check_trainable(modules: list[MegatronModule], platform: Platform) -> None:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    # A weight that is stored in fewer bytes says how many values it has.
    total = sum(getattr(parameter, "logical_numel", parameter.numel()) for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    counts = torch.tensor([total, trainable], dtype=torch.int64, device=platform.device())
    torch.distributed.all_reduce(counts, group=parallel_state.get_model_parallel_group())
    total, trainable = counts.tolist()
    if trainable == 0:
        raise ConfigError(
            f"nothing to train: all {total:,} parameters are frozen; set freeze to false for at least one part"
        )
    if is_rank_0():
        logger.info("parameters: %s, trained: %s (%.2f%%)", f"{total:,}", f"{trainable:,}", 100 * trainable / total)


def _optimizer_config(args: DriverArguments) -> OptimizerConfig:
    """AdamW; megatron.core gives biases and parameters of one dimension no weight decay."""
    overlapped = takes(OptimizerConfig, "overlap_param_gather")
    gather = {"overlap_param_gather": args.overlap_param_gather} if overlapped else {}
    return OptimizerConfig(
        optimizer=ADAM,  # what use_muon replaces
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        clip_grad=args.clip_grad,
        bf16=args.bf16,
        fp16=args.fp16,
        params_dtype=compute_dtype(args),
        loss_scale=args.loss_scale,
        initial_loss_scale=args.initial_loss_scale,
        min_loss_scale=args.min_loss_scale,
        loss_scale_window=args.loss_scale_window,
        hysteresis=args.hysteresis,
        use_distributed_optimizer=args.use_distributed_optimizer,
        **gather,
    )


def _connect(args: DriverArguments, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Tell the schedules of megatron.core how gradients are scaled, synchronised and finished."""
    # Weakly: the distributed optimizer's parameters are views, whose autograd nodes lead back to the model where
    # Python's collector does not look. Model, optimizer and process groups of a run would never be freed.
    held = weakref.ref(optimizer)
    for chunk in model:
        config = chunk.config
        config.grad_scale_func = lambda loss: held().scale_loss(loss)
        config.finalize_model_grads_func = finalize_gradients
        if args.overlap_grad_reduce:
            # The interleaved schedule holds back the reduction of all chunks with what the first one names.
            config.no_sync_func = chunk.no_sync if len(model) == 1 else [each.no_sync for each in model]
