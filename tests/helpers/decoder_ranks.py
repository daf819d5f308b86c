"""One training step of a tiny decoder on any parallel layout: its token losses and gradients, in HF's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from mindspeed_mm.constants import IGNORE_INDEX


class Spread(NamedTuple):
    """How a model is spread over ranks."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context


class RankShard(NamedTuple):
    """What one rank knows after a step: gradients of its tensors by our name in the whole part, and the losses of its
    slice of the sequence (last stage)."""

    tensor_rank: int
    context_rank: int
    gradients: dict[str, torch.Tensor]
    losses: torch.Tensor | None


class DecoderStep(NamedTuple):
    """The rows of a step. `lengths` are the sequences of a single row; None: each row is one."""

    ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...] | None = None

    @property
    def positions(self) -> torch.Tensor:
        if self.lengths is None:
            return torch.arange(self.ids.shape[1]).unsqueeze(0)
        return torch.cat([torch.arange(length) for length in self.lengths]).unsqueeze(0)


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """The id that each position predicts; some positions have none."""
    labels = torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), IGNORE_INDEX)), dim=1)
    labels[:, 3::5] = IGNORE_INDEX
    return labels


def take_step(path: str, spread: Spread, step: DecoderStep) -> RankShard:
    """Forward and backward pass on this rank, gradients of the mean loss reduced as in a run."""
    from mindspeed_mm.platform import get_platform

    platform = get_platform("cpu")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.objectives.sft import sum_losses
    from mindspeed_mm.platform.distributed import init_single_process
    from mindspeed_mm.platform.segments import Segments

    if spread.ranks == 1:
        init_single_process(platform)
    else:
        parallel_state.initialize_model_parallel(spread.tensor, spread.pipeline, context_parallel_size=spread.context)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    runtime = Runtime(
        tensor_model_parallel_size=spread.tensor,
        pipeline_model_parallel_size=spread.pipeline,
        context_parallel_size=spread.context,
        sequence_parallel=spread.sequence_parallel,
    )
    vlm, _ = build_vlm(
        load_model_spec(Path(path)),
        runtime,
        torch.device("cpu"),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    vlm.config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(vlm.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), vlm.train())
    losses = []

    def forward(_iterator, chunk):
        segments = None if step.lengths is None else Segments.of_lengths(step.lengths, torch.device("cpu"))
        output = chunk(step.ids, step.positions, labels=step.labels, segments=segments)
        losses.append(output.detach().clone())
        return output, sum_losses

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=step.ids.shape[1],
        micro_batch_size=step.ids.shape[0],
        forward_only=False,
    )
    return RankShard(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        _gradients(vlm),
        losses[0] if parallel_state.is_pipeline_last_stage() else None,
    )


def _gradients(vlm) -> dict[str, torch.Tensor]:
    """Gradients of what is trained of the text decoder, its layers numbered over the whole part."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from mindspeed_mm.weights.loading import global_name

    offset = get_transformer_layer_offset(vlm.text_decoder.config)
    return {
        global_name(name, offset): parameter.main_grad.clone()
        for name, parameter in vlm.text_decoder.named_parameters()
        if parameter.requires_grad
    }


def joined(shards: list[RankShard], part, spec, rules=None) -> dict[str, torch.Tensor]:
    """Gradients of the whole part in HF's names (or those of other `rules`)."""
    from mindspeed_mm.weights.shards import unshard

    full = {}
    for step in part.rules["ours"].steps(spec.geometry):
        holding = [shard for shard in shards if step.target in shard.gradients]
        by_rank = {shard.tensor_rank: shard.gradients[step.target] for shard in holding}
        full[step.target] = unshard([by_rank[rank] for rank in sorted(by_rank)], step.rule, spec.geometry)
    return (rules or part.rules["hf"]).export(full, spec.geometry)


def joined_losses(shards: list[RankShard]) -> torch.Tensor:
    """Token losses of the last stage, of all slices of the sequence one behind the other."""
    by_slice = {shard.context_rank: shard.losses for shard in shards if shard.losses is not None}
    return torch.cat([by_slice[rank] for rank in sorted(by_slice)])


RECOMPUTED = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective"},
}


def check_recomputation(path: Path, kind: str, step: DecoderStep) -> None:
    """Assert that a model.json's decoder has the losses and gradients of `step` with recomputation, too."""
    model = json.loads(path.read_text())
    model["text_decoder"].update(RECOMPUTED[kind])
    again = path.with_name("recomputed.json")
    again.write_text(json.dumps(model))
    found, wanted = (take_step(str(each), Spread(), step) for each in (again, path))
    torch.testing.assert_close(found.losses, wanted.losses)
    for key, gradient in wanted.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient)
