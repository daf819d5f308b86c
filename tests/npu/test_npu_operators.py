"""The operators that NpuPlatform calls: held against their schemas, equal to the CPU's, every one of them called."""

import ast
import inspect

import pytest
import torch

from mindspeed_mm.doctor.parity.verdict import Collected, compare, is_equal, relative_error
from mindspeed_mm.platform import npu, npu_adamw
from tests.doctor.test_parity import cpu  # noqa: F401 - a fixture
from tests.npu import runs
from tests.npu.test_npu_training import RUNS

pytestmark = pytest.mark.usefixtures("single_process")


def named_operators() -> set[str]:
    """npu_* operators that the platform's code names."""
    found = set()
    for module in (npu, npu_adamw):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("npu_"):
                found.add(node.attr)
    return found


@pytest.fixture(scope="module")
def stand_in(npu_ranks, tmp_path_factory):
    """(values, errors, calls) of doctor's cases on the stand-in."""
    (found,) = npu_ranks(1).run(runs.compared, str(tmp_path_factory.mktemp("npu")), ("fp32", "bf16"))
    return found


def test_every_case_of_the_doctor_equals_the_cpu(cpu, stand_in):  # noqa: F811
    values, errors, _ = stand_in
    assert not errors
    rows = compare(cpu, Collected(values))
    assert is_equal(rows), [row for row in rows if not is_equal([row])]
    for name, value in cpu.values.items():
        if name.startswith("fp32: ") and not name.startswith("fp32: trajectory"):
            bound = 1e-4 if name.startswith("fp32: optimizer") else 1e-5  # a small change of weights about 1
            assert relative_error(values[name], value) < bound, name


def test_every_operator_that_the_platform_names_is_called(stand_in):
    called = {name.partition(".")[0] for name in stand_in[2]}
    assert called == named_operators()


def operators_beside_the_base() -> dict[str, float]:
    """Largest relative error of each operation of NpuPlatform against Platform's own, in float32."""
    from mindspeed_mm.doctor.parity.operators import compute
    from mindspeed_mm.platform import current_platform
    from mindspeed_mm.platform.base import Platform

    platform, found = current_platform(), {}
    cases = list(compute(platform, torch.float32))
    fast = [case() for _, case in cases]
    names = ("attention", "segment_attention", "branch_attention", "rms_norm", "swiglu", "geglu", "rotate_qk")
    names += ("add_rms_norm", "continued_attention")
    own = {name: getattr(npu.NpuPlatform, name) for name in names}
    try:
        for name in names:
            setattr(npu.NpuPlatform, name, getattr(Platform, name))
        runs.calls()
        slow = [case() for _, case in compute(platform, torch.float32)]
        assert not runs.calls()
    finally:
        for name, method in own.items():
            if method is getattr(Platform, name):
                delattr(npu.NpuPlatform, name)
            else:
                setattr(npu.NpuPlatform, name, method)
    for (case, _), one, other in zip(cases, fast, slow, strict=True):
        found[case] = max(relative_error(one[name], other[name]) for name in one)
    return found


def test_operators_equal_their_fallbacks(npu_ranks):
    (errors,) = npu_ranks(1).run(operators_beside_the_base)
    assert len(errors) > 20 and max(errors.values()) < 1e-5, errors


def fallbacks() -> dict[str, dict[str, int]]:
    """Which operators are called for inputs that theirs do not take."""
    from mindspeed_mm.platform import current_platform
    from mindspeed_mm.platform.npu_adamw import NpuAdamW
    from mindspeed_mm.platform.segments import Segments

    platform, device = current_platform(), torch.device("cpu")
    options = {"scale": 0.5, "dropout": 0.0}
    x = torch.randn(1025, 2, 4)
    pairs = torch.randn(2050, 2, 4)
    many = Segments.of_lengths([1] * 1025, device)
    longest, short = torch.zeros(2**20 + 1, 1, 1), Segments.of_lengths([2], device)
    odd = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    odd.grad = torch.ones_like(odd)
    heads = torch.randn(1, 2, 3, 4)
    angles = torch.ones(2, 1, 1, 1, 448)
    cases = {
        "soft cap": lambda: platform.attention(heads, heads, heads, mask=None, causal=True, soft_cap=3.0, **options),
        "many sequences": lambda: platform.segment_attention(x, x, x, many, causal=False, **options),
        "many continued sequences": lambda: platform.continued_attention(
            x, pairs, pairs, many, Segments.of_lengths([2] * 1025, device), scale=0.5
        ),
        "too many keys": lambda: platform.continued_attention(
            longest[:2], longest, longest, short, Segments.of_lengths([2**20 + 1], device), scale=0.5
        ),
        "continued with a soft cap": lambda: platform.continued_attention(
            x[:2], x[:3], x[:3], short, Segments.of_lengths([3], device), scale=0.5, soft_cap=3.0
        ),
        "norm of another type": lambda: platform.rms_norm(torch.randn(2, 4).bfloat16(), torch.ones(4), 1e-5),
        "added norm of another type": lambda: platform.add_rms_norm(
            torch.randn(2, 4).bfloat16(), torch.randn(2, 4).bfloat16(), torch.ones(4), 1e-5
        ),
        "wide heads": lambda: platform.rotate_qk(torch.randn(2, 1, 3 * 896), angles, angles, 1),
        "double parameters": NpuAdamW([odd], lr=0.1).step,
    }
    found = {}
    for name, case in cases.items():
        runs.calls()
        case()
        found[name] = runs.calls()
    return found


def test_what_an_operator_does_not_take_goes_the_general_way(npu_ranks):
    (found,) = npu_ranks(1).run(fallbacks)
    assert found.pop("many sequences") == {"npu_fusion_attention": 1}  # in batches of one length
    assert found.pop("many continued sequences") == {"npu_fusion_attention": 1025}
    assert found.pop("too many keys") == {"npu_fusion_attention": 1}  # in layout BNSD, with a mask
    assert found == {name: {} for name in found} and len(found) == 6


def lent_norms() -> dict[str, bool]:
    """What the addition behind attention lends the norm behind it, and when the norm computes for itself."""
    from mindspeed_mm.models.kit.add_norm import AddBeforeNorm
    from mindspeed_mm.models.kit.norm import RMSNorm

    norm = RMSNorm(8, 1e-5)
    torch.nn.init.normal_(norm.weight)
    add = AddBeforeNorm(norm)
    x, residual, bias = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.randn(8)
    wanted = torch.nn.functional.rms_norm(x + residual, (8,), norm.weight, 1e-5)
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), norm.weight)
    found = {}

    def passed(x, bias=None, dropout=0.0):
        runs.calls()
        with torch.enable_grad():  # as megatron.core's layer adds
            total = add(True, False)((x, bias), residual, dropout)
        return total, norm(total)

    total, normed = passed(x.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(normed.square().sum(), norm.weight)
    found["lent"] = runs.calls() == {"npu_add_rms_norm": 1, "npu_rms_norm_backward": 1}
    found["equal"] = torch.allclose(normed, wanted, atol=1e-6) and torch.allclose(gradient, wanted_gradient, atol=1e-5)
    total, normed = passed(x)  # the weight alone is trained
    (gradient,) = torch.autograd.grad(normed.square().sum(), norm.weight)
    found["weight alone"] = torch.allclose(gradient, wanted_gradient, atol=1e-5)
    with torch.no_grad():  # the first pass of what is computed again
        total, normed = passed(x)
    found["without gradients"] = not (total.requires_grad or normed.requires_grad) and norm.lent is None
    found["lent without gradients"] = runs.calls() == {"npu_add_rms_norm": 1}
    for name, options in {"bias": {"bias": bias}, "dropout": {"dropout": 0.5}}.items():
        passed(x, **options)
        found[name] = runs.calls() == {"npu_rms_norm": 1}
    passed(x)
    found["another input"] = torch.allclose(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-5))
    return found


def test_the_addition_lends_the_norm_its_result(npu_ranks):
    (found,) = npu_ranks(1).run(lent_norms)
    assert all(found.values()) and len(found) == 8, found


def adamw_beside_torchs() -> float:
    """Largest difference after some steps, with a parameter that gets no gradient at times."""
    from mindspeed_mm.platform.npu_adamw import NpuAdamW

    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)]
    runs_of = []
    for kind in (NpuAdamW, torch.optim.AdamW):
        generator = torch.Generator().manual_seed(2)
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = kind(parameters, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
        for step in range(6):
            for number, parameter in enumerate(parameters):
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = None if number == step % 3 else gradient
            assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
        states = [value for state in optimizer.state.values() for value in state.values()]
        runs_of.append([*(parameter.detach() for parameter in parameters), *states])
    return max((one - other).abs().max().item() for one, other in zip(*runs_of, strict=True))


def test_adamw_equals_torchs(npu_ranks):
    assert npu_ranks(1).run(adamw_beside_torchs)[0] < 1e-6


def refusals() -> dict[str, str]:
    """What the stand-in says to calls that torch_npu would not take."""
    import torch_npu

    x, t = torch.randn(1, 2, 4, 8), torch.randn(6, 2, 8)
    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    attention, common = torch_npu.npu_fusion_attention, {"head_num": 2, "input_layout": "BNSD"}
    tnd = {"head_num": 2, "input_layout": "TND"}
    calls = {
        "no such operator": lambda: torch_npu.npu_faster_attention(x),
        "no such argument": lambda: attention(x, x, x, window=3, **common),
        "another type": lambda: attention(x, x, x, head_num="2", input_layout="BNSD"),
        "an argument that is missing": lambda: attention(x, x, x, head_num=2),
        "an operator without a reference": lambda: torch_npu.npu_silu(x),
        "double": lambda: attention(x.double(), x.double(), x.double(), **common),
        "types that differ": lambda: attention(x, x.half(), x.half(), **common),
        "a mask of numbers": lambda: attention(x, x, x, atten_mask=torch.ones(4, 4), **common),
        "a mask of another shape": lambda: attention(x, x, x, atten_mask=torch.ones(1, 4).bool(), **common),
        "a mask that is not compressed": lambda: attention(
            x, x, x, atten_mask=triangle[:4, :4], sparse_mode=2, **common
        ),
        "a mask the wrong way round": lambda: attention(x, x, x, atten_mask=~triangle, sparse_mode=2, **common),
        "heads": lambda: attention(x, x, x, head_num=4, input_layout="BNSD"),
        "rows without ends": lambda: attention(t, t, t, **tnd),
        "ends that do not end": lambda: attention(t, t, t, actual_seq_qlen=[2, 5], actual_seq_kvlen=[2, 5], **tnd),
        "a row that is too long": lambda: attention(
            *[torch.zeros(2**20 + 1, 2, 1)] * 3, actual_seq_qlen=[2**20 + 1], actual_seq_kvlen=[2**20 + 1], **tnd
        ),
        "norm of another type": lambda: torch_npu.npu_rms_norm(x.half(), torch.ones(8)),
        "odd channels": lambda: torch_npu.npu_rotary_mul(x[..., :7], x[..., :7], x[..., :7]),
        "decoding in float32": lambda: torch_npu.npu_fused_infer_attention_score(x, x, x, num_heads=2),
        "a sum of doubles": lambda: torch.distributed.all_reduce(torch.ones(2, dtype=torch.float64)),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (AttributeError, RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            found[name] = str(error)
        else:
            found[name] = "taken"
    return found


def test_the_stand_in_takes_what_the_schemas_and_the_documentation_say(npu_ranks):
    (found,) = npu_ranks(1).run(refusals)
    assert not [name for name, said in found.items() if said == "taken"]
    assert "not in its schemas" in found["no such operator"] and "window" in found["no such argument"]
    assert "HCCL: all_reduce does not support float64" in found["a sum of doubles"]


def without_a_mask_nothing_is_hidden() -> float:
    """torch_npu's documentation: a sparse mode does nothing without a mask."""
    import torch_npu

    x = torch.randn(1, 2, 4, 8)
    options = {"head_num": 2, "input_layout": "BNSD"}
    one = torch_npu.npu_fusion_attention(x, x, x, sparse_mode=2, **options)[0]
    return (one - torch_npu.npu_fusion_attention(x, x, x, **options)[0]).abs().max().item()


def test_a_sparse_mode_without_a_mask_hides_nothing(npu_ranks):
    assert npu_ranks(1).run(without_a_mask_nothing_is_hidden)[0] == 0


def step_without_values(lengths: tuple[int, int]) -> int:
    """Gradients of a step, AdamW included, on a device whose tensors have no values: whatever waits for one fails."""
    from mindspeed_mm.data.collate import Collator
    from mindspeed_mm.doctor.parity import model
    from mindspeed_mm.objectives.sft import OBJECTIVE
    from mindspeed_mm.platform import current_platform
    from mindspeed_mm.platform.distributed import init_single_process
    from mindspeed_mm.platform.npu_adamw import NpuAdamW

    platform, nowhere = current_platform(), torch.device("meta")
    init_single_process(platform)
    vlm = model.build(platform, torch.float32)
    samples = [model.samples(0)[0] for _ in lengths]
    for sample, length in zip(samples, lengths, strict=True):
        del sample.input_ids[length:], sample.labels[length:]
    vlm.text_decoder.rotary._frequencies_on(nowhere)  # moved once, by the first micro-batch
    vlm, platform.device = vlm.to(nowhere), lambda: nowhere
    platform._causal_mask = None  # it stays where it was made
    try:
        output, sums = OBJECTIVE.forward(Collator(0)(samples), vlm)
        total, _, _ = sums(output)
        total.backward()
        NpuAdamW(vlm.parameters(), lr=0.1).step()
    finally:
        del platform.device
        platform._causal_mask = None
    assert total.device == nowhere
    return sum(parameter.grad is not None for parameter in vlm.parameters())


@pytest.mark.parametrize("lengths", [(20, 20), (20, 14)], ids=["full rows", "packed rows"])
def test_a_step_never_waits(npu_ranks, lengths):
    assert npu_ranks(1).run(step_without_values, lengths)[0] > 30


def test_all_layouts_of_parallel_runs_are_tried():
    assert {layout.ranks for layout in RUNS.values()} == {1, 2}
