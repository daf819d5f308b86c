"""Early stop on the validation loss: how validations are counted, and what is refused."""

import math

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny

get_platform("cpu")

from mindspeed_mm.trainer.early_stop import EarlyStop  # noqa: E402


def early_stop(*flags, validates=True):
    return EarlyStop(tiny.arguments(*flags), validates=validates)


def test_validations_without_improvement_are_counted_in_a_row():
    counted = early_stop("--early-stop-patience", "2", "--early-stop-min-improvement", "0.1")
    for step, (loss, without) in enumerate([(3.0, 0), (2.95, 1), (2.8, 0), (math.nan, 1), (2.75, 2)]):
        assert not counted.is_due()
        counted.add(loss, step)
        assert counted.without == without
    assert counted.is_due() and (counted.best, counted.best_step) == (2.8, 2)
    resumed = early_stop("--early-stop-patience", "3")
    resumed.resume_from(counted.as_saved())
    assert not resumed.is_due() and resumed.as_saved() == counted.as_saved()
    resumed.resume_from({})  # a checkpoint from before there was a count
    assert resumed.without == 2


def test_off_counts_nothing():
    off = early_stop(validates=False)
    off.add(1.0, 1)
    off.add(2.0, 2)
    assert not off.is_due() and off.as_saved() == {"best": None, "best_step": 0, "without": 0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--early-stop-patience", "0"], "--early-stop-patience: found 0, expected at least 1"),
        (["--early-stop-patience", "1", "--early-stop-min-improvement", "-1"], "min-improvement: found -1, expected 0"),
        (["--early-stop-min-improvement", "0.1"], "is given without --early-stop-patience"),
        (["--early-stop-patience", "1"], "needs a validation loss: add validation_parameters"),
    ],
)
def test_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        early_stop(*flags, validates=False)
