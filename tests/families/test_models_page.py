"""docs/models.md says what every family does; each of its cells is tried here."""

from pathlib import Path

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import all_families
from tests.evaluation.evaluation_helpers import choice_rows, write_table
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.models_page import page
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


LATER = {"qwen2_5_vl"}
"""Families whose conversions are still being built: not on the page."""

TRIED = sorted(set(MAKERS) - LATER)


def test_every_family_is_tried():
    assert {*TRIED, *LATER} == set(all_families())


@pytest.fixture(scope="module")
def cells():
    """Columns of each family, which the tests of this file fill in."""
    return {name: {} for name in TRIED}


@pytest.fixture(scope="module", params=TRIED)
def base(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp("family"))


def test_runs(base, ranks, cells, tmp_path):
    samples, wanted = base.rows((2, 0, 1)), None
    for column, layout in RUNS.items():
        save = tmp_path / column
        ranks(layout.ranks).run(train, str(base.folder), layout, samples, str(save), 1, GRADIENT)
        found = trained(save, base.spec, base.names)
        wanted = wanted or found
        compare(found, wanted)
        cells[base.family.name][column] = "yes"
    moved = trained(tmp_path / "train", base.spec, base.names)
    source = open_source(base.folder)
    first = {name: source.part(slot).get(name) for slot in source.part_sources for name in source.part(slot).names}
    assert not any(torch.equal(tensor, first.get(name, tensor[:0])) for name, tensor in moved.items())


def test_layouts(base, cells, tmp_path):
    """The first layout is read as transformers wrote it; that it reads ours is in the family's own tests."""
    first, *others = [layout.name for layout in base.family.layouts if layout.written]
    targets = [first, *others, "mindspeed-mm", "checkpoint"]
    for name in targets:
        mm.convert(base.folder, tmp_path / name, to=name)
    for name in targets[1:]:
        mm.convert(tmp_path / name, tmp_path / f"from {name}", to=first)
        assert mm.load(tmp_path / name, device="cpu").spec.model_id == base.family.name
    cells[base.family.name] |= dict.fromkeys(("convert in", "convert out"), ", ".join(sorted(targets)))


def test_text(base, cells):
    vlm = mm.load(base.folder, device="cpu")
    rows = [row.input_ids for row in base.rows((2, 0))]
    found = vlm.generate(input_ids=rows, images=SHOWN[:2], max_new_tokens=4, eos_token_id=-1)
    assert [len(ids) for ids in found] == [4, 4]
    cells[base.family.name]["generate"] = "yes"


def test_benchmark(base, cells, tmp_path):
    table = write_table(tmp_path / "toy.tsv", choice_rows(3))
    flags = ("--model", base.folder, "--dataset-path", table, "--evaluation-dataset", "toy", "--max-new-tokens", 3)
    flags = (*flags, "--result-output-path", tmp_path / "out", "--evaluation-model", "tiny", "--device", "cpu")
    assert main(["evaluate", *map(str, flags)]) == 0
    assert (tmp_path / "out/tiny_toy_report.json").is_file()
    cells[base.family.name]["evaluate"] = "yes"


def test_the_page_is_up_to_date(cells, tmp_path):
    """After the others, whose findings it compares."""
    if not all(len(found) == 9 for found in cells.values()):
        pytest.skip("the tests before it were not all run")
    text = page(cells)
    if PAGE.read_text() != text:
        (tmp_path / "models.md").write_text(text)
        raise AssertionError(f"docs/models.md is stale; copy {tmp_path / 'models.md'} over it")
