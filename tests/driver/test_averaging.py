"""The moving average of the weights: torch's own rule, every layout, checkpoints that hold it and those that do not."""

import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_training import whole_run as run
from tests.parallel.comparison import names

get_platform("cpu")
from megatron.core import package_info  # noqa: E402  the platform comes first

from megatron.driver.checkpoint.reading import AVERAGE_PREFIX, SafeReader, read_checkpoint  # noqa: E402
from megatron.driver.checkpoint.sharding import model_tensors  # noqa: E402
from megatron.driver.state import Hooks  # noqa: E402

EMA = ("--ema-decay", "0.8")
DISTRIBUTED = ("--use-distributed-optimizer",)


def averages(folder):
    """The trained tensors of a save folder as averages."""
    checkpoint = read_checkpoint(folder / "ema")
    return {name: checkpoint.get(name) for name in checkpoint.averages}


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["fp32", "bf16"])
def test_the_rule_is_that_of_torch(tmp_path, precision):
    """Of what the optimizer holds in float32, from the weights that the run begins with."""
    seen, keys = [], {}

    def keep(state):
        seen.append([held.main.clone() for held in state.average._held])
        keys.update({id(item.data): item.key for item in model_tensors(state.modules).values()})

    _, _, state = run(*precision, *EMA, "--save", tmp_path, hooks=Hooks(after_step=keep))
    start = tiny_start(precision)
    wanted = [start[number].clone() for number in range(len(start))]
    for step in seen:
        get_ema_multi_avg_fn(0.8)(wanted, step, None)
    assert all(torch.equal(found, value) for found, value in zip(state.average._averages, wanted, strict=True))
    found, plain = averages(tmp_path), read_checkpoint(tmp_path)
    assert len(found) == len(wanted)
    for held, value in zip(state.average._held, wanted, strict=True):
        name = keys[id(held.model)]
        assert found[name].dtype == plain.dtype(name)
        assert torch.equal(found[name], value.to(found[name].dtype))
        assert not torch.equal(found[name], plain.get(name))


def tiny_start(precision):
    """What a run's optimizer holds before its first step, in the order of `state.average`."""
    from megatron.driver.held_parameters import held_parameters
    from megatron.driver.initialize import shutdown

    try:
        state = tiny.begin(tiny.arguments(*precision))
        return [held.main.detach().clone() for held in held_parameters(state.optimizer)]
    finally:
        shutdown()


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(("first", "second"), [((), ()), ((), DISTRIBUTED), (DISTRIBUTED, ("--async-save",))])
def test_a_run_goes_on_with_it(tmp_path, first, second):
    if package_info.MINOR < 13:  # its distributed optimizer reads its own state alone
        second = (*first, *(flag for flag in second if flag not in DISTRIBUTED))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*EMA, "--save", whole, train_iters=6)
    run(*EMA, *first, "--save", cut, "--exit-interval", "3", train_iters=6)
    run(*EMA, *second, "--save", cut, "--load", cut, train_iters=6)
    wanted, found = averages(whole), averages(cut)
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("single_process")
def test_a_run_without_it_keeps_nothing(tmp_path, caplog):
    _, _, state = run("--save", tmp_path, train_iters=2)
    assert state.average is None
    held = SafeReader(tmp_path / "iter_0000002").read_metadata().state_dict_metadata
    assert not any(name.startswith(AVERAGE_PREFIX) for name in held)
    with pytest.raises(CheckpointError, match="holds no moving average of the weights: the run had no --ema-decay"):
        read_checkpoint(tmp_path / "ema")
    run(*EMA, "--save", tmp_path, "--load", tmp_path, train_iters=3)  # begins where the weights are
    assert "theirs begins with the loaded weights" in caplog.text
    assert averages(tmp_path)
    run("--save", tmp_path, "--load", tmp_path, train_iters=4)
    assert "which this run does not go on with: give --ema-decay to keep it" in caplog.text


@pytest.mark.usefixtures("single_process")
def test_what_is_frozen_has_none_and_weights_alone_begin_anew(tmp_path):
    frozen = {"frozen": ("embedding", "layers.0")}
    run(*EMA, "--save", tmp_path / "one", train_iters=2, **frozen)
    found = averages(tmp_path / "one")
    assert found and not any("embedding" in name or "layers.0" in name for name in found)
    start = read_checkpoint(tmp_path / "one")
    flags = (
        "--pretrained-checkpoint",
        tmp_path / "one",
        "--save",
        tmp_path / "two",
        "--lr",
        "1e-30",
        "--no-save-optim",
    )
    run(*EMA, *flags, train_iters=1)  # nothing moves: the average is what was loaded
    for name, value in averages(tmp_path / "two").items():
        torch.testing.assert_close(value, start.get(name), rtol=1e-6, atol=1e-7)


LAYOUTS = {
    "TP2": ("--tensor-model-parallel-size", "2"),
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "DP2": DISTRIBUTED,
    "DP2 bf16": (*DISTRIBUTED, "--bf16"),
}


def trained(flags, world_size, batch):
    """Train on this rank. Between the steps the averages are in the weights' place for a moment."""
    hooks = Hooks(after_step=exchange) if "--ema-decay" in flags else None
    tiny.run(tiny.arguments(*flags, world_size=world_size, train_iters=3, batch=batch), hooks=hooks)


def exchange(state):
    """Inside, each parameter is its average, also where the ranks share it; behind it all is as before."""
    held, before = state.average._held, tiny.snapshot_of_parameters(state)
    with state.average.in_place(state.modules):
        for own, average in zip(held, state.average._averages, strict=True):
            inside = own.model if own.share is None else own.model.view(-1)[own.share]
            assert torch.equal(inside, average.to(inside.dtype))
        changed = tiny.snapshot_of_parameters(state)
    assert any(not torch.equal(changed[name], value) for name, value in before.items())
    after = tiny.snapshot_of_parameters(state)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("layout", names(LAYOUTS, slow=("DP2",)))
def test_every_layout_averages_alike(ranks, tmp_path, layout):
    flags, half = LAYOUTS[layout], ["--bf16"] if "bf16" in layout else []
    common = ["--pretrained-checkpoint", str(tmp_path / "start"), *EMA, *half]
    ranks(1).run(trained, ["--save", str(tmp_path / "start"), *half], 1, (4, 4))
    count = 2 if half else 1  # rows that are taken together round otherwise in bfloat16
    ranks(count).run(trained, [*common, "--save", str(tmp_path / "one")], count, (4 // count, 4))
    ranks(2).run(trained, [*common, *flags, "--save", str(tmp_path / "two")], 2, (2, 4))
    wanted, found = averages(tmp_path / "one"), averages(tmp_path / "two")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        step = 1e-5 if value.dtype == torch.float32 else torch.finfo(value.dtype).eps
        torch.testing.assert_close(found[name], value, rtol=step, atol=2e-6)


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_no_run_goes_on_from_averages(tmp_path, flag):
    with pytest.raises(CheckpointError, match=f"{flag} .*ema means the moving averages of a checkpoint"):
        run(flag, tmp_path / "ema", train_iters=1)


def test_validation_of_what_is_not_kept():
    with pytest.raises(ConfigError, match="--ema-validation is given without --ema-decay"):
        tiny.arguments("--ema-validation")


@pytest.mark.parametrize("decay", ["0", "1", "1.5"])
def test_a_decay_that_cannot_be(decay):
    with pytest.raises(ConfigError, match=r"--ema-decay is .*: expected a value between 0 and 1"):
        tiny.arguments("--ema-decay", decay)
