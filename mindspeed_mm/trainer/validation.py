"""What a training run does between steps: the loss on the validation sets, and the data counts of all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import islice

import torch

from megatron.driver import validation
from megatron.driver.arguments import DriverArguments
from megatron.driver.initialize import is_rank_0
from megatron.driver.log_lines import validation_line
from megatron.driver.state import Hooks, TrainState
from mindspeed_mm.data.build import DataCounts
from mindspeed_mm.data.config import DataloaderParam
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.trainer.early_stop import EarlyStop
from mindspeed_mm.trainer.inputs import RunInputs

logger = logging.getLogger(__name__)

Prepare = Callable[[TrainState, list[Batch]], list[Batch]]


class Validation:
    """Measures the loss on data.json's validation_parameters at --eval-interval, on the same samples each time."""

    def __init__(self, inputs: RunInputs, prepare: Prepare = lambda state, batches: batches) -> None:
        """Checks the sets. `prepare` as in Hooks. Raises ConfigError where there are sets but no interval, or early
        stopping without sets or with values that it cannot use."""
        self._inputs, self._dataset, self._prepare = inputs, None, prepare
        if inputs.args.ema_validation and not inputs.data_config.dataset_param.validation_parameters:
            raise ConfigError(
                "--ema-validation needs a validation set: add validation_parameters to the data config, and "
                "--eval-interval"
            )
        self.early_stop = EarlyStop(inputs.args, validates=bool(inputs.data_config.dataset_param.validation_parameters))
        args, parameters = inputs.args, inputs.data_config.dataset_param
        if not parameters.validation_parameters:
            return
        if args.eval_interval is None:
            raise ConfigError(
                "the data config has validation_parameters, but when to use them is open: --eval-interval"
            )
        self._dataset = inputs.build_dataset(validation=True)

    def after_step(self, state: TrainState) -> None:
        """Measure and log, if it is time. Collective."""
        args = self._inputs.args
        if self._dataset is None or state.iteration % args.eval_interval:
            return
        whole = max(1, len(self._dataset) // args.global_batch_size)
        batches = min(args.eval_iters or whole, whole)
        loss = self._measure(state, batches, "validation loss")
        if args.ema_validation:
            assert state.average is not None  # the flag needs --ema-decay
            with state.average.in_place(state.modules):
                loss = self._measure(state, batches, "validation loss of the moving average")
        self.early_stop.add(loss, state.iteration)

    def _measure(self, state: TrainState, batches: int, what: str) -> float:
        """The loss of the model as it is now, logged as `what`. Collective."""
        args, objective = self._inputs.args, self._inputs.objective
        hooks = Hooks(pad_to_one_length=self._inputs.pad_to_one_length, prepare=self._prepare)
        data = self._batches(state, batches)
        loss = validation.evaluate(state, args, objective.forward_step, data, batches, hooks)
        if is_rank_0():
            name = objective.loss_name
            perplexity = math.exp(min(loss, 700.0)) if name == "lm loss" else None
            samples = batches * args.global_batch_size
            logger.info("%s", validation_line(state, args, loss, perplexity, samples, name, what))
        return loss

    def _batches(self, state: TrainState, batches: int):
        """The first micro-batches of the set in the order of the file; read in this process."""
        inputs = self._inputs
        per_rank = batches * inputs.args.global_batch_size // (inputs.args.micro_batch_size * state.data_parallel_size)
        loader = inputs.loader(self._dataset, state, num_workers=0, options=DataloaderParam(shuffle=False))
        return islice(loader, per_rank)


def gather_counts(counts: DataCounts, state: TrainState, args: DriverArguments) -> None:
    """Sum up what all ranks have read, at log lines and checkpoints. Collective."""
    if not args.is_logged(state.iteration) and (args.save_interval is None or state.iteration % args.save_interval):
        return
    totals = torch.tensor([counts.samples, counts.skipped], dtype=torch.int32, device=state.platform.device())
    torch.distributed.all_reduce(totals)
    # Ranks that share a micro-batch have counted it, too.
    share = torch.distributed.get_world_size() // state.data_parallel_size
    samples, skipped = (total // share for total in totals.tolist())
    counts.run_samples, counts.run_skipped = counts.before[0] + samples, counts.before[1] + skipped
    if skipped and is_rank_0():
        logger.info("bad images so far: %d records left out of %d read", counts.run_skipped, counts.run_samples)
