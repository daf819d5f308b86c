"""Several ranks: the same numbers at every layout, and checkpoints that move between layouts."""

import numpy
import pytest

from tests.helpers import tiny_training as tiny
from tests.helpers.pool import RankError
from tests.parallel.comparison import names

COMMON = ("--clip-grad", "1.0", "--lr-decay-style", "cosine", "--lr-warmup-iters", "1")


def trained(flags, world_size, train_iters, batch, model=None):
    """Train on this rank; (losses and gradient norms where they are recorded, parameters of this rank)."""
    from pathlib import Path

    args = tiny.arguments(*COMMON, *flags, world_size=world_size, train_iters=train_iters, batch=batch)
    state, _ = tiny.run(args, tiny.tiny_model(**(model or {})))
    parameters = {name: value.numpy() for name, value in tiny.snapshot(state).items() if "optimizer" not in name}
    found = tiny.records(Path(args.save)) if args.save and Path(args.save, "metrics.jsonl").exists() else []
    return [(record["loss"], record["grad_norm"]) for record in found], parameters


def full(folder):
    """Full tensors of the newest checkpoint."""
    from megatron.driver.checkpoint.reading import read_checkpoint

    checkpoint = read_checkpoint(folder)
    return {name: checkpoint.get(name).float().numpy() for name in checkpoint.names}


@pytest.fixture(scope="module")
def start(ranks, tmp_path_factory):
    """A checkpoint to begin from, since fresh weights depend on the tensor-parallel size."""
    folder = tmp_path_factory.mktemp("start")
    from mindspeed_mm.platform import get_platform

    get_platform("cpu")
    from megatron.driver.initialize import shutdown

    trained(["--save", str(folder)], 1, 2, (4, 4))
    shutdown()
    return str(folder)


@pytest.fixture(scope="module")
def single(start, tmp_path_factory):
    """Five steps in one process."""
    folder = tmp_path_factory.mktemp("single")
    from megatron.driver.initialize import shutdown

    metrics, _ = trained(["--pretrained-checkpoint", start, "--save", str(folder)], 1, 5, (4, 4))
    shutdown()
    return metrics, full(folder)


LAYOUTS = {
    "dp2": ([], 2, (2, 4)),
    "dp2-micro1": ([], 2, (1, 4)),
    "dp2-overlap": (["--overlap-grad-reduce"], 2, (1, 4)),
    "dp2-distributed": (["--use-distributed-optimizer"], 2, (2, 4)),
    "dp2-distributed-overlap": (
        ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
        2,
        (1, 4),
    ),
    "tp2": (["--tensor-model-parallel-size", "2"], 2, (2, 4)),
    "pp2": (["--pipeline-model-parallel-size", "2"], 2, (2, 4)),
}


@pytest.mark.parametrize("name", names(LAYOUTS, slow=("dp2-micro1", "dp2-overlap", "dp2-distributed")))
def test_every_layout_trains_alike(ranks, start, single, tmp_path, name):
    flags, world_size, batch = LAYOUTS[name]
    flags = [*flags, "--pretrained-checkpoint", start, "--save", str(tmp_path)]
    results = ranks(world_size).run(trained, flags, world_size, 5, batch)
    metrics, parameters = single
    numpy.testing.assert_allclose(results[0][0], metrics, rtol=1e-5 if "p2" != name[1:3] else 1e-6)
    found = full(tmp_path)
    assert found.keys() == parameters.keys()
    for key, value in parameters.items():
        numpy.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    if name.startswith("dp"):
        for key, value in results[0][1].items():
            numpy.testing.assert_array_equal(value, results[1][1][key], err_msg=key)


@pytest.mark.parametrize("name", names(["dp2", "dp2-distributed", "tp2", "pp2"], slow=("dp2",)))
def test_resumed_equals_uninterrupted(ranks, tmp_path, name):
    flags, world_size, batch = LAYOUTS[name]
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    first = ranks(world_size).run(trained, [*flags, "--save", whole], world_size, 6, batch)
    ranks(world_size).run(trained, [*flags, "--save", cut, "--exit-interval", "3"], world_size, 6, batch)
    second = ranks(world_size).run(trained, [*flags, "--save", cut, "--load", cut], world_size, 6, batch)
    assert first[0][0] == second[0][0]
    for one, other in zip(first, second, strict=True):
        for key, value in one[1].items():
            numpy.testing.assert_array_equal(value, other[1][key], err_msg=key)


@pytest.mark.parametrize("name", ["dp2", "tp2", "pp2"])
@pytest.mark.usefixtures("single_process")
def test_a_run_goes_on_at_another_layout(ranks, start, single, tmp_path, name, caplog):
    """Three steps at the layout, two more in one process."""
    flags, world_size, batch = LAYOUTS[name]
    save = ["--save", str(tmp_path)]
    begin = [*flags, "--pretrained-checkpoint", start, *save, "--exit-interval", "3"]
    ranks(world_size).run(trained, begin, world_size, 5, batch)
    metrics, _ = trained([*save, "--load", str(tmp_path)], 1, 5, (4, 4))
    assert "random states of" in caplog.text
    numpy.testing.assert_allclose(metrics, single[0], rtol=1e-5)


def test_frozen_parts_on_two_stages(ranks, tmp_path):
    """Stage 0 has nothing to train."""
    flags = ["--pipeline-model-parallel-size", "2", "--save", str(tmp_path)]
    frozen = {"frozen": ("decoder", "embedding")}
    ranks(2).run(trained, flags, 2, 2, (2, 4), frozen)
    results = ranks(2).run(trained, [*flags, "--load", str(tmp_path)], 2, 4, (2, 4), frozen)
    assert len(results[0][0]) == 4
    assert len(list((tmp_path / "frozen").iterdir())) == 1


def test_an_error_on_one_rank_reaches_all(ranks, start):
    flags = ["--load", start]
    with pytest.raises(RankError, match="rank 0(.|\n)*does not fit the model(.|\n)*") as error:
        ranks(2).run(trained, flags, 2, 4, (2, 4), {"width": 32})
    assert "rank 1" in str(error.value)
