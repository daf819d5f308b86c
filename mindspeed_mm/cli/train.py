"""`mindspeed-mm train`: pretraining and fine-tuning from a model.json, a data.json and Megatron's flags."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from mindspeed_mm.errors import ConfigError

HELP = "pretrain or fine-tune from --mm-model, --mm-data and Megatron's flags"
EXAMPLE = (
    "torchrun --nproc_per_node 8 -m mindspeed_mm train --mm-model examples/llava1.5/model.json "
    "--mm-data examples/llava1.5/data.json --micro-batch-size 8 --global-batch-size 64 --seq-length 2048 "
    "--lr 1e-3 --train-iters 8720 --bf16 --save save_dir --load save_dir"
)

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron.driver import arguments

    group = parser.add_argument_group("multimodal")
    group.add_argument("--mm-model", required=True, metavar="JSON", help="architecture, freezing and weights")
    group.add_argument("--mm-data", required=True, metavar="JSON", help="data sets, template, tokenizer")
    group.add_argument("--mm-tool", metavar="JSON", help="tools.json of the ancestor: its profile block")
    group.add_argument("--allow-nonfinite", action="store_true", help="also start from weights with NaN or Inf")
    group.add_argument("--device", choices=("npu", "cuda", "cpu"), help="default: the first that this machine has")
    arguments.add_arguments(parser)


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Train. Returns iteration, loss and checkpoint for --json."""
    from mindspeed_mm.config.load import read_json
    from mindspeed_mm.platform import get_platform

    platform = get_platform(namespace.device)
    from megatron.driver import arguments, initialize, watch
    from mindspeed_mm.cli._out_of_memory import explaining_out_of_memory
    from mindspeed_mm.cli._training import TrainingRun

    if namespace.mm_tool is not None:
        apply_tools(namespace, read_json(namespace.mm_tool))
    args = arguments.from_namespace(namespace)
    training = TrainingRun(args, platform, namespace.mm_model, namespace.mm_data, namespace.mm_tool)
    training.allow_nonfinite = namespace.allow_nonfinite
    try:
        initialize.initialize(training.args, platform)
        with watch.naming_lost_ranks(), explaining_out_of_memory(training):
            return training.run()
    finally:
        initialize.shutdown()


STATIC_DEFAULTS = {"with_stack": False, "with_memory": False, "record_shapes": False, "with_cpu": True}
"""Keys of tools.json's static_param that change what is recorded, with the one value that is supported."""


def refuse_tools(tool: dict[str, Any]) -> None:
    """Accept a tools.json whose profile block can be followed (see `apply_tools`).

    Raises:
        ConfigError: something is switched on that does not exist here.
    """
    problems = []
    enabled = [name for name, block in tool.items() if isinstance(block, dict) and block.get("enable")]
    problems += [f"{name}.enable is true, which this version does not have" for name in enabled if name != "profile"]
    profile = tool.get("profile", {})
    if "profile" in enabled:
        if profile.get("profile_type", "static") != "static":
            problems.append(f'profile.profile_type is {profile["profile_type"]!r}: expected "static"')
        static = profile.get("static_param", {})
        problems += [
            f"profile.static_param.{key} is {static[key]}: expected {str(value).lower()}"
            for key, value in STATIC_DEFAULTS.items()
            if static.get(key, value) != value
        ]
    if problems:
        raise ConfigError("--mm-tool cannot be followed:\n  " + "\n  ".join(problems))


def apply_tools(namespace: argparse.Namespace, tool: dict[str, Any]) -> None:
    """What tools.json's profile block asks for, as flags; `level`, `aic_metrics_type` and `data_simplification`, which
    choose counters of Ascend's own profiler, are told to have no effect. Raises ConfigError as `refuse_tools`."""
    refuse_tools(tool)
    profile = tool.get("profile", {})
    if not profile.get("enable"):
        return
    static = profile.get("static_param", {})
    namespace.profile = True
    namespace.profile_ranks = tuple(profile.get("ranks", (0,)))
    namespace.profile_step_start = static.get("start_step", namespace.profile_step_start)
    namespace.profile_step_end = static.get("end_step", namespace.profile_step_end)
    namespace.profile_dir = namespace.profile_dir or static.get("save_path")
    unused = [key for key in ("level", "aic_metrics_type", "data_simplification") if key in static]
    if unused:
        logger.info("--mm-tool: %s choose counters of Ascend's profiler and have no effect", ", ".join(unused))
