"""Prints docs/parallelism.md's table: how far each layout is from one process, and from transformers.

    python -m tests.parallel.deviations GOLDEN_FOLDER [--eight]

--eight adds the layouts of eight ranks.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.helpers.golden_training import STEPS, GoldenLayout, full_tensors, records, train_golden
from tests.helpers.pool import RankPool
from tests.parallel.comparison import relative
from tests.parallel.test_batches import LAYOUTS as BATCHES
from tests.parallel.test_one_loss import EIGHT, FOUR_GROUPS, GROUPED, LAYOUTS, RECOMPUTED


class DeviationTable:
    """Runs layouts and prints a line for each."""

    def __init__(self, golden: Path) -> None:
        self._golden, self._pools, self._known = golden, {}, {}
        self._modes = json.loads((golden / "training" / "meta.json").read_text())["modes"]

    def run(self, layout: GoldenLayout, flags: str = "", steps: int = STEPS, save: Path | None = None):
        """(records, tensors) of a layout."""
        with tempfile.TemporaryDirectory() as folder:
            save = save or Path(folder)
            pool = self._pools.setdefault(layout.ranks, RankPool(layout.ranks))
            pool.run(train_golden, self._golden, layout, str(save), flags, steps, timeout=600)
            return records(save), full_tensors(save)

    def single(self, layout: GoldenLayout, flags: str):
        """What a layout is compared with: one process, four rows a step."""
        one = GoldenLayout(
            trained=layout.trained,
            grouped=layout.grouped,
            text_steps=layout.text_steps,
            decoder=tuple(item for item in layout.decoder if item in FOUR_GROUPS),
        )
        if one not in self._known:
            self._known[one] = self.run(one, flags)
        return self._known[one]

    def line(self, name: str, layout: GoldenLayout, flags: str = "") -> None:
        """Run and print."""
        wanted, found = self.single(layout, flags), self.run(layout, flags)
        deviations = {key: _largest(found[0], wanted[0], key) for key in ("loss", "grad_norm")}
        parameters = max(
            relative(key, found[1][key][: len(tensor)], tensor[: len(found[1][key])])
            for key, tensor in wanted[1].items()
        )
        transformers = "-"
        if not layout.grouped and not layout.text_steps:
            theirs = self._modes[layout.trained]["per_step"]
            transformers = f"{max(abs(a['loss'] - b['loss']) for a, b in zip(found[0], theirs, strict=False)):.1e}"
        print(
            f"| {name} | {layout.ranks} | {layout.trained} | {deviations['loss']:.1e} | {deviations['grad_norm']:.1e} "
            f"| {parameters:.1e} | {transformers} |",
            flush=True,
        )

    def grouped(self, layouts: dict[str, GoldenLayout], decoder: tuple = ()) -> None:
        """Layouts of the grouped decoder, all from one checkpoint, since fresh weights depend on the layout."""
        with tempfile.TemporaryDirectory() as start:
            self.run(GoldenLayout(grouped=True, decoder=decoder), "", 1, Path(start))
            for name, layout in layouts.items():
                self.line(f"{name} (grouped)", layout, f"--pretrained-checkpoint {start}")


def _largest(found, wanted, key: str) -> float:
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    """Print the table."""
    table = DeviationTable(Path(sys.argv[1]))
    if "--eight" in sys.argv:
        return table.grouped(EIGHT)
    for name, layout in LAYOUTS.items():
        table.line(name, layout)
    for name, layout in RECOMPUTED.items():
        table.line(f"recompute {name}", layout)
    for name, layout in BATCHES.items():
        table.line(f"{name}, packed rows", layout._replace(packed=True))
    for name, layout in BATCHES.items():
        if name != "one":
            table.line(f"{name}, every second step without images", layout._replace(text_steps=True, trained="c"))
    table.grouped(GROUPED)
    table.grouped({"TP4": GoldenLayout(tensor=4, grouped=True, decoder=FOUR_GROUPS)}, FOUR_GROUPS)


if __name__ == "__main__":
    main()
