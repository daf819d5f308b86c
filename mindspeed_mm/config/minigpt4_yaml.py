"""MiniGPT-4's YAML files (train_configs, eval_configs): our files, flags, and a report of what became of keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_mm.config.lavis_yaml import Section, merged, parsed_options, read_yaml, repository_of
from mindspeed_mm.config.minigpt4_data import DATA_YAMLS, map_data
from mindspeed_mm.config.minigpt4_model import GEMMA_TURNS, MODEL_YAMLS, QUESTIONS, V2, Mapped, map_model

CONFIGS = "minigpt4/configs"
"""Of the user's checkout: defaults of models and data sets."""

PROMPT_TOKENS = 40
"""Room for the question, beside max_txt_len, which counts the answer alone."""

SCHEDULES = ("linear_warmup_cosine_lr", "linear_warmup_step_lr")
"""The original's schedules, which are values of --lr-decay-style."""

QUESTIONS_FILE = "prompts/alignment.txt"

NO_EFFECT = {
    "batch_size_eval, log_freq, save_freq": "no effect: nothing is evaluated; --log-interval and --save-interval",
    "device, world_size, dist_url, distributed, dist_backend, gpu": "no effect: torchrun and --device say it",
    "wandb_log, job_name": "no effect: give --wandb-project and --wandb-exp-name",
    "runner, valid_splits, test_splits": "no effect",
}

CHAT = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.05, "max_new_tokens": 300}
"""How the original's demo answers."""

NEW_TOKENS_V2 = 500
"""Of the demo of MiniGPT-v2."""

MAX_CONTEXT = 2000
"""Tokens of a prompt and its answer in the demo."""


class MappedChat(NamedTuple):
    """A conversation: the model, whether it is loaded in 8 bits, most tokens of a prompt and its answer, and generation
    options."""

    mapped: Mapped
    low_resource: bool
    context: int
    options: dict[str, Any]


@dataclass
class MappedRun:
    """A training run: both files, flags of `mindspeed-mm train`, and the rest of Mapped."""

    mapped: Mapped
    data: dict[str, Any]
    flags: dict[str, Any]
    output: Path


def read_run(path: str | Path, options: Iterable[str] = ()) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """(a file's values over the defaults of its model and data sets, folders that its paths are relative to).

    Raises ConfigError: a file is no plain YAML, holds unknown sections, or an option is none.
    """
    path = Path(path)
    given = read_yaml(path)
    asked = merged(given, parsed_options(options))
    root = repository_of(path, CONFIGS)
    low: dict[str, Any] = {}
    if root is not None:
        names = [
            f"models/{MODEL_YAMLS[kind]}" for kind in MODEL_YAMLS if kind == asked.get("model", {}).get("model_type")
        ]
        names += [f"datasets/{DATA_YAMLS[name]}" for name in asked.get("datasets", {}) if name in DATA_YAMLS]
        for name in names:
            if (root / CONFIGS / name).is_file():
                low = merged(low, read_yaml(root / CONFIGS / name))
    return merged(low, asked), tuple(dict.fromkeys((Path.cwd(), root or path.resolve().parent)))


def map_chat(path: str | Path, options: Iterable[str] = ()) -> MappedChat:
    """An eval_configs file as a conversation. Raises ConfigError, as map_run does."""
    values, folders = read_run(path, options)
    section, mapped = Section("model", values.get("model")), Mapped(folders)
    map_model(section, mapped)
    mapped.template += "" if mapped.template == GEMMA_TURNS else "_chat"
    mapped.note(section, "prompt_template", f'template "{mapped.template}", the demo\'s conversation')
    for key in ("max_txt_len", "prompt_path"):
        section.take(key)
    mapped.note(section, "max_txt_len, prompt_path", "no effect in a chat")
    context = section.count("max_context_len", MAX_CONTEXT)
    mapped.note(section, "max_context_len", f"--max-context-len {context}")
    low = section.flag("low_resource")
    mapped.note(section, "low_resource", "--quantize int8" if low else "no effect")
    section.refuse_rest()
    if mapped.checkpoint is None:
        raise section.wrong(
            "ckpt", None, "the trained linear (checkpoint_N.pth), or a checkpoint of mindspeed-mm train"
        )
    mapped.report.append("datasets, run, preprocess: no effect in a chat")
    more = {"max_new_tokens": NEW_TOKENS_V2} if section.take("arch") == V2 else {}
    return MappedChat(mapped, low, context, CHAT | more)


def map_run(path: str | Path, options: Iterable[str] = ()) -> MappedRun:
    """A train_configs file as JSON files and flags.

    Args:
        path: the YAML file. Defaults are read from minigpt4/configs above it, where that is.
        options: texts NAME=VALUE, which win over the files.

    Raises:
        ConfigError: a key that means nothing here, a wrong value or a path without anything there; by the key's name.
    """
    values, folders = read_run(path, options)
    section, mapped = Section("model", values.get("model")), Mapped(folders)
    map_model(section, mapped)
    section.only("low_resource", (False,), "training is not done in 8 bits")
    data = map_data(Section("datasets", values.get("datasets")), mapped)
    captions = data["dataset_param"]["dataset_type"] == "tar"
    _check_questions(section, mapped)
    length = section.count("max_txt_len", 32)
    section.count("max_context_len", 0)
    mapped.note(section, "max_context_len", "no effect: --seq-length holds for prompt and answer together")
    flags = {"seq_length": 1 + mapped.image_tokens + length + (0 if captions else PROMPT_TOKENS)}
    mapped.note(
        section, "max_txt_len", f"--seq-length {flags['seq_length']}: begin, image, text; the end of a text is cut"
    )
    section.refuse_rest()
    run = Section("run", values.get("run"))
    output = run.take("output_dir")
    if not isinstance(output, str) or not output:
        raise run.wrong("output_dir", output, "a folder")
    flags |= _run_flags(run, mapped) | {"save": output, "load": output}
    if mapped.checkpoint is not None and mapped.checkpoint.is_dir():
        flags["pretrained_checkpoint"] = str(mapped.checkpoint)
    run.refuse_rest()
    if "preprocess" in values or "evaluation_datasets" in values:
        mapped.report.append("preprocess, evaluation_datasets: no effect in training")
    return MappedRun(mapped, data, flags, Path(output))


def _check_questions(section: Section, mapped: Mapped) -> None:
    """The questions of prompt_path have to be the four that the reader asks."""
    if section.take("prompt_path") is None:
        return
    path = mapped.path(section, "prompt_path", "the questions")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "<ImageHere>" in line]
    found = {line.rpartition("</Img>")[2].strip() for line in lines}
    if found != set(QUESTIONS):
        other = sorted(found ^ set(QUESTIONS))[0]
        raise section.wrong("prompt_path", str(path), f"the four questions of {QUESTIONS_FILE}; {other!r} differs")
    mapped.note(section, "prompt_path", "its four questions, chosen by the image_id")


def _batch(run: Section, mapped: Mapped) -> int:
    """Samples of a micro-batch: the run's, or those of the sets on average. The original has had both keys."""
    if mapped.batch is None:
        return run.count("batch_size_train")
    size = max(1, round(mapped.batch))
    if run.count("batch_size_train", size) != size:
        raise run.wrong("batch_size_train", run.take("batch_size_train"), f"{size}, as datasets.*.batch_size say")
    return size


def _lowest(run: Section) -> float:
    """min_lr, which in the original may also be above init_lr: its cosine then rises."""
    found, highest = run.number("min_lr", 0), run.number("init_lr")
    if found > highest:
        raise run.wrong("min_lr", found, f"at most init_lr, {highest:g}")
    return found


def _run_flags(run: Section, mapped: Mapped) -> dict[str, Any]:
    run.only("task", ("image_text_pretrain",), "the only task")
    style = run.only("lr_sched", SCHEDULES, "the original's schedules")
    run.only("evaluate", (False,), "mindspeed-mm evaluate")
    run.only("resume_ckpt_path", (None,), "a run goes on from output_dir by itself; give --load for another folder")
    run.only("accum_grad_iters", (1,), "give --global-batch-size, which divides the loss by the tokens")
    run.only("train_splits", (["train"],), "the only split")
    steps = run.count("iters_per_epoch")
    epochs = run.count("max_epoch")
    flags = {
        "train_iters": steps * epochs,
        "save_interval": steps,
        "lr": run.number("init_lr"),
        "min_lr": _lowest(run),
        "lr_decay_style": style,
        "iters_per_epoch": steps,
        "lr_warmup_iters": run.count("warmup_steps", 0),
        "weight_decay": run.number("weight_decay", 0.05),
        "adam_beta2": run.number("beta2", 0.999),
        "clip_grad": 0.0,
        "micro_batch_size": _batch(run, mapped),
        "num_workers": run.count("num_workers", 0),
        "seed": run.count("seed", 42),
    }
    if flags["train_iters"] == 0:
        raise run.wrong("iters_per_epoch", steps, "at least 1, and max_epoch at least 1")
    mapped.note(
        run, "max_epoch, iters_per_epoch", f"--train-iters {steps * epochs}, --save-interval {steps}: every epoch"
    )
    first = run.number("warmup_lr", -1)
    flags["lr_warmup_init"] = flags["lr"] if first < 0 else first
    rate = run.number("lr_decay_rate", 1)
    if style == SCHEDULES[1]:
        flags["lr_decay_rate"] = rate
    mapped.note(
        run, "init_lr, min_lr, warmup_lr, warmup_steps, weight_decay, beta2", "flags; gradients are not clipped"
    )
    mapped.note(run, "lr_sched, lr_decay_rate", f"--lr-decay-style {style}, as the original computes it")
    if flags["lr_warmup_iters"] > steps:
        mapped.note(
            run, "warmup_steps", "the warm-up goes on over epochs; --lr-warmup-in-epoch begins it anew, as LAVIS does"
        )
    mapped.note(run, "batch_size_train", f"--micro-batch-size {flags['micro_batch_size']}, of each data-parallel rank")
    if run.flag("amp"):
        flags["fp16"] = True
    mapped.note(run, "amp", "--fp16, where --bf16 is not given" if flags.get("fp16") else "float32")
    for keys, meaning in NO_EFFECT.items():
        given = [key for key in keys.split(", ") if run.take(key) is not None]
        if given:
            mapped.note(run, ", ".join(given), meaning)
    return flags
