"""Optimizer state moves between the distributed optimizer and the plain one."""

import pytest
import torch

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_training import whole_run as run

get_platform("cpu")
from megatron.core import package_info  # noqa: E402  the platform comes first

from megatron.driver.checkpoint import resuming  # noqa: E402
from mindspeed_mm.platform.core_optimizer import sharded_state  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_process")

DISTRIBUTED = ["--use-distributed-optimizer"]


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--fp16", "--initial-loss-scale", "1024"]])
@pytest.mark.parametrize(("first", "second"), [([], DISTRIBUTED), (DISTRIBUTED, [])], ids=["to", "from"])
def test_the_run_goes_on_alike(tmp_path, precision, first, second):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kept, _, _ = run(*precision, "--save", whole, train_iters=6)
    run(*precision, *first, "--save", cut, "--exit-interval", "3", train_iters=6)
    if package_info.MINOR < 13:  # its distributed optimizer has a layout of its own
        with pytest.raises(CheckpointError, match="megatron-core 0.12 and its distributed optimizer read and write no"):
            run(*precision, *second, "--save", cut, "--load", cut, train_iters=6)
        return
    found, report, _ = run(*precision, *second, "--save", cut, "--load", cut, train_iters=6)
    assert report.iteration == 6
    for key in ("loss", "grad_norm", "learning_rate", "loss_scale"):
        assert [r[key] for r in tiny.records(cut)] == pytest.approx([r[key] for r in tiny.records(whole)], rel=1e-5)
    for name, tensor in kept.items():
        if not name.startswith("optimizer"):
            # Of equal float32 values one may round to the neighbour, where another order of sums moves it over a tie.
            step = 1e-5 if tensor.dtype == torch.float32 else torch.finfo(tensor.dtype).eps
            torch.testing.assert_close(found[name], tensor, rtol=step, atol=1e-6)


def test_the_layout_of_another_megatron_core_is_refused(tmp_path, monkeypatch):
    """A checkpoint of 0.12's distributed optimizer holds flat pieces where others hold whole tensors."""
    run(*DISTRIBUTED, "--save", tmp_path, train_iters=1)
    layouts = {"fully_reshardable": "fully_sharded_model_space", "fully_sharded_model_space": "fully_reshardable"}

    def other(*args, **options):
        state = sharded_state(*args, **options)
        return state | {"param_state_sharding_type": layouts[state["param_state_sharding_type"]]}

    monkeypatch.setattr(resuming, "sharded_state", other)
    with pytest.raises(CheckpointError, match="Use the same megatron-core and the same setting of --use-distributed"):
        run(*DISTRIBUTED, "--save", tmp_path, "--load", tmp_path, train_iters=2)
