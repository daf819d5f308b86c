"""The training loop: one global batch after the other until the run is done, told to stop, or must not go on."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron.driver.arguments import DriverArguments
from megatron.driver.checkpoint.saver import SaveClock, Saver
from megatron.driver.collectives import gather
from megatron.driver.initialize import is_rank_0
from megatron.driver.metrics import Recorder
from megatron.driver.micro_batches import naming_samples
from megatron.driver.parameter_groups import run_learning_rate
from megatron.driver.profiling import Profiler
from megatron.driver.state import BatchFacts, Hooks, TrainState
from megatron.driver.steps import StepMetrics
from megatron.driver.stopping import StopRequest
from mindspeed_mm.errors import DataError, TrainingError
from mindspeed_mm.platform.regions import region

logger = logging.getLogger(__name__)

LOSS = "lm loss"
"""Key of what loss_func reports: (sum of token losses, supervised tokens)."""

ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[torch.Tensor, Callable]]


class TrainReport(NamedTuple):
    """How a run ended."""

    iteration: int
    loss: float | None
    """Of the last step; None where no step was left to do."""
    checkpoint: Path | None
    """The last one written by this run."""
    stopped_by: int | None = None
    """The signal that ended the run before its last step."""


class MeteredIterator:
    """The micro-batches of one step after the other, with the facts of each and the time spent waiting for them.

    All micro-batches of a step are fetched before it begins: an error in the data of one rank then stops every rank
    with a message, where it would otherwise leave the others waiting in a collective.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        describe: Callable[[Any], BatchFacts],
        pad_to_one_length: Callable[[list[Any]], list[Any]] | None = None,
    ) -> None:
        self._iterator, self._describe, self._pad_to_one_length = iterator, describe, pad_to_one_length
        self.batches: list[Any] = []
        self.facts: list[BatchFacts] = []
        self.seconds = 0.0

    def fetch(self, count: int, device: torch.device) -> None:
        """Begin a new step with its `count` micro-batches. Collective.

        Raises:
            DataError: this rank's data cannot be used.
            TrainingError: the data ended, or another rank's cannot be used.
        """
        error: ValueError | None = None
        start = time.perf_counter()
        try:
            self.batches = [self._next() for _ in range(count)]
            self.seconds = time.perf_counter() - start
            if self._pad_to_one_length is not None:
                self.batches = self._pad_to_one_length(self.batches)
            self.facts = [self._describe(batch) for batch in self.batches]
        except (DataError, TrainingError) as caught:
            error = caught
        failed = self._failed_anywhere(error is not None, device)
        if error is not None:
            raise error
        if failed:
            raise TrainingError("the data of another rank cannot be used: see its message")

    @staticmethod
    def _failed_anywhere(failed: bool, device: torch.device) -> bool:
        """A call of its own: all others of a step come in or after its forward pass, where the ranks with good data
        would wait for this one already. It waits for the device, so a single rank does without."""
        if torch.distributed.get_world_size() == 1:
            return failed
        anywhere = torch.tensor(float(failed), device=device)
        torch.distributed.all_reduce(anywhere)
        return bool(anywhere.item())

    def _next(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            raise TrainingError(
                "the data ended before the last step: the data iterator must begin a new epoch"
            ) from None


def interleaved() -> bool:
    """True where the run has virtual pipeline stages."""
    return parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None


def forward_backward(
    state: TrainState,
    args: DriverArguments,
    forward_step: ForwardStep,
    batches: list[Any],
    *,
    forward_only: bool = False,
) -> list[dict]:
    """All micro-batches of a step through megatron.core's schedule, backwards too unless `forward_only`. Collective.

    Each chunk of a stage reads every micro-batch. Virtual stages exchange tensors of one size, so their micro-batches
    must be equally long (Hooks.pad_to_one_length).

    Returns:
        What loss_func reported for each micro-batch, on the last stage.

    Raises:
        Whatever the model raises, with a note that names the samples that were the last to go into it.
    """
    rows, length = args.micro_batch_size, args.seq_length
    if interleaved():
        rows, length = batches[0].input_ids.shape
        if getattr(batches[0], "segment_ids", None) is not None:  # packed rows go through the model as one
            rows, length = 1, rows * length
    place = f"behind step {state.iteration}" if forward_only else f"in step {state.iteration + 1}"
    with naming_samples(batches, len(state.model), place) as iterators:
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved() else iterators[0],
            model=state.model,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )


def train(
    state: TrainState,
    args: DriverArguments,
    forward_step: ForwardStep,
    data_iterator: Iterator[Any],
    hooks: Hooks | None = None,
) -> TrainReport:
    """Train until --train-iters, --exit-interval or a signal; saves at the intervals and at the end. Collective.

    Args:
        forward_step: see the package's docstring.
        data_iterator: endless; yields the micro-batches of this data-parallel rank from state.consumed_samples on.

    Raises:
        TrainingError: non-finite loss or gradient, no supervised token in a global batch, a gradient of zero, or
            no data; names the step and its samples. Nothing is saved then.
        CheckpointError: a save failed, and --on-save-error is stop.
    """
    hooks = hooks or Hooks()
    if state.iteration >= args.train_iters and is_rank_0():
        logger.warning("nothing to do: %d of --train-iters %d steps are done", state.iteration, args.train_iters)
    data = MeteredIterator(data_iterator, hooks.describe, hooks.pad_to_one_length if interleaved() else None)
    step = stopped_by = None
    state.platform.keep_memory()
    clock = SaveClock(args)
    with (
        StopRequest() as stop,
        Recorder(state, args) as recorder,
        Saver(state, args, hooks) as saver,
        Profiler(args, state.platform) as profiler,
    ):
        while state.iteration < args.train_iters and not hooks.finished():
            with profiler.step(state.iteration + 1):
                step, totals = train_step(state, args, forward_step, data, stop, saver, hooks)
            recorder.add(step, totals.memory)
            hooks.after_step(state)
            if totals.save_failed:
                saver.wait()
            if _is_save_due(state, args, totals.stop > 0 or hooks.finished()) or clock.is_due():
                recorder.flush()
                saver.save()
                clock.restart()
            if totals.stop and state.iteration < args.train_iters and not hooks.finished():
                # A rank that got none stops because of another one's.
                stopped_by = stop.signal or signal.SIGTERM
                break
            if _is_exit_due(state, args):
                if is_rank_0():
                    logger.info("stopped at step %d: --exit-interval", state.iteration)
                break
    return TrainReport(state.iteration, None if step is None else step.loss, saver.last, stopped_by)


def _is_exit_due(state: TrainState, args: DriverArguments) -> bool:
    return args.exit_interval is not None and state.iteration % args.exit_interval == 0


def _is_save_due(state: TrainState, args: DriverArguments, stopping: bool) -> bool:
    if args.save is None:
        return False
    regular = args.save_interval is not None and state.iteration % args.save_interval == 0
    return regular or stopping or state.iteration == args.train_iters or _is_exit_due(state, args)


def train_step(
    state: TrainState,
    args: DriverArguments,
    forward_step: ForwardStep,
    data: MeteredIterator,
    stop: StopRequest,
    saver: Saver,
    hooks: Hooks | None = None,
) -> tuple[StepMetrics, _Totals]:
    """One optimizer step over one global batch.

    Returns:
        The step's metrics; and sums over the ranks, which also say whether one was asked to stop or failed to save.
    """
    start, hooks = time.perf_counter(), hooks or Hooks()
    with region("data wait"):
        data.fetch(get_num_microbatches(), state.platform.device())
    batches = hooks.prepare(state, data.batches)
    for chunk in state.model:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    with region("backward"):  # what the model does not name inside
        reported = forward_backward(state, args, forward_step, batches)
    totals, means, part_norms = _reduce(state, args, reported, data, stop, saver, hooks.metrics)
    if totals.supervised == 0:
        _refuse(
            state, data, "no token of the global batch is supervised, so there is nothing to learn from: check labels"
        )
    loss = totals.loss_sum / totals.supervised
    if not math.isfinite(loss):
        _refuse(state, data, f"the loss is {loss}: check the data and weights, or lower --lr")
    learning_rate = run_learning_rate(state.optimizer)
    loss_scale = state.optimizer.get_loss_scale().item()
    with region("optimizer"):
        updated, grad_norm, _ = state.optimizer.step()
    if updated:
        _check_gradient(state, data, grad_norm, totals.gradient_expected > 0)
        state.scheduler.step(1)
        if state.average is not None:
            state.average.update()
    else:
        if args.loss_scale is None and loss_scale <= args.min_loss_scale:
            _refuse(
                state, data, f"gradients overflow at the smallest loss scale {loss_scale:g}: use --bf16 or lower --lr"
            )
        grad_norm, part_norms = None, dict.fromkeys(part_norms)
        state.skipped_iterations += 1
    state.iteration += 1
    state.consumed_samples += args.global_batch_size
    metrics = StepMetrics(
        loss=loss,
        supervised=int(totals.supervised),
        samples=int(totals.samples),
        tokens=int(totals.tokens),
        positions=int(totals.positions),
        flops=totals.flops,
        data_seconds=totals.data_seconds / state.data_parallel_size,
        seconds=time.perf_counter() - start,
        learning_rate=learning_rate,
        loss_scale=loss_scale,
        grad_norm=grad_norm,
        means=means,
        loss_name=hooks.loss_name,
        part_norms=part_norms,
    )
    return metrics, totals


class _Totals(NamedTuple):
    loss_sum: float
    supervised: float
    samples: float
    tokens: float
    positions: float
    flops: float
    gradient_expected: float
    data_seconds: float
    stop: float
    save_failed: float
    memory: float
    """Not a sum: MiB of the fullest rank at its peak; 0 where the step is not shown."""


def _reduce(
    state: TrainState,
    args: DriverArguments,
    reported: list[dict],
    data: MeteredIterator,
    stop: StopRequest,
    saver: Saver,
    names: Sequence[str],
) -> tuple[_Totals, dict[str, float], dict[str, float]]:
    """Sum a step's figures over the whole world in one call; each comes from one rank of those that share it. With them
    the means of what loss_func reports under `names`, and the gradient norms of the model's parts.

    The losses of all micro-batches are read here at once. megatron.core has waited for the end of the backward pass
    just before (finalize_model_grads looks at the number of tokens), so reading them later would save nothing.
    """
    sums = len(_Totals._fields) - 1
    # Behind the sums each rank has a place for its memory, so that the largest can be told; then come the means, and
    # the squared gradient norms of the parts.
    known = sums + torch.distributed.get_world_size()
    parts = [] if state.part_gradients is None else state.part_gradients.names
    norms = known + 2 * len(names)
    values = [0.0] * (norms + len(parts))
    if args.is_logged(state.iteration + 1):
        values[sums + torch.distributed.get_rank()] = state.platform.memory().peak
    first_of_tensor_parallel = parallel_state.get_tensor_model_parallel_rank() == 0
    first_of_context_parallel = parallel_state.get_context_parallel_rank() == 0
    if first_of_tensor_parallel and first_of_context_parallel and parallel_state.is_pipeline_first_stage():
        values[2] = sum(len(facts.sample_ids) for facts in data.facts)
        values[3] = sum(facts.tokens for facts in data.facts)
        values[4] = sum(facts.positions for facts in data.facts)
        values[5] = sum(facts.flops for facts in data.facts)
        values[6] = sum(facts.gradient_expected for facts in data.facts)
        values[7] = data.seconds
    values[8] = float(stop.received)
    values[9] = float(saver.failed)
    # HCCL has no collectives on float64.
    dtype = torch.float32 if state.platform.name == "npu" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=state.platform.device())
    if first_of_tensor_parallel and parallel_state.is_pipeline_last_stage():
        places = {LOSS: 0} | {name: known + 2 * number for number, name in enumerate(names)}
        for micro_batch in reported:
            for name, place in places.items():
                tensor[place] += micro_batch[name][0]
                tensor[place + 1] += micro_batch[name][1]
    if state.part_gradients is not None:
        for place, square in enumerate(state.part_gradients.squares(state.optimizer.get_loss_scale()), norms):
            tensor[place] = square
    torch.distributed.all_reduce(tensor)
    figures = tensor.tolist()
    pairs = zip(names, figures[known:norms:2], figures[known + 1 : norms : 2], strict=True)
    means = {name: total / number if number else math.nan for name, total, number in pairs}
    part_norms = {f"grad_norm/{name}": math.sqrt(square) for name, square in zip(parts, figures[norms:], strict=True)}
    return _Totals(*figures[:sums], memory=max(figures[sums:known])), means, part_norms


def _check_gradient(state: TrainState, data: MeteredIterator, grad_norm: float, expected: bool) -> None:
    if not math.isfinite(grad_norm):
        _refuse(state, data, f"the gradient norm is {grad_norm}: check the data and weights, or lower --lr")
    if grad_norm == 0 and expected:
        _refuse(state, data, "the gradient is zero: the loss does not depend on any trained parameter; check freeze")


def _refuse(state: TrainState, data: MeteredIterator, cause: str) -> None:
    """Stop every rank with the cause and the samples of the step. Collective."""
    own = [sample for facts in data.facts for sample in facts.sample_ids]
    samples = dict.fromkeys(str(sample) for rank in gather(own) for sample in rank)
    raise TrainingError(f"step {state.iteration + 1}: {cause}. Samples of this step: {', '.join(samples)}")
