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
    group.add_argument("--mm-tool", metavar="JSON", help="tools.json of the ancestor: profiling must be off in it")
    group.add_argument("--device", choices=("npu", "cuda", "cpu"), help="default: the first that this machine has")
    arguments.add_arguments(parser)


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Train. Returns iteration, loss and checkpoint for --json."""
    from mindspeed_mm.platform import get_platform

    platform = get_platform(namespace.device)
    from megatron.driver import arguments, initialize, watch
    from mindspeed_mm.cli._training import TrainingRun

    args = arguments.from_namespace(namespace)
    training = TrainingRun(args, platform, namespace.mm_model, namespace.mm_data, namespace.mm_tool)
    try:
        initialize.initialize(training.args, platform)
        with watch.naming_lost_ranks():
            return training.run()
    finally:
        initialize.shutdown()


def refuse_tools(tool: dict[str, Any]) -> None:
    """Accept a tools.json that asks for nothing.

    Raises:
        ConfigError: a profiler is switched on; profiling does not exist yet.
    """
    enabled = [name for name, block in tool.items() if isinstance(block, dict) and block.get("enable")]
    if enabled:
        raise ConfigError(
            f"--mm-tool switches on {', '.join(enabled)}, which this version does not have: set enable to false"
        )
