"""loss_curves.png and test_sheet.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

from examples.quickstart.results import Answer  # noqa: E402
from mindspeed_mm.trainer.curves import smoothed  # noqa: E402

RIGHT, WRONG, CURVE, LOST = "#1b7837", "#b2182b", "#2166ac", "#e08214"
SHEET_ROWS, SHEET_COLUMNS = 4, 6
WRONG_SHOWN = 6
"""Places of the sheet that are kept for wrong answers, the last row."""


def plot_losses(path: Path, stage1: list[dict], stage2: list[dict], killed: dict) -> None:
    """Both stages side by side; in stage 2 also the steps that were lost, and where the run was killed."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    titles = ("Stage 1: captions", "Stage 2: questions")
    for axis, records, title in zip(axes, (stage1, stage2), titles, strict=True):
        steps, losses = [record["iteration"] for record in records], [record["loss"] for record in records]
        axis.plot(steps, losses, color=CURVE, alpha=0.25, linewidth=0.8)
        axis.plot(steps, smoothed(losses), color=CURVE, linewidth=1.8, label="loss, smoothed")
        axis.set(title=title, xlabel="iteration", ylabel="loss per supervised token", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, alpha=0.2)
    axes[1].plot(
        [iteration for iteration, _ in killed["lost"]],
        [loss for _, loss in killed["lost"]],
        color=LOST,
        marker="o",
        markersize=4,
        label="steps lost and trained again (logged means)",
    )
    axes[1].axvline(killed["checkpoint"], color="grey", linestyle=":", label=f"resumed from {killed['checkpoint']}")
    axes[1].axvline(killed["killed_at"], color=WRONG, linestyle="--", label=f"killed at {killed['killed_at']}")
    for axis in axes:
        axis.legend(loc="upper right", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sheet_selection(answers: list[Answer]) -> list[Answer]:
    """24 answers: spread evenly over the set, and in the last row up to 6 of the wrong ones that these left out."""
    count = SHEET_ROWS * SHEET_COLUMNS
    missed = sum(not answer.hit for answer in answers)
    chosen = _spread(answers, count - min(missed, WRONG_SHOWN))
    shown = {id(answer) for answer in chosen}
    others = [answer for answer in answers if not answer.hit and id(answer) not in shown]
    wrong = _spread(others, count - len(chosen))
    rest = [answer for answer in answers if answer.hit and id(answer) not in shown]
    return [*chosen, *_spread(rest, count - len(chosen) - len(wrong)), *wrong]


def _spread(answers: list[Answer], count: int) -> list[Answer]:
    """So many of them, evenly spread; all where there are fewer."""
    count = min(count, len(answers))
    return [answers[number * len(answers) // count] for number in range(count)]


def plot_test_sheet(path: Path, answers: list[Answer], accuracy: float) -> None:
    """24 held-out digits with question, options, answer and truth; wrong answers are among them where there are any."""
    chosen = sheet_selection(answers)
    figure, axes = plt.subplots(SHEET_ROWS, SHEET_COLUMNS, figsize=(15, 13.5), constrained_layout=True)
    for axis, item in zip(axes.flat, chosen, strict=False):
        axis.imshow(item.image, cmap="gray", vmin=0, vmax=255)
        axis.set_xticks([])
        axis.set_yticks([])
        colour = RIGHT if item.hit else WRONG
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=3)
        axis.set_title(item.question, fontsize=10)
        options = [f"{letter}. {text}" for letter, text in item.options.items()]
        lines = [
            "   ".join(options[:2]),
            "   ".join(options[2:]),
            f"answer {described(item.prediction, item.options)}   truth {described(item.answer, item.options)}",
        ]
        axis.set_xlabel("\n".join(lines), fontsize=10, color=colour)
    for axis in list(axes.flat)[len(chosen) :]:
        axis.axis("off")
    figure.suptitle(sheet_title(answers, chosen, accuracy), fontsize=15)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def sheet_title(answers: list[Answer], chosen: list[Answer], accuracy: float) -> str:
    """How many are right, and that wrong ones were looked for."""
    missed, shown = (sum(not answer.hit for answer in some) for some in (answers, chosen))
    title = f"{accuracy:.1%} of {len(answers)} held-out digits right"
    return f"{title}; the sheet shows {shown} of the {missed} wrong answers" if missed else title


def described(letter: str, options: dict[str, str]) -> str:
    """A letter with its option's text; anything else that a model may say as it is, shortened."""
    return f"{letter} ({options[letter]})" if letter in options else repr(letter[:20])
