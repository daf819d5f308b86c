"""`doctor --parity`: the CPU equals itself, and every fault that is planted is found."""

import json

import pytest
import torch

from mindspeed_mm.doctor.parity import model, operators, run, verdict, worker
from mindspeed_mm.doctor.parity.verdict import Collected, ParityRow, compare, is_equal, relative_error, row_scale_error
from mindspeed_mm.errors import TrainingError
from mindspeed_mm.platform import Platform, get_platform
from mindspeed_mm.platform.cpu import CpuPlatform

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    """What the CPU gives."""
    return worker.collect(get_platform("cpu"), tmp_path_factory.mktemp("reference"))


def with_fault(monkeypatch, tmp_path, name, fault, dtypes=("fp32",)):
    """Everything once more, on a CPU whose method `name` is `fault(original, self, ...)`."""
    original = getattr(CpuPlatform, name)
    monkeypatch.setattr(CpuPlatform, name, lambda *args, **options: fault(original, *args, **options))
    return worker.collect(get_platform("cpu"), tmp_path, dtypes)


def differing(cpu, found):
    """Kinds of cases that are not equal."""
    return {(row.dtype, row.kind) for row in compare(cpu, found) if not is_equal([row])}


def wrong_mask(original, self, query, key, value, *, mask, causal, **options):
    """Hides each query's own position as well, but for the first."""
    if causal and query.shape[2] > 1:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(-1)
        seen[0, 0] = True
        mask, causal, options["window"] = seen[None, None], False, None
    return original(self, query, key, value, mask=mask, causal=causal, **options)


def wrong_scale(original, self, *tensors, scale, **options):
    return original(self, *tensors, scale=1.1 * scale, **options)


def swapped_heads(original, self, query, key, value, **options):
    """Takes query heads for those of the neighbouring key/value head."""
    if query.shape[1] == key.shape[1]:
        return original(self, query, key, value, **options)
    order = torch.arange(query.shape[1]).view(key.shape[1], -1).t().flatten()
    return original(self, query[:, order], key, value, **options)


def wrong_epsilon(original, self, x, weight, eps):
    return original(self, x, weight, 1.0)


def wrong_half(original, self, x):
    gate, up = x.chunk(2, dim=-1)
    return original(self, torch.cat((up, gate), dim=-1))


def wrong_direction(original, self, qkv, cos, sin, groups, head_size=None):
    return original(self, qkv, cos, -sin, groups, head_size)


def neighbours(original, self, query, key, value, segments, *, causal=True, **options):
    """Looks into the sequence before."""
    if causal:
        whole = type(segments).of_lengths([segments.ends[-1]], query.device)
        return original(self, query, key, value, whole, causal=True, **options)
    return original(self, query, key, value, segments, causal=causal, **options)


ATTENTION = {"operator", "layer", "loss", "gradient", "trajectory", "generation"}


def one_ahead(original, self, query, key, value, segments, *, causal=True, window=None, **options):
    """In packed rows alone, each query sees the key behind its own."""
    if not causal or window is not None:
        return original(self, query, key, value, segments, causal=causal, window=window, **options)
    outputs = []
    for place in segments.slices:
        length = place.stop - place.start
        seen = torch.ones(length, length, dtype=torch.bool).tril(1)[None, None]
        row = (x[place].transpose(0, 1)[None] for x in (query, key, value))
        outputs.append(self.attention(*row, mask=seen, causal=False, **options)[0].transpose(0, 1))
    return torch.cat(outputs)


def pairs_for_halves(original, self, qkv, cos, sin, groups, head_size=None):
    """Rotates channels 2i and 2i + 1 together, where Llama rotates i and i + D/2."""
    rotated = 2 * cos.shape[-1]
    order = torch.arange(rotated).view(-1, 2).t().flatten()
    x = qkv.reshape(*qkv.shape[:2], groups, -1, head_size or rotated).clone()
    x[..., :-1, :rotated] = x[..., :-1, order]
    x = original(self, x.view(qkv.shape), cos, sin, groups, head_size).view(x.shape).clone()
    x[..., :-1, order] = x[..., :-1, :rotated].clone()
    return x.view(qkv.shape)


def nearly_the_epsilon(original, self, x, weight, eps):
    """1e-6 for 1e-5, which values of size 1 hide."""
    return original(self, x, weight, eps / 10)


def one_more_in_the_window(original, self, *tensors, window=None, **options):
    return original(self, *tensors, window=None if window is None else window + 1, **options)


def wrong_behind_a_block(original, self, query, key, value, **options):
    """A kernel whose second block of queries is wrong."""
    output = original(self, query, key, value, **options)
    return torch.cat((output[:, :, :128], 1.01 * output[:, :, 128:]), dim=2)


def wrong_for_wide_heads(original, self, query, key, value, **options):
    return original(self, query, key, value, **options) * (1.01 if query.shape[3] >= 128 else 1)


def first_key_hidden(original, self, query, key, value, *, mask, **options):
    """Behind a cache alone."""
    if query.shape[2] == 1 and mask is not None:
        mask = mask & (torch.arange(mask.shape[3]) > 0)
    return original(self, query, key, value, mask=mask, **options)


def aligned_to_the_first_key(original, self, query, key, value, queries, keys, **options):
    """Takes the new tokens of a sequence for its first ones."""
    own = [end - begin for begin, end in zip((0, *queries.ends), queries.ends, strict=False)]
    places = [torch.arange(begin, begin + n) for begin, n in zip((0, *keys.ends), own, strict=False)]
    key, value = (x[torch.cat(places)] for x in (key, value))
    return original(self, query, key, value, queries, queries, **options)


FAULTS = {
    "wrong mask": ("attention", wrong_mask, ATTENTION),
    "wrong scale": ("attention", wrong_scale, {"operator", "layer", "gradient"}),
    "swapped heads": ("attention", swapped_heads, {"operator", "layer", "gradient"}),
    "wrong epsilon": ("rms_norm", wrong_epsilon, ATTENTION),
    "halves exchanged, silu": ("swiglu", wrong_half, ATTENTION),
    "halves exchanged, gelu": ("geglu", wrong_half, {"operator"}),
    "rotated backwards": ("rotate_qk", wrong_direction, {"operator", "layer"}),
    "neighbours seen": ("segment_attention", neighbours, {"operator", "layer", "loss", "gradient"}),
    "one key ahead in packed rows": ("segment_attention", one_ahead, {"operator", "layer", "loss", "gradient"}),
    "pairs rotated for halves": ("rotate_qk", pairs_for_halves, ATTENTION),
    "a tenth of the epsilon": ("rms_norm", nearly_the_epsilon, {"layer", "gradient"}),
    "one key more in a window": ("attention", one_more_in_the_window, {"operator"}),
    "wrong behind a block": ("attention", wrong_behind_a_block, {"operator"}),
    "wrong for wide heads": ("attention", wrong_for_wide_heads, {"operator"}),
    "causal from the first key on": ("continued_attention", aligned_to_the_first_key, {"operator"}),
    "first key hidden in decoding": ("attention", first_key_hidden, {"operator"}),
}

TWICE = ("wrong mask", "wrong scale", "swapped heads")
"""Planted in bfloat16 as well, whose tolerances are wider."""


THROUGH_ALL = ("wrong scale", "halves exchanged, silu", "one key ahead in packed rows", "a tenth of the epsilon")
"""Looked for in cases of every kind; the slow tests do it with each fault. Operators alone find the others as well."""

PLANTED = [(name, kinds if name in THROUGH_ALL else {"operator"}) for name, (_, _, kinds) in FAULTS.items()]
REST = [(name, FAULTS[name][2]) for name, kinds in PLANTED if kinds != FAULTS[name][2]]


@pytest.mark.parametrize(("name", "kinds"), PLANTED + [pytest.param(*rest, marks=pytest.mark.slow) for rest in REST])
def test_planted_faults_are_found(cpu, monkeypatch, tmp_path, name, kinds):
    method, fault, _ = FAULTS[name]
    dtypes = ("fp32", "bf16") if name in TWICE else ("fp32",)
    if kinds == {"operator"}:  # nothing else needs to be computed
        monkeypatch.setattr(worker, "_all_cases", lambda platform, dtype, folder: operators.compute(platform, dtype))
    found = differing(cpu, with_fault(monkeypatch, tmp_path, method, fault, dtypes))
    missed = {(dtype, kind) for dtype in dtypes for kind in kinds} - found
    assert not missed


def test_every_operation_of_the_platform_is_a_case(cpu):
    """What takes tensors and gives tensors."""
    named = {name.split(": ")[2].split(",")[0] for name in cpu.values if name.startswith("fp32: operator")}
    operations = {
        name
        for name, method in vars(Platform).items()
        if not name.startswith("_") and "torch.Tensor" in str(getattr(method, "__annotations__", {}))
    } - {"device_rng_state", "set_device_rng_state"}
    others = {
        "segment_attention": "attention in sequences of a row",
        "continued_attention": "attention of continued sequences",
        "branch_attention": "attention in branches",
    }
    assert others.keys() < operations
    assert {others.get(name, name) for name in operations} <= named


def test_the_cpu_equals_itself(cpu, tmp_path):
    found = worker.collect(get_platform("cpu"), tmp_path)
    assert not cpu.errors and not found.errors
    rows = compare(cpu, found)
    assert is_equal(rows) and not [row for row in rows if row.error and row.dtype == "fp32"]
    kinds = {row.kind for row in rows}
    assert kinds == set(verdict.FP32_TOLERANCES) - {"collective"}
    assert len(cpu.values["fp32: trajectory: losses"]) == model.STEPS


def test_a_lost_optimizer_state_is_found(cpu, monkeypatch, tmp_path):
    real = model._arguments
    monkeypatch.setattr(
        model,
        "_arguments",
        lambda dtype, steps, flags: real(dtype, steps, flags + (" --no-load-optim" if "--load" in flags else "")),
    )
    found = worker.collect(get_platform("cpu"), tmp_path, ("fp32",))
    assert ("fp32", "save and resume") in differing(cpu, found)


def adamw_with(monkeypatch, **changes):
    """Every AdamW of the run takes other numbers than it was given, at its steps too."""
    import megatron.core.optimizer as core

    def build(*args, **options):
        built = core_adam(*args, **options)
        step = built.step

        def changed(*args):
            for group in built.param_groups:
                group.update(changes)
            return step(*args)

        built.step = changed
        return built

    core_adam = core.Adam
    monkeypatch.setattr(core, "Adam", build)


@pytest.mark.parametrize("changes", [{"weight_decay": 0.0}, {"eps": 1e-8}, {"betas": (0.9, 0.999)}])
def test_a_number_that_adamw_loses_is_found(cpu, monkeypatch, changes):
    adamw_with(monkeypatch, **changes)
    found = model.optimized(get_platform("cpu"), torch.float32)
    assert ("fp32", "optimizer") in differing(cpu, Collected({f"fp32: {name}": value for name, value in found.items()}))


@pytest.mark.parametrize("times", [0, 2])
def test_gradients_clipped_not_at_all_or_twice_are_found(cpu, monkeypatch, times):
    import megatron.core.optimizer.optimizer as core

    clip = core.clip_grad_by_total_norm_fp32
    monkeypatch.setattr(
        core, "clip_grad_by_total_norm_fp32", lambda *args, **options: [clip(*args, **options) for _ in range(times)]
    )
    found = model.optimized(get_platform("cpu"), torch.float32)
    assert ("fp32", "optimizer") in differing(cpu, Collected({f"fp32: {name}": value for name, value in found.items()}))


def test_a_gradient_of_a_bias_that_is_lost_is_found(cpu, monkeypatch):
    from mindspeed_mm.platform import host_linear
    from mindspeed_mm.platform.distributed import init_single_process

    backward = host_linear._Linear.backward

    def without_bias(ctx, grad):
        x, weight, bias = backward(ctx, grad)
        return x, weight, None if bias is None else torch.zeros_like(bias)

    monkeypatch.setattr(host_linear._Linear, "backward", staticmethod(without_bias))
    init_single_process(get_platform("cpu"))
    found = model.layers(get_platform("cpu"), torch.float32)
    rows = compare(cpu, Collected({f"fp32: {name}": value for name, value in found.items()}))
    wrong = [row.case for row in rows if row.verdict == "different"]
    assert wrong and all(name.endswith(".bias") for name in wrong)


def test_a_random_state_that_is_not_put_back_is_found(cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(operators.torch, "set_rng_state", lambda state: None)
    found = worker.collect(get_platform("cpu"), tmp_path, ("fp32",))
    assert ("fp32", "random state") in differing(cpu, found)


def test_an_operator_that_fails_is_told_and_the_rest_goes_on(cpu, monkeypatch, tmp_path):
    def fails(original, self, x):
        raise RuntimeError("aclnnGeGlu failed\nand a long trace")

    found = with_fault(monkeypatch, tmp_path, "geglu", fails)
    rows = [row for row in compare(cpu, found) if not is_equal([row]) and row.dtype == "fp32"]
    assert {(row.verdict, row.case.split(":")[0], row.note) for row in rows} == {
        ("failed", "geglu", "RuntimeError: aclnnGeGlu failed")
    }


def test_what_the_cpu_cannot_compute_is_told():
    (row,) = compare(Collected(errors={"fp32: layer": "ValueError: no"}), Collected())
    assert (row.verdict, row.kind, row.note) == ("failed", "layer", "on the CPU: ValueError: no")


def test_errors_are_relative_norms():
    one = torch.tensor([3.0, 4.0])
    assert relative_error(one, one) == 0 and relative_error(one + torch.tensor([0.0, 0.5]), one) == pytest.approx(0.1)
    assert relative_error(one, torch.zeros(2)) == 5
    assert relative_error(one * float("nan"), one) == relative_error(one[:1], one) == float("inf")


def test_errors_of_rows_are_those_of_their_scale():
    rows = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    across = torch.tensor([[-4.0, 3.0], [0.0, 1.0]])
    scales = torch.tensor([[1.03], [0.96]])
    assert row_scale_error(rows + 0.1 * across, rows) < 1e-7
    assert row_scale_error(scales * rows + 0.1 * across, rows) == pytest.approx(((9 + 16) / 2) ** 0.5 / 100, rel=1e-5)
    assert row_scale_error(rows * float("nan"), rows) == row_scale_error(rows[:1], rows) == float("inf")


def test_bfloat16_may_be_as_far_as_three_times_the_cpus_own():
    exact = {"fp32: operator: x": torch.tensor([1.0]), "bf16: operator: x": torch.tensor([1.02])}
    for value, wanted in ((1.05, "equal"), (1.07, "different")):
        found = Collected({"fp32: operator: x": torch.tensor([1.0]), "bf16: operator: x": torch.tensor([value])})
        assert [row.verdict for row in compare(Collected(exact), found)] == ["equal", wanted]


@pytest.fixture
def console():
    from rich.console import Console

    return Console(record=True, width=140, file=open("/dev/null", "w"))


def test_the_table_names_what_differs(console):
    rows = [
        ParityRow("fp32", "operator", "rms_norm: result", "equal", 1e-7, 1e-4),
        ParityRow("fp32", "operator", "swiglu: result", "different", 0.5, 1e-4),
        ParityRow("bf16", "collective", "all-reduce", "skipped", note="1 device(s): two ranks need two"),
    ]
    run.show(rows, console)
    text = console.export_text()
    assert "1 different or failed" in text and "different: fp32 operator: swiglu: result: error 5.00e-01" in text
    assert "the device differs from the CPU" in text
    assert json.loads(json.dumps(run.as_json(rows, "npu")))["verdict"] == "different"
    assert is_equal(rows[::2])


def test_collectives_of_two_ranks(ranks):
    for found in ranks(2).run(_collectives):
        assert len(found) == 14 and not [name for name, value in found.items() if value]


def test_a_reduction_that_averages_is_found(ranks):
    for found in ranks(2).run(_averaging):
        assert {name for name, value in found.items() if value} == {
            f"{dtype}: collective: {name}" for dtype in ("fp32", "bf16") for name in ("all-reduce", "reduce-scatter")
        }


def _averaging():
    """As if averages were asked for, where sums are."""

    reduce, scatter = torch.distributed.all_reduce, torch.distributed.reduce_scatter_tensor
    ranks = torch.distributed.get_world_size()

    def averaged(tensor, kind=torch.distributed.ReduceOp.SUM):
        reduce(tensor, kind)
        tensor /= ranks if kind == torch.distributed.ReduceOp.SUM else 1

    def averaged_share(share, tensor):
        scatter(share, tensor)
        share /= ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", averaged)
        patch.setattr(torch.distributed, "reduce_scatter_tensor", averaged_share)
        return _collectives()


def _collectives():
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = worker.collectives(get_platform("cpu"), rank, size)
    return {name: value.abs().max().item() for name, value in found.items()}


def test_a_process_that_ends_early_is_told(monkeypatch, console):
    monkeypatch.setattr(run, "WORKER", "mindspeed_mm.doctor.parity.nothing")
    with pytest.raises(TrainingError, match="cpu ended with exit code 1: .*No module named"):
        run.parity("cpu", 0, console)


def test_a_process_that_does_not_end_is_told(monkeypatch, console):
    monkeypatch.setattr(run, "SECONDS", 0.01)
    with pytest.raises(TrainingError, match="cpu did not end within 0.01 s"):
        run.parity("cpu", 0, console)


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    from mindspeed_mm.cli.main import main

    target = tmp_path / "parity.json"
    assert main(["doctor", "--parity", "--device", "cpu", "--report", str(target), "--json"]) == 0
    out = capsys.readouterr().out
    assert "the device computes what the CPU computes" in out and f"written: {target}" in out
    told = json.loads(target.read_text())["parity"]
    assert told["verdict"] == "equal" and {"collective", "generation"} <= {row["kind"] for row in told["rows"]}
