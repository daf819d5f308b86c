"""`mindspeed-mm train`: pretraining and fine-tuning from a model.json, a data.json and Megatron's flags."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from mindspeed_mm import ending
from mindspeed_mm.cli.flags.cfg_options import add_cfg_options
from mindspeed_mm.cli.flags.cfg_path import add_cfg_path_arguments, apply_cfg_path
from mindspeed_mm.cli.flags.lora import add_lora_arguments
from mindspeed_mm.cli.flags.preference import add_preference_arguments, given_preferences
from mindspeed_mm.cli.flags.steps import add_steps_arguments, asks_for_answers, wanted_prefixes
from mindspeed_mm.cli.flags.trained import add_trained_arguments, given_flags
from mindspeed_mm.cli.plan import size
from mindspeed_mm.errors import ConfigError

HELP = "pretrain or fine-tune from --mm-model, --mm-data and Megatron's flags"
EXAMPLE = (
    "torchrun --nproc_per_node 8 -m mindspeed_mm train --mm-model examples/llava1.5/model.json "
    "--mm-data examples/llava1.5/data.json --micro-batch-size 8 --global-batch-size 64 "
    "--lr 1e-3 --train-iters 8720 --bf16 --save save_dir --load save_dir"
)

PARALLEL_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser, *, steps: bool = True) -> None:
    """`steps`: with the flags that say what else the launch does."""
    from megatron.driver import arguments

    if steps:
        add_steps_arguments(parser.add_argument_group("what the launch does"))
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
    add_trained_arguments(parser)
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
        args, platform, *files, namespace.objective, given_flags(namespace), given_preferences(namespace)
    )
    training.allow_nonfinite, training.feature_cache = namespace.allow_nonfinite, options_of(namespace)
    if namespace.pref_cache is not None:
        training.keep_reference(namespace.pref_cache)
    return training


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Train, and answer sets where that is asked for. Returns iteration, loss, checkpoint and values for --json."""
    predictions = Predictions(namespace)
    if namespace.do_train == "false":
        return predictions.alone()
    training = prepared(namespace)
    predictions.check(training.inputs)
    from megatron.driver import initialize, watch
    from mindspeed_mm.trainer.out_of_memory import explaining_out_of_memory
    from mindspeed_mm.trainer.plan_verdict import tell_verdict

    with ending.closing():
        ending.at_end(initialize.shutdown)
        initialize.initialize(training.inputs.args, training.inputs.platform)
        tell_verdict(training.inputs)
        with watch.naming_lost_ranks(), explaining_out_of_memory(training.inputs):
            result = training.run()
            inputs = training.inputs
            del training  # its model makes room for the one that answers
            return result | predictions.after(inputs, result)


class Predictions:
    """What a launch of `train` answers when it has trained."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        """Raises ConfigError for flags that do not go together."""
        self._namespace, self._asked = namespace, asks_for_answers(namespace)
        self._prefixes: list[str] = []
        if namespace.do_train == "false" and not self._asked:
            raise ConfigError(
                "--do-train false leaves nothing to do: give --do-eval, --do-predict or --do-multi-predict"
            )

    def check(self, inputs: Any) -> None:
        """Raise ConfigError, before training begins, for answers that cannot be given behind it."""
        if not self._asked:
            return
        args = inputs.args
        if args.save is None:
            raise ConfigError("the answers are written into the folder --save, which is not given: add it")
        if args.context_parallel_size > 1 or args.num_virtual_stages_per_pipeline_rank is not None:
            raise ConfigError(
                "sets are answered without context parallelism and virtual stages; train first, then run "
                "`mindspeed-mm predict --load SAVE` at other sizes"
            )
        self._prefixes = wanted_prefixes(self._namespace, inputs.data_config)
        from mindspeed_mm.cli.predict import read_sets
        from mindspeed_mm.data.template_choice import template_of

        template = template_of(inputs.data_config, inputs.tokenizer)
        read_sets(inputs.data_config, self._prefixes, template, inputs.tokenizer, inputs.media)

    def after(self, inputs: Any, result: dict[str, Any]) -> dict[str, Any]:
        """Load what was saved, and answer. Collective."""
        if not self._prefixes:
            return {}
        import gc

        gc.collect()
        if result["checkpoint"] is None:
            raise ConfigError(f"{inputs.args.save} holds no checkpoint to answer with; save one, or run predict")
        from evaluation.ranks import connect
        from mindspeed_mm.cli.predict import answer_sets
        from mindspeed_mm.inference import api

        args, device = inputs.args, inputs.platform.name
        sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        communicator = connect(device, *sizes)
        vlm = api.load(
            result["checkpoint"],
            device=device,
            dtype=inputs.runtime.params_dtype,
            tensor_model_parallel_size=sizes[0],
            pipeline_model_parallel_size=sizes[1],
        )
        name, size = inputs.data_config.dataset_param.template_name, self._namespace.predict_batch_size
        return answer_sets(inputs.data_config, vlm, communicator, Path(args.save), self._prefixes, size, name)

    def alone(self) -> dict[str, Any]:
        """Answer without training, as `mindspeed-mm predict` does."""
        from mindspeed_mm.cli import predict

        given = self._namespace
        if given.mm_data is None or given.save is None or not (given.load or given.mm_model):
            raise ConfigError(
                "--do-train false needs --mm-data, --save for the answers, and --load or --mm-model with weights"
            )
        names = (
            "mm_data",
            "mm_model",
            "cfg_options",
            "do_eval",
            "do_predict",
            "do_multi_predict",
            "predict_batch_size",
        )
        same = {name: getattr(given, name) for name in (*names, "load", "device", "allow_nonfinite")}
        same |= {"mm_model": None} if given.load else {}
        sizes = {name: getattr(given, name) for name in PARALLEL_SIZES}
        dtype = "bf16" if given.bf16 else "fp16" if given.fp16 else None
        none = dict.fromkeys(("model", "template", "tokenizer", "image_processor", "quantize", "adapter"))
        fixed = {"double_quant": False, "output_dir": given.save, "dtype": dtype}
        return predict.run(argparse.Namespace(**same, **sizes, **none, **fixed))
