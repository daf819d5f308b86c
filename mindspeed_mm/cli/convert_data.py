"""`mindspeed-mm convert-data`: public annotation files as files that training reads, or an index of images as TSV."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError

HELP = "convert annotation files of MiniGPT-v2's sets to records, or a huge JSON index of images to TSV"
EXAMPLE = (
    "mindspeed-mm convert-data ccs_synthetic_filtered_large.json index_tsv --to tsv\n"
    "  mindspeed-mm convert-data vqa_train.json coco_vqa.jsonl --to coco_vqa"
)

TSV = "tsv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="SRC ... DST: the annotation files (two of RefCOCO's sets and refvg, else one or more), and the file to "
        "write; with --to tsv the folder, where a conversion that was cut short goes on",
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="SET",
        help="tsv, or a set by the name of its builder: coco_vqa, refcoco, invrefcoco, refvg, ... (docs/minigpt4.md)",
    )
    parser.add_argument(
        "--columns", nargs="+", metavar="KEY", help="of --to tsv: keys of a record (default url caption)"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="of --to tsv: rows of a file (default 1000000)")
    parser.add_argument(
        "--template-string", metavar="TEXT", help="the question, with <question>, <expr> or <objs> in it"
    )
    parser.add_argument("--template-file", metavar="FILE", help="a JSON list of such questions")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default 0)")
    parser.add_argument(
        "--keep-text", action="store_true", help="leave texts as they are, not as blip_caption has them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier file")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Convert. Returns what was written for --json."""
    if len(namespace.paths) < 2:
        raise ConfigError(f"found {namespace.paths[0]} alone; expected SRC ... DST")
    *sources, target = namespace.paths
    flags = {TSV: ("columns", "rows")}.get(
        namespace.to, ("template_string", "template_file", "seed", "keep_text", "overwrite")
    )
    others = ("columns", "rows", "template_string", "template_file", "seed", "keep_text", "overwrite")
    idle = [name for name in others if name not in flags and getattr(namespace, name) not in (None, False)]
    if idle:
        raise ConfigError(f"--{idle[0].replace('_', '-')} has no meaning with --to {namespace.to}: leave it out")
    result = _tsv(namespace, sources, target) if namespace.to == TSV else _records(namespace, sources, Path(target))
    sys.stdout.write(f"wrote {target}: {result['records']} records\n")
    return {"target": target, **result}


def _tsv(namespace: argparse.Namespace, sources: list[str], target: str) -> dict[str, Any]:
    from mindspeed_mm.data.index_tsv import COLUMNS, ROWS, index_to_tsv

    if len(sources) != 1 or (namespace.rows is not None and namespace.rows < 1):
        raise ConfigError(
            f"--to tsv: found {len(sources)} files and --rows {namespace.rows}; expected one, and 1 or more"
        )
    return index_to_tsv(sources[0], target, columns=namespace.columns or COLUMNS, rows=namespace.rows or ROWS)


def _records(namespace: argparse.Namespace, sources: list[str], target: Path) -> dict[str, Any]:
    from mindspeed_mm.config.minigpt4_tasks import KINDS
    from mindspeed_mm.data.multitask import TASKS, records_of, templates_of

    if target.exists() and not namespace.overwrite:
        raise ConfigError(f"{target} exists; expected a new file. Give --overwrite, or another name")
    given = (namespace.template_string, namespace.template_file)
    templates = None if given == (None, None) or namespace.to not in TASKS else templates_of(namespace.to, *given)
    options = {"templates": templates, "seed": namespace.seed or 0, "keep_text": namespace.keep_text}
    beside, count = target.with_name(f".{target.name}.part"), 0
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as out:
            for record in records_of(namespace.to, sources, **options):
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        beside.replace(target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose another place") from error
    finally:
        beside.unlink(missing_ok=True)
    return {"records": count, "dataset_type": KINDS[namespace.to]}
