"""Kernels of matrix products are measured once, kept, shared by the ranks, and change speed only."""

import json

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.platform import host_linear, host_products

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def unmeasured(monkeypatch, tmp_path):
    """A process that knows nothing yet, of a user whose cache folder is empty. Gives the dtypes that get measured."""
    measured = []

    def measure(dtype):
        measured.append(dtype)
        return dict.fromkeys(host_products.classes(), host_products.kernels(dtype)[0])

    monkeypatch.setattr(host_products, "_tables", {})
    monkeypatch.setattr(host_products, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return measured


def forget():
    host_products._tables.clear()


def kept(tmp_path):
    (path,) = (tmp_path / "mindspeed-mm").iterdir()
    return path


def test_letter_h_measured_once_for_a_machine(unmeasured, tmp_path):
    first = host_products.table(torch.bfloat16)
    assert host_products.table(torch.bfloat16) is first
    forget()
    assert host_products.table(torch.bfloat16) == first and unmeasured == [torch.bfloat16]
    assert json.loads(kept(tmp_path).read_text())["machine"]["threads"] == torch.get_num_threads()


def test_each_number_of_threads_and_machine_has_its_own(unmeasured, monkeypatch):
    host_products.table(torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    host_products.table(torch.float32)
    forget()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    host_products.table(torch.float32)
    assert unmeasured == [torch.float32] * 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "\x00", '{"machine": 1}', "wrong kernel", "wrong class"],
    ids=["empty", "cut", "list", "zero", "other machine", "kernel", "class"],
)
def test_a_damaged_file_is_written_anew(unmeasured, tmp_path, text):
    right = host_products.table(torch.float32)
    path = kept(tmp_path)
    content = json.loads(path.read_text())
    if text == "wrong kernel":
        content["kernels"]["forward, large"] = "cublas"
        text = json.dumps(content)
    if text == "wrong class":
        content["kernels"] = {"forward": "torch"}
        text = json.dumps(content)
    path.write_text(text)
    forget()
    assert host_products.table(torch.float32) == right and len(unmeasured) == 2
    assert json.loads(path.read_text())["kernels"] == right


def test_a_folder_that_takes_no_file_costs_time_only(unmeasured, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "mindspeed_mm")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert set(host_products.table(torch.float32).values()) == {"torch"}
    assert "cannot be written" in caplog.text and unmeasured == [torch.float32]


def test_a_user_without_a_home(unmeasured, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr(host_products.Path, "home", no_home)
    assert set(host_products.table(torch.float32).values()) == {"torch"}


def test_no_half_written_file_is_left(unmeasured, tmp_path):
    host_products.table(torch.float32)
    assert kept(tmp_path).suffix == ".json"


@pytest.mark.parametrize("dtype", host_products.DTYPES)
def test_a_real_measurement_names_usable_kernels(dtype):
    with torch.inference_mode():  # as where generation is the first to ask
        found = host_products.measure(dtype)
    assert list(found) == host_products.classes() and set(found.values()) <= set(host_products.kernels(dtype))


def test_another_kernel_must_be_clearly_faster(monkeypatch):
    seconds = {"torch": 1.0, "onednn": 0.9}
    monkeypatch.setattr(host_products, "fastest", lambda _candidates: seconds)
    assert set(host_products.measure(torch.float32).values()) == {"torch"}
    seconds["onednn"] = 0.8
    found = host_products.measure(torch.float32)
    assert {kernel for name, kernel in found.items() if not name.startswith("attention")} == {"onednn"}


def test_a_kernel_that_the_processor_refuses_is_left_out():
    def refuse():
        raise RuntimeError("could not create a primitive descriptor")

    assert list(host_products.fastest({"torch": lambda: None, "onednn": refuse})) == ["torch"]


def test_a_hopeless_kernel_is_tried_no_more(monkeypatch):
    calls = []
    monkeypatch.setattr(host_products, "_seconds", lambda call: call())
    host_products.fastest({"fast": lambda: calls.append("fast") or 1.0, "slow": lambda: calls.append("slow") or 9.0})
    assert calls.count("slow") == 2 and calls.count("fast") == 1 + host_products.ROUNDS


def test_classes():
    assert host_products._class("forward", 1, 10**9) == "forward, few rows"
    assert host_products._class("forward", 8, 999_999) == "forward, tiny"
    assert host_products._class("weight gradient", 600, 600 * 512 * 512) == "weight gradient, large"
    assert host_products.choose("forward", torch.float64, 9, 9, 9) == "torch"


@pytest.mark.parametrize(("length", "size"), [(56, "tiny"), (180, "small"), (300, "medium"), (1025, "large")])
def test_letter_h_attention_goes_by_its_length_and_heads(monkeypatch, length, size):
    """Case: short sequences trained in bf16 took 25 times as long as in fp32, on a processor with tiles for bf16."""
    own = {name: "torch" for name in host_products.classes()} | {f"attention, {size}": "float32"}
    monkeypatch.setitem(host_products._tables, (torch.bfloat16, torch.get_num_threads()), own)
    assert host_products.choose_attention(torch.bfloat16, length, 64) == "float32"
    assert host_products.choose_attention(torch.float32, length, 64) == "torch"
    assert host_products.choose_attention(torch.bfloat16, 9000, 1) == ("float32" if size == "small" else "torch")


def test_attention_is_measured_where_the_processor_multiplies_half_precision(monkeypatch):
    timed = []
    monkeypatch.setattr(
        host_products, "fastest", lambda calls: timed.append([call() for call in calls.values()]) or dict(torch=1.0)
    )
    monkeypatch.setattr(host_products, "has_half_products", lambda _dtype: True)
    found = host_products._measure_attention(torch.bfloat16)
    assert list(found) == host_products.classes()[-len(found) :] and len(timed) == len(host_products.ATTENTION_SIZES)
    monkeypatch.setattr(host_products, "has_half_products", lambda _dtype: False)
    assert set(host_products._measure_attention(torch.bfloat16).values()) == {"float32"}
    assert set(host_products._measure_attention(torch.float32).values()) == {"torch"}
    assert len(timed) == len(host_products.ATTENTION_SIZES)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", host_products.FORMS)
def test_half_precision_by_float32_is_exact_to_the_last_rounding(dtype, form):
    x, weight = (torch.randn_like(t.contiguous()).view(t.shape) for t in host_products.operands(form, 6, 40, 24, dtype))
    exact = (x.double() @ weight.double().t()).to(dtype)
    torch.testing.assert_close(host_products.run("float32", x, weight), exact)
    torch.testing.assert_close(host_products.run("torch", x, weight), exact)


@pytest.mark.parametrize("kernel", ["torch", "float32"])
def test_gradients_in_half_precision(kernel, monkeypatch):
    monkeypatch.setattr(host_products, "choose", lambda *_: kernel)
    tensors = [torch.randn(*shape).bfloat16().requires_grad_() for shape in ((9, 16), (8, 16), (8,))]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for multiply, own in ((host_linear.linear, tensors), (F.linear, exact)):
        multiply(*own).square().sum().backward()
    for found, right in zip(tensors, exact, strict=True):
        assert found.grad.dtype == torch.bfloat16
        torch.testing.assert_close(found.grad.double(), right.grad, rtol=3e-2, atol=3e-1)


@pytest.mark.parametrize("kernel", host_products.kernels(torch.float32))
@pytest.mark.parametrize(("rows", "outer"), [(0, 8), (9, 0)])
def test_products_of_nothing(kernel, rows, outer, monkeypatch):
    """Case: a context-parallel rank without labels ended the run, since oneDNN refuses a product without rows."""
    monkeypatch.setattr(host_products, "choose", lambda *_: kernel)
    x, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(outer, 16, requires_grad=True)
    host_linear.linear(x, weight).sum().backward()
    assert x.grad.shape == x.shape and not x.grad.any() or outer
    assert weight.grad.shape == weight.shape and not weight.grad.any()


@pytest.mark.parametrize("kernel", ["torch", "float32"])
def test_trained_attention_in_half_precision(kernel, monkeypatch):
    from mindspeed_mm.platform import get_platform

    monkeypatch.setattr(host_products, "choose_attention", lambda *_: kernel)
    tensors = [torch.randn(1, 2, 7, 8).bfloat16().requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out = get_platform("cpu").attention(*tensors, mask=None, causal=True, scale=0.3, dropout=0.0)
    right = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.3)
    out.sum().backward()
    right.sum().backward()
    assert out.dtype == torch.bfloat16 and tensors[0].grad.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), right, rtol=2e-2, atol=2e-2)
    for found, other in zip(tensors, exact, strict=True):
        torch.testing.assert_close(found.grad.double(), other.grad, rtol=3e-2, atol=3e-2)


def test_several_ranks_that_did_not_settle_go_by_capability(unmeasured, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(host_products, "has_half_products", lambda _dtype: False)
    assert set(host_products.table(torch.float32).values()) == {"torch"}
    assert set(host_products.table(torch.bfloat16).values()) == {"float32"}
    assert unmeasured == []


def settled_tables():
    """On each rank: what it would have chosen alone, and what holds after the ranks agreed."""
    rank = torch.distributed.get_rank()
    host_products._tables.clear()
    real = host_products._known_or_measured
    kernel = ("torch", "onednn")[rank]
    host_products._known_or_measured = lambda _dtype: dict.fromkeys(host_products.classes(), kernel)
    try:
        host_products.settle()
        return {str(key): sorted(set(own.values())) for key, own in host_products._tables.items()}
    finally:
        host_products._known_or_measured = real
        host_products._tables.clear()


def test_ranks_take_the_choices_of_rank_0(ranks):
    first, second = ranks(2).run(settled_tables)
    assert first == second and set(map(tuple, first.values())) == {("torch",)} and len(first) == 3


def test_the_choices_are_told(unmeasured):
    from mindspeed_mm.platform import get_platform

    host_products.table(torch.float32)
    threads = torch.get_num_threads()
    assert host_products.describe() == f"products in float32, {threads} thread(s), by torch: all"
    own = dict.fromkeys(host_products.classes(), "torch") | {"forward, large": "onednn", "forward, tiny": "onednn"}
    host_products._tables[torch.float32, threads] = own
    assert "by onednn: forward (tiny, large)" in get_platform("cpu").choices()
    own = dict.fromkeys(host_products.classes(), "torch") | {"attention, tiny": "float32"}
    host_products._tables[torch.bfloat16, threads] = own
    assert host_products.describe().endswith(
        f"products in bfloat16, {threads} thread(s), by torch: all\n"
        f"trained attention in bfloat16, {threads} thread(s), by float32: tiny"
    )
