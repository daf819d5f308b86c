"""Point-QA, local: a question about what is at a point or in a box.

{"file_path": "a.jpg", "question": "Which colour?", "point": [50, 88], "bbox": [24, 63, 76, 113], "answer": "red"}

The version says what stands behind the question: b the box, p the point, bp one of them by chance.
"""

from __future__ import annotations

from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import QUESTION
from mindspeed_mm.data.grounding.reading import PublicSet, pointed
from mindspeed_mm.data.keys import keys

DATASET = PublicSet(
    "point_qa_local",
    keys("a record of point_qa_local", "file_path", "question", "point", "bbox", "answer"),
    lambda fields, chance: pointed(fields, chance, fields.plain("question")),
    template=ASK,
    placeholders=("<image>", QUESTION),
    versions=("p", "b", "bp"),
)
