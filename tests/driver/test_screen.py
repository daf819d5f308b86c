"""Letter P: what a run shows while it trains."""

import io
import logging
import types

import pytest
from rich.console import Console

from mindspeed_mm.platform import get_platform

get_platform("cpu")

from megatron.driver import screen  # noqa: E402
from megatron.driver.log_lines import Pace, compact, duration, figures, place, short_line, validation_line  # noqa: E402
from megatron.driver.screen import LiveTable, MegatronLines, ShortLines, open_screen  # noqa: E402
from megatron.driver.state import BatchFacts, Hooks  # noqa: E402
from megatron.driver.steps import StepMetrics  # noqa: E402
from tests.helpers import tiny_training as tiny  # noqa: E402

STEP = StepMetrics(
    loss=0.4835,
    supervised=900,
    samples=32,
    tokens=1800,
    positions=2000,
    flops=5e12,
    data_seconds=0.001,
    seconds=0.0625,
    learning_rate=9.14e-4,
    loss_scale=1.0,
    grad_norm=1.944,
)


def state_of(iteration, peak=None):
    platform = types.SimpleNamespace(peak_flops=lambda _dtype: peak, memory=get_platform("cpu").memory)
    return types.SimpleNamespace(iteration=iteration, consumed_samples=32 * iteration, platform=platform)


def replaced(**changes):
    return StepMetrics(**{**vars(STEP), **changes})


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self):
        return self.now


def logged(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "megatron.driver.screen"]


def test_letter_p_the_short_line():
    shown = figures(state_of(290), tiny.arguments(), [STEP, STEP], 300.0, 44.2)
    assert short_line(place(state_of(290), tiny.arguments(train_iters=1000)), shown) == (
        "step  290/1000 | loss 0.4835 | lr 9.14e-04 | grad norm 1.94 | 512 samples/s | 28.8k tokens/s | "
        "memory 0.315 GB | data wait 1.6 % | padding 10 % | 0.0625 s a step | 44 s left"
    )


def test_tflops_are_there_where_the_peak_is_known():
    args = tiny.arguments()
    assert "TFLOP/s" not in short_line("", figures(state_of(1), args, [STEP], 1.0, None))
    line = short_line("", figures(state_of(1, peak=320e12), args, [STEP], 1.0, None))
    assert "| 80 TFLOP/s (25 % of the peak) |" in line


def test_skipped_steps_and_the_loss_scale_are_said():
    steps = [STEP, replaced(grad_norm=None, loss_scale=1024.0)]
    line = short_line("", figures(state_of(2), tiny.arguments("--fp16"), steps, 1.0, None))
    assert "grad norm skipped | loss scale 1024 | 1 of 2 steps skipped, gradients overflowed |" in line


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (999.4, "999"), (999.6, "1k"), (28_700, "28.7k"), (1.5e6, "1.5M"), (2e9, "2G")]
)
def test_large_figures_are_short(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min"), (200_000, "2 d 07 h"), (61, "1 min 01 s")],
)
def test_times_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_counts_what_lies_between_steps():
    clock = Clock()
    pace = Pace(clock)
    pace.count()
    assert pace.left(10) is None, "the first step is slower than all others"
    for now in (2.0, 9.0):  # two seconds for a step, then five for a save beside it
        clock.now = now
        pace.count()
    assert pace.left(10) == 45.0 and pace.left(0) == 0.0


def test_letter_p_a_run_shows_one_short_line_at_each_interval_and_at_its_ends(caplog):
    with caplog.at_level("INFO", logger="megatron.driver"):
        tiny.whole_run("--log-interval", "2", train_iters=5)
    lines = logged(caplog)
    assert [line.split(" | ")[0] for line in lines] == ["step 1/5", "step 2/5", "step 4/5", "step 5/5"]
    assert all(
        part in lines[1] for part in ("loss 3.", "lr ", "samples/s", "tokens/s", "memory ", "data wait ", " left")
    )
    assert not any("lm loss" in line for line in lines)


def show_memory_on_this_rank(folder):
    """The peak that rank 0 shows, when the other rank needs more."""
    from megatron.driver.initialize import is_rank_0, shutdown
    from mindspeed_mm.platform.base import MemoryStats

    get_platform("cpu").memory = lambda: MemoryStats(1.0, 2048.0 if is_rank_0() else 4096.0, 9000.0)
    handler = logging.StreamHandler(text := io.StringIO())
    logging.getLogger("megatron.driver").addHandler(handler)
    try:
        tiny.run(tiny.arguments(world_size=2, train_iters=1))
    finally:
        shutdown()
        logging.getLogger("megatron.driver").removeHandler(handler)
        del get_platform("cpu").memory
    return text.getvalue()


def test_memory_is_that_of_the_fullest_rank(ranks, tmp_path):
    first, second = ranks(2).run(show_memory_on_this_rank, tmp_path)
    assert "memory 4.29 GB" in first and "step 1/1" not in second


def test_metrics_keep_their_form(tmp_path):
    """What is shown goes into no file: metrics.jsonl has the keys that it always had."""
    tiny.whole_run("--save", tmp_path, train_iters=1)
    (record,) = tiny.records(tmp_path)
    assert list(record) == ["iteration", "consumed_samples", *STEP.record]


def console(width=120):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def test_the_live_table():
    args, state, clock = tiny.arguments(train_iters=40), state_of(0), Clock()
    target = console()
    table = LiveTable(state, args, target, Pace(clock), clock)
    for step in range(1, 21):
        state.iteration, clock.now = step, clock.now + 1.0
        table.step(300.0, [replaced(loss=float(step))], due=step % 2 == 0)
    table.close()
    last = target.file.getvalue().split("samples/s")[-1]
    assert "tokens/s" in last and "memory" in last
    assert "step 20 of 40 (50 %), 20 s left" in last
    rows = [line.split()[:2] for line in last.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [[str(step), f"{float(step):#.4g}"] for step in range(2, 21, 2)]


def test_the_table_keeps_the_last_rows_and_fits_80_columns():
    args, state, target = tiny.arguments(train_iters=100), state_of(0, peak=320e12), console(80)
    table = LiveTable(state, args, target, Pace(Clock()), Clock())
    for step in range(1, 31):
        state.iteration = step
        table.step(30000.0, [STEP], due=True)
    table.close()
    drawn = table._table()
    assert drawn.row_count == screen.ROWS
    target.file = io.StringIO()
    target.print(drawn)
    text = target.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "TFLOP/s" in text and "padding" not in text and "31.5 GB" in text


@pytest.mark.parametrize("good", [0, 1])
def test_letter_k_a_terminal_that_is_closed_ends_no_training(good):
    """The run is told by SIGHUP, and has to save first."""

    def write(text):
        raise OSError(5, "Input/output error")

    target, state = console(), state_of(0)
    table = LiveTable(state, tiny.arguments(), target, Pace(Clock()), Clock())
    for step in range(3):
        if step == good:
            target.file.write = write
        state.iteration += 1
        table.step(0.0, [STEP], due=True)
    table.close()


def test_the_bar_moves_between_log_lines():
    args, state, clock, target = tiny.arguments(train_iters=10), state_of(1), Clock(), console()
    table = LiveTable(state, args, target, Pace(clock), clock)
    table.step(0.0, [STEP], due=False)
    state.iteration = 2
    table.step(0.0, [STEP, STEP], due=False)  # too soon to be drawn
    assert "step 1 of 10" in target.file.getvalue() and "step 2 of 10" not in target.file.getvalue()
    clock.now = 1.0
    table.step(0.0, [STEP, STEP], due=False)
    assert "step 2 of 10" in target.file.getvalue()
    table.close()
    assert "\x1b[?25l" not in target.file.getvalue().split("\x1b[?25h", 1)[1], "the cursor is never left hidden"


def test_a_live_table_that_never_began_closes():
    LiveTable(state_of(0), tiny.arguments(), console()).close()


@pytest.mark.parametrize(
    ("form", "terminal", "expected"),
    [
        ("auto", False, ShortLines),
        ("auto", True, LiveTable),
        ("table", False, LiveTable),
        ("short", True, ShortLines),
        ("megatron", True, MegatronLines),
    ],
)
def test_the_form_follows_the_flag_and_the_terminal(monkeypatch, form, terminal, expected):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr("sys.stderr", types.SimpleNamespace(isatty=lambda: terminal, write=len, flush=lambda: None))
    assert type(open_screen(state_of(0), tiny.arguments("--log-format", form))) is expected


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stderr", types.SimpleNamespace(isatty=lambda: True, write=len, flush=lambda: None))
    assert type(open_screen(state_of(0), tiny.arguments())) is ShortLines


def test_validation_in_both_forms():
    args = tiny.arguments(train_iters=100)
    assert validation_line(state_of(20), args, 2.0, 7.389, 64) == (
        "step  20/100 | validation loss 2.000 | perplexity 7.389 | 64 samples"
    )
    args = tiny.arguments("--log-format", "megatron", train_iters=100)
    assert validation_line(state_of(20), args, 2.0, 7.389, 64).startswith(
        "validation loss at iteration 20 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389000E+00 | samples: 64 |"
    )


def test_flags_without_an_effect_are_said_once_together():
    flags = ["--use-flash-attn", "--exit-signal-handler", "--sequence-parallel", "--save", "x"]
    (note,) = tiny.arguments(*flags).notes()
    assert note == (
        "accepted, and without an effect in this run: --use-flash-attn (the platform picks its fastest exact attention "
        "kernel), --exit-signal-handler (SIGTERM always saves and stops), --sequence-parallel (it needs "
        "--tensor-model-parallel-size above 1)"
    )
    assert tiny.arguments("--save", "x").notes() == []


def test_the_table_of_a_run_on_a_terminal(monkeypatch):
    """A whole run whose log passes through the live table."""
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    hooks = Hooks(describe=lambda b: BatchFacts(b.sample_ids, b.tokens, b.supervised, b.tokens))
    tiny.whole_run("--log-format", "table", train_iters=3, hooks=hooks)
    assert "step 3 of 3 (100 %), 0 s left" in text.getvalue()
