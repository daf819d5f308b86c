"""A Q-Former learns to read handwritten digits, on the CPU, both stages as MiniGPT-4's: one command.

    python -m examples.minigpt4.digits --out digits_out

EVA's encoder, the Q-Former and the linear begin with random values, the decoder is the quickstart's untrained Llama,
and everything is trained. The last line is JSON: the share of 360 held-out digits that the model names before and
after.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from sklearn.datasets import load_digits

from examples.quickstart.commands import follow
from examples.quickstart.make_data import IMAGE_SIZE, NAMES, held_out_indices, image_name, make_data
from examples.quickstart.make_models import MAX_POSITIONS, TEXT, make_llama, make_tokenizer, write_json
from examples.quickstart.walk import guarded

QUESTION = "Read the digit."
TEMPLATE = "minigpt4_vicuna"
SEED = 1234
STEPS = {"full": (150, 450), "fast": (4, 6)}
"""Of stage 1 and stage 2."""
HELD_OUT = {"full": 360, "fast": 20}


def model_config(vicuna: Path) -> dict:
    """The whole model in miniature: 17 positions of the encoder, 8 queries."""
    new = {"ckpt_path": None, "fresh": True, "init_method_std": 0.08}
    encoder = {"model_id": "eva_vit", "num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 256, "patch_size": 8}
    bridge = {"model_id": "qformer", "input_size": 64, "hidden_size": TEXT["hidden_size"], "num_query_tokens": 8}
    bridge |= {"width": 64, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 128}
    bridge |= {"vision_norm_epsilon": 1e-5}
    return {
        "model_id": "minigpt4",
        "text_decoder": {"ckpt_path": str(vicuna)},
        "image_encoder": {
            "vision_encoder": encoder | {"image_size": IMAGE_SIZE, "num_attention_heads": 4} | new,
            "vision_projector": bridge | new,
        },
    }


def data_config(data: Path, records: str, vicuna: Path, kind: str, template: str) -> dict:
    """The data of one stage; images are stretched to squares, as BLIP's processor does."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = {"image_processor_type": "BlipImageProcessor", "resample": 3, "size": size}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {
        "dataset_param": {
            "dataset_type": kind,
            "basic_parameters": {"data_path": str(data / records), "data_folder": str(data / "images")},
            "preprocess_parameters": {
                "train_pipeline": processor | dict.fromkeys(("image_mean", "image_std"), [0.5] * 3)
            },
            "tokenizer_config": {"from_pretrained": str(vicuna)},
            "template_name": template,
        },
        "dataloader_param": {"shuffle": True},
    }


def prepare(out: Path) -> None:
    """Images, records of both stages, an untrained decoder with a tokenizer of the set's words, and the JSON files."""
    data, vicuna = out / "data", out / "vicuna"
    make_data(data, questions_per_digit=1)
    labels = load_digits().target
    rows = sorted(set(range(len(labels))) - set(held_out_indices(labels)))
    asked = [
        {"id": str(row), "image": image_name(row), "instruction_input": QUESTION, "answer": NAMES[labels[row]]}
        for row in rows
    ]
    write_json(data / "naming.json", asked)
    captions = json.loads((data / "stage1.json").read_text(encoding="utf-8"))
    lines = [record["conversations"][1]["value"] for record in captions]
    size = make_tokenizer(vicuna, [*lines, *(f"###Human: {QUESTION} ###Assistant:\t{name}\t###" for name in NAMES)] * 3)
    make_llama(vicuna, size, SEED)
    write_json(out / "model.json", model_config(vicuna))
    write_json(out / "stage1.json", data_config(data, "stage1.json", vicuna, "multimodal", "minigpt4_caption"))
    write_json(out / "stage2.json", data_config(data, "naming.json", vicuna, "minigpt4", TEMPLATE))


def train(out: Path, stage: int, steps: int) -> None:
    """One stage through the command line, from the weights of the one before."""
    flags = {"mm-model": out / "model.json", "mm-data": out / f"stage{stage}.json", "save": out / f"run{stage}"}
    flags |= {
        "train-iters": steps,
        "iters-per-epoch": max(1, steps // 3),
        "lr": 1e-3,
        "min-lr": 8e-4 if stage == 1 else 1e-5,
    }
    flags |= {"lr-decay-style": "linear_warmup_cosine_lr", "lr-warmup-iters": min(20, steps), "lr-warmup-init": 1e-6}
    flags |= {"micro-batch-size": 32, "seq-length": MAX_POSITIONS // 4, "clip-grad": 1.0, "adam-beta2": 0.98}
    flags |= {"num-workers": 0, "device": "cpu", "log-interval": 50, "seed": SEED}
    flags |= {"pretrained-checkpoint": out / "run1"} if stage == 2 else {}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    follow(["train", *words])


def accuracy(model: Path, out: Path, count: int) -> float:
    """Share of the held-out digits that the model names, asked in the template of stage 2."""
    import mindspeed_mm as mm

    labels = load_digits().target
    rows = held_out_indices(labels)[:: max(1, 360 // count)][:count]
    processor = json.loads((out / "stage2.json").read_text(encoding="utf-8"))["dataset_param"]["preprocess_parameters"]
    write_json(out / "preprocessor_config.json", processor["train_pipeline"])
    vlm = mm.load(model, device="cpu", tokenizer=out / "vicuna", image_processor=out)
    images = [[str(out / "data" / "images" / image_name(row))] for row in rows]
    answers = vlm.generate([QUESTION] * len(rows), images, template=TEMPLATE, max_new_tokens=8)
    return sum(answer.strip() == NAMES[labels[row]] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def main(arguments: list[str] | None = None) -> dict:
    """Prepare, ask, train, ask again; prints and returns what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="minigpt4_digits", metavar="DIR", help="new folder (default %(default)s)")
    parser.add_argument("--fast", action="store_true", help="some steps only, to see that everything runs")
    given = parser.parse_args(arguments)
    out, form, begin = Path(given.out), "fast" if given.fast else "full", time.monotonic()
    out.mkdir(parents=True)
    prepare(out)
    count = HELD_OUT[form]
    before = accuracy(out / "model.json", out, count)
    for stage, steps in enumerate(STEPS[form], start=1):
        train(out, stage, steps)
    after = accuracy(out / "run2", out, count)
    result = {"before": before, "after": after, "n": count, "seconds": round(time.monotonic() - begin)}
    sys.stdout.write(json.dumps(result) + "\n")
    return result


if __name__ == "__main__":
    sys.exit(guarded("minigpt4 digits", main))
