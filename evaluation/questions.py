"""Open a benchmark's file: a TSV, or questions as JSON lines with the images as files.

JSON lines come as POPE's coco_pope_*.json, LLaVA's question files and Shikra's REC files. Their keys are renamed to
the columns of a TSV; images are looked for below `image_root`, or else in the file's folder and folders known to
stand beside it.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.image_files import find_images, root_of
from evaluation.prompts import SHORT_INSTRUCTION
from evaluation.shr_files import genome_folder, is_shr, read_shr
from evaluation.tsv import (
    Row,
    Table,
    digests_of_files,
    image_digest,
    meant_columns,
    read_table,
    typed_indices,
)
from mindspeed_mm.config.load import parse_json
from mindspeed_mm.data.storage.objects import is_address, local_file, parent_of
from mindspeed_mm.errors import ConfigError, DataError

COLUMN_OF_KEY = {
    "question_id": "index",
    "id": "index",
    "text": "question",
    "image": "image_path",
    "img_path": "image_path",
    "file_path": "image_path",
    "label": "answer",
}
"""Columns for the keys that differ from them."""

POPE_FILE = "coco_pope_{}.json"
POPE_SETS = ("random", "popular", "adversarial")
IMAGE_FOLDERS = ("", "images", "val2014", "../images", "../val2014")
"""Where images are looked for when no folder is given, from the file's folder."""
LABEL_FOLDERS = ("", "coco")
"""Where POPE's labelled files are looked for, from the folder of LLaVA's question file."""
MAX_FILE_BYTES = 2**31
_SUFFIXES = (".json", ".jsonl")


def read_questions(path: str | Path, *, image_root: str | Path | None = None, text_questions: bool = False) -> Table:
    """Read and check a benchmark's file; a folder holds POPE's three sets, or SHR. `text_questions` keeps the rows of a
    TSV that have no image. Raises DataError (see read_table)."""
    image_root = parent_of(path) if image_root is None and is_address(path) else image_root
    path = Path(local_file(path))
    if path.is_dir() and is_shr(path):
        root = genome_folder(path, image_root)
        records, sha256 = read_shr(path, root)
        return _table(path, records, (sha256, ""), root)
    if path.is_dir():
        files = [path / POPE_FILE.format(name) for name in POPE_SETS]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise DataError(
                f"{path} is a folder without {', '.join(missing)}; give a TSV, JSON lines, or POPE's or SHR's folder."
            )
        records = [
            record | {"index": f"{name}/{record['index']}", "category": name}
            for name, file in zip(POPE_SETS, files, strict=True)
            for record in _records(file)
        ]
        return _table(path, records, digests_of_files(files), image_root)
    if path.suffix not in _SUFFIXES:
        return read_table(path, image_root=image_root, text_questions=text_questions)
    records = _records(path)
    for name in POPE_SETS:
        if path.name == POPE_FILE.format(name):
            records = [{"category": name} | record for record in records]
    return _table(path, records, digests_of_files([path, *_add_labels(path, records)]), image_root)


def _records(path: Path) -> list[dict[str, str]]:
    """Cells per line, all texts; lines without an index get their number, from 0."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes; expected questions without their images.")
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other line ends may stand in a text
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected questions as JSON lines there.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save the questions as UTF-8.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            records.append({"index": str(len(records))} | _cells(line, f"{path}, line {number}"))
    if not records:
        raise DataError(f"{path} has no lines; expected one question a line.")
    columns = set(records[0])
    for number, record in enumerate(records, start=1):
        if set(record) != columns:
            raise DataError(
                f"{path}, question {number}: found keys {', '.join(sorted(record))}; expected those of the first one, "
                f"{', '.join(sorted(columns))}."
            )
    return records


def _cells(line: str, where: str) -> dict[str, str]:
    try:
        record = parse_json(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}; expected one question a line.") from error
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: found {line[:60]}; expected an object.")
    if "imageId" in record:  # GQA's own files
        record = {"img_path": f"{record['imageId']}.jpg"} | {k: v for k, v in record.items() if k != "imageId"}
    names = meant_columns([COLUMN_OF_KEY.get(key, key) for key in record], where, told=False)
    if len(set(names)) < len(names):
        raise DataError(f"{where}: two keys mean the same column ({', '.join(sorted(record))}); keep one.")
    if "image_path" not in names:
        raise DataError(
            f"{where}: found keys {', '.join(sorted(record))}; expected image or img_path (file_path, imageId) "
            "among them."
        )
    return {name: _text(value) for name, value in zip(names, record.values(), strict=True)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _add_labels(path: Path, records: list[dict[str, str]]) -> list[Path]:
    """Give LLaVA's POPE questions the labels of POPE's own files, where these stand beside; returns those files."""
    sets = {record.get("category") for record in records}
    if not sets <= set(POPE_SETS) or "answer" in records[0]:
        return []
    folders = [path.parent / name for name in LABEL_FOLDERS]
    folder = next((f for f in folders if all((f / POPE_FILE.format(name)).is_file() for name in sets)), None)
    if folder is None:
        return []
    files = [folder / POPE_FILE.format(name) for name in sorted(sets)]
    labels = {
        (name, record["image_path"], record["question"]): record["answer"]
        for name, file in zip(sorted(sets), files, strict=True)
        for record in _records(file)
    }
    for record in records:
        question = record["question"].removesuffix(f"\n{SHORT_INSTRUCTION}")
        key = (record["category"], record["image_path"], question)
        if key not in labels:
            raise DataError(
                f"{path}, question {record['index']}: {folder / POPE_FILE.format(key[0])} has no question "
                f'"{question[:60]}" on {key[1]}; give the files of the same release.'
            )
        record["answer"] = labels[key]
    return files


def _table(path: Path, records: list[dict[str, str]], digests: tuple[str, str], image_root: str | Path | None) -> Table:
    folder = path if path.is_dir() else path.parent
    first = records[0]["image_path"]
    candidates = [folder / name for name in IMAGE_FOLDERS if (folder / name / first).is_file()]
    root = root_of(image_root) if image_root is not None else (candidates or [folder])[0]
    texts = [record["index"] for record in records]
    (index, uses), *_ = Counter(texts).most_common(1)
    if uses > 1:
        raise DataError(f"{path}: index {index} is used more than once; make every index unique.")
    rows = tuple(
        Row(
            index,
            cells,
            i,
            0,
            len(find_images(cells["image_path"], root, f"{path}, row with index {index}")),
            image_digest(cells["image_path"]),
        )
        for i, (index, cells) in enumerate(zip(typed_indices(texts), records, strict=True))
    )
    columns = tuple(records[0])
    sha256, md5 = digests
    return Table(path, columns, rows, tuple(records), (), sha256, root, is_json_lines=True, md5=md5)
