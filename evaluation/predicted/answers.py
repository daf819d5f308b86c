"""Answers of a model to the records of a data.json's `prediction`, in the order of the records, with metrics.

A record's earlier turns and its last question are what the model sees, in the template that it was trained with; the
last answer is what it should say. PREFIX is eval, test or multitest_NAME:

PREFIX_extra_prediction.jsonl  {"pred", "target"} a line
PREFIX_results.json            the metric's values, as PREFIX_accuracy, and PREFIX_samples
PREFIX.html                    the first records with the boxes drawn on their images
all_results.json               those of all sets, beside what other runs left there
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from evaluation.engine import Communicator, Engine, EvaluationRequest
from evaluation.journal import Journal
from evaluation.predicted.metrics import set_metrics
from evaluation.predicted.page import MAX_ROWS, render_predictions
from evaluation.results import JOURNAL_SUFFIX
from mindspeed_mm import registry
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.grounding.geometry import BoxStep
from mindspeed_mm.data.image import load_image
from mindspeed_mm.data.prediction import PredictedSet, check_answerable
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.sample import Sample, VideoFrames
from mindspeed_mm.data.set_config import DATASETS
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

ALL_RESULTS = "all_results.json"


def read_set(config: DataConfig, chosen: PredictedSet, options: ReadOptions) -> Any:
    """The checked records of a set. Raises DataError for one that cannot be asked."""
    kind = config.dataset_param.kind_of(chosen)
    source = registry.find(DATASETS, kind, "DATASET", what="dataset_type")(chosen, options)
    check_answerable(chosen, source)
    for number in range(len(source)):
        evaluation_request(number, source[number])
    return source


def predict_set(
    prefix: str,
    chosen: PredictedSet,
    source: Any,
    steps: Sequence[BoxStep],
    engine: Engine,
    folder: Path,
    communicator: Communicator,
    batch_size: int,
) -> dict[str, float]:
    """Ask every record of a set, and write its files on the first rank. Returns what stands in PREFIX_results.json.
    `steps` move boxes from a stored image to the model's.

    Collective: the copies of the model share the records. Answers are kept as they come, so that the same command goes
    on after a kill. Raises DataError for a record without a question before its last answer, or a file that cannot be
    written.
    """
    facts = {"set": chosen.model_dump(mode="json"), "records": len(source)} | dict(engine.describe())
    facts["content"] = _digest(source)
    journal = Journal(folder / f"{prefix}{JOURNAL_SUFFIX}", facts, communicator.rank)
    answers = {index: text for known in communicator.all_gather(journal.read()) for index, text in known.items()}
    waiting = [number for number in range(len(source)) if number not in answers]
    own = waiting[communicator.replica :: communicator.replicas]
    requests = [evaluation_request(number, source[number]) for number in own]
    new: dict[int | str, str] = {}
    with progress_bar(f"answers of {prefix}", len(own)) as advance:
        for index, text in engine.generate(requests, batch_size) if requests else ():
            new[index] = text
            if communicator.is_leader:
                journal.append(index, text)
            advance(1)
    journal.close()
    for known in communicator.all_gather(new):
        answers |= known
    pairs = [{"pred": answers[number], "target": source[number].turns[-1].text} for number in range(len(source))]
    style = chosen.grounding.style if chosen.grounding is not None else None
    values = set_metrics(
        chosen.metric,
        [pair["pred"] for pair in pairs],
        [pair["target"] for pair in pairs],
        style,
        lenient=chosen.lenient,
    )
    found = {f"{prefix}_{name}": value for name, value in values.items()} | {f"{prefix}_samples": len(pairs)}
    if communicator.rank == 0:
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        _write(folder / f"{prefix}_extra_prediction.jsonl", lines)
        _write(folder / f"{prefix}_results.json", _text(found))
        first = [source[number] for number in range(min(len(source), MAX_ROWS))]
        page = render_predictions(prefix, first, [pair["pred"] for pair in pairs], found, style, steps)
        _write(folder / f"{prefix}.html", page)
        _write(folder / ALL_RESULTS, _text(_earlier(folder / ALL_RESULTS) | found))
    communicator.all_gather(None)
    return found


def _digest(source: Any) -> str:
    """Name of the content of all records."""
    digest = hashlib.blake2b(digest_size=16)
    for number in range(len(source)):
        sample = source[number]
        digest.update(repr((sample.turns, [str(image) for image in sample.images])).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def evaluation_request(number: int, sample: Sample) -> EvaluationRequest:
    """A record as it is asked. Raises DataError for one that cannot be."""
    turns = sample.turns
    roles = [turn.role for turn in turns]
    if len(turns) < 2 or len(turns) % 2 or roles != ["human", "gpt"] * (len(turns) // 2):
        raise DataError(
            f"{sample.where}: the turns are from {', '.join(roles)}; expected questions (human) and answers (gpt) in "
            "turn, the last one of which is asked for. Correct the record, or leave it out of this set."
        )
    if any(isinstance(image, VideoFrames) for image in sample.images):
        raise DataError(
            f"{sample.where}: the record shows frames of a video, which sets of images do not; leave it out."
        )
    if any(turn.literal for turn in turns):
        raise DataError(f"{sample.where}: a text holds an <image> that is none; leave the record out of this set.")
    pairs = [(turns[i].text, turns[i + 1].text) for i in range(0, len(turns), 2)]
    pairs[-1] = (pairs[-1][0], None)
    key = repr([str(image) for image in sample.images])
    return EvaluationRequest(number, tuple(pairs), None, key, functools.partial(_images, sample))


def _images(sample: Sample) -> tuple[PIL.Image.Image, ...]:
    try:
        return tuple(load_image(image) for image in sample.images)
    except DataError as error:
        raise DataError(f"{sample.where}: {error}") from error


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _earlier(path: Path) -> dict[str, Any]:
    """What the file holds; a damaged one is told and written anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s); it is written anew", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; give another folder") from error
