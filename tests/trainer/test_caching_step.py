"""Features on their way to the disk, beside the training step."""

import pytest
import torch

from mindspeed_mm.models.media import Media, fixed_size_features
from mindspeed_mm.platform import get_platform

get_platform("cpu")

from mindspeed_mm.objectives.sft import OBJECTIVE  # noqa: E402
from mindspeed_mm.trainer.caching_step import WAITING_BATCHES, CachingStep  # noqa: E402


class Cache:
    """Keeps what is written; the key "bad" fails in a way that no disk does."""

    def __init__(self):
        self.written = {}

    def write(self, key, features):
        if key == "bad":
            raise RuntimeError("the device is lost")
        self.written[key] = features


def features(values):
    """[images, 3, 4] as an encoder gives them."""
    return fixed_size_features(values, Media.of_images(values))


def test_all_that_was_made_is_written_when_it_closes():
    cache = Cache()
    step = CachingStep(cache, torch.device("cpu"), OBJECTIVE)
    batches = 3 * WAITING_BATCHES
    for number in range(batches):
        step._store([f"{number}a", f"{number}b"], features(torch.full((2, 3, 4), float(number))))
    step.close()
    assert len(cache.written) == 2 * batches and cache.written["5b"].eq(5).all()


def test_what_the_writer_meets_reaches_the_step():
    step = CachingStep(Cache(), torch.device("cpu"), OBJECTIVE)
    with pytest.raises(RuntimeError, match="the device is lost"):
        for _ in range(WAITING_BATCHES + 1):
            step._store(["bad"], features(torch.zeros(1, 3, 4)))
    step._writer.shutdown()


def test_what_the_writer_meets_last_is_raised_at_the_end():
    step = CachingStep(Cache(), torch.device("cpu"), OBJECTIVE)
    step._store(["bad"], features(torch.zeros(1, 3, 4)))
    with pytest.raises(RuntimeError, match="the device is lost"):
        step.close()
