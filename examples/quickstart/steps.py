"""The steps of the quickstart, in order. Each takes the Run and returns what later steps need, as plain JSON values."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.commands import (
    Command,
    StepError,
    free_port,
    iteration_of,
    json_result,
    logged_losses,
    run,
    say,
    shortened,
)
from examples.quickstart.configs import lora_config, write_configs
from examples.quickstart.make_data import CHOOSING, image_name, make_data
from examples.quickstart.make_models import make_models, write_json
from examples.quickstart.plots import plot_losses, plot_test_sheet
from examples.quickstart.results import loss_drop, read_answers, read_metrics
from examples.quickstart.settings import Settings
from examples.quickstart.state import RunFolder

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK, PARITY = "digits_mcq", "parity_mcq"
MODEL_NAME = "quickstart"
METRICS = "metrics.jsonl"


@dataclass
class Run:
    """One walk through the steps."""

    folder: RunFolder
    settings: Settings

    @property
    def out(self) -> Path:
        return self.folder.path

    def log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"

    def command(self, name: str, *words: str | Path, **variables: str | Path | int) -> list[str]:
        """Run a command that must succeed; returns its output."""
        return run(self._command(words, variables), ROOT, self.log(name))

    def interrupted(self, name: str, stop_when: Callable[[str], bool], *words: str | Path, **variables) -> list[str]:
        """Run a command until `stop_when` says of a line that it is to be killed."""
        return run(self._command(words, variables), ROOT, self.log(name), stop_when)

    @staticmethod
    def _command(words: tuple, variables: dict) -> Command:
        return Command([str(word) for word in words], {name: str(value) for name, value in variables.items()})


def data(run: Run) -> dict:
    """Images, captions, questions and the benchmark."""
    counts = make_data(run.folder.fresh("data"), run.settings.questions_per_digit)
    say(
        f"{counts['images']} images, {counts['captions']} captions, {counts['questions']} conversations, "
        f"{counts['benchmark']} multiple-choice questions over digits that are never trained on"
    )
    return counts


def models(run: Run) -> dict:
    """Public-format folders of untrained models, and the configs that name them."""
    sizes = make_models(run.folder.fresh("models"), run.out / "data", run.settings.seed)
    say(f"{sizes['clip parameters']:,} parameters in clip/, {sizes['vicuna parameters']:,} in vicuna/, random values")
    write_configs(
        run.folder.fresh("configs"), run.out / "data", run.out / "models", run.out / "converted", sizes["vocabulary"]
    )
    return sizes


def convert(run: Run) -> dict:
    """The public folders as converted_clip.pt and converted_vicuna.pt."""
    target = run.folder.fresh("converted")
    target.rmdir()  # the command makes it
    for part in ("clip", "vicuna"):
        lines = run.command(
            f"convert_{part}", "mindspeed-mm", "convert", run.out / "models" / part, target, "--to", "mindspeed-mm"
        )
        for line in lines:
            if line.startswith("wrote"):
                say(f"    {shortened(line, ROOT)}")
    return {"files": sorted(path.name for path in target.iterdir())}


def training_words(run: Run, launcher: str, steps: int, lr: float) -> list[str | Path]:
    """The launcher and the flags in which the toy differs from LLaVA-1.5."""
    settings = run.settings
    return [
        *("bash", f"examples/llava1.5/{launcher}"),
        *("--train-iters", str(steps), "--lr", str(lr), "--lr-warmup-fraction", str(settings.warmup_fraction)),
        *("--clip-grad", "1.0", "--adam-beta2", str(settings.adam_beta2)),
        *("--save-interval", str(settings.save_interval), "--log-interval", "10"),
        *("--num-workers", "0", "--seed", str(settings.seed), "--log-format", "megatron"),
    ]


def training_variables(run: Run, stage: str, data_config: str) -> dict[str, str | Path | int]:
    """The launcher's variables."""
    ranks = 2 if (os.cpu_count() or 1) > 1 else 1
    return {
        "NPUS_PER_NODE": ranks,
        "MASTER_PORT": free_port(),
        "MBS": run.settings.global_batch_size // ranks,
        "GBS": run.settings.global_batch_size,
        "MM_MODEL": run.out / "configs" / "model.json",
        "MM_DATA": run.out / "configs" / data_config,
        "SAVE_PATH": run.out / stage,
        "PRECISION": "fp32",  # a CPU without bfloat16 instructions would crawl, and the toy gains nothing from it
        "OMP_NUM_THREADS": 1,
    }


def stage1(run: Run) -> dict:
    """Captions; resumes by itself when this very step was interrupted."""
    settings = run.settings
    words = training_words(run, "pretrain_llava1_5.sh", settings.stage1_steps, settings.stage1_lr)
    run.command("stage1", *words, **training_variables(run, "stage1", "data_pretrain.json"))
    return stage_result(run, "stage1", settings.stage1_steps)


def stage2_words(run: Run) -> list[str | Path]:
    settings = run.settings
    return training_words(run, "finetune_llava1_5.sh", settings.stage2_steps, settings.stage2_lr)


def stage2_variables(run: Run) -> dict[str, str | Path | int]:
    variables = training_variables(run, "stage2", "data_finetune.json")
    return {**variables, "PRETRAINED_PATH": run.out / "stage1"}


def interruption(run: Run) -> dict:
    """Questions, until all processes of the run are killed behind a checkpoint."""
    settings = run.settings
    run.folder.fresh("stage2")

    def far_enough(line: str) -> bool:
        facts = iteration_of(line)
        return facts is not None and facts.iteration >= settings.interrupt_at

    lines = run.interrupted("stage2_interrupted", far_enough, *stage2_words(run), **stage2_variables(run))
    logged = logged_losses(lines)
    saved = int((run.out / "stage2" / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
    killed = max(logged)
    say(f"    SIGKILL to all its processes at iteration {killed}; the last checkpoint is of iteration {saved}")
    lost = [[iteration, loss] for iteration, loss in logged.items() if iteration > saved]
    return {"killed_at": killed, "checkpoint": saved, "lost": lost}


def stage2(run: Run) -> dict:
    """The same command again: it resumes from the last checkpoint."""
    again = logged_losses(run.command("stage2_resumed", *stage2_words(run), **stage2_variables(run)))
    killed = run.folder.result("interruption")
    differing = [iteration for iteration, loss in killed["lost"] if again.get(iteration) != loss]
    if differing:
        raise StepError(
            f"the resumed run must repeat the lost steps exactly, but its logged losses differ at {differing}: compare "
            f"{run.log('stage2_interrupted')} and {run.log('stage2_resumed')}"
        )
    say(f"    the steps from {killed['checkpoint']} to {killed['killed_at']} were trained again, with equal losses")
    return stage_result(run, "stage2", run.settings.stage2_steps)


def stage_result(run: Run, stage: str, steps: int) -> dict:
    """The stage's checkpoint and how far its loss fell.

    Raises:
        StepError: the loss has not fallen as much as it must.
    """
    first, last = loss_drop(read_metrics(run.out / stage / METRICS))
    say(f"    loss {first:.3f} -> {last:.3f}")
    if not last < run.settings.required_drop * first:
        raise StepError(f"the loss of {stage} fell from {first:.3f} to {last:.3f} only: see {run.log(stage)}")
    return {"checkpoint": str(run.out / stage / f"iter_{steps:07d}"), "first_loss": first, "last_loss": last}


def evaluate(run: Run) -> dict:
    """All held-out questions, from the training checkpoint."""
    result = asked(run, "evaluate", "stage2", BENCHMARK)
    return {key: result[key] for key in ("accuracy", "n", "unparsed", "files")}


def asked(run: Run, name: str, stage: str, table: str) -> dict:
    """The result of a table's questions, answered by a stage's checkpoint."""
    lines = run.command(
        name,
        *("mindspeed-mm", "evaluate", "--load", run.out / stage),
        *("--dataset-path", run.out / "data" / f"{table}.tsv", "--evaluation-dataset", table),
        *("--evaluation-model", MODEL_NAME, "--result-output-path", run.folder.fresh(f"evaluation/{name}")),
        *("--batch-size", "32", "--max-new-tokens", "8", "--json"),
        OMP_NUM_THREADS=1,
    )
    result = json_result(lines)
    say(f"    {result['n']} questions, accuracy {result['accuracy']:.4f}, {result['unparsed']} answers unreadable")
    return result


def lora(run: Run) -> dict:
    """A question that the model was never asked, before and after adapters of its decoder are trained on it."""
    before = asked(run, "parity_before", "stage2", PARITY)
    model = json.loads((run.out / "configs" / "model.json").read_text(encoding="utf-8"))
    write_json(run.out / "configs" / "model_lora.json", lora_config(model, run.out / "stage2"))
    words = training_words(run, "finetune_llava1_5.sh", run.settings.lora_steps, run.settings.lora_lr)
    variables = training_variables(run, "lora", "data_parity.json")
    run.command("lora", *words, **variables | {"MM_MODEL": run.out / "configs" / "model_lora.json"})
    after = asked(run, "parity_after", "lora", PARITY)
    say(f"    odd or even: {before['accuracy']:.4f} right before, {after['accuracy']:.4f} after")
    return {"before": before["accuracy"], "after": after["accuracy"], "checkpoint": str(run.out / "lora")}


def infer(run: Run) -> dict:
    """One held-out image, two questions."""
    questions = json.loads((run.out / "data" / "stage2.json").read_text(encoding="utf-8"))
    trained = {record["image"] for record in questions}
    row = next(row for row in range(10_000) if image_name(row) not in trained)
    lines = run.command(
        "infer",
        *("mindspeed-mm", "infer", "--load", run.out / "stage2"),
        *("--image", run.out / "data" / "images" / image_name(row)),
        *("--prompt", CHOOSING[-1], "--max-new-tokens", "8", "--temperature", "0", "--json"),
        OMP_NUM_THREADS=1,
    )
    answers = json_result(lines)["answers"]
    for answer in answers:
        say(f"    {image_name(row)}: {answer['prompt']} -> {answer['answer']}")
    return {"image": image_name(row), "answers": answers}


def images(run: Run) -> dict:
    """loss_curves.png and test_sheet.png."""
    killed = run.folder.result("interruption")
    curves, sheet = run.out / "loss_curves.png", run.out / "test_sheet.png"
    plot_losses(
        curves,
        read_metrics(run.out / "stage1" / METRICS),
        read_metrics(run.out / "stage2" / METRICS),
        killed,
    )
    result = run.folder.result("evaluate")
    answers = read_answers(Path(result["files"]["predictions"]), run.out / "data" / f"{BENCHMARK}.tsv")
    plot_test_sheet(sheet, answers, result["accuracy"])
    for path in (curves, sheet):
        say(f"    {path}")
    return {"files": [str(curves), str(sheet)]}


STEPS: tuple[tuple[str, str, Callable[[Run], dict]], ...] = (
    ("data", "Make the data set from scikit-learn's scanned digits", data),
    ("models", "Make untrained CLIP and Llama folders and a tokenizer", models),
    ("convert", "Convert the weights", convert),
    ("stage1", "Stage 1: pretraining on captions", stage1),
    ("interruption", "Stage 2: fine-tuning on questions, interrupted", interruption),
    ("stage2", "Stage 2 again: the same command resumes", stage2),
    ("evaluate", "Evaluate on the held-out questions", evaluate),
    ("infer", "Ask about one held-out image", infer),
    ("lora", "A new question: odd or even? LoRA on the trained model", lora),
    ("images", "Draw the loss curves and the test sheet", images),
)
