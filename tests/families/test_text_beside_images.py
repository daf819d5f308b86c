"""Ranks and rows without images beside ranks and rows with some, of every family, against transformers."""

import pytest
import torch

from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_families import MAKERS, make_family
from tests.helpers.vlm_ranks import GRADIENT, STEP, compare, stored, train, trained
from tests.parallel.comparison import names

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


@pytest.fixture(scope="module", params=MAKERS)
def base(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("name", names(ROWS, slow=("a rank without images", "several images a row")))
def test_gradients(base, ranks, name, tmp_path):
    counts, layout = ROWS[name]
    samples = base.rows(counts)
    base.theirs.zero_grad(set_to_none=True)
    base.their_loss(samples).backward()
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
