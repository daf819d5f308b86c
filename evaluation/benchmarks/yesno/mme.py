"""MME (Fu et al., 2023): two questions an image; per category 100 * (accuracy + share of images with both right)."""

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.benchmarks import Mode
from evaluation.benchmarks.yesno._yesno import Combined, Reading, YesNo, refuse_near_names
from evaluation.report import Cell, mean
from evaluation.scorers.yesno import MME_PERCEPTION, MME_REASONING
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError

OWN_INSTRUCTION = "Please answer yes or no."
"""Ends every question of MME's tables; LLaVA's question file does without, its conversion for MME's tool adds it."""


@dataclass(frozen=True)
class MME(YesNo):
    """Yes-no questions whose headline is the points in perception."""

    def check(self, table: Table) -> None:
        """Raise DataError also without categories, or without a name of the image that pairs the questions."""
        super().check(table)
        missing = [name for name in ("category", "image_path") if name not in table.columns]
        if missing:
            raise DataError(
                f"{table.path} lacks column {', '.join(missing)}, which MME needs: points are given per category, and "
                f"image_path tells which questions share an image; found {', '.join(table.columns)}."
            )
        refuse_near_names(table, (*MME_PERCEPTION, *MME_REASONING), self.name)

    def official_text(self, question: str) -> str:
        """LLaVA's question file: its short-answer instruction stands in place of MME's own."""
        return super().official_text(question.removesuffix(OWN_INSTRUCTION).rstrip())

    def combine(self, readings: Sequence[Reading], mode: Mode, table: Table) -> Combined:
        """Points per category, and their sums for perception and reasoning. Both modes differ in reading only."""
        images: dict[tuple[str, str], list[int]] = {}
        for reading in readings:
            key = (reading.row.cells["category"], reading.row.cells["image_path"])
            images.setdefault(key, []).append(reading.hit)
        names = sorted({name for name, _ in images})
        points = {name: _points([hits for (own, _), hits in images.items() if own == name]) for name in names}
        line = {
            "perception": sum(points.get(name, 0.0) for name in MME_PERCEPTION),
            "reasoning": sum(points.get(name, 0.0) for name in MME_REASONING),
            **points,
        }
        counted = [name for name in names if name in MME_PERCEPTION] or names

        def units_of(counted: Sequence[str]) -> dict[str, list[int]]:
            return {f"{name}/{path}": _unit(name, hits, counted) for (name, path), hits in images.items()}

        groups = {"perception": MME_PERCEPTION, "reasoning": MME_REASONING, **{name: (name,) for name in names}}
        parts = {title: [name for name in own if name in names] for title, own in groups.items()}
        cells = {
            title: Cell([unit for unit in units_of(own).values() if any(unit[1::4])], "MME points")
            for title, own in parts.items()
            if own
        }
        return Combined({"points": line}, units_of(counted), {"points": cells}, "perception points", "MME points")


def _points(images: Sequence[Sequence[int]]) -> float:
    return 100 * (mean(hit for hits in images for hit in hits) + mean(int(all(hits)) for hits in images))


def _unit(name: str, hits: Sequence[int], counted: Sequence[str]) -> list[int]:
    own = [sum(hits), len(hits), int(all(hits)), 1]
    return [number for other in counted for number in (own if other == name else [0] * 4)]


BENCHMARK = MME("MME")
