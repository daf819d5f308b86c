"""Samples a second of `mindspeed-mm evaluate` against a loop like LLaVA's own scripts, on one model in one run.

The loop is LLaVA's model_vqa_loader: batch 1, transformers' generate, and a DataLoader whose four workers tokenise and
preprocess ahead. Both sides see the same ids and pixels in float32, greedy, and must give the same answers. Tables have
the shape of public benchmarks: how many questions are asked on one image, and how long they are. Prints one JSON
object a shape.

    python benchmarks/evaluate.py --tokenizer DIR            a random model of some million parameters
    python benchmarks/evaluate.py --model llava-1.5-7b-hf    a model in llava-hf layout
"""

import argparse
import base64
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch

from evaluation.engine import EvaluationRequest
from evaluation.ranks import connect

LOADER_WORKERS = 4
"""num_workers of LLaVA's model_vqa_loader."""
SIDE = 336
"""Side of the random model's images in pixels: 576 image tokens, as in LLaVA-1.5."""
PHOTO = (640, 480)
"""Size of the JPEG images: COCO's most frequent one."""
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class BenchmarkShape(NamedTuple):
    """What a benchmark's table looks like."""

    questions_per_image: int
    """Rounded: GQA's 12,578 questions are about 398 images, POPE's 9,000 about 500, MME's 2,374 about 1,187; MMBench
    asks each question in as many rotations as it has options."""
    tokens: int
    """Typical length of the question itself: "Is there a dog in the image?" of POPE has about ten."""
    options: int


SHAPES = {
    "scienceqa": BenchmarkShape(1, 50, 3),
    "mme": BenchmarkShape(2, 15, 0),
    "mmbench": BenchmarkShape(4, 15, 4),
    "pope": BenchmarkShape(18, 10, 0),
    "gqa": BenchmarkShape(32, 10, 0),
}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--model", metavar="DIR", help="model in llava-hf layout")
    group.add_argument("--tokenizer", metavar="DIR", help="tokenizer of the random model")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--questions", type=int, default=64, help="of each shape")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=2, help="2: a letter or a word, and the stop id")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "npu"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    connect(options.device)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model) if options.model else random_model(Path(folder) / "model", Path(options.tokenizer))
        words = options.tokenizer or model
        for name in options.shapes:
            table = write_table(Path(folder) / f"{name}.tsv", SHAPES[name], options.questions, words)
            result = {"shape": name} | measure(model, table, Path(folder) / name, options)
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
    return 0


def measure(model: Path, table: Path, folder: Path, options: argparse.Namespace) -> dict:
    """Both sides on the same questions, ours first; each has a warm-up of two questions."""
    import mindspeed_mm as mm
    from evaluation.model_engine import ModelEngine
    from evaluation.runner import run
    from mindspeed_mm.generation.options import GenerationOptions

    vlm = mm.load(str(model), device=options.device, dtype="fp32")
    engine = Timed(ModelEngine(vlm, GenerationOptions(max_new_tokens=options.max_new_tokens)))
    common = {"model": "m", "progress": False}
    run("bench", table, engine, folder / "warm", limit=2, **common)
    engine.seconds = 0.0
    start = time.perf_counter()
    result = run("bench", table, engine, folder / "out", batch_size=options.batch_size, **common)
    ours = time.perf_counter() - start
    loop, answers = reference_loop(model, vlm, engine.requests, options)
    asked = len(engine.requests)
    return {
        "questions": asked,
        "images": len({request.image for request in engine.requests}),
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "device": options.device,
        "threads": options.threads,
        "parameters": sum(parameter.numel() for parameter in vlm.model.parameters()),
        "samples_per_second": round(asked / ours, 3),
        "loop_samples_per_second": round(asked / loop, 3),
        "speedup": round(loop / ours, 2),
        "share_outside_the_engine": round(1 - engine.seconds / ours, 4),
        "equal_answers": sum(result.predictions[index] == text for index, text in answers.items()),
    }


class Timed:
    """An evaluation.engine.Engine that notes what it is asked last, and how long the answers take."""

    def __init__(self, engine):
        self._engine, self.seconds, self.requests = engine, 0.0, ()

    def describe(self) -> dict:
        """That of the engine within."""
        return self._engine.describe()

    def generate(self, requests: Sequence[EvaluationRequest], batch_size: int) -> Iterator[tuple[int | str, str]]:
        """That of the engine within, timed."""
        self.requests = requests
        answers = iter(self._engine.generate(requests, batch_size))
        while True:
            start = time.perf_counter()
            answer = next(answers, None)
            self.seconds += time.perf_counter() - start
            if answer is None:
                return
            yield answer


class Samples(torch.utils.data.Dataset):
    """What the loop's workers make of a question: its id, ids [S] and pixels [N, 3, h, w]."""

    def __init__(self, vlm, requests: Sequence[EvaluationRequest]):
        self._engine, self._vlm, self._requests = vlm.engine(), vlm, requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, number: int):
        from mindspeed_mm.data.image import preprocess
        from mindspeed_mm.generation import engine as generation

        request = self._requests[number]
        images = request.images()
        ids = self._engine.prepare(generation.GenerationRequest("x", request.turns, None, images))
        pixels = [preprocess(image, self._vlm.image_processor, pad=self._vlm.pad) for image in images]
        return request.id, torch.tensor(ids), torch.stack(pixels)


@torch.inference_mode()
def reference_loop(
    model: Path, vlm, requests: Sequence[EvaluationRequest], options: argparse.Namespace
) -> tuple[float, dict[int | str, str]]:
    """Seconds and answers of transformers' generate, one question at a time."""
    from transformers import LlavaForConditionalGeneration

    from mindspeed_mm.constants import IMAGE_TOKEN_INDEX

    reference = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval().to(options.device)
    stop = [vlm.tokenizer.eos_token_id]

    def ask(ids: torch.Tensor, pixels: torch.Tensor) -> str:
        ids = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, reference.config.image_token_id)[None].to(options.device)
        output = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels.to(options.device),
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )
        new = [token for token in output[0, ids.shape[1] :].tolist() if token not in stop]
        return vlm.tokenizer.decode([token for token in new if token < vlm.tokenizer.vocab_size]).strip()

    samples = Samples(vlm, requests)
    for number in range(min(2, len(samples))):
        ask(*samples[number][1:])
    start = time.perf_counter()
    loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=LOADER_WORKERS)
    answers = {index: ask(ids, pixels) for index, ids, pixels in loader}
    return time.perf_counter() - start, answers


def write_table(path: Path, shape: BenchmarkShape, questions: int, tokenizer: str | Path) -> Path:
    """A table of `shape`: photo-like images in JPEG, the first row of each image holds it."""
    from mindspeed_mm.inference.api import load_tokenizer

    draw, encode = random.Random(0), load_tokenizer(str(tokenizer)).encode
    letters = "ABCDEFGH"[: shape.options]
    lines = ["\t".join(["index", "image", "question", *(letters or ()), "answer"])]
    for number in range(questions):
        first = number - number % shape.questions_per_image
        image = photo(first) if number == first else str(first)
        question, tokens = "Which", draw.gauss(shape.tokens, shape.tokens / 4)
        while len(encode(question, False)) < tokens - 1:
            question += f" {draw.choice(WORDS)}"
        question += "?"
        options = [draw.choice(WORDS) for _ in letters]
        lines.append("\t".join([str(number), image, question, *options, "A" if letters else draw.choice(WORDS)]))
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path


WORDS = "red blue small large table chair dog street window person water tree under beside light metal".split()


def photo(seed: int) -> str:
    """Base64 of a JPEG that takes about as long to decode as a photo: smooth colours with some noise."""
    draw = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(PHOTO)
    noisy = np.asarray(coarse, dtype=np.int16) + draw.integers(-12, 13, (*PHOTO[::-1], 3))
    data = io.BytesIO()
    PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
    return base64.b64encode(data.getvalue()).decode("ascii")


def random_model(folder: Path, tokenizer: Path) -> Path:
    """A LLaVA of random weights in llava-hf layout, with the vocabulary of `tokenizer`."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    from mindspeed_mm.inference.api import load_tokenizer

    torch.manual_seed(0)
    size = load_tokenizer(str(tokenizer)).vocab_size
    text = LlamaConfig(
        vocab_size=size + 64, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=size, image_seq_length=576)
    Llava(config).save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    return folder


if __name__ == "__main__":
    sys.exit(main())
