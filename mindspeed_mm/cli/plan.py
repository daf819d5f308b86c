"""`mindspeed-mm plan`: memory, communication and time of a run before it is started, and the layouts that fit."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mindspeed_mm.cli.flags.cfg_options import add_cfg_options
from mindspeed_mm.cli.flags.lora import add_lora_arguments
from mindspeed_mm.cli.flags.trained import add_trained_arguments, given_flags
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.planning.flags import STRATEGY_FLAGS

HELP = "predict memory, communication and time of a training run, and find the layouts that fit"
EXAMPLE = (
    "mindspeed-mm plan --mm-model examples/llava1.5/model_finetune.json --devices 8 --memory 64GB --bf16 "
    "--seq-length 2048 --global-batch-size 128"
)


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron.driver import arguments

    what = parser.add_argument_group("what is planned")
    what.add_argument("--mm-model", required=True, metavar="JSON", help="architecture and freezing")
    what.add_argument(
        "--mm-data", metavar="JSON", help="data sets: number and lengths of the samples are read from them"
    )
    add_cfg_options(what)
    what.add_argument("--sample-tokens", type=float, metavar="N", help="mean tokens of a sample, image tokens included")
    what.add_argument("--sample-images", type=float, metavar="N", help="mean images of a sample (default 1)")
    what.add_argument(
        "--sample-supervised", type=float, metavar="N", help="mean labels of a sample (default: all text)"
    )
    what.add_argument("--samples", type=int, metavar="N", help="samples of an epoch")
    what.add_argument(
        "--recompute",
        choices=("none", "selective", "full", "model"),
        help="recomputation in the backward pass; model: as --mm-model says (default: what is fastest and fits)",
    )
    machine = parser.add_argument_group("on what")
    machine.add_argument("--devices", type=int, default=1, metavar="N", help="devices of the run (default 1)")
    machine.add_argument("--hardware", metavar="NAME", help="a device of the table in docs/planning.md, such as H100")
    machine.add_argument("--memory", type=size, metavar="SIZE", help="memory of a device, such as 64GB")
    machine.add_argument("--reserve", type=float, default=10.0, metavar="%", help="kept free of it (default 10)")
    machine.add_argument(
        "--device", choices=("npu", "cuda", "cpu"), help="whose kernels keep what (default: the hardware's, else npu)"
    )
    machine.add_argument("--peak-tflops", type=float, metavar="N", help="matrix products, dense, in the run's type")
    machine.add_argument("--memory-bandwidth", type=float, metavar="GB/S")
    machine.add_argument("--interconnect", type=float, metavar="GB/S", help="sent by a device inside its host")
    machine.add_argument("--network", type=float, metavar="GB/S", help="sent by a device to other hosts")
    machine.add_argument("--devices-per-host", type=int, default=8, metavar="N")
    machine.add_argument("--efficiency", type=float, metavar="SHARE", help="of the peak that is reached (default 1)")
    machine.add_argument("--measured", metavar="JSONL", help="metrics.jsonl of a run on such devices: its rate is used")
    machine.add_argument("--measured-devices", type=int, default=1, metavar="N", help="devices of that run (default 1)")
    machine.add_argument("--calibrate", action="store_true", help="measure this machine's device for some seconds")
    machine.add_argument("--top", type=int, default=10, metavar="N", help="layouts that are listed (default 10)")
    add_trained_arguments(parser)
    add_lora_arguments(parser)
    arguments.add_arguments(parser)
    parser.set_defaults(**dict.fromkeys(STRATEGY_FLAGS))


def size(text: str) -> float:
    """Bytes of "64GB", "80GiB", "64e9"."""
    match = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected a number with KB, MB, GB or GiB, like 64GB")
    found = float(match[1]) * UNITS[match[2].upper()]
    if not match[2] and found < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is {found:g} bytes: give the unit, like {match[1]}GB")
    return found


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Print the plan. Returns it for --json.

    Raises:
        ConfigError: a flag cannot be used, no layout is possible, or none fits; `result` holds what was found.
    """
    from mindspeed_mm.config.options import take_options
    from mindspeed_mm.platform import get_platform

    take_options(namespace)
    platform = get_platform(namespace.device if namespace.calibrate else "cpu")
    from mindspeed_mm.planning import report as tables
    from mindspeed_mm.planning.planner import Planner

    planner = Planner(namespace, platform, given_flags(namespace))
    result = planner.search()
    tables.show(result, namespace.top)
    report = tables.as_json(result, namespace.top)
    if not result.fitting:
        least = result.others[0]
        error = ConfigError(
            f"nothing fits into {planner.limit / 1e9:.1f} GB a device: the smallest layout needs "
            f"{least.memory.peak / 1e9:.1f} GB; take more devices, a shorter --seq-length, --use-distributed-optimizer "
            "or more recomputation"
        )
        error.result = report
        raise error
    return report
