"""The loss on samples that are not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron.driver.arguments import DriverArguments
from megatron.driver.loop import LOSS, ForwardStep, forward_backward, interleaved
from megatron.driver.state import Hooks, TrainState


def evaluate(
    state: TrainState,
    args: DriverArguments,
    forward_step: ForwardStep,
    data_iterator: Iterator[Any],
    batches: int,
    hooks: Hooks | None = None,
) -> float:
    """Mean loss of the supervised tokens of `batches` global batches; NaN where none is supervised. Collective.

    `forward_step` as in loop.train. Nothing of the state changes; dropout is off meanwhile.
    """
    hooks = hooks or Hooks()
    totals = torch.zeros(2, dtype=torch.float32 if state.platform.name == "npu" else torch.float64)
    for chunk in state.model:
        chunk.eval()
    try:
        with torch.no_grad():
            for _ in range(batches):
                micro_batches = list(islice(data_iterator, get_num_microbatches()))
                if interleaved():
                    micro_batches = hooks.pad_to_one_length(micro_batches)
                micro_batches = hooks.prepare(state, micro_batches)
                reported = forward_backward(state, args, forward_step, micro_batches, forward_only=True)
                # As in training, ranks that share a micro-batch report it once.
                if parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage():
                    totals[0] += sum(float(micro_batch[LOSS][0]) for micro_batch in reported)
                    totals[1] += sum(float(micro_batch[LOSS][1]) for micro_batch in reported)
    finally:
        for chunk in state.model:
            chunk.train()
    totals = totals.to(state.platform.device())
    torch.distributed.all_reduce(totals)
    loss, supervised = totals.tolist()
    return loss / supervised if supervised else math.nan
