"""Samples that share a packed row train as rows of their own do, in every family, on several axes of positions too."""

import pytest

from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_families import MAKERS, make_family
from tests.helpers.vlm_ranks import GRADIENT, STEP, compare, stored, train, trained
from tests.parallel.comparison import names

LAYOUTS = {
    "one rank": GoldenLayout(packed=True),
    "CP2": GoldenLayout(context=2, packed=True),
    "PP2": GoldenLayout(pipeline=2, packed=True),
}


@pytest.fixture(scope="module", params=MAKERS)
def base(request, tmp_path_factory):
    """(the family, samples, its parameters, the gradients of rows of their own on one rank)."""
    family = make_family(request.param, tmp_path_factory.mktemp("family"))
    return family, family.rows((2, 0, 1)), stored(family.theirs, family.names)


@pytest.fixture(scope="module")
def alone(base, ranks, tmp_path_factory):
    return gradients(base, ranks, GoldenLayout(), tmp_path_factory.mktemp("alone"))


def gradients(base, ranks, layout, folder):
    family, samples, parameters = base
    ranks(layout.ranks).run(train, str(family.folder), layout, samples, str(folder), 1, GRADIENT)
    after = trained(folder, family.spec, family.names)
    return {key: (parameters[key].detach() - tensor[: len(parameters[key])]) / STEP for key, tensor in after.items()}


@pytest.mark.parametrize("name", names(LAYOUTS, slow=("one rank",)))
def test_gradients(base, alone, ranks, name, tmp_path):
    found = gradients(base, ranks, LAYOUTS[name], tmp_path)
    unused = {key for key, gradient in alone.items() if not gradient.any()}
    assert not any(found[key].any() for key in unused)
    compare({key: gradient for key, gradient in found.items() if key not in unused}, alone, 3e-6)
