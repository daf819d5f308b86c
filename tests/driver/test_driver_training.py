"""One process: schedules, precision, steps that must not go on."""

import gc
import math
import os
import signal
import weakref

import pytest
import torch

from mindspeed_mm.errors import ConfigError, TrainingError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny

get_platform("cpu")

from megatron.driver.loop import train  # noqa: E402
from megatron.driver.state import BatchFacts, Hooks  # noqa: E402
from megatron.driver.stopping import StopRequest  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_process")


def rates(tmp_path, *flags, train_iters=8):
    tiny.run(tiny.arguments("--save", str(tmp_path), *flags, train_iters=train_iters, batch=(1, 1)))
    return [record["learning_rate"] for record in tiny.records(tmp_path)]


def test_cosine_schedule_with_warm_up(tmp_path):
    found = rates(tmp_path, "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.25", "--lr", "1")
    cosine = [0.5 * (1 + math.cos(math.pi * (step - 2) / 6)) for step in range(2, 8)]
    assert found == pytest.approx([0.0, 0.5, *cosine])


def test_linear_schedule_ends_at_min_lr(tmp_path):
    found = rates(tmp_path, "--lr-decay-iters", "4", "--lr", "1", "--min-lr", "0.2", train_iters=6)
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_constant_schedule(tmp_path):
    assert rates(tmp_path, "--lr-decay-style", "constant", train_iters=3) == [0.01] * 3


def test_adamw_equals_torch(tmp_path):
    """megatron.core's optimizer against torch.optim.AdamW with the same groups, on the same gradients."""
    args = tiny.arguments("--clip-grad", "0", "--weight-decay", "0.1", "--lr-decay-style", "constant", train_iters=3)
    state = tiny.begin(args)
    reference = {name: p.detach().clone().requires_grad_() for name, p in state.modules[0].named_parameters()}
    decayed = [p for name, p in reference.items() if p.dim() > 1]
    plain = [p for name, p in reference.items() if p.dim() == 1]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)

    def step_and_follow(data_iterator, model):
        return tiny.forward_step(data_iterator, model)

    for _ in range(3):
        target = state.iteration + 1
        stop = tiny.arguments("--clip-grad", "0", train_iters=target)
        batches = tiny.tiny_batches(consumed=state.consumed_samples, micro=2, rank=0, size=1)
        train(state, stop, step_and_follow, batches)
        for name, parameter in state.modules[0].named_parameters():
            reference[name].grad = parameter.main_grad.clone()
        optimizer.step()
    for name, parameter in state.modules[0].named_parameters():
        torch.testing.assert_close(parameter, reference[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_loss_does_not_depend_on_the_split_into_micro_batches(tmp_path, micro):
    args = tiny.arguments("--save", str(tmp_path), "--clip-grad", "0", train_iters=3, batch=(micro, 4))
    state, _ = tiny.run(args)
    found = tiny.records(tmp_path)
    expected = reference_losses(3)
    assert [record["loss"] for record in found] == pytest.approx(expected, rel=1e-6)
    assert all(record["grad_norm"] > 0 for record in found)


def reference_losses(steps):
    """The same training in one piece: plain torch, loss over the tokens of the whole batch."""
    from megatron.driver.initialize import shutdown

    shutdown()
    args = tiny.arguments("--clip-grad", "0", train_iters=steps, batch=(4, 4))
    state = tiny.begin(args)
    model = state.modules[0]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], weight_decay=0.01)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        batches = tiny.tiny_batches(consumed=4 * step, micro=4, rank=0, size=1)
        output, loss_func = tiny.forward_step(batches, model)
        total, count, _ = loss_func(output)
        loss = total / count
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_bf16_and_fp16_train(tmp_path):
    from megatron.driver.initialize import shutdown

    for number, flags in enumerate((["--bf16"], ["--fp16", "--initial-loss-scale", "1024"])):
        folder = tmp_path / str(number)
        # The same four rows again and again, so that the loss must fall.
        args = tiny.arguments("--save", str(folder), *flags, "--lr-decay-style", "constant", train_iters=8)
        state = tiny.begin(args)
        rows = tiny.tiny_batches(consumed=0, micro=2, rank=0, size=1)
        batches = [next(rows), next(rows)]
        train(state, args, tiny.forward_step, iter(batches * 8))
        losses = [record["loss"] for record in tiny.records(folder)]
        assert losses[-1] < losses[0] - 0.3
        assert all(parameter.dtype != torch.float32 for parameter in state.modules[0].parameters())
        assert all(group.dtype == torch.float32 for group in state.optimizer.optimizer.param_groups[0]["params"])
        shutdown()


def test_fp16_overflow_is_a_skipped_step(tmp_path):
    args = tiny.arguments("--save", str(tmp_path), "--fp16", "--hysteresis", "1", train_iters=30, batch=(1, 1))
    state, _ = tiny.run(args)
    found = tiny.records(tmp_path)
    skipped = [record for record in found if record["grad_norm"] is None]
    assert skipped and state.skipped_iterations == len(skipped) < 30
    assert found[0]["loss_scale"] == 2.0**32
    assert found[-1]["loss_scale"] < 2.0**32
    assert state.scheduler.num_steps == 30 - len(skipped)


def test_fp16_overflow_at_the_smallest_scale_stops(tmp_path):
    scale = str(2.0**32)
    flags = ["--fp16", "--hysteresis", "1", "--initial-loss-scale", scale, "--min-loss-scale", scale]
    with pytest.raises(TrainingError, match="gradients overflow at the smallest loss scale"):
        tiny.run(tiny.arguments("--save", str(tmp_path), *flags, train_iters=30, batch=(1, 1)))


def test_the_log_line_has_megatrons_form(caplog):
    hooks = Hooks(describe=lambda b: BatchFacts(b.sample_ids, b.tokens - 4, b.supervised, b.tokens, flops=1e9))
    with caplog.at_level("INFO", logger="megatron.driver"):
        tiny.run(tiny.arguments("--log-format", "megatron", train_iters=1), hooks=hooks)
    line = next(r.getMessage() for r in caplog.records if "consumed samples" in r.getMessage())
    for part in (
        "iteration        1/       1 | consumed samples:            4 | elapsed time per iteration (ms): ",
        "| throughput per GPU (TFLOP/s/GPU): ",
        "| learning rate: 1.000000E-02 | global batch size:     4 | lm loss: 3.",
        "| loss scale: 1.0 | grad norm: ",
        "| number of skipped iterations:   0 | number of nan iterations:   0 |",
        "samples/s: ",
        "tokens/s: ",
        "data wait (%): ",
        "padding (%): 25.0",
    ):
        assert part in line
    assert any("memory (MB) | allocated:" in record.getMessage() for record in caplog.records)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny.run(tiny.arguments("--tensorboard-dir", str(tmp_path), train_iters=2))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert "grad_norm" in events.Tags()["scalars"]


def test_non_finite_loss_stops_with_the_samples(tmp_path):
    def poisoned(data_iterator, model):
        output, loss_func = tiny.forward_step(data_iterator, model)
        return output * float("inf"), loss_func

    with pytest.raises(TrainingError, match="step 1: the loss is (inf|nan): .*row-0, row-1, row-2, row-3"):
        tiny.run(tiny.arguments("--save", str(tmp_path)), step=poisoned)
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


def test_non_finite_gradient_stops():
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    def poisoned(data_iterator, model):
        output, loss_func = tiny.forward_step(data_iterator, model)
        return Poison.apply(output), loss_func

    with pytest.raises(TrainingError, match="the gradient norm is nan"):
        tiny.run(tiny.arguments(), step=poisoned)


def test_a_batch_without_labels_stops():
    with pytest.raises(TrainingError, match="step 1: no token of the global batch is supervised.*row-0"):
        tiny.run(tiny.arguments(), masked=True)


def test_a_masked_row_among_others_trains():
    masked = tiny.tiny_batches(consumed=0, micro=2, rank=0, size=1, masked=True)
    good = tiny.tiny_batches(consumed=2, micro=2, rank=0, size=1)
    state = tiny.begin(tiny.arguments(train_iters=1))
    report = train(state, tiny.arguments(train_iters=1), tiny.forward_step, iter([next(masked), next(good)]))
    assert report.iteration == 1 and math.isfinite(report.loss)


def detached(data_iterator, model):
    output, loss_func = tiny.forward_step(data_iterator, model)
    return output.detach(), loss_func


def test_a_gradient_of_zero_stops_unless_it_is_right():
    with pytest.raises(TrainingError, match="the gradient is zero"):
        tiny.run(tiny.arguments(), step=detached)


def test_a_gradient_of_zero_is_right_where_nothing_trained_takes_part():
    facts = Hooks(
        describe=lambda b: BatchFacts(b.sample_ids, b.tokens, b.supervised, b.tokens, gradient_expected=False)
    )
    _, report = tiny.run(tiny.arguments(train_iters=1), step=detached, hooks=facts)
    assert report.iteration == 1


def test_data_that_ends_is_an_error():
    state = tiny.begin(tiny.arguments())
    with pytest.raises(TrainingError, match="the data ended before the last step"):
        train(state, tiny.arguments(), tiny.forward_step, iter([]))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="nothing to train: all 6,304 parameters are frozen"):
        tiny.run(tiny.arguments(), tiny.tiny_model(frozen=("",)))


def test_another_backend_is_an_error():
    with pytest.raises(ConfigError, match="--distributed-backend hccl does not work on cpu: expected gloo"):
        tiny.run(tiny.arguments("--distributed-backend", "hccl"))


def test_a_world_of_another_size_is_an_error():
    with pytest.raises(ConfigError, match=r"checked for 2 process\(es\), 1 are running"):
        tiny.run(tiny.arguments(world_size=2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_stops(tmp_path, number):
    def terminated(data_iterator, model):
        os.kill(os.getpid(), number)
        return tiny.forward_step(data_iterator, model)

    before = signal.signal(number, signal.SIG_DFL)  # nohup has SIGHUP ignored
    try:
        _, report = tiny.run(tiny.arguments("--save", str(tmp_path)), step=terminated)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert report.iteration == 1
    assert report.checkpoint == tmp_path / "iter_0000001"


def test_letter_k_a_closed_terminal_stops_nothing_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exit_interval_saves_and_stops(tmp_path):
    _, report = tiny.run(tiny.arguments("--save", str(tmp_path), "--exit-interval", "3"))
    assert report.iteration == 3
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.mark.parametrize("distributed", [False, True])
def test_a_run_that_has_ended_is_freed(distributed):
    """Models, and with them the process groups and their threads: also with the distributed optimizer's views."""
    flags = ["--use-distributed-optimizer", "--overlap-grad-reduce"]
    model = weakref.ref(tiny.whole_run(*flags * distributed)[2].model[0])
    gc.collect()
    gc.collect()
    assert model() is None


def test_stages_need_a_length_of_samples():
    """`train` fills it in from the model config; others who use the driver give it."""
    import dataclasses

    from megatron.driver.setup import setup
    from mindspeed_mm.errors import ConfigError

    args = tiny.arguments("--pipeline-model-parallel-size", "2", world_size=2)
    with pytest.raises(ConfigError, match="--pipeline-model-parallel-size above 1 needs --seq-length"):
        setup(dataclasses.replace(args, seq_length=None), None, None)


def test_an_error_of_a_pass_names_the_samples_that_went_in_last():
    def broken(data_iterator, model):
        batch = next(data_iterator)
        if "row-2" in batch.sample_ids:
            raise RuntimeError("no such shape")
        return tiny.forward_step(iter([batch]), model)

    with pytest.raises(RuntimeError, match="no such shape") as caught:
        tiny.run(tiny.arguments(batch=(2, 4)), step=broken)
    assert caught.value.__notes__ == ["The last to go into the model: micro-batch 2 of 2, in step 1: row-2, row-3"]
