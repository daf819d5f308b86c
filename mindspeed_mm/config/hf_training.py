"""Hugging Face's Seq2SeqTrainingArguments as flags of `mindspeed-mm train`, with a word on each."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import nearest

FLAGS = {
    "output_dir": "--save",
    "per_device_train_batch_size": "--micro-batch-size",
    "learning_rate": "--lr",
    "weight_decay": "--weight-decay",
    "max_grad_norm": "--clip-grad",
    "adam_beta1": "--adam-beta1",
    "adam_beta2": "--adam-beta2",
    "adam_epsilon": "--adam-eps",
    "warmup_ratio": "--lr-warmup-fraction",
    "warmup_steps": "--lr-warmup-iters",
    "max_steps": "--train-iters",
    "logging_steps": "--log-interval",
    "save_steps": "--save-interval",
    "save_total_limit": "--keep-last",
    "eval_steps": "--eval-interval",
    "seed": "--seed",
    "dataloader_num_workers": "--num-workers",
    "per_device_eval_batch_size": "--predict-batch-size",
    "logging_dir": "--tensorboard-dir",
}
"""One argument, one flag with the same value."""

SWITCHES = {
    "bf16": "--bf16",
    "fp16": "--fp16",
    "do_eval": "--do-eval",
    "do_predict": "--do-predict",
    "do_multi_predict": "--do-multi-predict",
}
"""Given where they are true."""

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}

ELSEWHERE = {
    "gradient_checkpointing": 'set "recompute_granularity": "full" in model.json\'s text_decoder',
    "fsdp": "give --use-distributed-optimizer, or --tensor-model-parallel-size N for a model that does not fit",
    "fsdp_config": "layers need not be named here",
    "deepspeed": "give --use-distributed-optimizer for ZeRO's first stage",
    "num_train_epochs": "give --train-iters: epochs x samples / global batch size",
    "report_to": "give --tensorboard-dir, --wandb-project or --swanlab-project",
    "overwrite_output_dir": "a folder with checkpoints is gone on with; give another --save to start afresh",
    "resume_from_checkpoint": "give --load",
    "group_by_length": 'set "group_by_modality_length": true in data.json\'s dataloader_param',
    "label_smoothing_factor": "the loss is not smoothed here",
    "generation_max_length": 'set "max_new_tokens" in prediction.generation of data.json',
    "generation_num_beams": 'set "num_beams" in prediction.generation of data.json',
}
"""What to do by hand."""

ALWAYS = {
    "remove_unused_columns": "no column is dropped here",
    "predict_with_generate": "sets of prediction are always answered",
    "local_rank": "torchrun says it",
    "ddp_backend": "the device's own",
    "tf32": "the device's own default",
    "fp16_full_eval": "evaluation has the precision of --dtype",
    "bf16_full_eval": "evaluation has the precision of --dtype",
    "logging_strategy": "by steps, as --log-interval says",
    "save_strategy": "by steps, as --save-interval says",
    "evaluation_strategy": "by steps, as --eval-interval says",
    "eval_strategy": "by steps, as --eval-interval says",
    "logging_first_step": "the first step is always logged",
    "ddp_find_unused_parameters": "parts without gradients are known",
}
"""What needs nothing."""


@dataclass
class Migrated:
    """What became of a configuration's values."""

    flags: list[str] = field(default_factory=list)
    """Words of the command line."""

    mapped: dict[str, str] = field(default_factory=dict)
    """Where a value went, by its path."""

    by_hand: dict[str, str] = field(default_factory=dict)
    """What is left to do."""

    needless: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    """Values without a counterpart."""


def parse_flags(text: str) -> dict[str, Any]:
    """`--learning_rate 4e-5 --do_eval True` as values. Raises ConfigError for a word that belongs to no flag."""
    found: dict[str, Any] = {}
    name = None
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"--hf-flags {text!r:.80} cannot be split into words ({error}); correct the quotes"
        ) from error
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = _value(value) if value else True
        elif name is None or found[name] is not True:
            raise ConfigError(f"--hf-flags: found {word!r:.60} without a flag before it; expected --name value")
        else:
            found[name] = _value(word)
    return found


def refuse_unknown(flags: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise ConfigError for a flag that is none of `names`, the trainer's own, with the nearest."""
    known = {*names, "do_train", *FLAGS, *SWITCHES, *ELSEWHERE, *ALWAYS}  # older versions had more
    for name in flags:
        if name not in known:
            raise ConfigError(f"--hf-flags: Seq2SeqTrainingArguments has no {name}; {nearest(name, sorted(known))}")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def migrate_training(values: Mapping[str, Any], processes: int, result: Migrated, where: str = "training_args") -> None:
    """Put what the arguments mean into `result`. Raises ConfigError for a schedule and a batch that are none."""
    for name, value in values.items():
        key = f"{where}.{name}"
        if name == "do_train":
            result.flags += [] if value else ["--do-train", "false"]
            result.mapped[key] = "mindspeed-mm train" if value else "--do-train false"
        elif value is None or value is False and name in (*SWITCHES, "gradient_checkpointing"):
            result.needless[key] = "not asked for"
        elif name in SWITCHES:
            _add(result, key, SWITCHES[name])
        elif name == "lr_scheduler_type":
            if value not in SCHEDULES:
                raise ConfigError(f"{key} is {value!r:.40}; expected one of {', '.join(SCHEDULES)}")
            _add(result, key, "--lr-decay-style", SCHEDULES[value])
        elif name == "gradient_accumulation_steps":
            result.mapped[key] = "--global-batch-size"
        elif name in ("max_steps", "warmup_steps") and not (isinstance(value, int | float) and value > 0):
            result.needless[key] = "not asked for"
        elif name in FLAGS:
            _add(result, key, FLAGS[name], value)
        else:
            tables = ((ELSEWHERE, result.by_hand), (ALWAYS, result.needless))
            target = next(((table[name], found) for table, found in tables if name in table), None)
            if target is None:
                result.unread[key] = repr(value)[:80]
            else:
                target[1][key] = target[0]
    sizes = [values.get("per_device_train_batch_size"), values.get("gradient_accumulation_steps") or 1, processes]
    if sizes[0] is not None:
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ConfigError(
                f"{where}: batch size {sizes[0]!r:.20}, accumulation {sizes[1]!r:.20} and {processes} processes; "
                "expected whole numbers above 0"
            )
        result.flags += ["--global-batch-size", str(sizes[0] * sizes[1] * sizes[2])]
        result.mapped[f"{where}.per_device_train_batch_size"] = "--micro-batch-size, --global-batch-size"


def _add(result: Migrated, key: str, flag: str, value: Any = None) -> None:
    result.flags += [flag] if value is None else [flag, str(value)]
    result.mapped[key] = flag
