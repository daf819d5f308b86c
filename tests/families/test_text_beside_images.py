"""Ranks and rows without images beside ranks and rows with some, of every family, against transformers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.sources import open_source
from tests.helpers import tiny_llava, tiny_qwen
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_llava import image, sample
from tests.helpers.vlm_ranks import GRADIENT, STEP, compare, stored, train, trained


def make_llava(folder):
    theirs = tiny_llava.llava(tiny_llava.clip(), "qwen3")
    return theirs, tiny_llava.save(theirs, folder, tiny_llava.fixed_processor("clip"))


def make_llava_next(folder):
    theirs = tiny_llava.llava_next(tiny_llava.siglip(), **tiny_llava.FULL)
    return theirs, tiny_llava.save(theirs, folder, tiny_llava.tile_processor())


def make_qwen(folder):
    theirs = tiny_qwen.qwen()
    return theirs, tiny_qwen.save(theirs, folder)


FAMILIES = {
    "llava": (make_llava, tiny_llava.inputs),
    "llava_next": (make_llava_next, tiny_llava.inputs),
    "qwen2_5_vl": (make_qwen, tiny_qwen.inputs),
}
SHOWN = [image(30, 50), image(60, 20), image(40, 41)]

ROWS = {
    "a rank without images": ((2, 0, 1, 0), GoldenLayout(data=2)),
    "several images a row": ((3, 2, 3, 1), GoldenLayout(data=2)),
    "no image at all": ((0, 0), GoldenLayout(data=2)),
    "rows in turns, PP2": ((0, 3, 0, 1), GoldenLayout(pipeline=2)),
    "a packed row of both, CP2": ((2, 0, 1), GoldenLayout(context=2, packed=True)),
    "a packed row of text, CP2": ((0, 0, 0), GoldenLayout(context=2, packed=True)),
    "a rank without images, TP2": ((0, 1), GoldenLayout(tensor=2, data=2)),
}
"""Images of each row, and how the run is spread. Data-parallel ranks take the rows in turns."""


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    """The family's tiny model: transformers' model, folder, spec, names, media and how transformers takes a sample."""
    make, inputs = FAMILIES[request.param]
    theirs, folder = make(tmp_path_factory.mktemp("family"))
    spec = describe_model(open_source(folder))
    assert spec.model_id == request.param
    media = spec.family.media_processor(spec, folder)
    return SimpleNamespace(
        theirs=theirs, folder=folder, spec=spec, inputs=inputs, media=media, names=spec.family.layouts[0]
    )


def rows_of(base, counts):
    """A sample for each number of images."""
    found = []
    for number, count in enumerate(counts):
        shown = SHOWN[:count]
        encoded = sample(base.media, shown, (5 + number, *(4,) * count), seed=7 * number)
        if base.spec.family.multimodal_positions:
            grids = [base.media.plan(each.height, each.width).grid for each in shown]
            ids, grids = torch.tensor(encoded.input_ids), torch.tensor(grids).view(-1, 3)
            encoded = replace(encoded, positions=base.spec.family.positions(base.spec, ids, grids))
        found.append(encoded)
    return found


def their_loss(base, samples):
    """transformers' mean over the supervised tokens of all rows."""
    total, count = 0.0, 0
    for encoded in samples:
        own = sum(label != IGNORE_INDEX for label in encoded.labels[1:])
        given = base.inputs(base.spec.family, base.spec, encoded)
        total = total + base.theirs(**given, labels=torch.tensor([encoded.labels])).loss * own
        count += own
    return total / count


@pytest.mark.parametrize("name", ROWS)
def test_gradients(base, ranks, name, tmp_path):
    counts, layout = ROWS[name]
    samples = rows_of(base, counts)
    base.theirs.zero_grad(set_to_none=True)
    their_loss(base, samples).backward()
    parameters = stored(base.theirs, base.names)
    ranks(layout.ranks).run(train, str(base.folder), layout, samples, str(tmp_path), 1, GRADIENT)
    after = trained(tmp_path, base.spec, base.names)
    unused = {key for key in after if parameters[key].grad is None or not parameters[key].grad.any()}
    for key in unused:
        assert torch.equal(after[key], parameters[key].detach()), key
    assert bool(unused) or any(counts)
    found = {key: (parameters[key].detach() - tensor[: len(parameters[key])]) / STEP for key, tensor in after.items()}
    wanted = {key: parameter.grad for key, parameter in parameters.items() if key not in unused}
    compare({key: gradient for key, gradient in found.items() if key not in unused}, wanted)
