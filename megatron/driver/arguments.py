"""Megatron's command-line flags as one frozen dataclass.

Each field of DriverArguments is one flag (`micro_batch_size` is --micro-batch-size) with Megatron's name and default
(megatron/training/arguments.py of Megatron-LM core_r0.8.0, which the ancestor's launchers are written for).
No flag is accepted and ignored: what cannot have an effect here is checked for consistency or named in the log.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from typing import Any

from megatron.driver.flags import flag, switch
from megatron.driver.optimizer_flags import OptimizerArguments, optimizer_problems
from megatron.driver.profile_checks import profile_problems
from megatron.driver.ranges import option, range_problems, schedule_problems, tracking_problems
from mindspeed_mm.errors import ConfigError

_GROUPS = {
    "parallel": "parallelism and batch",
    "model": "model (compared with --mm-model, which decides)",
    "optimizer": "optimizer and learning rate",
    "precision": "precision",
    "checkpoint": "checkpoints",
    "run": "run and log",
    "kept": "accepted for the ancestor's launchers, without an effect here",
}


@dataclass(frozen=True, kw_only=True)
class DriverArguments(OptimizerArguments):
    """All flags of the driver. Made by `from_namespace`, which validates them."""

    tensor_model_parallel_size: int = flag(int, 1, "parallel", "devices that share each matrix")
    pipeline_model_parallel_size: int = flag(int, 1, "parallel", "stages that share the layers")
    num_virtual_stages_per_pipeline_rank: int | None = flag(
        int, None, "parallel", "chunks of layers on each pipeline stage (interleaved schedule, a smaller bubble)"
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        int, None, "parallel", "the same, given as the layers of such a chunk"
    )
    context_parallel_size: int = flag(int, 1, "parallel", "devices that share each sequence")
    sequence_parallel: bool = switch("parallel", "split norms and dropouts along the sequence; needs tensor parallel")
    micro_batch_size: int = flag(int, 1, "parallel", "samples per device and forward pass")
    global_batch_size: int | None = flag(int, None, "parallel", "samples per step; default micro batch x data parallel")
    use_distributed_optimizer: bool = switch("parallel", "split optimizer state over the data-parallel ranks")
    overlap_grad_reduce: bool = switch("parallel", "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = switch("parallel", "gather parameters while the forward pass runs")
    distributed_backend: str = flag(
        str, "nccl", "parallel", "nccl stands for the device's own", ("nccl", "hccl", "gloo")
    )
    distributed_timeout_minutes: float = flag(float, 10.0, "parallel", "a silent rank is given up after this")
    preflight_timeout_seconds: float = flag(float, 60.0, "parallel", "how long ranks wait for each other at the start")

    seq_length: int | None = flag(
        int,
        None,
        "model",
        'most tokens of a sample with its images; "overlong" in the data config decides on longer ones',
    )
    num_layers: int | None = flag(int, None, "model", "layers of the text decoder")
    hidden_size: int | None = flag(int, None, "model", "width of the text decoder")
    ffn_hidden_size: int | None = flag(int, None, "model", "width of the text decoder's MLP")
    num_attention_heads: int | None = flag(int, None, "model", "attention heads of the text decoder")
    num_query_groups: int | None = flag(int, None, "model", "key/value heads of the text decoder")
    max_position_embeddings: int | None = flag(int, None, "model", "longest sequence of the text decoder")
    attention_dropout: float | None = flag(float, None, "model", "dropout of attention weights in the text decoder")
    hidden_dropout: float | None = flag(float, None, "model", "dropout of hidden states in the text decoder")
    normalization: str | None = flag(str, None, "model", "norm of the text decoder")
    img_h: int | None = flag(int, None, "model", "height of the images")
    img_w: int | None = flag(int, None, "model", "width of the images")
    patch_dim: int | None = flag(int, None, "model", "side of the vision encoder's patches")
    vocab_size: int | None = flag(int, None, "model", "vocabulary of the text decoder")
    position_embedding_type: str = flag(str, "rope", "model", "position embedding of the text decoder", ("rope",))
    tokenizer_type: str = flag(str, "NullTokenizer", "model", "the tokenizer is named in --mm-data", ("NullTokenizer",))

    bf16: bool = switch("precision", "compute in bfloat16, master weights in float32")
    fp16: bool = switch("precision", "compute in float16 with loss scaling, master weights in float32")
    loss_scale: float | None = flag(float, None, "precision", "fixed loss scale of --fp16; default dynamic")
    initial_loss_scale: float = flag(float, 2.0**32, "precision", "first dynamic loss scale")
    min_loss_scale: float = flag(float, 1.0, "precision", "lowest dynamic loss scale")
    loss_scale_window: int = flag(int, 1000, "precision", "good steps after which the scale doubles")
    hysteresis: int = flag(int, 2, "precision", "overflows after which the scale halves")

    save: str | None = flag(str, None, "checkpoint", "folder that checkpoints are written to")
    save_interval: int | None = flag(
        int, None, "checkpoint", "steps between checkpoints; the last step is always saved"
    )
    save_interval_minutes: float | None = flag(float, None, "checkpoint", "minutes between checkpoints")
    keep_last: int | None = flag(int, None, "checkpoint", "checkpoints that stay; older ones are deleted; default all")
    keep_every: int | None = flag(int, None, "checkpoint", "with --keep-last: iterations divisible by this stay too")
    on_save_error: str = flag(str, "stop", "checkpoint", "what a full disk does to the run", ("stop", "continue"))
    async_save: bool = switch("checkpoint", "write checkpoints in the background, from a copy in host memory")
    load: str | None = flag(str, None, "checkpoint", "folder to resume from; its tracker file names the iteration")
    ckpt_step: int | None = flag(int, None, "checkpoint", "load this iteration instead of the tracker's")
    pretrained_checkpoint: str | None = flag(
        str, None, "checkpoint", "weights to begin with while --load holds no checkpoint (stage 1 -> stage 2)"
    )
    finetune: bool = switch("checkpoint", "take only the weights of --load and begin at step 0")
    exit_on_missing_checkpoint: bool = switch(
        "checkpoint", "stop when --load holds no checkpoint, where it is --save too"
    )
    no_load_optim: bool = switch(
        "checkpoint", "do not load optimizer state; the schedule goes on from the step reached"
    )
    no_load_rng: bool = switch("checkpoint", "do not load random states")
    no_save_optim: bool = switch("checkpoint", "do not save optimizer state")
    no_save_rng: bool = switch("checkpoint", "do not save random states")
    ckpt_format: str = flag(str, "torch_dist", "checkpoint", "only torch_dist is written")

    seed: int = flag(int, 1234, "run", "seed of weights, dropout and sample order")
    num_workers: int = flag(int, 2, "run", "processes per rank that prepare data; 0 prepares in the training process")
    exit_interval: int | None = flag(int, None, "run", "save and stop at a step divisible by this")
    log_interval: int = flag(int, 100, "run", "steps between log lines; step 1 and step --train-iters have one, too")
    log_format: str = flag(
        str,
        "auto",
        "run",
        "auto is the live table on a terminal, else a short line",
        ("auto", "short", "table", "megatron"),
    )
    profile: bool = switch("run", "trace some steps with torch's profiler and show where their time goes")
    profile_step_start: int = flag(int, 10, "run", "first step that --profile traces")
    profile_step_end: int = flag(int, 12, "run", "step before which --profile ends")
    profile_dir: str | None = flag(str, None, "run", "folder for traces; default SAVE/profile")
    profile_ranks: tuple = flag(int, (0,), "run", "ranks that --profile traces, -1 for all")
    tensorboard_dir: str | None = flag(str, None, "run", "folder for TensorBoard curves")
    wandb_project: str | None = flag(str, None, "run", "curves to Weights & Biases too, under this project")
    wandb_exp_name: str | None = flag(str, None, "run", "name of the run there; default that of --save")
    wandb_save_dir: str | None = flag(str, None, "run", "folder that W&B writes to; default SAVE")
    swanlab_project: str | None = flag(str, None, "run", "curves to SwanLab too, under this project")
    swanlab_exp_name: str | None = flag(str, None, "run", "name of the run there; default that of --save")
    swanlab_save_dir: str | None = flag(str, None, "run", "folder that SwanLab writes to; default SAVE/swanlab")
    online: bool = switch("run", "W&B and SwanLab send the curves while the run trains; else they write to disk alone")
    eval_interval: int | None = flag(int, None, "run", "steps between losses on the validation set, where there is one")
    eval_iters: int | None = flag(int, None, "run", "global batches of a validation; at most, and by default, the set")
    early_stop_patience: int | None = flag(int, None, "run", "stop after so many validations without a lower loss")
    early_stop_min_improvement: float = flag(float, 0.0, "run", "by how much a validation loss must be lower to count")

    log_throughput: bool = switch("kept", "speed is always shown")
    use_pytorch_profiler: bool = switch("kept", "--profile always is torch's profiler")
    use_mcore_models: bool = switch("kept", "models always are megatron.core's")
    use_dist_ckpt: bool = switch("kept", "checkpoints always are torch_dist")
    use_flash_attn: bool = switch("kept", "the platform picks its fastest exact attention kernel")
    use_fused_rotary_pos_emb: bool = switch("kept", "the model computes rotary embeddings itself")
    no_masked_softmax_fusion: bool = switch("kept", "the attention kernels need no fused softmax")
    no_gradient_accumulation_fusion: bool = switch("kept", "that fusion needs Apex and is never used")
    exit_signal_handler: bool = switch("kept", "SIGTERM always saves and stops")

    world_size: int = field(default=1, metadata={})

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different samples."""
        return self.world_size // self.model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one copy of the model and its sequences."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def is_logged(self, iteration: int) -> bool:
        """Whether step `iteration`, from 1 on, has a log line: at each --log-interval, and so that a short or slow run
        shows something, the first and that of --train-iters."""
        return iteration % self.log_interval == 0 or iteration in (1, self.train_iters)

    def model_flags(self) -> dict[str, Any]:
        """Flags of the model group that were given: the caller compares them with its model description."""
        names = [f.name for f in _flags() if f.metadata["group"] == "model" and f.default is None]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def notes(self) -> list[str]:
        """What the log says of the flags: in one sentence, those that were given and that nothing here depends on."""
        given = [f for f in _flags() if f.metadata["group"] == "kept" and getattr(self, f.name) != f.default]
        idle = [f"{option(f.name)} ({f.metadata['help']})" for f in given]
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            idle.append("--sequence-parallel (it needs --tensor-model-parallel-size above 1)")
        notes = [f"accepted, and without an effect in this run: {', '.join(idle)}"] if idle else []
        if self.save is None:
            notes.append("--save is not given: nothing of this run will be kept")
        return notes


_ALIASES = {"num_virtual_stages_per_pipeline_rank": ("--virtual-pipeline-model-parallel-size",)}
"""Further names of flags: this one is the ancestor's."""


def _flags() -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(DriverArguments) if f.metadata]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every flag of the driver to `parser`, in groups."""
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    for own in _flags():
        group, text = groups[own.metadata["group"]], own.metadata["help"]
        if own.metadata["kind"] is bool:
            group.add_argument(option(own.name), action="store_true", help=text)
            continue
        if own.default is not None:
            default = own.default[0] if isinstance(own.default, tuple) else own.default
            text = f"{text} (default {default})"
        group.add_argument(
            option(own.name),
            *_ALIASES.get(own.name, ()),
            type=own.metadata["kind"],
            default=own.default,
            nargs="+" if isinstance(own.default, tuple) else None,
            choices=own.metadata["choices"],
            metavar=None if own.metadata["choices"] else own.metadata["kind"].__name__.upper(),
            help=text,
        )


def refuse_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    """Stop on flags that `parse_known_args` did not know.

    Raises:
        ConfigError: names each unknown flag with the nearest known ones; stray values are shown as they are.
    """
    known = [option for action in parser._actions for option in action.option_strings]
    problems = []
    for word in unknown:
        if not word.startswith("--"):
            problems.append(f"{word!r} belongs to no flag")
            continue
        name = word.split("=", 1)[0]
        if name.startswith("--recompute-"):
            problems.append(f"unknown flag {name}: recompute_* are keys of each part in the model config")
            continue
        near = difflib.get_close_matches(name, known, n=3)
        problems.append(f"unknown flag {name}" + (f": did you mean {' or '.join(near)}?" if near else ": see --help"))
    if problems:
        raise ConfigError("the command line cannot be used:\n  " + "\n  ".join(problems))


def from_namespace(namespace: argparse.Namespace, world_size: int | None = None) -> DriverArguments:
    """Validate what argparse read.

    Args:
        namespace: result of parsing with `add_arguments`; other attributes are left alone.
        world_size: number of processes; default WORLD_SIZE as torchrun sets it, 1 outside torchrun.

    Raises:
        ConfigError: every problem found, one per line.
    """
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    values = {own.name: getattr(namespace, own.name) for own in _flags()}
    if values["num_virtual_stages_per_pipeline_rank"] == 1:
        values["num_virtual_stages_per_pipeline_rank"] = None  # stages as they are
    args = DriverArguments(**values, world_size=world_size)
    problems = [*range_problems(args), *schedule_problems(args), *_check_combinations(args)]
    if not problems:
        problems, args = _check_batch(args)
    if problems:
        raise ConfigError("the command line cannot be used:\n  " + "\n  ".join(problems))
    return args


def with_virtual_stages(args: DriverArguments, num_layers: int) -> DriverArguments:
    """`args` with --num-layers-per-virtual-pipeline-stage expressed in stages, for a model of `num_layers` layers.

    Raises:
        ConfigError: the layers do not divide.
    """
    layers, stages = args.num_layers_per_virtual_pipeline_stage, args.pipeline_model_parallel_size
    if layers is None:
        return args
    if num_layers % (layers * stages):
        fitting = [size for size in range(1, num_layers // stages + 1) if num_layers % (size * stages) == 0]
        raise ConfigError(
            f"{num_layers} layers cannot be divided by --num-layers-per-virtual-pipeline-stage {layers} x "
            f"--pipeline-model-parallel-size {stages}: "
            + (f"take {' or '.join(map(str, fitting))}" if fitting else "use a divisor of the layers as pipeline size")
        )
    chunks = num_layers // (layers * stages)
    return dataclasses.replace(
        args,
        num_layers_per_virtual_pipeline_stage=None,
        num_virtual_stages_per_pipeline_rank=chunks if chunks > 1 else None,
    )


def _check_combinations(args: DriverArguments) -> list[str]:
    problems = []
    if args.bf16 and args.fp16:
        problems.append("--bf16 and --fp16 are both given: keep one of them")
    if args.loss_scale is not None and not args.fp16:
        problems.append("--loss-scale is for --fp16 only")
    if args.initial_loss_scale < args.min_loss_scale:
        problems.append(
            f"--initial-loss-scale is {args.initial_loss_scale}: expected at least --min-loss-scale "
            f"({args.min_loss_scale})"
        )
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        problems.append("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")
    if args.use_checkpoint_opt_param_scheduler and args.override_opt_param_scheduler:
        problems.append("--use-checkpoint-opt-param-scheduler and --override-opt-param-scheduler exclude each other")
    if args.ckpt_format != "torch_dist":
        problems.append(
            f"--ckpt-format is {args.ckpt_format!r}: only torch_dist is supported, which loads at any parallel layout"
        )
    if args.save is None:
        needing = ("save_interval", "save_interval_minutes", "keep_last")
        given = [name for name in needing if getattr(args, name) is not None] + ["async_save"] * args.async_save
        problems += [f"{option(name)} is given without --save" for name in given]
    if args.keep_every is not None and args.keep_last is None:
        problems.append("--keep-every is given without --keep-last: without it everything is kept")
    virtual = ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage")
    given = [option(name) for name in virtual if getattr(args, name) is not None]
    if len(given) == 2:
        problems.append(f"{' and '.join(given)} are both given: keep one of them")
    if given and args.pipeline_model_parallel_size == 1:
        problems.append(f"{given[0]} needs --pipeline-model-parallel-size above 1: it cuts pipeline stages into chunks")
    problems += optimizer_problems(args)
    problems += profile_problems(args)
    problems += tracking_problems(args)
    if args.load is None:
        needing = ("finetune", "ckpt_step", "exit_on_missing_checkpoint")
        problems += [f"{option(name)} needs --load" for name in needing if getattr(args, name) not in (None, False)]
    return problems


def _check_batch(args: DriverArguments) -> tuple[list[str], DriverArguments]:
    """Fit world size, parallel sizes and batch sizes; fills in the default global batch."""
    shape = (
        f"tensor {args.tensor_model_parallel_size} x pipeline {args.pipeline_model_parallel_size} "
        f"x context {args.context_parallel_size}"
    )
    if args.world_size % args.model_parallel_size:
        return [f"{args.world_size} process(es) cannot be divided by {shape} parallel: change one of them"], args
    step = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size is None:
        args = dataclasses.replace(args, global_batch_size=step)
    if args.global_batch_size % step:
        lower = args.global_batch_size // step * step
        nearest = [str(size) for size in (lower, lower + step) if size]
        return [
            f"--global-batch-size {args.global_batch_size} cannot be divided by --micro-batch-size "
            f"{args.micro_batch_size} x {args.data_parallel_size} data-parallel rank(s) = {step}: "
            f"take {' or '.join(nearest)}"
        ], args
    virtual = args.num_virtual_stages_per_pipeline_rank or args.num_layers_per_virtual_pipeline_stage
    stages = args.pipeline_model_parallel_size
    if virtual is not None and args.num_micro_batches % stages:
        wanted = -(-args.num_micro_batches // stages) * stages * step
        return [
            f"virtual pipeline stages need a multiple of {stages} micro-batches (--pipeline-model-parallel-size), "
            f"--global-batch-size {args.global_batch_size} gives {args.num_micro_batches}: take {wanted}"
        ], args
    return [], args
