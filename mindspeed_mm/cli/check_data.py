"""`mindspeed-mm check-data`: looks at every record and image of a data.json before training."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from mindspeed_mm.cli.flags.cfg_options import add_cfg_options
from mindspeed_mm.errors import ConfigError, DataError

HELP = "check every record and image of a data.json before training; exit code 1 if something is wrong"
EXAMPLE = (
    "mindspeed-mm check-data --mm-data examples/llava1.5/data.json --mm-model examples/llava1.5/model.json "
    "--html data.html"
)
IMAGE_TOKENS = 576
"""Image tokens of LLaVA-1.5 (CLIP ViT-L/14 at 336 px), where no model config tells."""

SEQUENCE = 2048
"""--seq-length of LLaVA-1.5, where neither the flag nor a model config tells."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mm-data", required=True, metavar="JSON", help="the data config to check")
    parser.add_argument("--mm-model", metavar="JSON", help="tells image tokens, maximum length and the tokenizer")
    add_cfg_options(parser)
    parser.add_argument("--seq-length", type=int, metavar="N", help="maximum length of a sample in tokens")
    parser.add_argument("--tokens-per-image", type=int, metavar="N", help=f"without --mm-model; default {IMAGE_TOKENS}")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: as in training")
    parser.add_argument("--objective", metavar="NAME", help="as train takes it: sft, dpo; default: of --mm-data")
    parser.add_argument("--templates", metavar="A,B", help="further templates whose lengths are counted")
    parser.add_argument("--no-images", action="store_true", help="do not open images")
    parser.add_argument("--fix-suffix", action="store_true", help="write DATA.fixed.json with the names that fit")
    parser.add_argument("--html", metavar="FILE", help="write a page with histograms and the worst samples")
    parser.add_argument("--report", metavar="FILE", help="write everything as JSON")
    parser.add_argument("--strict", action="store_true", help="exit code 1 for warnings (duplicate ids, ...), too")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Check. Prints a table on stdout. Raises DataError when there are errors, after everything is written."""
    from rich.console import Console

    from mindspeed_mm.config.inherit import read_config
    from mindspeed_mm.config.options import take_options
    from mindspeed_mm.data.config import DataConfig
    from mindspeed_mm.data.preflight_report import fix_suffixes, print_table, summary, write_page, write_whole
    from mindspeed_mm.data.preflight_sets import check_config, look_at_set, look_at_skips
    from mindspeed_mm.data.storage.objects import is_address

    start = time.monotonic()
    take_options(namespace)
    config = DataConfig.load(namespace.mm_data)
    model = read_config(namespace.mm_model) if namespace.mm_model else None
    objective = _objective(namespace, config)
    check, tokens = _check(namespace, config, model)
    check_config(config, check.max_length, _wants_auxiliary(objective))
    sets, fixed = [], []
    for basic in config.all_sets:
        found = look_at_set(
            check,
            config,
            basic,
            preferences=_wants_pairs(objective, config, basic, [earlier for _, earlier in sets]),
            ask=_ask,
            earlier=[earlier for _, earlier in sets],
            processes=namespace.workers,
        )
        for problem in tokens if not sets else ():
            found.problem("settings", problem)
        sets.append((basic, found))
        if namespace.fix_suffix and found.suffixes:
            if is_address(basic.data_path):
                raise ConfigError(f"--fix-suffix writes beside the data file, and {basic.data_path} is in a store")
            fixed.append(str(fix_suffixes(Path(basic.data_path), basic.data_folder, found.suffixes)))
    look_at_skips(check.policies, sets)
    results = [(summary(basic.data_path, found), found) for basic, found in sets]
    accounts = [account for account, _ in results]
    print_table(accounts, Console(file=sys.stdout))
    for path in fixed:
        sys.stdout.write(f"written: {path}\n")
    if namespace.html:
        write_page(Path(namespace.html), results, check.max_length)
    seconds = round(time.monotonic() - start, 1)
    total = {name: sum(account[name] for account in accounts) for name in ("records", "images", "errors", "warnings")}
    result = {"sets": accounts, **total, "fixed": fixed, "seconds": seconds, "max_length": check.max_length}
    if namespace.report:
        import json

        write_whole(Path(namespace.report), json.dumps(result, indent=1) + "\n")
    if total["errors"] or (namespace.strict and total["warnings"]):
        error = DataError(
            f"{total['errors']} problems and {total['warnings']} warnings in {total['records']} records: see the table "
            "above, and --report for more of them."
        )
        error.result = result  # what --json prints
        raise error
    return result


def _ask(number: int, sample: Any) -> Any:
    """Raise DataError for a record that cannot be asked."""
    from evaluation.predicted.answers import evaluation_request

    return evaluation_request(number, sample)


def _objective(namespace: argparse.Namespace, config: Any) -> Any:
    """What is trained, where a flag or the file says it."""
    from mindspeed_mm.objectives import chosen_objective

    if namespace.objective is None and config.objective is None:
        return None
    return chosen_objective(config.objective, namespace.objective, {})


def _wants_pairs(objective: Any, config: Any, basic: Any, earlier: list[Any]) -> bool | None:
    """Whether a set has to hold preference pairs; where nothing says the objective, the first set does (None)."""
    if any(basic is other for other in config.dataset_param.auxiliary_parameters):
        return False
    if objective is not None:
        return objective.preferences
    return next((found.pairs for found in earlier if found.pairs is not None), None)


def _wants_auxiliary(objective: Any) -> bool | None:
    """Whether the objective reads auxiliary sets; None where a flag of train may say so."""
    if objective is None or objective.preferences and not objective.auxiliary:
        return None
    return objective.auxiliary


def _check(namespace: argparse.Namespace, config: Any, model: dict[str, Any] | None) -> tuple[Any, list[str]]:
    """Templates, tokenizer and lengths as in training; and what is wrong with the tokenizer for the model."""
    from mindspeed_mm.data.build import check_box_words, check_user_tokens, policies_of
    from mindspeed_mm.data.expand import Encoding
    from mindspeed_mm.data.image import ImageProcessor
    from mindspeed_mm.data.media import FixedSizeImages
    from mindspeed_mm.data.preflight import Check
    from mindspeed_mm.data.template import get_template
    from mindspeed_mm.data.template_check import check_template
    from mindspeed_mm.data.template_choice import DEFAULT_TEMPLATE, with_template
    from mindspeed_mm.data.tokenizer import load_tokenizer

    parameters = config.dataset_param
    media, seq_length, weights, rows, usual = None, SEQUENCE, None, None, (DEFAULT_TEMPLATE, True)
    if model is not None:
        from mindspeed_mm.models.complete import read_model
        from mindspeed_mm.models.family import media_of_data

        spec = read_model(namespace.mm_model)
        media = media_of_data(spec, config)
        usual = spec.family.usual_template(spec)
        rows = spec.text_decoder.language_vocab_size
        seq_length, weights = spec.text_decoder.language_max_sequence_length, spec.text_decoder.ckpt_path
    elif parameters.mm_use_im_start_end:
        raise ConfigError("dataset_param.mm_use_im_start_end is true: give --mm-model, which says the tokens")
    if media is None or namespace.tokens_per_image:
        processor = ImageProcessor.from_config(parameters.preprocess_parameters.processor_source)
        media = FixedSizeImages(processor, namespace.tokens_per_image or IMAGE_TOKENS)
    given = parameters.tokenizer_config.from_pretrained if parameters.tokenizer_config else weights
    path = namespace.tokenizer or given
    if path is None:
        raise ConfigError("no tokenizer: give --tokenizer, --mm-model, or dataset_param.tokenizer_config")
    tokenizer = load_tokenizer(path)
    check_box_words(config, tokenizer)
    tokens = []
    if model is not None:
        spec.family.check_tokens(spec, tokenizer.token_to_id)
        try:
            check_user_tokens(tokenizer, rows, str(path))
        except DataError as error:  # the records that hold them are found as well
            tokens.append(str(error))
    parameters = with_template(config, tokenizer, *usual).dataset_param
    names = [parameters.template_name, *(namespace.templates or "").split(",")]
    encodings = {}
    for name in dict.fromkeys(name.strip() for name in names if name.strip()):
        template = get_template(name, tokenizer)
        check_template(template, tokenizer)
        encodings[name] = Encoding(tokenizer, template, media, parameters.special_text)
    max_length = config.max_length(namespace.seq_length or seq_length)
    policies = policies_of(parameters)
    return Check(encodings, max_length, policies, images=not namespace.no_images, rows=rows), tokens
