"""Log-probabilities of the reference for all pairs of a data set, without a step of training."""

from __future__ import annotations

from itertools import islice

from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron.driver.loop import MeteredIterator, interleaved
from megatron.driver.state import Hooks, TrainState
from mindspeed_mm.data.build import DataCounts
from mindspeed_mm.data.config import DataloaderParam
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.trainer.inputs import RunInputs


def visit_all(inputs: RunInputs, state: TrainState, hooks: Hooks, counts: DataCounts) -> int:
    """Send every sample once through `hooks.prepare`, in the order of the files, a global batch at a time. Collective.

    The last batch is filled up with the first samples, which are known by then. Packing is left out: a pair's
    log-probabilities do not depend on the row that it stands in.

    Returns:
        The number of samples.

    Raises:
        DataError, TrainingError: as in a step of training.
    """
    samples, per_step = len(inputs.dataset), get_num_microbatches()
    steps = -(-samples // (per_step * inputs.args.micro_batch_size * state.data_parallel_size))
    loader = inputs.loader(inputs.dataset, state, options=DataloaderParam(shuffle=False), counts=counts)
    pad = hooks.pad_to_one_length if interleaved() else None
    data = MeteredIterator(islice(loader, steps * per_step), hooks.describe, pad)
    with progress_bar("reference", steps) as advance:
        for _ in range(steps):
            data.fetch(per_step, state.platform.device())
            hooks.prepare(state, data.batches)
            advance(1)
    return samples
