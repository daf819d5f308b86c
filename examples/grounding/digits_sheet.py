"""boxes.png: held-out canvases with the true box and the box of the answer."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first
from PIL import Image  # noqa: E402

from evaluation.drawing import DrawnBoxes, with_boxes  # noqa: E402
from evaluation.scorers import boxes  # noqa: E402

RIGHT, WRONG, FRAME = "#1b7837", "#b2182b", "#bbbbbb"
ROWS, COLUMNS = 4, 6


def draw_sheet(path: Path, questions: Path, predictions: Path) -> None:
    """Draw canvases spread evenly over the set.

    Args:
        path: the PNG that is written.
        questions: JSON lines of REC; the canvases lie in the folder images beside it.
        predictions: the benchmark's MODEL_REC_extra_prediction.jsonl, in the same order.
    """
    asked, said = ([json.loads(line) for line in file.read_text().splitlines()] for file in (questions, predictions))
    count = min(ROWS * COLUMNS, len(asked))
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(13, 9.6), constrained_layout=True)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color(FRAME)
    for axis in axes.flat[count:]:
        axis.axis("off")
    for axis, number in zip(axes.flat, range(0, len(asked), len(asked) // count), strict=False):
        question, answer = asked[number], said[number]
        true, box = (boxes.read_box(answer[key]) for key in ("target", "pred"))
        overlap = boxes.iou(box or boxes.FAILED_BOX, true)
        image = Image.open(questions.parent / "images" / question["img_path"])
        axis.imshow(with_boxes(image, DrawnBoxes(true, box)))
        title = f"Where is {question['expression']}?\nIoU {overlap:.2f}" if box else f"{answer['pred'][:30]!r}"
        axis.set_title(title, fontsize=10, color=RIGHT if overlap > boxes.IOU_THRESHOLD else WRONG)
    figure.savefig(path, dpi=90)
    plt.close(figure)
