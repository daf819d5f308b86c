"""Time from the shell to the first optimizer step of a tiny model: `torchrun -m mindspeed_mm train` and a plain
transformers script under torchrun, on the same weights, image and conversation.

    python benchmarks/startup.py --out benchmarks/results/startup_cpu.json
    python benchmarks/startup.py --ranks 2 --where

Starts alternate; the first of each side warms the file cache and writes our index of the data, and is left out. The
clock of both sides stops when the line about their first step arrives. The peer is the least that such a script can be:
tokenizer, image processor, model, DistributedDataParallel, fused AdamW, clipping, no Trainer. `--where` adds what our
time goes into (a start under `-X importtime`, outside of the measurement).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llava_shapes import IMAGE_SIZE, IMAGE_TOKENS, SHAPES, model_json, save_model
from report import machine, write

WORDS = "the a cat dog house tree picture shows blue red under near with and person street".split()
QUESTION, ANSWER = "<image>\nwhat is near the house", " ".join(WORDS)
SIZE = "tiny"
LEARNING_RATE = 1e-6
LOSS_TOLERANCE = 2e-3
STEP_LINES = {
    "ours": re.compile(r"iteration\s+1/.*lm loss: ([\d.E+-]+)"),
    "transformers": re.compile(r"^first step, loss ([\d.]+)"),
}

PEER = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaForConditionalGeneration

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
processor = CLIPImageProcessor.from_pretrained(folder / "model")
model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
model.train()
model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True)
batch = json.loads((folder / "batch.json").read_text())
tokenizer(batch["text"])
pixels = processor(Image.open(folder / "image.png").convert("RGB"), return_tensors="pt")["pixel_values"]
ids = torch.tensor([batch["input_ids"]])
out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([batch["labels"]]),
    pixel_values=pixels)
out.loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
if dist.get_rank() == 0:
    print(f"first step, loss {out.loss.item():.6f}", flush=True)
dist.destroy_process_group()
"""


def make_files(folder: Path, size: str = SIZE) -> None:
    """Weights, tokenizer, image, record, configs, and the batch as ids for the peer."""
    import numpy as np
    import sentencepiece
    from PIL import Image

    import mindspeed_mm as mm
    from mindspeed_mm.constants import IMAGE_TOKEN_INDEX

    model = folder / "model"
    save_model(size, str(model))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 50),
        model_prefix=str(model / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    _write(model / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": True, **special})
    clip = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    _write(model / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", **clip})
    pixels = np.random.default_rng(0).integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    record = {"id": "0", "image": "image.png", "conversations": turns}
    _write(folder / "data.json", [record])
    data = {"data_path": str(folder / "data.json"), "data_folder": str(folder)}
    parameters = {
        "dataset_type": "llava",
        "basic_parameters": data,
        "preprocess_parameters": {"image_processer_path": str(model)},
        "index_folder": str(folder / "index"),
    }
    _write(folder / "mm_data.json", {"dataset_param": parameters})
    parts = ("text_decoder", "vision_encoder", "vision_projector")
    _write(folder / "mm_model.json", model_json(SIZE, parts, str(model)))
    ids, labels = mm.encode(turns, mm.load_tokenizer(model), "v1")
    place, image = ids.index(IMAGE_TOKEN_INDEX), [SHAPES[SIZE].image_token_id] * IMAGE_TOKENS
    ids = ids[:place] + image + ids[place + 1 :]
    labels = labels[:place] + [-100] * IMAGE_TOKENS + labels[place + 1 :]
    _write(folder / "batch.json", {"text": f"{QUESTION} {ANSWER}", "input_ids": ids, "labels": labels})
    (folder / "peer.py").write_text(PEER.replace("LEARNING_RATE", str(LEARNING_RATE)))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def train_arguments(folder: Path, ranks: int) -> list[str]:
    """What follows `mindspeed_mm`."""
    flags = f"--device cpu --micro-batch-size 1 --global-batch-size {ranks} --seq-length 2048 --train-iters 1"
    flags += f" --lr {LEARNING_RATE} --lr-decay-style constant --weight-decay 0 --clip-grad 1"
    flags += " --log-interval 1 --log-format megatron"
    files = ["--mm-model", str(folder / "mm_model.json"), "--mm-data", str(folder / "mm_data.json")]
    return ["train", *files, *flags.split()]


def start(name: str, folder: Path, ranks: int) -> tuple[float, float, float]:
    """(seconds to the first step, seconds to the end, loss of the step) of one start."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    script = ["-m", "mindspeed_mm", *train_arguments(folder, ranks)]
    if name == "transformers":
        script = [str(folder / "peer.py"), str(folder)]
    begin = time.perf_counter()
    process = subprocess.Popen([*torchrun, *script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines, first, loss = [], 0.0, 0.0
    for line in process.stdout:
        lines.append(line)
        found = STEP_LINES[name].search(line)
        if found and not first:
            first, loss = time.perf_counter() - begin, float(found.group(1))
    if process.wait() or not first:
        raise RuntimeError(f"{name} did not come to its first step:\n{''.join(lines)}")
    return first, time.perf_counter() - begin, loss


def slowest_imports(folder: Path, count: int = 12) -> dict[str, float]:
    """Seconds of the packages that take our start longest to import, each without what it imports of others."""
    command = [sys.executable, "-X", "importtime", "-m", "mindspeed_mm", *train_arguments(folder, 1)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    seconds: dict[str, float] = {}
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", text):
        package = module.split(".")[0]
        seconds[package] = seconds.get(package, 0.0) + int(own) / 1e6
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {package: round(value, 3) for package, value in ordered[:count]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="starts of each side after the first")
    parser.add_argument("--where", action="store_true", help="add the packages that are slowest to import")
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.ranks))
    results: dict[str, Any] = {"settings": vars(args) | machine()}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_files(folder)
        runs: dict[str, list] = {"ours": [], "transformers": []}
        for _ in range(args.repeats + 1):
            for name, kept in runs.items():
                kept.append(start(name, folder, args.ranks))
        if args.where:
            results["imports_s"] = slowest_imports(folder)
    losses = {name: kept[0][2] for name, kept in runs.items()}
    if abs(losses["ours"] / losses["transformers"] - 1) > LOSS_TOLERANCE:
        raise ValueError(f"the losses differ: {losses}: the sides do not do the same work")
    for name, kept in runs.items():
        results[name] = {
            "first_step_s": statistics.median(first for first, _, _ in kept[1:]),
            "end_s": statistics.median(end for _, end, _ in kept[1:]),
            "cold_first_step_s": kept[0][0],
            "first_steps_s": [first for first, _, _ in kept[1:]],
            "loss": kept[0][2],
        }
    ours, theirs = results["ours"], results["transformers"]
    results["ratio"] = ours["first_step_s"] / theirs["first_step_s"]
    sys.stderr.write(
        f"first step after {ours['first_step_s']:.2f} s, transformers {theirs['first_step_s']:.2f} s: "
        f"{results['ratio']:.2f}x\n"
    )
    write(results, args.out)


if __name__ == "__main__":
    main()
