"""A two-layer language model and its data, small enough to train in milliseconds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

VOCABULARY = 32
SEQUENCE = 8


def arguments(*flags: str, world_size: int = 1, train_iters: int = 4, batch: tuple[int, int] = (2, 4)):
    """DriverArguments from flags; batch is (micro, global)."""
    from megatron.driver.arguments import add_arguments, from_namespace

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    common = ["--lr", "1e-2", "--train-iters", str(train_iters), "--seq-length", str(SEQUENCE), "--log-interval", "1"]
    sizes = ["--micro-batch-size", str(batch[0]), "--global-batch-size", str(batch[1])]
    return from_namespace(parser.parse_args([*common, *sizes, *flags]), world_size=world_size)


@dataclass
class TinyBatch:
    input_ids: torch.Tensor
    labels: torch.Tensor
    sample_ids: list[str]

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def supervised(self) -> int:
        return int((self.labels >= 0).sum())


def tiny_batches(*, consumed: int, micro: int, rank: int, size: int, masked: bool = False) -> Iterator[TinyBatch]:
    """Endless micro-batches of rows that depend only on their number; global batches are cut rank after rank.

    Rows have different numbers of labels, so that a mean of means differs from the mean over tokens.
    """
    row = consumed
    while True:
        rows = [row + rank * micro + index for index in range(micro)]
        row += micro * size
        ids, labels = zip(*(_row(number, masked) for number in rows), strict=True)
        yield TinyBatch(torch.stack(ids), torch.stack(labels), [f"row-{number}" for number in rows])


def _row(number: int, masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCABULARY, (SEQUENCE + 1,), generator=generator)
    labels = tokens[1:].clone()
    labels[: SEQUENCE if masked else 1 + number % 5] = -100
    return tokens[:-1], labels


def tiny_model(
    frozen: tuple[str, ...] = (),
    dropout: float = 0.0,
    width: int = 16,
    layers: int = 2,
    vocabulary: int = VOCABULARY,
):
    """model_provider of a GPTModel; parameters whose name contains a word of `frozen` are frozen."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    def provide(pre_process: bool, post_process: bool):
        from megatron.core import parallel_state

        config = TransformerConfig(
            num_layers=layers,
            hidden_size=width,
            num_attention_heads=2,
            ffn_hidden_size=2 * width,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=dropout,
            attention_dropout=0.0,
            tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
            pipeline_dtype=torch.float32,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="LayerNorm"),
            vocabulary,
            SEQUENCE,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(word in name for word in frozen))
        return model

    return provide


def forward_step(data_iterator, model):
    """See megatron.driver."""
    batch = next(data_iterator)
    positions = torch.arange(SEQUENCE).expand_as(batch.input_ids)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    labels = batch.labels
    output = model(batch.input_ids, positions, mask, labels=labels.clamp(min=0))

    def loss_func(losses: torch.Tensor):
        supervised = labels >= 0
        total = (losses.float() * supervised).sum()
        count = supervised.sum()
        return total, count, {"lm loss": (total.detach(), count)}

    return output, loss_func


def begin(args, provider=None, hooks=None):
    """initialize + setup on the CPU."""
    from megatron.driver.initialize import initialize
    from megatron.driver.setup import setup
    from mindspeed_mm.platform import get_platform

    platform = get_platform("cpu")
    initialize(args, platform)
    return setup(args, provider or tiny_model(), platform, hooks)


def run(args, provider=None, hooks=None, step=forward_step, masked: bool = False):
    """A whole run: (state, report)."""
    from megatron.driver.loop import train

    state = begin(args, provider, hooks)
    batches = tiny_batches(
        consumed=state.consumed_samples,
        micro=args.micro_batch_size,
        rank=state.data_parallel_rank,
        size=state.data_parallel_size,
        masked=masked,
    )
    return state, train(state, args, step, batches, hooks)


def snapshot_of_parameters(state) -> dict[str, torch.Tensor]:
    """Parameters by name; those of pipeline chunks behind their number."""
    return {
        (f"{number}.{name}" if number else name): parameter.detach().clone()
        for number, module in enumerate(state.modules)
        for name, parameter in module.named_parameters()
    }


def snapshot(state) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state by name."""
    tensors = snapshot_of_parameters(state)
    for number, values in enumerate(state.optimizer.optimizer.state.values()):
        tensors |= {f"optimizer.{number}.{name}": value.clone() for name, value in values.items()}
    return tensors


def whole_run(*flags, train_iters: int = 4, hooks=None, step=forward_step, batch=(2, 4), **model):
    """A run from process group to shut-down in this process: (snapshot, report, state). `model` goes to tiny_model."""
    from megatron.driver.initialize import shutdown

    args = arguments(*map(str, flags), train_iters=train_iters, batch=batch)
    try:
        state, report = run(args, tiny_model(**model), hooks, step)
        return snapshot(state), report, state
    finally:
        shutdown()


def records(save: Path) -> list[dict]:
    """metrics.jsonl of a save folder."""
    import json

    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Train in a process of its own: seconds per micro-batch, steps, flags."""
    import os
    import sys
    import time

    pause, steps, *flags = sys.argv[1:]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))

    def slow_step(data_iterator, model):
        time.sleep(float(pause))
        return forward_step(data_iterator, model)

    torch.set_num_threads(1)
    from mindspeed_mm.platform import get_platform

    get_platform("cpu")
    from megatron.driver.initialize import shutdown
    from megatron.driver.watch import naming_lost_ranks

    batch = (2, max(4, 2 * world_size))
    try:
        with naming_lost_ranks():
            run(arguments(*flags, train_iters=int(steps), world_size=world_size, batch=batch), step=slow_step)
    finally:
        shutdown()


if __name__ == "__main__":
    main()
