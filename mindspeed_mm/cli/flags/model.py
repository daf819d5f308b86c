"""Flags that `infer` and `chat` share: which model, on what, with which options."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from mindspeed_mm.errors import ConfigError

SHORT_OPTIONS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")


def add_model_arguments(parser: argparse.ArgumentParser, *, several_adapters: bool = False) -> None:
    """Flags of `load_model`. With `several_adapters`, `adapter` becomes a list, for `adapters.named_adapters`."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--model", metavar="PATH", help="weights in any layout, or a training checkpoint")
    weights.add_argument("--load", metavar="DIR", help="training checkpoint to answer with (as --model)")
    parser.add_argument("--template", help="conversation template (default: the checkpoint's or its tokenizer's own)")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the tokenizer that comes with the weights")
    parser.add_argument("--image-processor", metavar="DIR", help="default: the one that comes with the weights")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16")
    parser.add_argument("--quantize", choices=("int8", "nf4", "fp4"), help="decoder in 8 or 4 bits")
    parser.add_argument("--double-quant", action="store_true", help="with --quantize: its scales in 8 bits, too")
    if several_adapters:
        parser.add_argument(
            "--adapter",
            action="append",
            metavar="[NAME=]DIR",
            help="LoRA adapter in PEFT's format, on top of the weights; with NAME= beside them, for requests that give "
            "this name as their model; repeatable",
        )
    else:
        parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter in PEFT's format, on top of the weights")
    parser.add_argument("--allow-nonfinite", action="store_true", help="also load weights with NaN or Inf")
    parser.add_argument("--device", choices=("npu", "cuda", "cpu"), help="default: the first that this machine has")


def add_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that spread the model over the processes of a torchrun launch."""
    for kind in ("tensor", "pipeline"):
        parser.add_argument(
            f"--{kind}-model-parallel-size", type=int, default=1, metavar="N", help="under torchrun with N processes"
        )


def refuse_idle_processes(namespace: argparse.Namespace) -> None:
    """Raise ConfigError where several processes were started for a model that lives in one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and namespace.tensor_model_parallel_size == namespace.pipeline_model_parallel_size == 1:
        raise ConfigError(
            f"{processes} processes would all do the same: spread the model over them with "
            f"--tensor-model-parallel-size {processes}, or start one"
        )


def add_option_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `given_options`."""
    parser.add_argument("--max-new-tokens", type=int, help="at most so many tokens an answer")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token, above 0 samples")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens of this total probability")
    parser.add_argument("--top-k", type=int, help="sample among so many likeliest tokens")
    parser.add_argument("--seed", type=int, help="seed of the sampling (default 0)")
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="any other option under its name in transformers' GenerationConfig, such as num_beams=4; repeatable",
    )


def given_options(namespace: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the flags on top; those of sampling switch it on, and a temperature of 0 off."""
    from mindspeed_mm.generation.options import SAMPLING

    values = dict(values)
    for text in namespace.option:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--option {text!r}: expected NAME=VALUE, such as num_beams=4")
        values[name.strip()] = _value(value.strip())
    for name in SHORT_OPTIONS:
        if getattr(namespace, name) is not None:
            values[name] = getattr(namespace, name)
    if namespace.temperature is not None:
        values["do_sample"] = namespace.temperature > 0
    elif namespace.top_p is not None or namespace.top_k is not None:
        values["do_sample"] = True
    if namespace.temperature == 0:  # greedy, whatever a file says of drawing
        values = {name: value for name, value in values.items() if name == "temperature" or name not in SAMPLING}
    return values


def _value(text: str) -> Any:
    """A JSON value where it is one, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def model_path(namespace: argparse.Namespace, default: str | None = None) -> str:
    """Where the weights are. Raises ConfigError where nothing says so."""
    path = namespace.load or namespace.model or default
    if not path:
        raise ConfigError("nothing to load: give --model PATH, --load CHECKPOINT or --mm-model JSON")
    return path


def load_model(namespace: argparse.Namespace, path: str, **defaults: str | None):
    """The LoadedVLM of the flags; `defaults` (device, dtype, tokenizer, image_processor) come from a JSON file."""
    from mindspeed_mm.inference import api

    chosen = {name: getattr(namespace, name) or defaults.get(name) for name in defaults}
    return api.load(
        path,
        quantize=namespace.quantize,
        double_quant=namespace.double_quant,
        adapter=namespace.adapter,
        allow_nonfinite=namespace.allow_nonfinite,
        tensor_model_parallel_size=getattr(namespace, "tensor_model_parallel_size", 1),
        pipeline_model_parallel_size=getattr(namespace, "pipeline_model_parallel_size", 1),
        **chosen,
    )
