"""`mindspeed-mm infer`: answers prompts about pictures, from an inference_llava.json or from flags."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from mindspeed_mm.errors import ConfigError

HELP = "answer prompts about pictures, from an inference_llava.json or from flags alone"
EXAMPLE = 'mindspeed-mm infer --model llava-1.5-7b-hf --image view.jpg --prompt "What is in the picture?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mm-model", metavar="JSON", help="the guide's inference_llava.json; flags win over it")
    parser.add_argument("--model", metavar="PATH", help="weights in any layout, or a training checkpoint")
    parser.add_argument("--load", metavar="DIR", help="training checkpoint to answer with (as --model)")
    parser.add_argument("--image", metavar="FILE", action="append", help="picture; give several for several prompts")
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="question; may be given several times")
    parser.add_argument("--template", help="conversation template (default: the checkpoint's, else v1)")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the tokenizer that comes with the weights")
    parser.add_argument("--image-processor", metavar="DIR", help="default: the one that comes with the weights")
    parser.add_argument("--max-new-tokens", type=int, help="at most so many tokens an answer")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token, above 0 samples")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens of this total probability")
    parser.add_argument("--top-k", type=int, help="sample among so many likeliest tokens")
    parser.add_argument("--seed", type=int, help="seed of the sampling (default 0)")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16")
    parser.add_argument("--device", choices=("npu", "cuda", "cpu"), help="default: the first that this machine has")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Answer. Prints each answer on stdout; returns them for --json."""
    from mindspeed_mm import api
    from mindspeed_mm.config.inference import InferenceConfig
    from mindspeed_mm.config.load import load_config, read_json
    from mindspeed_mm.generation.options import generation_options
    from mindspeed_mm.models.spec import MODEL_KEYS

    values = read_json(namespace.mm_model) if namespace.mm_model else {}
    own = {key: value for key, value in values.items() if key not in MODEL_KEYS}
    if namespace.prompt:
        own["prompts"] = namespace.prompt
    if namespace.image:
        own["image_path"] = namespace.image[0] if len(namespace.image) == 1 else namespace.image
    config = load_config(InferenceConfig, own, what="inference config", context=namespace.mm_model)
    options = generation_options(_options(namespace, config.generation_config), context=namespace.mm_model)
    pairs = [(prompt, () if picture is None else (_load(picture),)) for prompt, picture in _pairs(config)]
    vlm = api.load(
        _model_path(namespace),
        device=namespace.device or _device(config.device),
        dtype=namespace.dtype or config.dtype,
        tokenizer=namespace.tokenizer or (config.tokenizer.from_pretrained if config.tokenizer else None),
        image_processor=namespace.image_processor or config.image_processer_path,
    )
    from mindspeed_mm.generation.engine import GenerationRequest

    requests = [
        GenerationRequest(str(index), turns=((prompt, None),), images=images)
        for index, (prompt, images) in enumerate(pairs)
    ]
    return _answer(vlm.engine(namespace.template), requests, options)


def _answer(engine, requests, options) -> dict[str, Any]:
    answers, tokens, start = [], 0, time.perf_counter()
    for result in engine.generate(requests, options):
        tokens += len(result.token_ids)
        question = requests[len(answers)].turns[0][0]
        answers.append({"prompt": question, "answer": result.text})
        sys.stdout.write(f"USER: {question}\nASSISTANT: {result.text}\n")
    seconds = time.perf_counter() - start
    sys.stderr.write(f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s)\n")
    return {"answers": answers, "tokens": tokens, "seconds": round(seconds, 3)}


def _options(namespace: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """Options of the JSON with the flags on top; a temperature alone says whether to sample."""
    values = dict(values)
    for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed"):
        if getattr(namespace, name) is not None:
            values[name] = getattr(namespace, name)
    if namespace.temperature is not None:
        values["do_sample"] = namespace.temperature > 0
    return values


def _model_path(namespace: argparse.Namespace) -> str:
    given = [path for path in (namespace.load, namespace.model, namespace.mm_model) if path]
    if not given:
        raise ConfigError("nothing to load: give --model PATH, --load CHECKPOINT or --mm-model JSON")
    return given[0]


def _pairs(config) -> list[tuple[str, str | None]]:
    try:
        return config.pairs
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _load(path: str):
    from mindspeed_mm.data.image import load_image

    return load_image(path)


def _device(name: str | None) -> str | None:
    return name.split(":")[0] if name else None
