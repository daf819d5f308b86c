"""Samples a second of `mindspeed-mm evaluate` against a loop like LLaVA's own scripts, on one model in one run.

The loop asks one question at a time with transformers' generate, as LLaVA's model_vqa scripts do. Both sides see the
same ids and pixels in float32, greedy, and must give the same answers. Prints one JSON object.

    python benchmarks/evaluate.py --tokenizer DIR            a random model of a few million parameters
    python benchmarks/evaluate.py --model llava-1.5-7b-hf    a model in llava-hf layout
"""

import argparse
import base64
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import PIL.Image
import torch

from evaluation.engine import GenerationRequest
from evaluation.ranks import connect

SIDE = 112
"""Side of the random model's pictures in pixels: 64 image tokens of 14 x 14."""
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--model", metavar="DIR", help="model in llava-hf layout")
    group.add_argument("--tokenizer", metavar="DIR", help="tokenizer of the random model")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=4, help="answers are short: a letter, a word")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "npu"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    connect(options.device)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model) if options.model else random_model(Path(folder) / "model", Path(options.tokenizer))
        table = write_table(Path(folder) / "questions.tsv", options.questions)
        result = measure(model, table, Path(folder), options)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
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
    engine.seconds, engine.requests = 0.0, []
    start = time.perf_counter()
    result = run("bench", table, engine, folder / "out", batch_size=options.batch_size, **common)
    ours = time.perf_counter() - start
    loop, answers = reference_loop(model, vlm, engine.requests, options)
    asked = len(engine.requests)
    return {
        "questions": asked,
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
    """An evaluation.engine.Engine that notes what it is asked and how long the answers take."""

    def __init__(self, engine):
        self._engine, self.seconds, self.requests = engine, 0.0, []

    def describe(self) -> dict:
        """That of the engine within."""
        return self._engine.describe()

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int | str, str]]:
        """That of the engine within, timed."""
        self.requests += requests
        start = time.perf_counter()
        answers = list(self._engine.generate(requests))
        self.seconds += time.perf_counter() - start
        return iter(answers)


@torch.inference_mode()
def reference_loop(
    model: Path, vlm, requests: Sequence[GenerationRequest], options: argparse.Namespace
) -> tuple[float, dict[int | str, str]]:
    """Seconds and answers of transformers' generate, one question at a time."""
    from transformers import LlavaForConditionalGeneration

    from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
    from mindspeed_mm.data.image import preprocess
    from mindspeed_mm.generation import engine as generation

    reference = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval().to(options.device)
    engine = vlm.engine()
    stop = [vlm.tokenizer.eos_token_id]
    answers: dict[int | str, str] = {}

    def ask(request: GenerationRequest) -> str:
        ids = engine.prepare(generation.GenerationRequest("x", request.turns, None, request.images))
        images = [preprocess(image, vlm.image_processor, pad=vlm.pad) for image in request.images]
        ids = torch.tensor([[reference.config.image_token_id if i == IMAGE_TOKEN_INDEX else i for i in ids]])
        output = reference.generate(
            input_ids=ids.to(options.device),
            attention_mask=torch.ones_like(ids).to(options.device),
            pixel_values=torch.stack(images).to(options.device),
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )
        new = [token for token in output[0, ids.shape[1] :].tolist() if token not in stop]
        return vlm.tokenizer.decode([token for token in new if token < vlm.tokenizer.vocab_size]).strip()

    for request in requests[:2]:
        ask(request)
    start = time.perf_counter()
    for request in requests:
        answers[request.id] = ask(request)
    return time.perf_counter() - start, answers


def write_table(path: Path, questions: int) -> Path:
    """Multiple-choice questions on plain pictures, texts of several lengths."""
    lines = ["index\timage\tquestion\tA\tB\tanswer"]
    for number in range(questions):
        data = io.BytesIO()
        PIL.Image.new("RGB", (SIDE, SIDE), (number * 37 % 256, number * 91 % 256, number * 53 % 256)).save(data, "PNG")
        picture = base64.b64encode(data.getvalue()).decode("ascii")
        lines.append(f"{number}\t{picture}\tWhich colour {'or shade ' * (number % 8)}is shown?\tred\tblue\tA")
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path


def random_model(folder: Path, tokenizer: Path) -> Path:
    """A LLaVA of random weights in llava-hf layout, with the vocabulary of `tokenizer`."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    from mindspeed_mm.api import load_tokenizer

    torch.manual_seed(0)
    size = load_tokenizer(str(tokenizer)).vocab_size
    text = LlamaConfig(
        vocab_size=size + 64, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6
    )
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=size, image_seq_length=64)
    Llava(config).save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    return folder


if __name__ == "__main__":
    sys.exit(main())
