"""A small Flamingo learns to read a rule from examples in its context, on the CPU: one command.

    python -m examples.otter.digits --out digits_out

Every record shows two scanned digits with a made-up word for each, then more digits, and asks for their words. Which
word stands for which digit changes from record to record, so that only the examples tell. A second set of records,
without examples, names digits, so that there is something to see. Both are MIMIC-IT's files. CLIP, perceiver,
cross-attention and decoder begin with random values. The last line is JSON: the share of held-out digits that are named
by the right word, with examples and without, and of those whose word changes when the words of the examples are
exchanged.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import sys
import time
from pathlib import Path

from sklearn.datasets import load_digits

from examples.quickstart.commands import follow
from examples.quickstart.make_data import IMAGE_SIZE, NAMES, held_out_indices, image
from examples.quickstart.make_models import make_clip, write_json
from examples.quickstart.walk import guarded

QUESTION = "which word?"
NAMING = "which digit?"
WORDS = ("dax", "wug")
DIGITS = (0, 1)
"""Those that are shown."""
SEED = 1234
RECORDS = 6000
QUERIES = 4
"""Of a training record, behind one example of each digit; those before the last are examples of the last, too."""
STEPS = {"full": 800, "fast": 6}
HELD_OUT = {"full": 72, "fast": 8}
LR = 2e-3
SPECIAL = ("<|endofchunk|>", "<image>", "<answer>")


def make_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer of bytes and of the few words that are there; returns the ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    answers = (*WORDS, *(NAMES[digit] for digit in DIGITS))
    tokenizer.train_from_iterator([f"User: {QUESTION} {NAMING} GPT: {answer}" for answer in answers], trainer)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, additional_special_tokens=list(SPECIAL))
    wrapped.save_pretrained(folder)
    return wrapped.get_vocab()


def model_config(ids: dict[str, int]) -> dict:
    """The whole model in miniature: 16 patches an image, 8 latents, cross-attention in front of every layer. Its gates
    begin at zero and have a learning rate of their own, since the run is short."""
    new = {"ckpt_path": None, "fresh": True, "init_method_std": 0.08}
    heads = {"num_attention_heads": 4}
    encoder = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "patch_size": 8, "select_layer": -1}
    perceiver = {"model_id": "perceiver", "input_size": 64, "hidden_size": 64, "num_layers": 1, "num_latents": 8}
    cross = {"every": 1, "memory_size": 64, "media_token_id": ids["<image>"], **heads, "kv_channels": 16}
    gates = [{"names": "decoder.layers.*.gated_cross.*_gate", "lr": 10 * LR}]
    decoder = {
        "num_layers": 3,
        "parameters": gates,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "language_vocab_size": len(ids),
    }
    return {
        "model_id": "flamingo",
        "text_decoder": decoder | heads | {"max_position_embeddings": 128, "cross_attention": cross} | new,
        "image_encoder": {
            "vision_encoder": encoder | heads | {"image_size": IMAGE_SIZE} | new,
            "vision_projector": perceiver | heads | {"kv_channels": 16} | new,
        },
    }


def make_records(folder: Path, scans, labels, held_out: set[int]) -> None:
    """instructions.json, images.json and train.json, as MIMIC-IT has them, of each record two examples and some
    queries; naming.json."""
    rng = random.Random("digits in context")
    rows = {digit: [row for row in range(len(labels)) if labels[row] == digit] for digit in DIGITS}
    rows = {digit: [row for row in own if row not in held_out] for digit, own in rows.items()}
    instructions, trained = {}, {}
    for number in range(RECORDS):
        words = dict(zip(DIGITS, rng.sample(WORDS, len(DIGITS)), strict=True))
        shown = [*rng.sample(DIGITS, len(DIGITS)), *rng.choices(DIGITS, k=QUERIES)]
        names = [f"D_INS_{number:05d}_{place}" for place in range(len(shown))]
        for name, digit in zip(names, shown, strict=True):
            entry = {"instruction": QUESTION, "answer": words[digit], "image_ids": [f"D_IMG_{rng.choice(rows[digit])}"]}
            instructions[name] = entry | {"rel_ins_ids": []}
        trained[names[-1]] = names[:-1]
    naming = {
        f"N_INS_{row:05d}": {
            "instruction": NAMING,
            "answer": NAMES[digit],
            "image_ids": [f"D_IMG_{row}"],
            "rel_ins_ids": [],
        }
        for digit, own in rows.items()
        for row in own
    }
    images = {}
    for row in (row for own in rows.values() for row in own):
        buffer = io.BytesIO()
        image(scans[row]).save(buffer, format="PNG")
        images[f"D_IMG_{row}"] = base64.b64encode(buffer.getvalue()).decode("ascii")
    folder.mkdir(parents=True)
    write_json(folder / "instructions.json", {"meta": {"version": "0.0.1"}, "data": instructions})
    write_json(folder / "naming.json", {"meta": {"version": "0.0.1"}, "data": naming})
    write_json(folder / "images.json", images)
    write_json(folder / "train.json", trained)


def data_config(data: Path, model: Path) -> dict:
    """The records with their examples, in Otter's template."""
    images = {"images": str(data / "images.json")}
    sets = {
        "instructions": images | {"train_config": str(data / "train.json"), "in_context": True},
        "naming": images | {"num_samples": RECORDS // 2},
    }
    return {
        "dataset_param": {
            "dataset_type": "mimic_it",
            "template_name": "otter",
            "basic_parameters": [
                {"data_path": str(data / f"{name}.json"), "mimic_it": own} for name, own in sets.items()
            ],
            "preprocess_parameters": {"image_processer_path": str(model)},
            "tokenizer_config": {"from_pretrained": str(model)},
        },
        "dataloader_param": {"shuffle": True},
    }


def train(out: Path, steps: int) -> None:
    """Through the command line."""
    flags = {"mm-model": out / "model.json", "mm-data": out / "data.json", "save": out / "run", "train-iters": steps}
    flags |= {"lr": LR, "min-lr": LR / 20, "lr-decay-style": "cosine", "lr-warmup-fraction": 0.05, "weight-decay": 0.01}
    flags |= {"micro-batch-size": 16, "seq-length": 128, "clip-grad": 1.0, "adam-beta2": 0.98}
    flags |= {"num-workers": 0, "device": "cpu", "log-interval": 50, "seed": SEED}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    follow(["train", *words])


def ask(out: Path, count: int) -> dict[str, float]:
    """What the trained model says of held-out digits: under both rules, and without examples."""
    import mindspeed_mm as mm
    from mindspeed_mm.generation.engine import GenerationRequest

    digits = load_digits()
    held = [row for row in held_out_indices(digits.target) if digits.target[row] in DIGITS]
    rng = random.Random("queries")
    queries = rng.sample(held, min(count, len(held)))
    vlm = mm.load(out / "run", device="cpu", tokenizer=out / "clip", image_processor=out / "clip")

    def request(row: int, words: dict[int, str]) -> GenerationRequest:
        own = random.Random(f"examples of {row}")  # the same ones under both rules
        shown = [own.choice([each for each in held if digits.target[each] == digit and each != row]) for digit in words]
        turns = tuple((f"<image>{QUESTION}", words[int(digits.target[each])]) for each in shown)
        images = tuple(image(digits.images[each]) for each in (*shown, row))
        return GenerationRequest("", (*turns, (f"<image>{QUESTION}", None)), images=images)

    rules = [dict(zip(DIGITS, words, strict=True)) for words in (WORDS, WORDS[::-1])]
    answers = []
    for words in (*rules, {}):
        results = vlm.engine().generate([request(row, words) for row in queries], {"max_new_tokens": 2}, 16)
        answers.append([result.text.strip() for result in results])
    right = [
        [answer == words[int(digits.target[row])] for answer, row in zip(own, queries, strict=True)]
        for own, words in zip(answers, (*rules, rules[0]), strict=True)
    ]
    return {
        "with examples": sum(map(sum, right[:2])) / (2 * len(queries)),
        "without": sum(right[2]) / len(queries),
        "changed by the examples": sum(a != b for a, b in zip(*answers[:2], strict=True)) / len(queries),
        "n": len(queries),
    }


def main(arguments: list[str] | None = None) -> dict:
    """Prepare, train, ask; prints and returns what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="otter_digits", metavar="DIR", help="new folder (default %(default)s)")
    parser.add_argument("--fast", action="store_true", help="some steps only, to see that everything runs")
    given = parser.parse_args(arguments)
    out, form, begin = Path(given.out), "fast" if given.fast else "full", time.monotonic()
    out.mkdir(parents=True)
    digits = load_digits()
    make_clip(out / "clip", SEED)  # its image processor alone is used
    ids = make_tokenizer(out / "clip")
    make_records(out / "data", digits.images, digits.target, set(held_out_indices(digits.target)))
    write_json(out / "model.json", model_config(ids))
    write_json(out / "data.json", data_config(out / "data", out / "clip"))
    train(out, STEPS[form])
    result = ask(out, HELD_OUT[form]) | {"seconds": round(time.monotonic() - begin)}
    sys.stdout.write(json.dumps(result) + "\n")
    return result


if __name__ == "__main__":
    sys.exit(guarded("otter digits", main))
