"""Losses of pairs of answers, each a formula of log-probabilities. Legend: N pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairScores(NamedTuple):
    """Log-probabilities of both answers; each [N, 2] float32, the chosen one first."""

    policy: Tensor
    """Sums over the answer's tokens, with gradient."""
    reference: Tensor
    """Of the reference model; zeros without one."""
    lengths: Tensor
    """Supervised tokens of each answer."""

    @property
    def policy_means(self) -> Tensor:
        """Log-probabilities of a token, on average."""
        return self.policy / self.lengths

    def ratios(self, mean: bool) -> Tensor:
        """[N, 2] log of policy / reference, of the whole answers or of a token on average."""
        ratios = self.policy - self.reference
        return ratios / self.lengths if mean else ratios


class LossSettings(NamedTuple):
    """Numbers of the formulas."""

    beta: float
    label_smoothing: float
    gamma: float
    length_average: bool


def sigmoid(scores: PairScores, settings: LossSettings) -> Tensor:
    """DPO (Rafailov et al. 2023, equation 7); with label smoothing the conservative form (Mitchell 2023), in which a
    share of the preferences is taken to be turned round."""
    chosen, rejected = scores.ratios(settings.length_average).unbind(1)
    return _logistic(settings.beta * (chosen - rejected), settings.label_smoothing)


def hinge(scores: PairScores, settings: LossSettings) -> Tensor:
    """SLiC's hinge on DPO's margin (Zhao et al. 2023; Liu et al. 2024)."""
    chosen, rejected = scores.ratios(settings.length_average).unbind(1)
    return F.relu(1 - settings.beta * (chosen - rejected))


def ipo(scores: PairScores, settings: LossSettings) -> Tensor:
    """IPO (Azar et al. 2023, equation 17), on token averages as its authors have it; beta is their tau."""
    chosen, rejected = scores.ratios(mean=True).unbind(1)
    return (chosen - rejected - 1 / (2 * settings.beta)) ** 2


def orpo(scores: PairScores, settings: LossSettings) -> Tensor:
    """ORPO (Hong et al. 2024, equations 6 and 7): the chosen answer's own loss and beta times the odds ratio's."""
    chosen, rejected = scores.policy_means.unbind(1)
    odds = chosen - rejected - torch.log1p(-chosen.exp()) + torch.log1p(-rejected.exp())
    return -chosen - settings.beta * F.logsigmoid(odds)


def simpo(scores: PairScores, settings: LossSettings) -> Tensor:
    """SimPO (Meng et al. 2024, equation 6); gamma is the margin of the averages times beta."""
    chosen, rejected = scores.policy_means.unbind(1)
    return _logistic(settings.beta * (chosen - rejected) - settings.gamma, settings.label_smoothing)


def _logistic(margin: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


class PreferenceLoss(NamedTuple):
    """A formula and what goes with it."""

    formula: Callable[[PairScores, LossSettings], Tensor]
    """Scores -> [N] losses."""
    reference: bool
    """Whether it compares with a reference model."""
    uses: frozenset[str]
    """The fields of LossSettings that it reads."""


LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid, True, frozenset(("beta", "label_smoothing", "length_average"))),
    "hinge": PreferenceLoss(hinge, True, frozenset(("beta", "length_average"))),
    "ipo": PreferenceLoss(ipo, True, frozenset(("beta",))),
    "orpo": PreferenceLoss(orpo, False, frozenset(("beta",))),
    "simpo": PreferenceLoss(simpo, False, frozenset(("beta", "gamma", "label_smoothing"))),
}
