"""Requests a second: `mindspeed-mm serve`, and a FastAPI server that has transformers generate one request at a time.

    python benchmarks/serve.py --size tiny --clients 1 16 --requests 48 --out serve.json

Random weights, greedy answers of a fixed length, half of the questions about an image. Both servers run on loopback in
this process and get the same requests from the same number of clients, each of which asks again when it was answered.
A measurement of one is followed by one of the other, so that both see the same load of the machine; medians are shown,
with the range of the paired ratios. Answers are compared.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fastapi
import httpx
import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image

import mindspeed_mm as mm

sys.path.insert(0, str(Path(__file__).parent))
from generate import IMAGE_ID, SIZES, save_model  # noqa: E402

NAME = "random"
CHAT = "/v1/chat/completions"


def save_companions(size: str, folder: str) -> None:
    """A tokenizer of words and the image processor of the size."""
    (_, _, _, _, vocabulary), (*_, side) = SIZES[size]
    names = ["<unk>", "<s>", "</s>", "<image>", *(f"w{number}" for number in range(4, vocabulary))]
    model = tokenizers.models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, **special, additional_special_tokens=["<image>"]
    ).save_pretrained(folder)
    square = {"height": side, "width": side}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square).save_pretrained(folder)


def bodies(count: int, size: str, new_tokens: int, seed: int) -> list[dict]:
    """Requests with 8 to 64 words, every other one with an image of its own; with another seed, none occurs again."""
    draw, (_, _, _, _, vocabulary), (*_, side) = random.Random(seed), *SIZES[size]
    found = []
    for index in range(count):
        text = " ".join(f"w{draw.randrange(4, vocabulary)}" for _ in range(draw.choice((8, 16, 32, 64))))
        parts = [{"type": "text", "text": text}]
        if index % 2:
            pixels = np.random.default_rng((seed, index)).integers(0, 256, (side, side, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        own = {"max_tokens": new_tokens, "min_new_tokens": new_tokens, "temperature": 0}
        found.append({"model": NAME, "messages": [{"role": "user", "content": parts}]} | own)
    return found


def our_app(vlm: mm.LoadedVLM, batch_size: int) -> fastapi.FastAPI:
    """The server of this suite."""
    from mindspeed_mm.serving.app import make_app
    from mindspeed_mm.serving.lanes import ModelLanes
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.service import ChatService

    limits = ServingLimits(batch_size=batch_size, queue=1024)
    return make_app(ChatService(ModelLanes(NAME, lambda: vlm.engine(batch_size=batch_size)), limits))


def their_app(vlm: mm.LoadedVLM, folder: str, threads: int) -> fastapi.FastAPI:
    """transformers behind FastAPI, one request at a time. This suite renders the prompts, so that they are equal."""
    from mindspeed_mm.serving.conversation import generation_request
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.protocol import ChatRequest

    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    engine, one_at_a_time, app = vlm.engine(), threading.Lock(), fastapi.FastAPI()

    @app.post(CHAT)
    def chat(body: dict) -> dict:
        torch.set_num_threads(threads)  # of the thread that FastAPI chose
        asked = generation_request("a", ChatRequest(**body).messages, ServingLimits(), after_image="\n")
        ids = torch.tensor([[IMAGE_ID if token == -200 else token for token in engine.prepare(asked)]])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if asked.images:
            images = [Image.open(io.BytesIO(image.data)).convert("RGB") for image in asked.images]
            given["pixel_values"] = processor(images, return_tensors="pt")["pixel_values"]
        length = {"max_new_tokens": body["max_tokens"], "min_new_tokens": body["min_new_tokens"]}
        with one_at_a_time, torch.inference_mode():
            out = model.generate(**given, **length, do_sample=False, pad_token_id=0, eos_token_id=2)
        text = vlm.tokenizer.decode(out[0, ids.shape[1] :].tolist()).strip()
        return {"choices": [{"message": {"content": text}}]}

    return app


@contextlib.contextmanager
def on_loopback(app: fastapi.FastAPI) -> Iterator[str]:
    """The address of an application that runs in a thread."""
    from mindspeed_mm.serving.server import AddressServer, listen

    with listen("127.0.0.1", 0) as listening:
        server = AddressServer(app, listening, shutdown_seconds=10)
        thread = threading.Thread(target=server.serve_until_told)
        thread.start()
        server.ready.wait()
        try:
            yield server.address
        finally:
            server.should_exit = True
            thread.join()


def measure(address: str, asked: list[dict], clients: int) -> tuple[float, list[str]]:
    """Requests a second, and the answers."""
    with httpx.Client(base_url=address, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        def ask(body: dict) -> str:
            return client.post(CHAT, json=body).raise_for_status().json()["choices"][0]["message"]["content"]

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            texts = list(pool.map(ask, asked))
        return len(asked) / (time.perf_counter() - start), texts


def compare(sides: dict[str, str], arguments: argparse.Namespace, clients: int, tell: Callable[[str], object]) -> dict:
    """Medians of alternating measurements. Raises ValueError where answers differ."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(arguments.repeats + 1):  # the first one warms up
        seed = 1000 * clients + turn  # our engine remembers images and beginnings of prompts
        asked, texts = bodies(arguments.requests, arguments.size, arguments.new_tokens, seed), {}
        for name, address in sides.items():
            rate, texts[name] = measure(address, asked, clients)
            if turn:
                rates[name].append(rate)
        different = sum(one != other for one, other in zip(texts["ours"], texts["theirs"], strict=True))
        if different:
            raise ValueError(f"{different} of {len(asked)} answers differ between the servers")
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["theirs"], strict=True)]
    found = {"clients": clients, "ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    found |= {name: statistics.median(rate) for name, rate in rates.items()}
    tell("{clients} clients: {ours:.2f} requests/s, one by one {theirs:.2f}, ratio {ratio:.2f} {range}".format(**found))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=48, help="of one measurement")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences that our server runs together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", help="write a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        save_model(arguments.size, torch.float32, folder)
        save_companions(arguments.size, folder)
        vlm = mm.load(folder, device="cpu")
        sides = {
            "ours": servers.enter_context(on_loopback(our_app(vlm, arguments.batch_size))),
            "theirs": servers.enter_context(on_loopback(their_app(vlm, folder, arguments.threads))),
        }
        rows = [compare(sides, arguments, clients, print) for clients in arguments.clients]
    load = os.getloadavg()[0]
    print(f"load of the machine at the end: {load:.1f}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({**vars(arguments), "load": load, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
