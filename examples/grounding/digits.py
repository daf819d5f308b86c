"""Where is the seven? A small LLaVA learns to answer with boxes, on the CPU: the whole study.

    bash examples/grounding/digits.sh --out grounding_out

Untrained CLIP and Llama folders learn from canvases with scanned digits (`digits_data.py`). The benchmark REC asks
about canvases whose scans no training canvas shows, and boxes.png shows some of them with the true box and the
answer's. What is done is noted in OUT/state.json.
"""

import argparse
import hashlib
import json
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from examples.grounding.digits_data import Scans, rows_of, write_lessons, write_questions
from examples.grounding.digits_models import data_config, make_models, model_config
from examples.grounding.digits_sheet import draw_sheet
from examples.quickstart.commands import Command, json_result, run, say
from examples.quickstart.make_models import write_json
from examples.quickstart.state import RunFolder, exclusive
from examples.quickstart.walk import ended, walk

ROOT = Path(__file__).resolve().parents[2]
LESSONS_FILE, HELD_OUT = "lessons", "held_out"
"""Names of the files of questions: what is trained on; scans that are never trained on."""


@dataclass(frozen=True)
class GroundingSettings:
    """Everything that decides the result, besides the code."""

    steps: int
    canvases: int
    """To train on, with a question for each of their digits."""
    questions: int
    """Held-out canvases, with a question each."""
    digits: int = 3
    """On a canvas."""
    batch_size: int = 32
    lr: float = 3e-3
    adam_beta2: float = 0.98
    warmup_fraction: float = 0.1
    seed: int = 1234

    def fingerprint(self) -> str:
        """Changes with any setting and with the code that makes the data."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for name in ("digits.py", "digits_data.py", "digits_models.py", "../quickstart/make_models.py"):
            digest.update((Path(__file__).parent / name).read_bytes())
        return digest.hexdigest()[:16]


FULL = GroundingSettings(steps=2000, canvases=20000, questions=400)
FAST = GroundingSettings(steps=6, canvases=40, questions=12, batch_size=8)


@dataclass
class GroundingRun:
    """A walk through the study."""

    folder: RunFolder
    settings: GroundingSettings

    @property
    def out(self) -> Path:
        return self.folder.path

    def command(self, name: str, *words: str | Path | int | float, **variables: str | Path | int) -> list[str]:
        """Run a command that must succeed; returns its output. Raises StepError."""
        command = Command([str(word) for word in words], {key: str(value) for key, value in variables.items()})
        return run(command, ROOT, self.out / "logs" / f"{name}.log")


def data(study: GroundingRun) -> dict:
    """Canvases and questions."""
    settings, folder = study.settings, study.folder.fresh("data")
    canvases = {}
    for name, number in ((LESSONS_FILE, settings.canvases), (HELD_OUT, settings.questions)):
        scans, rng = Scans(rows_of(held_out=name == HELD_OUT)), random.Random(f"{settings.seed} {name}")
        canvases[name] = [scans.canvas(settings.digits, rng) for _ in range(number)]
    counts = {
        LESSONS_FILE: write_lessons(folder, LESSONS_FILE, canvases[LESSONS_FILE]),
        HELD_OUT: write_questions(folder, HELD_OUT, canvases[HELD_OUT]),
    }
    say(f"    questions: {counts[LESSONS_FILE]:,} to learn from, {counts[HELD_OUT]:,} held out")
    return counts


def models(study: GroundingRun) -> dict:
    """Public-format folders of untrained models, and the configs that name them."""
    folder, configs = study.folder.fresh("models"), study.folder.fresh("configs")
    sizes = make_models(folder, study.settings.seed)
    say(f"    parameters: {sizes['clip parameters']:,} in clip/, {sizes['vicuna parameters']:,} in vicuna/")
    write_json(configs / "model.json", model_config(folder))
    lessons = study.out / "data" / f"{LESSONS_FILE}.jsonl"
    write_json(configs / "data.json", data_config(lessons, study.out / "data/images", folder))
    return sizes


def train(study: GroundingRun) -> dict:
    """All parts, by Muon; resumes by itself when this very step was interrupted.

    One rank of one thread; a worker beside it reads the images.
    """
    settings, configs, saved = study.settings, study.out / "configs", study.out / "trained"
    study.command(
        "train",
        *("mindspeed-mm", "train", "--mm-model", configs / "model.json", "--mm-data", configs / "data.json"),
        *("--device", "cpu", "--optimizer", "muon", "--lr", settings.lr, "--adam-beta2", settings.adam_beta2),
        *("--weight-decay", 0, "--lr-decay-style", "cosine", "--lr-warmup-fraction", settings.warmup_fraction),
        *("--micro-batch-size", settings.batch_size, "--global-batch-size", settings.batch_size),
        *("--train-iters", settings.steps, "--seed", settings.seed, "--num-workers", 1),
        *("--load", saved, "--save", saved, "--save-interval", max(1, settings.steps // 6)),
        *("--log-interval", 20, "--log-format", "megatron"),
        OMP_NUM_THREADS=1,
    )
    return {"checkpoint": str(saved / f"iter_{settings.steps:07d}")}


def evaluate(study: GroundingRun) -> dict:
    """The benchmark REC on the held-out canvases."""
    data = study.out / "data"
    lines = study.command(
        "evaluate",
        *("mindspeed-mm", "evaluate", "--load", study.out / "trained", "--evaluation-dataset", "REC"),
        *("--dataset-path", data / f"{HELD_OUT}.jsonl", "--image-root", data / "images"),
        *("--evaluation-model", "digits", "--result-output-path", study.folder.fresh("evaluation")),
        *("--batch-size", 50, "--max-new-tokens", 12, "--device", "cpu", "--json"),
        OMP_NUM_THREADS=1,
    )
    return json_result(lines)


def sheet(study: GroundingRun) -> dict:
    """boxes.png."""
    result = study.folder.result("evaluate")
    path = study.out / "boxes.png"
    draw_sheet(path, study.out / "data" / f"{HELD_OUT}.jsonl", Path(result["files"]["extra_prediction"]))
    say(f"    {path}")
    return {"file": str(path)}


STEPS = (
    ("data", "Place scanned digits on canvases", data),
    ("models", "Make untrained CLIP and Llama folders and a tokenizer", models),
    ("train", "Train on boxes", train),
    ("evaluate", "Ask about held-out canvases", evaluate),
    ("sheet", "Draw true and answered boxes", sheet),
)


def study_of(out: Path, settings: GroundingSettings, clean: bool) -> dict:
    """Walk all steps in the folder `out` and return the last line's values."""
    with exclusive(out):
        study = GroundingRun(RunFolder(out, settings.fingerprint()), settings)
        study.folder.open(clean)
        seconds = walk(study.folder, STEPS, study)
        result = study.folder.result("evaluate")
        return {
            "accuracy": result["accuracy"],
            "n": result["n"],
            "unparsed": result["unparsed"],
            "seconds": round(seconds, 1),
            "sheet": study.folder.result("sheet")["file"],
        }


def main(argv: list[str] | None = None) -> int:
    """0 on success, 1 with a message otherwise, 130 when interrupted; the last line is JSON on success."""
    parser = argparse.ArgumentParser(
        prog="examples/grounding/digits.sh",
        description="LLaVA learns to answer with boxes where a handwritten digit is, on CPU, in minutes.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="grounding_out", metavar="DIR", help="folder of all results (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="few steps: checks that all works, not the accuracy")
    parser.add_argument("--seed", type=int, default=FULL.seed, help="of canvases, weights and order (%(default)s)")
    parser.add_argument("--clean", action="store_true", help="throw away the study that DIR holds and start over")
    parser.add_argument("--relative-to", default=".", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    out = (Path(options.relative_to) / options.out).resolve()
    settings = replace(FAST if options.fast else FULL, seed=options.seed)
    return ended("digits", out, lambda: study_of(out, settings, options.clean))


if __name__ == "__main__":
    sys.exit(main())
