"""Each loss against its formula in plain torch, at random scores, with gradients; and options that do not fit."""

import math

import pytest
import torch

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.objectives import find_objective
from mindspeed_mm.objectives._preference_losses import LOSSES, LossSettings, PairScores
from mindspeed_mm.platform import get_platform


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """The objective imports megatron.core."""
    get_platform("cpu")


POLICY = torch.tensor([[-12.0, -20.0], [-7.5, -3.0], [-0.9, -41.0]])
REFERENCE = torch.tensor([[-13.0, -18.5], [-7.0, -4.0], [-2.0, -40.0]])
LENGTHS = torch.tensor([[6.0, 9.0], [4.0, 2.0], [1.0, 20.0]])


def plain(name, policy, settings):
    """Pair by pair, in Python's words."""
    losses = []
    for own, ref, count in zip(policy, REFERENCE, LENGTHS, strict=True):
        scale = count if settings.length_average or name == "ipo" else torch.ones(2)
        margin = (own[0] - ref[0]) / scale[0] - (own[1] - ref[1]) / scale[1]
        mean = own / count
        eps, beta = settings.label_smoothing, settings.beta
        if name == "sigmoid":
            p = 1 / (1 + torch.exp(-beta * margin))
            losses.append(-(1 - eps) * p.log() - eps * (1 - p).log())
        elif name == "hinge":
            losses.append(torch.clamp(1 - beta * margin, min=0))
        elif name == "ipo":
            losses.append((margin - 0.5 / beta).square())
        elif name == "orpo":
            odds = mean.exp() / (1 - mean.exp())
            losses.append(-mean[0] - beta * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))))
        elif name == "simpo":
            p = torch.sigmoid(beta * (mean[0] - mean[1]) - settings.gamma)
            losses.append(-(1 - eps) * p.log() - eps * (1 - p).log())
    return torch.stack(losses)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_formulas(name, average):
    settings = LossSettings(beta=0.3, label_smoothing=0.1, gamma=0.4, length_average=average)
    ours, theirs = (POLICY.clone().requires_grad_() for _ in range(2))
    found = LOSSES[name].formula(PairScores(ours, REFERENCE, LENGTHS), settings)
    wanted = plain(name, theirs, settings)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss", "start"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_the_loss_of_equal_models(loss, start):
    assert find_objective("dpo").configured({"loss": loss}).start_loss == pytest.approx(start)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "kto"}, 'loss: found "kto"'),
        ({"beta": 0}, "beta: found 0"),
        ({"label_smoothing": 0.5}, "label_smoothing: found 0.5"),
        ({"bta": 0.1}, 'did you mean "beta"'),
        ({"loss": "hinge", "label_smoothing": 0.1}, 'label_smoothing is given, but the loss "hinge" does not use it'),
        ({"gamma": 1.0}, "does not use it; leave it out .HA-DPO's gamma is auxiliary_weight here"),
        ({"loss": "simpo", "reference_free": True}, 'the loss "simpo" has no reference anyway'),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ConfigError, match=words):
        find_objective("dpo").configured(options)


def test_an_objective_without_options():
    with pytest.raises(ConfigError, match="the objective sft has no options, found beta"):
        find_objective("sft").configured({"beta": 0.1})
