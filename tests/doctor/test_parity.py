"""`doctor --parity`: the CPU equals itself, and every fault that is planted is found."""

import json

import pytest
import torch

from mindspeed_mm.doctor.parity import model, operators, run, verdict, worker
from mindspeed_mm.doctor.parity.verdict import Collected, ParityRow, compare, is_equal, relative_error
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
FAULTS = {
    "wrong mask": ("attention", wrong_mask, ATTENTION),
    "wrong scale": ("attention", wrong_scale, {"operator", "layer", "gradient"}),
    "swapped heads": ("attention", swapped_heads, {"operator", "layer", "gradient"}),
    "wrong epsilon": ("rms_norm", wrong_epsilon, ATTENTION),
    "halves exchanged, silu": ("swiglu", wrong_half, ATTENTION),
    "halves exchanged, gelu": ("geglu", wrong_half, {"operator"}),
    "rotated backwards": ("rotate_qk", wrong_direction, {"operator", "layer"}),
    "neighbours seen": ("segment_attention", neighbours, {"operator", "layer", "loss", "gradient"}),
}

TWICE = ("wrong mask", "wrong scale", "swapped heads")
"""Planted in bfloat16 as well, whose tolerances are wider."""


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(cpu, monkeypatch, tmp_path, name):
    method, fault, kinds = FAULTS[name]
    dtypes = ("fp32", "bf16") if name in TWICE else ("fp32",)
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
    assert operations == {"attention", "segment_attention", "rms_norm", "swiglu", "geglu", "rotate_qk"}
    assert operations - {"segment_attention"} <= named and "attention in sequences of a row" in named


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
        assert len(found) == 6 and not [name for name, value in found.items() if value]


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
