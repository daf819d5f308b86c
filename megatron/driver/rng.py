"""Random states of all ranks in one safetensors file: python, numpy, torch, the device and megatron.core's tracker."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes

from megatron.driver.collectives import gather
from mindspeed_mm.platform import Platform

RNG_FILE = "rng.safetensors"


def capture(platform: Platform) -> dict[str, torch.Tensor]:
    """Every random state of this process as tensors on the CPU."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state()
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(numpy.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    device = platform.device_rng_state()
    if device is not None:
        states["device"] = device.cpu()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state.cpu()
    return {name: state.clone() for name, state in states.items()}


def restore(states: dict[str, torch.Tensor], platform: Platform) -> None:
    """Put back what `capture` took."""
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, position, has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    if "device" in states:
        platform.set_device_rng_state(states["device"])
    prefix = "tracker."
    tracked = {name[len(prefix) :]: state for name, state in states.items() if name.startswith(prefix)}
    get_cuda_rng_tracker().set_states(tracked)


def collect(platform: Platform) -> bytes:
    """The states of all ranks, as RNG_FILE holds them. Collective."""
    ranks = gather(capture(platform))
    return as_bytes({f"{rank}.{name}": state for rank, states in enumerate(ranks) for name, state in states.items()})


def load(folder: Path, platform: Platform) -> None:
    """Restore this rank's states from a checkpoint that was written by as many ranks."""
    prefix = f"{torch.distributed.get_rank()}."
    tensors = load_file(folder / RNG_FILE)
    restore({name[len(prefix) :]: state for name, state in tensors.items() if name.startswith(prefix)}, platform)
