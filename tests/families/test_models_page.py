"""docs/models.md says what every family does; each of its cells is tried here."""

import re
from pathlib import Path

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import all_families
from tests.evaluation.evaluation_helpers import choice_rows, write_table
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.models_page import family_line, page
from tests.helpers.tiny_families import MAKERS, SHOWN, make_family
from tests.helpers.vlm_ranks import GRADIENT, compare, train, trained

PAGE = Path(__file__).parents[2] / "docs/models.md"
RUNS = {
    "train": GoldenLayout(),
    "pack": GoldenLayout(packed=True),
    "TP": GoldenLayout(tensor=2),
    "PP": GoldenLayout(pipeline=2),
    "CP": GoldenLayout(context=2),
}

TRIED = sorted(MAKERS)


def test_every_family_is_tried():
    assert set(TRIED) == set(all_families())


def try_runs(base, ranks, folder):
    """Each layout trains every parameter of the parts to the same weights."""
    samples, wanted = base.rows((2, 0, 1)), None
    for column, layout in RUNS.items():
        save = folder / column
        ranks(layout.ranks).run(train, str(base.folder), layout, samples, str(save), 1, GRADIENT)
        found = trained(save, base.spec, base.names)
        wanted = wanted or found
        compare(found, wanted)
    source = open_source(base.folder)
    first = {name: source.part(slot).get(name) for slot in source.part_sources for name in source.part(slot).names}
    same = [name for name, tensor in wanted.items() if torch.equal(tensor, first.get(name, tensor[:0]))]
    assert all(re.search(base.untouched, name) for name in same)


def try_layouts(base, folder) -> str:
    """Names of the layouts that are written and read. The first is read as transformers wrote it; that it reads ours is
    in the family's own tests."""
    first, *others = [layout.name for layout in base.family.layouts if layout.written]
    targets = [first, *others, "mindspeed-mm", "checkpoint"]
    for name in targets:
        mm.convert(base.folder, folder / name, to=name)
    for name in targets[1:]:
        mm.convert(folder / name, folder / f"from {name}", to=first)
        assert mm.load(folder / name, device="cpu").spec.model_id == base.family.name
    return ", ".join(sorted(targets))


def try_text(base):
    """Text of rows with and without images."""
    vlm = mm.load(base.folder, device="cpu")
    rows = [row.input_ids for row in base.rows((2, 0))]
    asked = {"qformer_input_ids": [[4, 5], [6]]} if base.media.reads_instructions else {}
    found = vlm.generate(input_ids=rows, images=SHOWN[:2], max_new_tokens=4, eos_token_id=-1, **asked)
    assert [len(ids) for ids in found] == [4, 4]


def try_benchmark(base, folder):
    """A table of questions with images."""
    table = write_table(folder / "toy.tsv", choice_rows(3))
    flags = ("--model", base.folder, "--dataset-path", table, "--evaluation-dataset", "toy", "--max-new-tokens", 3)
    flags = (*flags, "--result-output-path", folder / "out", "--evaluation-model", "tiny", "--device", "cpu")
    assert main(["evaluate", *map(str, flags)]) == 0
    assert (folder / "out/tiny_toy_report.json").is_file()


@pytest.mark.parametrize("name", TRIED)
def test_the_line_of_a_family_is_true(name, ranks, tmp_path):
    (tmp_path / "model").mkdir()
    base = make_family(name, tmp_path / "model")
    try_runs(base, ranks, tmp_path)
    layouts = try_layouts(base, tmp_path)
    try_text(base)
    try_benchmark(base, tmp_path)
    cells = dict.fromkeys((*RUNS, "generate", "evaluate"), "yes") | dict.fromkeys(
        ("convert in", "convert out"), layouts
    )
    line = family_line(name, cells)
    assert line in PAGE.read_text().splitlines(), f"docs/models.md is stale; its line of {name} is\n{line}"


def test_the_page_holds_nothing_else():
    text = PAGE.read_text()
    lines = [line for name in TRIED for line in text.splitlines() if line.startswith(f"| {name} |")]
    assert len(lines) == len(TRIED)
    assert text == page(lines), f"docs/models.md is stale; it should be\n{page(lines)}"
