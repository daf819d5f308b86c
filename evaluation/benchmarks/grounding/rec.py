"""REC, referring-expression comprehension, in Shikra's form (Chen et al., 2023): a box for a phrase, IoU above 0.5.

Questions are JSON lines with img_path, expression and bbox (left, top, right, bottom in pixels). Boxes are fractions
of the image padded to a square; either kind of bracket is read, and words such as <bin_250>.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.benchmark import Mode
from evaluation.drawing import DrawnBoxes
from evaluation.judge_protocol import Judge
from evaluation.prompts import Prompt, PromptStyle, refuse_kit_style
from evaluation.report import Report, Rows, RowScore, mean_cell, mean_units
from evaluation.scorers import boxes
from evaluation.tsv import Row, Table
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.errors import DataError

TEMPLATE = "Where is {expression} in {image}? Answer with its box."
ANSWER = "Answer: {box} ."
"""Shikra's form of the right answer."""


@dataclass(frozen=True)
class REC:
    """A benchmark (evaluation.benchmark.Benchmark) whose answers are boxes."""

    name: str = "REC"
    aliases: tuple[str, ...] = ("refcoco", "refcoco+", "refcocog", "rec_shikra")
    kind = "boxes"
    by_order = True
    """Answers without an index are taken in the order of the questions, as Shikra's files are."""

    def check(self, table: Table) -> None:
        """Raise DataError when a column is missing or a box is not four numbers."""
        missing = [name for name in ("expression", "bbox", "image_path") if name not in table.columns]
        if missing:
            raise DataError(
                f"{table.path} lacks {', '.join(missing)}, which REC needs; found {', '.join(table.columns)}. "
                "Expected JSON lines with img_path, expression and bbox."
            )
        for row in table.rows:
            _pixels(row, table)
            if row.image_count != 1:
                raise DataError(
                    f"{table.path}, row with index {row.index}: found {row.image_count} images; a box needs just one."
                )

    def has_answers(self, table: Table) -> bool:
        """Always true: the boxes are part of the questions."""
        return True

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """One fixed question, with the image where Shikra has it. VLMEvalKit has no such benchmark."""
        refuse_kit_style(self.name, style)
        return {
            row.index: Prompt(turns=((TEMPLATE.format(expression=row.cells["expression"], image=IMAGE_TOKEN), None),))
            for row in table.rows
        }

    def target(self, row: Row, table: Table) -> list[float]:
        """The right box of a row, 0..1 of the padded image, rounded as it is written."""
        (image,) = table.images(row)
        side = max(image.size)
        return boxes.norm_box(boxes.pad_box(_pixels(row, table), *image.size), side, side)

    def score(
        self,
        table: Table,
        predictions: Mapping[int | str, str],
        mode: Mode,
        missing: int = 0,
        judge: Judge | None = None,
    ) -> Report:
        """Share of boxes with IoU > 0.5, and the mean IoU."""
        rows = [row for row in table.rows if row.index in predictions]
        scores, overlaps, failed, drawn, detail = Rows(), [], 0, {}, []
        overlap_of = boxes.exact_iou if mode == "strict" else boxes.iou
        for row in rows:
            box, target = boxes.read_box(predictions[row.index]), self.target(row, table)
            failed += box is None
            overlap = overlap_of(box or boxes.FAILED_BOX, target)
            overlaps.append(overlap)
            said = boxes.format_boxes([box]) if box else None
            drawn[row.index] = DrawnBoxes(target, box)
            detail.append({"pred": predictions[row.index], "target": ANSWER.format(box=boxes.format_boxes([target]))})
            log = f"IoU {float(overlap):.4f} with {boxes.format_boxes([target])}"
            scores[row.index] = RowScore(said, int(overlap > boxes.IOU_THRESHOLD), log)
        count = len(rows)
        line = {
            "accuracy": sum(score.hit for score in scores.values()) / count,
            "target_failed": 0,
            "failed": failed,
            "iou": float(sum(overlaps) / count),
        }
        return Report(
            benchmark=self.name,
            mode=mode,
            table={"all": line},
            cells={
                "all": {
                    "accuracy": mean_cell(score.hit for score in scores.values()),
                    "iou": mean_cell(map(float, overlaps)),
                }
            },
            rows=scores,
            units=mean_units({index: score.hit for index, score in scores.items()}),
            unparsed=failed,
            metric="accuracy at IoU 0.5",
            dropped=len(table.dropped),
            missing=missing,
            attachments={"extra_prediction.jsonl": detail},
            boxes=drawn,
        )


def _pixels(row: Row, table: Table) -> list[float]:
    try:
        box = json.loads(row.cells["bbox"])
    except ValueError:
        box = None
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(n, int | float) for n in box):
        raise DataError(
            f"{table.path}, row with index {row.index}: bbox is {row.cells['bbox'][:40]}; expected four numbers, "
            "left, top, right and bottom in pixels."
        )
    return box


BENCHMARK = REC()
