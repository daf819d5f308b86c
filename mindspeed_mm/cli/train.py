"""`mindspeed-mm train`: pretraining and fine-tuning from a model.json, a data.json and Megatron's flags."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from mindspeed_mm import ending
from mindspeed_mm.cli.flags.cfg_options import add_cfg_options
from mindspeed_mm.cli.flags.cfg_path import add_cfg_path_arguments, apply_cfg_path
from mindspeed_mm.cli.flags.lora import add_lora_arguments, given_lora
from mindspeed_mm.cli.flags.preference import add_preference_arguments, given_preferences
from mindspeed_mm.cli.plan import size

HELP = "pretrain or fine-tune from --mm-model, --mm-data and Megatron's flags"
EXAMPLE = (
    "torchrun --nproc_per_node 8 -m mindspeed_mm train --mm-model examples/llava1.5/model.json "
    "--mm-data examples/llava1.5/data.json --micro-batch-size 8 --global-batch-size 64 "
    "--lr 1e-3 --train-iters 8720 --bf16 --save save_dir --load save_dir"
)

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron.driver import arguments

    group = parser.add_argument_group("multimodal")
    group.add_argument("--mm-model", metavar="JSON", help="architecture, freezing and weights")
    group.add_argument("--mm-data", metavar="JSON", help="data sets, template, tokenizer")
    add_cfg_path_arguments(group)
    add_cfg_options(group)
    group.add_argument(
        "--objective", metavar="NAME", help='what is minimised: sft, dpo (default: "objective" of --mm-data, else sft)'
    )
    group.add_argument("--mm-tool", metavar="JSON", help="tools.json of the ancestor: its profile block")
    group.add_argument("--allow-nonfinite", action="store_true", help="also start from weights with NaN or Inf")
    group.add_argument(
        "--feature-cache",
        metavar="DIR",
        help="keep the features of a frozen vision encoder here: later epochs skip the vision encoder",
    )
    group.add_argument(
        "--feature-cache-size", type=size, metavar="SIZE", help="at most so much in that folder (default 50GB)"
    )
    add_lora_arguments(parser)
    add_preference_arguments(parser)
    group.add_argument("--device", choices=("npu", "cuda", "cpu"), help="default: the first that this machine has")
    arguments.add_arguments(parser)


def prepared(namespace: argparse.Namespace) -> Any:
    """The TrainingRun that the flags ask for, checked as far as that goes before processes meet. Raises its errors."""
    from mindspeed_mm.config.options import take_options
    from mindspeed_mm.config.tools import apply_tools
    from mindspeed_mm.platform import get_platform

    platform = get_platform(namespace.device)
    from megatron.driver import arguments
    from mindspeed_mm.trainer.feature_cache import options_of
    from mindspeed_mm.trainer.run import TrainingRun

    apply_cfg_path(namespace)
    take_options(namespace)
    if namespace.mm_tool is not None:
        apply_tools(namespace, namespace.mm_tool)
    args = arguments.from_namespace(namespace)
    files = namespace.mm_model, namespace.mm_data
    training = TrainingRun(
        args, platform, *files, namespace.objective, given_lora(namespace), given_preferences(namespace)
    )
    training.allow_nonfinite, training.feature_cache = namespace.allow_nonfinite, options_of(namespace)
    if namespace.pref_cache is not None:
        training.keep_reference(namespace.pref_cache)
    return training


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Train. Returns iteration, loss and checkpoint for --json."""
    training = prepared(namespace)
    from megatron.driver import initialize, watch
    from mindspeed_mm.trainer.out_of_memory import explaining_out_of_memory
    from mindspeed_mm.trainer.plan_verdict import tell_verdict

    with ending.closing():
        ending.at_end(initialize.shutdown)
        initialize.initialize(training.inputs.args, training.inputs.platform)
        tell_verdict(training.inputs)
        with watch.naming_lost_ranks(), explaining_out_of_memory(training.inputs):
            return training.run()
