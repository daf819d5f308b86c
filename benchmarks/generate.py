"""Generation speed: this suite's engine and transformers' generate, same random weights, same prompts, same run.

    python benchmarks/generate.py --size small --out generate.json
    python benchmarks/generate.py --size 7b --device cuda --out generate.json

On a GPU the type is bf16, and batches of 1, 8, 64 and 64 mixed requests are measured unless told otherwise.

A measurement of one is followed by one of the other, so that both see the same load of the machine; medians are shown.
In the mixed batch, prompts and answers have different lengths and some prompts share an image. transformers' generate
pads all prompts to the longest and runs until the longest answer ends; only tokens that were asked for are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

import mindspeed_mm as mm

IMAGE_ID = 3
FIRST_WORD = 10

# LLM width, layers, heads, MLP, vocabulary; vision encoder width, layers, heads, MLP, image size. 7b is LLaVA-1.5's.
SIZES = {
    "tiny": ((256, 4, 4, 688, 2000), (128, 3, 2, 256, 56)),
    "small": ((512, 8, 8, 1376, 32000), (256, 6, 4, 1024, 112)),
    "7b": ((4096, 32, 32, 11008, 32064), (1024, 24, 16, 4096, 336)),
}
PATCH = 14
CONTEXT = 4096
COPIED = 2**28
"""Bytes that are copied to measure a memory's bandwidth."""

PEAK_BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.039e12}
"""Bytes/s of device memory, from NVIDIA's data sheets (SXM forms, A100 with 80 GB)."""


SIDES = ("ours", "theirs")


@dataclass(frozen=True)
class Request:
    """A prompt of ids, image tokens expanded, its images, and how many tokens to answer."""

    ids: list[int]
    images: list[torch.Tensor]
    new_tokens: int


def save_model(size: str, dtype: torch.dtype, folder: str) -> None:
    """A random LLaVA of a size, in the layout of the hub."""
    (width, layers, heads, mlp, vocabulary), (v_width, v_layers, v_heads, v_mlp, image) = SIZES[size]
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp,
            vocab_size=vocabulary,
            max_position_embeddings=CONTEXT,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=v_width,
            num_hidden_layers=v_layers,
            num_attention_heads=v_heads,
            intermediate_size=v_mlp,
            image_size=image,
            patch_size=PATCH,
        ),
        image_token_index=IMAGE_ID,
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    torch.set_default_dtype(previous)


def make_request(words: int, images: list[torch.Tensor], new_tokens: int, size: str, draw: random.Random) -> Request:
    """Random words around images that come first."""
    vocabulary, image = SIZES[size][0][4], SIZES[size][1][4]
    tokens = len(images) * (image // PATCH) ** 2
    text = [draw.randrange(FIRST_WORD, vocabulary) for _ in range(words)]
    return Request([1, *[IMAGE_ID] * tokens, *text], images, new_tokens)


def mixed_requests(count: int, size: str, longest: int) -> list[Request]:
    """Prompts of 8 to 256 words, answers of 1/8 to all of `longest` tokens, half of them about one of four images."""
    draw = random.Random(1)
    image = SIZES[size][1][4]
    images = [torch.randn(3, image, image) for _ in range(4)]
    return [
        make_request(
            draw.choice((8, 16, 32, 64, 128, 256)),
            [draw.choice(images)] if index % 2 else [],
            max(1, longest * draw.randrange(1, 9) // 8),
            size,
            draw,
        )
        for index in range(count)
    ]


class OurGeneration:
    """The engine's scheduler on ids."""

    def __init__(self, vlm: mm.LoadedVLM, rows: int) -> None:
        from mindspeed_mm.generation.decode import Decoder

        self.decoder, self.rows = Decoder(vlm.model), rows

    def __call__(self, requests: list[Request]) -> list[list[int]]:
        from mindspeed_mm.generation.images import ImageFeatures
        from mindspeed_mm.generation.jobs import SampleJob
        from mindspeed_mm.generation.options import GenerationOptions
        from mindspeed_mm.generation.scheduler import Entry, Scheduler

        features = ImageFeatures(self.decoder, None)  # no image is remembered from earlier runs
        scheduler = Scheduler(self.decoder, features, self.rows)
        jobs = []
        for request in requests:
            jobs.append(SampleJob(request.ids, GenerationOptions(max_new_tokens=request.new_tokens), ()))
            prompt = [-200 if token == IMAGE_ID else token for token in request.ids]
            length = len(prompt) + request.new_tokens
            scheduler.submit(Entry(jobs[-1], prompt, length, request.images, lambda error: None))
        while scheduler.step():
            pass
        return [job.sequences[0].token_ids for job in jobs]


class TheirGeneration:
    """transformers' generate on one left-padded batch."""

    def __init__(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        self.model = model.eval().to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, requests: list[Request]) -> list[list[int]]:
        width = max(len(request.ids) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, width - len(request.ids) :] = 1
        images = [shown for request in requests for shown in request.images]
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if images:
            inputs["pixel_values"] = torch.stack(images).to(self.device, self.model.dtype)
        longest = max(request.new_tokens for request in requests)
        config = transformers.GenerationConfig(
            max_new_tokens=longest, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        out = self.model.generate(**inputs, generation_config=config)[:, width:].tolist()
        return [row[: request.new_tokens] for row, request in zip(out, requests, strict=True)]


def measure(ours: Callable, theirs: Callable, requests: list[Request], repeats: int, synchronize: Callable) -> dict:
    """Median seconds of both for the whole batch and for its first tokens, after one run to warm up."""
    first = [Request(request.ids, request.images, 1) for request in requests]
    same = [a == b for a, b in zip(ours(requests), theirs(requests), strict=True)]
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "ours_first": [], "theirs_first": []}
    for _ in range(repeats):
        for name, run, work in (
            ("ours", ours, requests),
            ("theirs", theirs, requests),
            ("ours_first", ours, first),
            ("theirs_first", theirs, first),
        ):
            synchronize()
            start = time.perf_counter()
            run(work)
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    tokens = sum(request.new_tokens for request in requests)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "requests": len(requests),
        "tokens": tokens,
        "equal_answers": sum(same),
        "ours": {"tokens_per_s": tokens / median["ours"], "first_token_s": median["ours_first"]},
        "transformers": {"tokens_per_s": tokens / median["theirs"], "first_token_s": median["theirs_first"]},
        "speedup": median["theirs"] / median["ours"],
        "speedup_range": [min(ratios), max(ratios)],
        "seconds": seconds,
    }


def memory_bandwidth(device: torch.device, name: str, synchronize: Callable) -> dict:
    """Bytes/s of a device's memory: the data sheet's where it is known, else the best of some copies (read and
    written)."""
    for known, value in PEAK_BANDWIDTH.items():
        if known in name:
            return {"bytes_per_s": value, "from": f"data sheet of {known}"}
    source = torch.ones(COPIED // 4, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - start)
    return {"bytes_per_s": 2 * COPIED / best, "from": "measured copy"}


def decode_bandwidth(seconds: dict, requests: list[Request], model: torch.nn.Module, size: str) -> dict:
    """Bytes/s that decoding reads on each side: a step reads the layers, the head and the cache once."""
    weights = [p for name, p in model.text_decoder.named_parameters() if "word_embeddings" not in name]
    width, layers = SIZES[size][0][:2]
    length = len(requests[0].ids) + requests[0].new_tokens / 2
    cache = 2 * layers * width * weights[0].element_size() * length * len(requests)
    read = sum(p.numel() * p.element_size() for p in weights) + cache
    steps = requests[0].new_tokens - 1
    spent = {who: statistics.median(seconds[who]) - statistics.median(seconds[f"{who}_first"]) for who in SIDES}
    return {who: read * steps / spent[who] for who in SIDES}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32 on the CPU, else bf16")
    parser.add_argument("--batch", type=int, nargs="+", help="sizes of batches of equal requests (default: 1; 1 8 64)")
    parser.add_argument("--mixed", type=int, help="requests in the mixed batch (default: 16 on the CPU, else 64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="the longest answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    args = parser.parse_args()
    host_only = args.device == "cpu"
    args.dtype = args.dtype or ("fp32" if host_only else "bf16")
    args.batch = args.batch or ([1] if host_only else [1, 8, 64])
    args.mixed = args.mixed or (16 if host_only else 64)
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    draw, image = random.Random(2), SIZES[args.size][1][4]
    with tempfile.TemporaryDirectory() as folder:
        save_model(args.size, dtype, folder)
        vlm = mm.load(folder, device=args.device, dtype=args.dtype)
        theirs = TheirGeneration(folder, vlm.device, dtype)
    from mindspeed_mm.platform import current_platform

    platform = current_platform()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{host.machine()}, {args.threads} threads"
    memory = memory_bandwidth(vlm.device, device, platform.synchronize)
    results: dict = {
        "settings": vars(args) | {"device_name": device, "torch": torch.__version__},
        "transformers_version": transformers.__version__,
        "load_average": os.getloadavg(),
        "memory": memory,
    }
    for count in args.batch:
        images = [torch.randn(3, image, image) for _ in range(count)]
        requests = [make_request(32, [shown], args.new_tokens, args.size, draw) for shown in images]
        found = measure(OurGeneration(vlm, count), theirs, requests, args.repeats, platform.synchronize)
        reached = decode_bandwidth(found["seconds"], requests, vlm.model, args.size)
        found["bandwidth_share"] = {who: value / memory["bytes_per_s"] for who, value in reached.items()}
        results[f"batch_{count}"] = found
    requests = mixed_requests(args.mixed, args.size, args.new_tokens)
    results[f"mixed_{args.mixed}"] = measure(
        OurGeneration(vlm, args.mixed), theirs, requests, args.repeats, platform.synchronize
    )
    text = json.dumps(results, indent=2)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    for name, found in results.items():
        if isinstance(found, dict) and "speedup" in found:
            ours, theirs_rate = (found[who]["tokens_per_s"] for who in ("ours", "transformers"))
            rates = f"{ours:.1f} tokens/s, transformers {theirs_rate:.1f}"
            sys.stderr.write(f"{name}: {rates}, {found['speedup']:.2f}x; {found['equal_answers']} answers equal\n")
    if not args.out:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
