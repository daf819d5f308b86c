"""`mindspeed-mm predict`: a model's answers to the sets of data.json's `prediction`, in order, with their metrics."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mindspeed_mm.cli.flags.cfg_options import add_cfg_options
from mindspeed_mm.cli.flags.model import add_model_arguments, add_parallel_arguments, load_model, model_path
from mindspeed_mm.cli.flags.steps import STEPS, add_predict_arguments, asks_for_answers, wanted_prefixes
from mindspeed_mm.errors import ConfigError

HELP = "answer the sets that --mm-data names under prediction, in their order, with metrics"
EXAMPLE = (
    "torchrun --nproc_per_node 8 -m mindspeed_mm predict --mm-data examples/grounding/data_rec.json "
    "--model llava-1.5-7b-hf --output-dir predictions"
)
GENERATION_DEFAULTS = {"max_new_tokens": 128, "do_sample": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mm-data", required=True, metavar="JSON", help="data.json with the sets under prediction")
    parser.add_argument(
        "--mm-model", metavar="JSON", help="model.json with weights, where no --load or --model is given"
    )
    add_cfg_options(parser)
    add_predict_arguments(parser)
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="folder of the answers and results")
    add_model_arguments(parser)
    add_parallel_arguments(parser)


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Answer. Without one of the --do flags, every set of data.json. Returns all values for --json."""
    from mindspeed_mm.config.options import ConfigFile, take_options
    from mindspeed_mm.data.config import DataConfig

    take_options(namespace)
    config = DataConfig.load(namespace.mm_data)
    if not asks_for_answers(namespace):
        for key, name in STEPS.items():
            setattr(namespace, name, any(prefix.split("_")[0] == key for prefix in config.predicted_sets))
    prefixes = wanted_prefixes(namespace, config)
    if not prefixes:
        raise ConfigError(f'{namespace.mm_data} has no sets under "prediction"; add them (docs/prediction.md)')
    if isinstance(namespace.mm_model, ConfigFile):
        raise ConfigError("predict takes --cfg-options of data alone: the weights decide the model")
    path = model_path(namespace, namespace.mm_model)
    from evaluation.ranks import connect

    sizes = namespace.tensor_model_parallel_size, namespace.pipeline_model_parallel_size
    communicator = connect(namespace.device, *sizes)
    parameters = config.dataset_param
    vlm = load_model(
        namespace,
        path,
        device=namespace.device,
        dtype=None,
        tokenizer=None if parameters.tokenizer_config is None else parameters.tokenizer_config.from_pretrained,
        image_processor=parameters.preprocess_parameters.image_processer_path,
    )
    template = namespace.template or parameters.template_name
    return answer_sets(
        config, vlm, communicator, Path(namespace.output_dir), prefixes, namespace.predict_batch_size, template
    )


def read_sets(
    config: Any, prefixes: list[str], template: Any, tokenizer: Any, media: Any
) -> tuple[dict[str, Any], Any]:
    """The records of the sets of these prefixes, and the options of generation. Raises ConfigError and DataError for
    what cannot be asked, which a run hears before it trains."""
    from evaluation.predicted.answers import read_set
    from mindspeed_mm.data.build import check_box_words, read_options
    from mindspeed_mm.generation.options import generation_options

    given = GENERATION_DEFAULTS | dict(config.prediction.generation)
    options = generation_options(given, context="prediction.generation")
    check_box_words(config, tokenizer)
    reading, chosen = read_options(config, template, media), config.predicted_sets
    return {prefix: read_set(config, chosen[prefix], reading) for prefix in prefixes}, options


def answer_sets(
    config: Any, vlm: Any, communicator: Any, folder: Path, prefixes: list[str], batch_size: int, template: str | None
) -> dict[str, Any]:
    """Answer the sets of these prefixes with a loaded model. Collective; the first rank prints the values."""
    from evaluation.model_engine import ModelEngine
    from evaluation.predicted.answers import predict_set
    from mindspeed_mm.data.box_steps import image_steps, is_whole
    from mindspeed_mm.data.template import get_template

    name, chosen = template or vlm.template, config.predicted_sets
    sources, options = read_sets(config, prefixes, get_template(name, vlm.tokenizer), vlm.tokenizer, vlm.media)
    steps = image_steps(config.dataset_param.preprocess_parameters) if is_whole(vlm.media) else ()
    engine = ModelEngine(vlm, options, name, as_written=True)
    results: dict[str, Any] = {}
    for prefix, source in sources.items():
        results |= predict_set(prefix, chosen[prefix], source, steps, engine, folder, communicator, batch_size)
    if communicator.rank == 0:
        for key, value in results.items():
            sys.stdout.write(f"{key}: {value:.6g}\n")
        sys.stdout.write(f"{folder}\n")
    return results
