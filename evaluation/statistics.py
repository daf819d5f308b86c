"""Metrics as functions of sums over questions, so that one bootstrap serves all of them.

A unit is what is drawn again together: a question, all rotations of one, or both questions on an image. Each unit has
K numbers; a metric is a function of their sums [..., K] over the drawn units.
"""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000
"""Bootstrap samples; the ends of a 95 % interval are then the 25th value from either side."""
SEED = 0
_PERCENT = (2.5, 97.5)

Statistic = Callable[[np.ndarray], np.ndarray]


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole != 0)


def _mean(sums: np.ndarray) -> np.ndarray:
    return _divide(sums[..., 0], sums[..., 1])


def _mean_of_ratios(sums: np.ndarray) -> np.ndarray:
    return _divide(sums[..., 0::2], sums[..., 1::2]).mean(axis=-1)


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    tp, fp, fn = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    return _divide(2 * tp, 2 * tp + fp + fn).mean(axis=-1)


def _mme_points(sums: np.ndarray) -> np.ndarray:
    hits, questions, both, images = (sums[..., i::4] for i in range(4))
    return 100 * (_divide(hits, questions) + _divide(both, images)).sum(axis=-1)


STATISTICS: dict[str, Statistic] = {
    "mean": _mean,
    "mean of ratios": _mean_of_ratios,
    "mean F1": _mean_f1,
    "MME points": _mme_points,
}
"""mean: (sum of scores, count), or any part and its whole. mean of ratios: several such pairs. mean F1: (TP, FP, FN)
per set, the sets' F1 averaged. MME points: (right answers, questions, images with both right, images) per category,
100 * (accuracy + accuracy of images) summed."""


def evaluate(units: Sequence[Sequence[float]], statistic: str) -> float:
    """The metric of all units."""
    return float(STATISTICS[statistic](np.asarray(units, dtype=np.float64).sum(axis=0)))


def bootstrap(units: Sequence[Sequence[float]], statistic: str, resamples: int = RESAMPLES) -> np.ndarray:
    """The metric of `resamples` samples of the units with replacement, [resamples]. The seed is fixed."""
    values = np.asarray(units, dtype=np.float64)
    generator = np.random.default_rng(SEED)
    count = len(values)
    drawn = (np.bincount(generator.integers(0, count, count), minlength=count) for _ in range(resamples))
    return STATISTICS[statistic](np.stack([weights @ values for weights in drawn]))


def interval(units: Sequence[Sequence[float]], statistic: str) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron, Annals of Statistics 1979) of the metric; it has no width if all
    units are equal."""
    low, high = np.percentile(bootstrap(units, statistic), _PERCENT)
    return float(low), float(high)
