"""Preference training against naming what is not there, on the quickstart's digits: the whole study on a CPU.

    bash examples/hallucination/digits.sh --out digits_out

The quickstart's model (trained first where its folder holds none) learns to say whether a digit is there, from answers
that always name the three most frequent digits. Then LoRA and DPO on pairs of answers take that back. POPE's questions
over held-out images, and the quickstart's own benchmark as a general score, are asked before, between and after. What
is done is noted in OUT/state.json.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from examples.hallucination.before_after import (
    Benchmarks,
    MeasureError,
    Model,
    Point,
    headline,
    measure,
    report,
    table_text,
    warnings,
)
from examples.hallucination.digits_data import make_study
from examples.quickstart.commands import StepError, free_port, say
from examples.quickstart.configs import data_config
from examples.quickstart.main import quickstart
from examples.quickstart.make_models import write_json
from examples.quickstart.settings import FAST, FULL, Settings
from examples.quickstart.state import FolderError, RunFolder, exclusive
from examples.quickstart.steps import BENCHMARK, Run
from examples.quickstart.walk import walk


@dataclass(frozen=True)
class StudySettings:
    """Everything that decides the result, besides the code and the quickstart's model."""

    quickstart: Settings
    leading_steps: int
    """Steps that make the model imagine the popular digits."""
    dpo_steps: int
    save_interval: int
    """Steps between two points of the trade-off."""
    per_digit: int
    """Held-out images of each digit that POPE's questions are about."""
    must_gain: bool
    """Whether POPE's F1 has to rise."""
    leading_lr: float = 1e-3
    dpo_lr: float = 1e-3
    beta: float = 0.1
    lora_r: int = 16
    batch_size: int = 32


FULL_STUDY = StudySettings(FULL, leading_steps=500, dpo_steps=120, save_interval=30, per_digit=18, must_gain=True)
FAST_STUDY = StudySettings(FAST, leading_steps=10, dpo_steps=4, save_interval=2, per_digit=1, must_gain=False)


@dataclass
class Study:
    """A walk through the study; `run` runs and logs the commands."""

    run: Run
    settings: StudySettings
    base: Path
    """The quickstart's folder."""

    @property
    def out(self) -> Path:
        return self.run.out

    def launch(
        self, name: str, script: str, steps: int, lr: float, save_interval: int, *words: str, **variables: str | Path
    ) -> None:
        """A shipped launcher, with the flags in which the toy differs from LLaVA-1.5; checkpoints go to OUT/name."""
        ranks = 2 if (os.cpu_count() or 1) > 1 else 1
        self.run.command(
            name,
            *("bash", script, "--train-iters", str(steps), "--lr", str(lr), "--num-workers", "0"),
            *("--adam-beta2", "0.98", "--clip-grad", "1.0", "--log-interval", "10", "--log-format", "megatron"),
            *("--save-interval", str(save_interval), "--seed", "1234", *words),
            NPUS_PER_NODE=ranks,
            MASTER_PORT=free_port(),
            MBS=self.settings.batch_size // ranks,
            GBS=self.settings.batch_size,
            SAVE_PATH=self.run.folder.fresh(name),
            PRECISION="fp32",
            OMP_NUM_THREADS=1,
            **variables,
        )


def data(study: Study) -> dict:
    """Questions, pairs, and the configs that name them."""
    counts = make_study(study.run.folder.fresh("data"), study.settings.per_digit)
    configs = study.run.folder.fresh("configs")
    images, models = study.base / "data" / "images", study.base / "models"
    leading = data_config(study.out / "data", "leading.json", models, "v1")
    leading["dataset_param"]["basic_parameters"] = [
        {"data_path": str(study.out / "data" / "leading.json"), "data_folder": str(images), "repeat_time": 4},
        {"data_path": str(study.base / "data" / "stage2.json"), "data_folder": str(images)},
    ]
    pairs = data_config(study.out / "data", "pairs.json", models, "v1")
    pairs["dataset_param"]["dataset_type"] = "preference"
    pairs["dataset_param"]["basic_parameters"]["data_folder"] = str(images)
    pairs["objective"] = {"name": "dpo", "loss": "sigmoid", "beta": study.settings.beta}
    model = json.loads((study.base / "configs" / "model.json").read_text(encoding="utf-8"))
    for part in model["image_encoder"].values():
        part["freeze"] = True
    lora = {"r": study.settings.lora_r, "alpha": 2 * study.settings.lora_r, "target_modules": "all-linear"}
    model["text_decoder"]["lora"] = lora
    for name, value in {"data_leading": leading, "data_pairs": pairs, "model_lora": model}.items():
        write_json(configs / f"{name}.json", value)
    say(f"    {counts['leading']} leading questions, {counts['pairs']} pairs, {counts['questions']} questions of POPE")
    return counts


def imagine(study: Study) -> dict:
    """Fine-tuning on the leading questions, and on the quickstart's own."""
    study.launch(
        "leading",
        "examples/llava1.5/finetune_llava1_5.sh",
        study.settings.leading_steps,
        study.settings.leading_lr,
        study.settings.leading_steps,
        MM_MODEL=study.base / "configs" / "model.json",
        MM_DATA=study.out / "configs" / "data_leading.json",
        PRETRAINED_PATH=study.base / "stage2",
    )
    return {}


def prefer(study: Study) -> dict:
    """LoRA and DPO on the pairs."""
    study.launch(
        "dpo",
        "examples/hallucination/dpo_llava1_5.sh",
        study.settings.dpo_steps,
        study.settings.dpo_lr,
        study.settings.save_interval,
        *("--pretrained-checkpoint", str(study.out / "leading")),
        MM_MODEL=study.out / "configs" / "model_lora.json",
        MM_DATA=study.out / "configs" / "data_pairs.json",
    )
    return {}


def ask(study: Study) -> dict:
    """POPE and the general benchmark, before, between and after; the plots."""
    settings = study.settings
    steps = range(settings.save_interval, settings.dpo_steps + 1, settings.save_interval)
    models = [Model("before", str(study.out / "leading"))]
    models += [Model(f"step {step}", str(study.out / "dpo" / f"iter_{step:07d}")) for step in steps]
    models[-1] = replace(models[-1], name="after")
    benchmarks = Benchmarks(
        pope=str(study.out / "data" / "pope"),
        image_root=str(study.base / "data" / "images"),
        general=(BENCHMARK, str(study.base / "data" / f"{BENCHMARK}.tsv")),
        flags=("--batch-size", "32", "--max-new-tokens", "4", "--device", "cpu"),
    )
    points = measure(models, benchmarks, study.out)
    say(table_text(points))
    for text in warnings(points):
        say(f"warning: {text}")
    files = report(points, study.out)
    return {"points": [asdict(point) for point in points], "files": [str(path) for path in files]}


STEPS = (
    ("data", "Make questions and pairs", data),
    ("leading", "Teach the model to see popular digits everywhere", imagine),
    ("dpo", "LoRA and DPO on pairs", prefer),
    ("points", "Ask before, between and after", ask),
)


def study_of(out: Path, base: Path, settings: StudySettings, clean: bool) -> dict:
    """Walk the quickstart in `base`, where it is not done, and the study in `out`; returns the last line's values.

    Raises StepError where POPE's F1 does not rise as it must.
    """
    trained = quickstart(base, settings.quickstart, clean=False)
    with exclusive(out):
        fingerprint = f"{settings} {base} {trained['accuracy']}"
        run = Run(RunFolder(out, fingerprint), settings.quickstart)
        run.folder.open(clean)
        study = Study(run, settings, base)
        seconds = walk(run.folder, STEPS, study)
        first, *_, last = (Point(**point) for point in run.folder.result("points")["points"])
        gain = {rate: [headline(point)[rate] for point in (first, last)] for rate in ("f1", "yes_ratio")}
        if settings.must_gain and gain["f1"][1] <= gain["f1"][0]:
            raise StepError(f"POPE's F1 went from {gain['f1'][0]:.4f} to {gain['f1'][1]:.4f}, it must rise")
        return {**gain, "general": [first.general, last.general], "seconds": round(seconds, 1)}


def main(argv: list[str] | None = None) -> int:
    """0 on success, 1 with a message otherwise; the last line is JSON on success."""
    parser = argparse.ArgumentParser(
        prog="examples/hallucination/digits.sh",
        description="DPO against naming digits that are not there: POPE before and after, on CPU, in minutes.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="digits_out", metavar="DIR", help="folder of all results (%(default)s)")
    parser.add_argument(
        "--quickstart", default="quickstart_out", metavar="DIR", help="the quickstart's folder (%(default)s)"
    )
    parser.add_argument("--fast", action="store_true", help="few steps: checks that all works, not the numbers")
    parser.add_argument("--clean", action="store_true", help="throw away the study that DIR holds and start over")
    parser.add_argument("--relative-to", default=".", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    root = Path(options.relative_to)
    out, base = ((root / given).resolve() for given in (options.out, options.quickstart))
    try:
        result = study_of(out, base, FAST_STUDY if options.fast else FULL_STUDY, options.clean)
    except (StepError, FolderError, MeasureError) as error:
        sys.stdout.flush()
        sys.stderr.write(f"\ndigits: error: {error}\n")
        return 1
    say(f"\nEverything is in {out}")
    say(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
