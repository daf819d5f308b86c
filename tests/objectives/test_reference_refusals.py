"""What stops a run before its first step: another policy than the reference, a reference that cannot be had again, and
batches without pairs."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.errors import ConfigError, DataError, TrainingError
from mindspeed_mm.platform import get_platform


@pytest.fixture
def reference():
    """(a reference of nothing, a run that has begun)."""
    from mindspeed_mm.platform.distributed import init_single_process

    platform = get_platform("cpu")
    if not torch.distributed.is_initialized():
        init_single_process(platform)
    from mindspeed_mm.trainer.reference import ReferenceModel

    args = SimpleNamespace(pretrained_checkpoint="earlier")
    runtime = SimpleNamespace(params_dtype=torch.float32)
    objective = SimpleNamespace(start_loss=0.6931)
    inputs = SimpleNamespace(args=args, runtime=runtime, platform=platform, objective=objective)
    return ReferenceModel(inputs), SimpleNamespace(iteration=3, modules=[], platform=platform)


def test_a_policy_that_is_not_its_reference(reference, monkeypatch, caplog):
    model, state = reference
    policy = [torch.tensor([[-100.0, -50.0]]), torch.zeros(0, 2)]
    monkeypatch.setattr(type(model), "_log_probs", lambda *_: policy)
    with caplog.at_level("INFO"):
        model._check(state, [], [policy[0] * (1 + 1e-6), policy[1]])
    assert "step 0: the policy is the reference" in caplog.text and "loss 0.6931, margins 0" in caplog.text
    for other in (policy[0] + 0.1, policy[0] * torch.nan):
        with pytest.raises(TrainingError, match="log-probabilities of policy and reference differ by"):
            model._check(state, [], [other, policy[1]])


def test_a_run_that_cannot_go_on(reference):
    model, state = reference
    with pytest.raises(ConfigError, match="the checkpoint does not say what the reference of its run is"):
        model._begin(state)
    model.resume_from("first values")
    with pytest.raises(ConfigError, match="cannot read its reference again, since it began from --pretrained-chec"):
        model._begin(state)


def test_batches_without_pairs_or_reference(reference):
    from mindspeed_mm.objectives import find_objective
    from mindspeed_mm.objectives._pairs import PairSums, pair_row

    batch = Collator(0)([Encoded("0", [1, 2, 3], [-100, 2, 3], ())])
    with pytest.raises(DataError, match="trains on preference records, but the batch holds conversations"):
        pair_row(batch, SimpleNamespace())
    sums = PairSums(*(torch.ones(1, 2) for _ in range(4)))
    with pytest.raises(DataError, match="the batch has no log-probabilities of the reference model"):
        find_objective("dpo")._reference_of(SimpleNamespace(batch=batch), sums)
