"""Choice of the device, the CPU platform, and what can be checked of the others without their hardware."""

import random
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.platform import base, current_platform, get_platform, host_megatron
from mindspeed_mm.platform.cuda import CudaPlatform
from mindspeed_mm.platform.npu import NpuPlatform


@pytest.fixture
def cpu():
    return get_platform("cpu")


@pytest.fixture
def unchosen(monkeypatch):
    """As in a process that has not chosen yet."""
    monkeypatch.setattr(base, "_current", None)


def test_unknown_device():
    with pytest.raises(ConfigError, match="--device 'tpu' is not known: expected one of npu, cuda, cpu"):
        get_platform("tpu")


def test_a_process_has_one_device(cpu):
    assert get_platform() is cpu is current_platform()
    with pytest.raises(ConfigError, match="already runs on 'cpu', 'cuda' was asked for"):
        get_platform("cuda")


def test_absent_device(cpu, unchosen, monkeypatch):
    monkeypatch.setattr(CudaPlatform, "is_available", classmethod(lambda cls: False))
    with pytest.raises(ConfigError, match="this machine has no usable cuda device"):
        get_platform("cuda")


def test_accelerators_come_first(cpu, unchosen, monkeypatch):
    asked = []
    classes = {}
    for name in base.PLATFORM_ORDER:
        available = classmethod(lambda cls, name=name: asked.append(name) or name == "cpu")
        classes[name] = type(name, (type(cpu),), {"is_available": available})
    monkeypatch.setattr(base, "_platform_class", classes.get)
    assert get_platform().name == "cpu"
    assert asked == ["npu", "cuda", "cpu"]


def test_cpu_figures(cpu):
    memory = cpu.memory()
    assert 0 < memory.allocated <= memory.peak < memory.total
    assert cpu.device() == torch.device("cpu")
    assert cpu.peak_flops(torch.bfloat16) is None
    assert cpu.device_rng_state() is None
    with pytest.raises(ValueError, match="the CPU has no device generator"):
        cpu.set_device_rng_state(torch.get_rng_state())


def test_seed_reaches_every_generator(cpu):
    def draw():
        cpu.seed(7)
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    assert draw() == draw()


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["none", "causal", "mask"])
def test_attention_equals_its_definition(cpu, heads, groups, kind):
    query, key, value = torch.randn(2, heads, 5, 8), torch.randn(2, groups, 5, 8), torch.randn(2, groups, 5, 8)
    mask = (torch.rand(2, 1, 5, 5) > 0.3) | torch.eye(5, dtype=torch.bool)
    allowed = {
        "none": torch.ones(5, 5, dtype=torch.bool),
        "causal": torch.ones(5, 5, dtype=torch.bool).tril(),
        "mask": mask,
    }[kind]
    scores = 0.5 * query @ key.repeat_interleave(heads // groups, 1).transpose(2, 3)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    expected = weights @ value.repeat_interleave(heads // groups, 1)
    found = cpu.attention(
        *(query, key, value), mask=mask if kind == "mask" else None, causal=kind == "causal", scale=0.5, dropout=0.0
    )
    torch.testing.assert_close(found, expected)


def test_rewriting_reaches_names_constants_and_nested_code():
    def sample(torch):
        def inner(device="cuda"):
            return torch.zeros(1, device=device), ("cuda", "torch.cuda.HalfTensor", "cuda:0")

        return torch.cuda.name, inner()

    sample.__code__ = host_megatron.rewrite(sample.__code__)
    fake = SimpleNamespace(cpu=SimpleNamespace(name="host"), zeros=lambda *_args, device: device)
    assert sample(fake) == ("host", ("cpu", ("cpu", "torch.HalfTensor", "cuda:0")))


def test_megatron_must_not_be_imported_before_the_choice(cpu, monkeypatch):
    import megatron.core  # noqa: F401

    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, host_megatron._HostFinder)])
    with pytest.raises(RuntimeError, match="megatron.core was imported before the platform was chosen"):
        host_megatron.install()


def test_loss_scale_is_restored_on_the_cpu(cpu):
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    settings = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2, "hysteresis": 1}
    one = DynamicGradScaler(initial_scale=8.0, min_scale=1.0, **settings)
    one.update(True)
    one.update(False)
    other = DynamicGradScaler(initial_scale=1.0, min_scale=1.0, **settings)
    other.load_state_dict(one.state_dict())
    assert other.scale.item() == 4.0
    other.update(False)
    assert other.scale.item() == 8.0


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 3 but this host shows 2 GPU\(s\)"):
        CudaPlatform()


def test_float32_is_kept_whole_on_a_gpu():
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        CudaPlatform.__new__(CudaPlatform).keep_float32_whole()
        assert [switch.allow_tf32 for switch in switches] == [False, False]
    finally:
        for switch, value in zip(switches, kept, strict=True):
            switch.allow_tf32 = value


def test_gpu_peaks(monkeypatch):
    platform = CudaPlatform.__new__(CudaPlatform)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert platform.peak_flops(torch.bfloat16) == 989e12
    assert platform.peak_flops(torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some other card")
    assert platform.peak_flops(torch.bfloat16) is None


def test_npu_is_absent_without_its_package():
    if "torch_npu" in sys.modules:
        pytest.skip("this machine has the NPU stack")
    assert not NpuPlatform.is_available()


def test_importing_megatron_core_loads_no_compiler():
    code = (
        "import sys; from mindspeed_mm.platform import get_platform; get_platform('cpu'); "
        "import megatron.core.transformer.transformer_config; sys.exit('torch._inductor.lowering' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
