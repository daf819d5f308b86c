"""Figures of the data engine: memory, first batch, random access, packing, check-data and image throughput.

    python benchmarks/data.py --tokenizer DIR [--records 1000000] [--peer-python VENV/bin/python] [--folder DIR]

Prints one line of JSON a measurement on stdout. Every part runs in a process of its own, so that memory is that part's.
The peer is a Python with Hugging Face's `datasets`; it is not needed otherwise. Run it on an idle machine: load is
reported.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "the a cat dog house tree picture shows blue red under near with and person street".split()
IMAGES = 200
ACCESSES = 20_000
REPEATS = 5

PEER = """
import json, random, sys, time
import psutil
from datasets import load_dataset
path, cache, count = sys.argv[1:]
def rss(): return round(psutil.Process().memory_info().rss / 1e6, 1)
before = rss()
start = time.perf_counter()
data = load_dataset("json", data_files=path, split="train", cache_dir=cache)
first = time.perf_counter() - start
start = time.perf_counter()
data = load_dataset("json", data_files=path, split="train", cache_dir=cache)
later = time.perf_counter() - start
places = [random.Random(0).randrange(len(data)) for _ in range(int(count))]
start = time.perf_counter()
for place in places: data[place]
access = (time.perf_counter() - start) / len(places)
print(json.dumps({"first_start_s": round(first, 2), "later_start_s": round(later, 3), "records": len(data),
    "access_us": round(access * 1e6, 1), "rss_mb": rss(), "rss_of_imports_mb": before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a Llama tokenizer folder")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--checked", type=int, default=20_000, help="records of the check-data part")
    parser.add_argument("--peer-python", metavar="PYTHON", help="a Python with the package `datasets`")
    parser.add_argument("--folder", metavar="DIR", help="where files are made; default: a temporary folder")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--only", help="some parts, by name, separated by commas")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(arguments.folder or made)
        folder.mkdir(parents=True, exist_ok=True)
        make_files(folder, arguments)
        chosen = arguments.only.split(",") if arguments.only else list(PARTS)
        for part in chosen:
            flags = ["--part", part, "--folder", str(folder), "--tokenizer", arguments.tokenizer]
            flags += ["--records", str(arguments.records), "--checked", str(arguments.checked)]
            report(part, [sys.executable, os.path.abspath(__file__), *flags])
        if arguments.peer_python:
            command = [arguments.peer_python, "-c", PEER, str(folder / "large.jsonl"), str(folder / "peer")]
            report("peer: datasets", [*command, str(ACCESSES)])


def report(name: str, command: list[str]) -> None:
    """Run a part and print its figures with the load of the machine while it ran."""
    before = os.getloadavg()[0]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(output.splitlines()[-1])
    print(json.dumps({"part": name, **figures, "load": [round(before, 1), round(os.getloadavg()[0], 1)]}), flush=True)


def make_files(folder: Path, arguments: argparse.Namespace) -> None:
    """A large JSONL, photo-like images of COCO's size, and records that use them."""
    generator = random.Random(0)

    def record(number: int, image: str) -> dict:
        turns = []
        for turn in range(generator.choice((1, 1, 2, 3))):
            question = " ".join(generator.choices(WORDS, k=generator.randint(5, 20)))
            answer = " ".join(generator.choices(WORDS, k=generator.randint(5, 70)))
            turns += [{"from": "human", "value": ("<image>\n" if not turn else "") + question}]
            turns += [{"from": "gpt", "value": answer}]
        return {"id": f"{number:09d}", "image": image, "conversations": turns}

    images = folder / "images"
    if not images.exists():
        images.mkdir()
        for number in range(IMAGES):
            (images / f"{number:06d}.jpg").write_bytes(photo(number))
    for name, count in (("large.jsonl", arguments.records), ("checked.jsonl", arguments.checked)):
        if (folder / name).exists():
            continue
        with (folder / name).open("w") as file:
            for number in range(count):
                file.write(json.dumps(record(number, f"{number % IMAGES:06d}.jpg")) + "\n")
    with (folder / "large.jsonl").open() as lines, (folder / "large.json").open("w") as file:
        for number, line in enumerate(lines):
            file.write((", " if number else "[") + line.rstrip())
        file.write("]")


def photo(seed: int) -> bytes:
    """A JPEG of 640 x 480 (or upright) with structure at all scales."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    width, height = (640, 480) if seed % 3 else (480, 640)
    image = np.zeros((height, width, 3), dtype=np.float32)
    for side, weight in ((4, 90), (16, 50), (64, 30), (240, 12)):
        small = Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8))
        image += np.asarray(small.resize((width, height)), dtype=np.float32) * weight / 182
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def config(arguments: argparse.Namespace, name: str, **changes):
    from mindspeed_mm.data.config import DataConfig

    folder = Path(arguments.folder)
    pipeline = {"size": {"shortest_edge": 336}, "crop_size": 336, "pad2square": True}
    return DataConfig.load(
        {
            "dataset_param": {
                "dataset_type": "multimodal",
                "basic_parameters": {"data_path": str(folder / name), "data_folder": str(folder / "images")},
                "preprocess_parameters": {"train_pipeline": pipeline},
                "tokenizer_config": {"from_pretrained": arguments.tokenizer},
                "index_folder": str(folder / "index"),
                **changes,
            }
        }
    )


def dataset_of(arguments: argparse.Namespace, name: str = "large.jsonl"):
    from mindspeed_mm.data.build import build_dataset
    from mindspeed_mm.data.tokenizer import load_tokenizer

    data_config = config(arguments, name)
    return build_dataset(data_config, load_tokenizer(arguments.tokenizer), _media(data_config), 4096)


def _media(data_config):
    """LLaVA-1.5's 576 features an image."""
    from mindspeed_mm.data.image import ImageProcessor
    from mindspeed_mm.data.media import FixedSizeImages

    parameters = data_config.dataset_param.preprocess_parameters
    return FixedSizeImages(ImageProcessor.from_config(parameters.processor_source), 576, pad=parameters.pad)


def rss() -> float:
    import psutil

    return round(psutil.Process().memory_info().rss / 1e6, 1)


def index(arguments: argparse.Namespace, name: str = "large.jsonl") -> dict:
    """The first start: every record is parsed and checked."""
    import mindspeed_mm.data.build  # noqa: F401  its memory is not the index's

    for stored in (Path(arguments.folder) / "index").glob(f"{name}-*"):
        stored.unlink()
    before, start = rss(), time.perf_counter()
    dataset = dataset_of(arguments, name)
    seconds = time.perf_counter() - start
    size = round((Path(arguments.folder) / name).stat().st_size / 1e6)
    figures = {"records": len(dataset), "file_mb": size, "first_start_s": round(seconds, 1)}
    return figures | {"rss_mb": rss(), "rss_of_imports_mb": before}


def index_list(arguments: argparse.Namespace) -> dict:
    """The first start on the same records as one JSON list in one line, as LLaVA's files are."""
    return index(arguments, "large.json")


def later(arguments: argparse.Namespace) -> dict:
    """Later starts, and random access without images."""
    import mindspeed_mm.data.build  # noqa: F401

    before, start = rss(), time.perf_counter()
    dataset = dataset_of(arguments)
    seconds = time.perf_counter() - start
    source = dataset.sets[0].source
    places = [random.Random(0).randrange(len(source)) for _ in range(ACCESSES)]
    times = {}
    for name, read in (("record", lambda n: source.records[n]), ("sample", lambda n: source[n])):
        rounds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            for place in places:
                read(place)
            rounds.append((time.perf_counter() - start) / ACCESSES * 1e6)
        times[f"access_{name}_us"] = round(statistics.median(rounds), 1)
    return {"later_start_s": round(seconds, 3), **times, "rss_mb": rss(), "rss_before_mb": before}


def first_batch(arguments: argparse.Namespace) -> dict:
    """From the start of the process' work to the first batch of 16 samples with images, the index being there."""
    from mindspeed_mm.data.build import build_loader

    start = time.perf_counter()
    dataset = dataset_of(arguments)
    order = {"consumed_samples": 0, "micro_batch_size": 16, "dp_rank": 0, "dp_size": 1, "seed": 1}
    loader = build_loader(dataset, **order, num_workers=0, pad_token_id=0)
    batch = next(loader)
    seconds = time.perf_counter() - start
    return {"first_batch_s": round(seconds, 2), "samples": len(batch.sample_ids), "rss_mb": rss()}


def images(arguments: argparse.Namespace) -> dict:
    """Images per second of one core at 336 px: ours, ours with fast_resize, transformers' CLIPImageProcessor with
    Pillow."""
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor

    from mindspeed_mm.data.image import ImageProcessor, preprocess

    torch.set_num_threads(1)
    paths = sorted((Path(arguments.folder) / "images").iterdir())[:IMAGES]
    fields = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    ours, theirs = ImageProcessor(**fields), CLIPImageProcessor(**fields)

    def peer(path):
        image = Image.open(path).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return theirs.preprocess(square, return_tensors="pt")["pixel_values"][0]

    ways = {
        "faithful": lambda path: preprocess(path, ours),
        "fast_resize": lambda path: preprocess(path, ours, fast=True),
        "transformers": peer,
    }
    # CPU time, not wall time: other work on the machine does not count. Rounds take turns.
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = time.process_time()
            for path in paths:
                way(path)
            rounds[name].append(len(paths) / (time.process_time() - start))
    speeds = {f"{name}_per_s": round(statistics.median(values)) for name, values in rounds.items()}
    scale = torch.tensor(ours.image_std)[:, None, None]
    expected = [peer(path) for path in paths[:40]]
    differences = {
        f"{name}_largest_difference": round(
            max(
                float(((ways[name](path) - wanted) * scale).abs().max())
                for path, wanted in zip(paths, expected, strict=False)
            ),
            5,
        )
        for name in ("faithful", "fast_resize")
    }
    return speeds | differences | {"difference_unit": "pixel values from 0 to 1"}


def check(arguments: argparse.Namespace) -> dict:
    """check-data over records with images."""
    from mindspeed_mm.data.build import read_options
    from mindspeed_mm.data.dataset import Policies
    from mindspeed_mm.data.datasets.llava import DATASET
    from mindspeed_mm.data.expand import Encoding
    from mindspeed_mm.data.preflight import Check
    from mindspeed_mm.data.template import get_template
    from mindspeed_mm.data.tokenizer import load_tokenizer

    template = get_template("v1")
    data_config = config(arguments, "checked.jsonl")
    encoding = Encoding(load_tokenizer(arguments.tokenizer), template, _media(data_config))
    start = time.perf_counter()
    source = DATASET(data_config.dataset_param.basic_parameters[0], read_options(data_config, template))
    found = Check({"v1": encoding}, 4096, Policies()).set_of(source, "checked.jsonl")
    seconds = time.perf_counter() - start
    used = sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    per_minute = {"records_per_minute": round(found.records / seconds * 60)}
    per_core = {"records_per_minute_of_one_idle_core": round(found.records / used * 60)}
    return {"records": found.records, "errors": found.errors, "seconds": round(seconds, 1), **per_minute, **per_core}


def packing(arguments: argparse.Namespace) -> dict:
    """Share of the positions that packed rows use, beside what no packing of the same samples can exceed."""
    import numpy as np

    from mindspeed_mm.data.packing import pack

    # The proportions of LLaVA-1.5's 665K mix: 6% text-only (ShareGPT, long), 36% short visual questions in several
    # turns, 58% conversations and descriptions, with images of 576 tokens and 40 tokens of the template.
    generator = np.random.default_rng(0)
    count, window = 20_480, 4096
    kind = generator.choice(3, size=count, p=[0.06, 0.36, 0.58])
    text = np.exp(generator.normal([6.9, 5.2, 5.5], [0.6, 0.6, 0.5], size=(count, 3)))[np.arange(count), kind]
    lengths = np.clip(text.astype(np.int64) + 40 + np.where(kind > 0, 576, 0), 60, 2048)
    figures: dict = {"mean_length": round(float(lengths.mean()), 1)}
    for capacity in (2048, 3072, 4096, 8192, 16384, 32768):
        start = time.perf_counter()
        windows = [lengths[place : place + window] for place in range(0, count, window)]
        rows = sum(len(pack(part, capacity)) for part in windows)
        seconds = (time.perf_counter() - start) / len(windows)
        bound = lengths.sum() / capacity / least_rows(lengths, capacity)
        figures[str(capacity)] = {
            "used": round(float(lengths.sum() / capacity / rows), 4),
            "bound": round(float(bound), 4),
            "s_per_window": round(seconds, 3),
        }
    return figures


def least_rows(lengths, capacity: int) -> float:
    """A lower bound on the number of rows of any packing, by dual feasible functions (Fekete and Schepers, 2001)."""
    import numpy as np

    best = lengths.sum() / capacity
    small = np.unique(lengths[lengths <= capacity // 2])[::16]
    for least in (0, *small.tolist()):
        sizes = np.where(lengths > capacity - least, capacity, np.where(lengths < least, 0, lengths))
        for k in range(1, 12):
            parts = (k + 1) * sizes
            weights = np.where(parts % capacity == 0, sizes / capacity, (parts // capacity) / k)
            best = max(best, weights.sum())
    return float(best)


PARTS = {
    "index": index,
    "index_list": index_list,
    "later": later,
    "first_batch": first_batch,
    "packing": packing,
    "images": images,
    "check": check,
}

if __name__ == "__main__":
    main()
