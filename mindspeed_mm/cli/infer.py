"""`mindspeed-mm infer`: answers prompts about images, from flags, an inference_llava.json or a file of requests."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_mm.cli.flags.launcher import add_launcher_flags, check_launcher_flags
from mindspeed_mm.cli.flags.model import (
    add_model_arguments,
    add_option_arguments,
    add_parallel_arguments,
    given_options,
    load_model,
    model_path,
    refuse_idle_processes,
)
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.errors import ConfigError, DataError

HELP = "answer prompts about images, from flags alone, an inference_llava.json or a JSONL file"
EXAMPLE = 'mindspeed-mm infer --model llava-1.5-7b-hf --image view.jpg --prompt "What is in the picture?"'

BATCH_SIZE = 8

AHEAD = 16
"""Requests of a file in flight per sequence that runs: enough to choose from, however long the file is."""

DIGITS = 6
"""Of log-probabilities that are written."""

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mm-model", metavar="JSON", help="the guide's inference_llava.json; flags win over it")
    add_model_arguments(parser)
    parser.add_argument("--image", metavar="FILE", action="append", help="image; give several for several prompts")
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="question; may be given several times")
    parser.add_argument(
        "--input", metavar="JSONL", help='many requests, a line each: {"image": "view.jpg", "prompt": "What is it?"}'
    )
    parser.add_argument("--output", metavar="JSONL", help="where their answers go; an interrupted run is continued")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="answers that are generated together")
    add_option_arguments(parser)
    add_parallel_arguments(parser)
    add_launcher_flags(parser)


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Answer. Prints each answer on stdout, or writes them to --output; returns them for --json."""
    from mindspeed_mm.config.inference import InferenceConfig, InferenceFile
    from mindspeed_mm.config.inherit import read_config
    from mindspeed_mm.config.load import load_config
    from mindspeed_mm.generation.options import generation_options
    from mindspeed_mm.models.spec import MODEL_KEYS

    check_launcher_flags(namespace)
    refuse_idle_processes(namespace)
    if namespace.batch_size < 1:
        raise ConfigError(f"--batch-size is {namespace.batch_size}; expected at least 1")
    if (namespace.input is None) != (namespace.output is None):
        raise ConfigError("--input and --output go together: the requests' file and the answers' file")
    values = read_config(namespace.mm_model) if namespace.mm_model else {}
    own = {key: value for key, value in values.items() if key not in MODEL_KEYS}
    if namespace.prompt:
        own["prompts"] = namespace.prompt
    if namespace.image:
        own["image_path"] = namespace.image[0] if len(namespace.image) == 1 else namespace.image
    form = InferenceConfig if namespace.input is None else InferenceFile
    config = load_config(form, own, what="inference config", context=namespace.mm_model)
    options = given_options(namespace, config.generation_config)
    generation_options(options, context=namespace.mm_model)
    path = model_path(namespace, namespace.mm_model)
    if namespace.input is not None:
        return _answer_file(namespace, config, path, options)
    try:
        questions = config.questions
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _refuse_hopeless(questions)
    return _answer(_engine(namespace, config, path, options), questions, options, namespace.batch_size)


def _refuse_hopeless(questions: list[tuple[str, tuple[str, ...]]]) -> None:
    """Raise DataError, before weights are read, where no question can be answered: empty prompts, missing images."""
    from mindspeed_mm.generation.images import refuse_url

    problems = []
    for number, (prompt, images) in enumerate(questions, start=1):
        try:
            for image in images:
                refuse_url(image)
                if not Path(image).exists():
                    raise DataError(f"image {image} is missing; expected a file there. Correct the path.")
            if not prompt.strip():
                raise DataError(f"the prompt is empty; give it a text ({IMAGE_TOKEN} alone for an image alone)")
        except DataError as error:
            problems.append(f"request {number}: {error}")
    if len(problems) == len(questions):
        raise DataError("\n  ".join([f"none of {len(questions)} prompts can be answered:", *problems]))


def _engine(namespace: argparse.Namespace, config, path: str, options: dict[str, Any]):
    vlm = load_model(
        namespace,
        path,
        device=_device(config.device),
        dtype=config.dtype,
        tokenizer=config.tokenizer.from_pretrained if config.tokenizer else None,
        image_processor=config.image_processer_path,
    )
    engine = vlm.engine(namespace.template, batch_size=namespace.batch_size)
    engine.defaults.options(options)  # beside what the model's own file says, before anything is asked
    return engine


def _answer(engine, questions, options: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Answers on stdout, as they are asked. A question that fails is told; the others go on."""
    from mindspeed_mm.cli.main import is_first_rank
    from mindspeed_mm.generation.engine import GenerationRequest

    requests = [
        GenerationRequest(str(index), turns=((prompt, None),), images=images)
        for index, (prompt, images) in enumerate(questions, start=1)
    ]
    answers, tokens, start, errors = [], 0, time.perf_counter(), []
    for (prompt, _), result in zip(
        questions, engine.generate(requests, options, batch_size, on_error="return"), strict=True
    ):
        if result.error is not None:
            where = f"request {result.id}: "  # which the errors of images and options do not name
            errors.append(where + result.error.removeprefix(where))
            continue
        for sequence in result.sequences:
            tokens += len(sequence.token_ids)
            answers.append({"prompt": prompt, "answer": sequence.text, **_logprobs(sequence)})
            if is_first_rank():
                sys.stdout.write(f"USER: {prompt}\nASSISTANT: {sequence.text}\n")
    seconds = time.perf_counter() - start
    logger.info("%d tokens in %.2f s (%.1f tokens/s)", tokens, seconds, tokens / seconds)
    found = {"answers": answers, "tokens": tokens, "seconds": round(seconds, 3)}
    if errors:
        error = DataError("\n  ".join([f"{len(errors)} of {len(requests)} prompts could not be answered:", *errors]))
        error.result = found
        raise error
    return found


def _answer_file(namespace: argparse.Namespace, config, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Answers of the file --input into the file --output."""
    from mindspeed_mm.cli.main import is_first_rank
    from mindspeed_mm.data.progress import progress_bar
    from mindspeed_mm.data.storage.objects import parent_of
    from mindspeed_mm.inference.request_file import Answers, read_requests, weights_stamp

    requests, folder = read_requests(namespace.input), parent_of(namespace.input)
    facts = {
        "model": str(Path(path).resolve()),
        "weights": weights_stamp(Path(path)),
        "template": namespace.template,
        "options": options,
        "dtype": namespace.dtype or config.dtype,
        "tokenizer": namespace.tokenizer,
        "image_processor": namespace.image_processor,
        "quantize": [namespace.quantize, namespace.double_quant] if namespace.double_quant else namespace.quantize,
    }
    if namespace.adapter:
        facts["adapter"] = [str(Path(namespace.adapter).resolve()), weights_stamp(Path(namespace.adapter))]
    answers = Answers(Path(namespace.output), facts, writes=is_first_rank())
    digests = {name: line.digest(folder) for name, line in requests.items() if not isinstance(line, DataError)}
    waiting = {
        name: line
        for name, line in requests.items()
        if name not in digests or answers.done.get(name, {}).get("request") != digests[name]
    }
    if len(waiting) < len(requests):
        logger.info("%d of %d requests are answered already", len(requests) - len(waiting), len(requests))
    resumed = len(requests) - len(waiting)
    with answers.open(list(requests)), progress_bar("answers", len(waiting)) as advance:
        if waiting:
            engine = _engine(namespace, config, path, options)
            for record in _records(engine, waiting, options, folder, AHEAD * namespace.batch_size):
                answers.append(record if "error" in record else record | {"request": digests[record["id"]]})
                advance(1)
    failed = [name for name in waiting if "error" in answers.done[name]]
    if failed:
        raise DataError(
            f"{len(failed)} of {len(requests)} requests failed; their lines in {namespace.output} say why "
            f"(first, id {failed[0]}: {answers.done[failed[0]]['error']}). Correct them and run the same command again"
        )
    return {"output": namespace.output, "requests": len(requests), "resumed": resumed}


def _records(
    engine, waiting: dict[str, Any], options: dict[str, Any], folder: str | Path, ahead: int
) -> Iterator[dict[str, Any]]:
    """One record a request, as they end; so many of them are in flight."""
    from mindspeed_mm.data.storage.objects import in_folder
    from mindspeed_mm.generation.engine import GenerationRequest
    from mindspeed_mm.generation.images import refuse_url

    ended: list[dict[str, Any]] = []

    def note(handle) -> None:
        result = handle.result
        if result.error is not None:
            ended.append({"id": handle.id, "error": result.error})
            return
        record = {"id": handle.id, "prompt": waiting[handle.id].prompt, "answer": result.text}
        if len(result.sequences) > 1:
            record["answers"] = [sequence.text for sequence in result.sequences]
        first = result.sequences[0]
        record |= {"finish_reason": first.finish_reason, "tokens": len(first.token_ids)}
        ended.append(record | _logprobs(first))

    def submit(name: str, line: Any) -> None:
        if isinstance(line, DataError):
            ended.append({"id": name, "error": str(line)})
            return
        try:
            for image in line.images:
                refuse_url(image)
        except DataError as error:
            ended.append({"id": name, "error": str(error)})
            return
        images = tuple(str(in_folder(folder, image)) for image in line.images)
        turns = line.turns(engine.vlm.spec.family.after_image)
        request = GenerationRequest(name, turns=turns, images=images, system=line.system)
        engine.submit(request, options | line.options, on_end=note)

    left, submitted, answered = iter(waiting.items()), 0, 0
    while answered < len(waiting):
        for name, line in itertools.islice(left, max(0, answered + ahead - submitted)):
            submit(name, line)
            submitted += 1
        if not ended:
            engine.step()
        answered += len(ended)
        yield from ended
        ended.clear()


def _logprobs(sequence) -> dict[str, Any]:
    """What the option `logprobs` asks for: the tokens' log-probabilities, and of each place the likeliest ids'."""
    if not sequence.logprobs:
        return {}
    likeliest = [
        {str(token): round(value, DIGITS) for token, value in place.items()} for place in sequence.top_logprobs
    ]
    return {
        "token_ids": list(sequence.token_ids),
        "logprobs": [round(value, DIGITS) for value in sequence.logprobs],
        "top_logprobs": likeliest,
    }


def _device(name: str | None) -> str | None:
    return name.split(":")[0] if name else None
