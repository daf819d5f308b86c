"""`mindspeed-mm config`: a model.json from weights at hand, and configurations of another project as ours."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError

HELP = "write a model.json for weights at hand, or read another project's configuration"
EXAMPLE = "mindspeed-mm config init internlm2-chat-7b clip-vit-large-patch14-336 > model.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("init", "migrate"),
        help="init: describe the weights of folders or files; migrate: read a Python configuration, never run",
    )
    parser.add_argument(
        "sources",
        metavar="PATH",
        nargs="+",
        help="init: a whole model, or parts, in any readable layout; migrate: a .py, or - for --hf-flags alone",
    )
    parser.add_argument("--num-attention-heads", type=int, metavar="N", help="of a vision encoder that does not say it")
    parser.add_argument(
        "--output", metavar="DIR", help="migrate: folder for data.json, train_flags.txt, migration.json"
    )
    parser.add_argument("--hf-flags", metavar="TEXT", help="migrate: flags of Hugging Face's trainer, in one text")
    parser.add_argument(
        "--processes", type=int, metavar="N", default=1, help="migrate: processes of a run, for the global batch size"
    )


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Print the model.json, or what became of a configuration. Returns it for --json."""
    if namespace.action == "migrate":
        return _migrate(namespace)
    for flag, value in (("--output", namespace.output), ("--hf-flags", namespace.hf_flags)):
        if value is not None:
            raise ConfigError(f"config init takes no {flag}; remove it")
    from mindspeed_mm.inference.model_json import model_json_of

    block = model_json_of(namespace.sources, num_attention_heads=namespace.num_attention_heads)
    if not namespace.json:
        sys.stdout.write(json.dumps(block, indent=2) + "\n")
    return block


def _trainer_flags(namespace: argparse.Namespace) -> set[str]:
    """Names of Hugging Face's Seq2SeqTrainingArguments, which take a second; none where no flag has to be checked."""
    if namespace.hf_flags is None:
        return set()
    from transformers import Seq2SeqTrainingArguments

    return {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}


def _epoch_samples(data: dict[str, Any]) -> int | None:
    """Samples of an epoch of a data.json; None where one of its files is not here."""
    from mindspeed_mm.data.mixing import Mix, mixed_indices
    from mindspeed_mm.data.records import RecordFile

    parameters = data["dataset_param"]
    paths = [Path(basic["data_path"]) for basic in parameters["basic_parameters"]]
    if not all(path.is_file() for path in paths):
        return None
    sizes = [len(RecordFile(path)) for path in paths]
    if "mixing" not in parameters:
        return sum(sizes)
    mix = Mix.model_validate_json(json.dumps(parameters["mixing"]))
    return len(mixed_indices(mix, sizes, [None] * len(sizes)))


def _migrate(namespace: argparse.Namespace) -> dict[str, Any]:
    from mindspeed_mm.config.migration import HEADINGS, migrate_files

    if len(namespace.sources) > 1:
        raise ConfigError(f"config migrate reads one file, found {len(namespace.sources)}; give them one by one")
    if namespace.num_attention_heads is not None:
        raise ConfigError("config migrate takes no --num-attention-heads; remove it")
    config = None if namespace.sources[0] == "-" else namespace.sources[0]
    flags = _trainer_flags(namespace)
    report = migrate_files(config, namespace.output, namespace.hf_flags, namespace.processes, flags, _epoch_samples)
    for name, heading in HEADINGS.items():
        for key, told in report[name].items():
            sys.stdout.write(f"{heading}: {key} -> {told}\n")
    return report
