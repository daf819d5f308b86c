"""torch.npu: one card in host memory, whose generator is the host's."""

import contextlib
import types

import torch

CARD = {"name": "Ascend910B3", "count": 8, "memory": 64 * 2**30}
"""What the stand-in says of its cards; tests change it."""

_state = {"device": 0}


def is_available():
    return True


def device_count():
    return CARD["count"]


def set_device(device):
    _state["device"] = getattr(device, "index", device)


def current_device():
    return _state["device"]


def get_device_name(device=None):
    return CARD["name"]


def get_device_properties(device=None):
    return types.SimpleNamespace(name=CARD["name"], total_memory=CARD["memory"])


def get_device_capability(device=None):
    return None  # as torch_npu does


def synchronize(device=None):
    return None


def manual_seed(seed):
    torch.default_generator.manual_seed(seed)


manual_seed_all = manual_seed


def get_rng_state(device=None):
    return torch.default_generator.get_state()


def set_rng_state(state, device=None):
    torch.default_generator.set_state(state)


def _is_in_bad_fork():
    return False


def memory_allocated(device=None):
    return 0


max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated


def memory_stats(device=None):
    return {}


def empty_cache():
    return None


reset_peak_memory_stats = synchronize


def is_current_stream_capturing():
    return False


class Stream:
    """Everything queued on it has run."""

    def __init__(self, *_args, **_options):
        pass

    def wait_stream(self, other):
        return None

    def wait_event(self, event):
        return None

    def synchronize(self):
        return None


class Event:
    """A moment that has passed."""

    def __init__(self, *_args, **_options):
        pass

    def record(self, stream=None):
        return None

    def wait(self, stream=None):
        return None

    def synchronize(self):
        return None

    def query(self):
        return True


def current_stream(device=None):
    return Stream()


default_stream = current_stream


def stream(_stream):
    return contextlib.nullcontext()


FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor


class memory:  # noqa: N801 - a module there
    """torch.npu.memory."""

    @staticmethod
    def _dump_snapshot(path):
        with open(path, "wb") as file:
            file.write(b"snapshot")


matmul, conv = types.SimpleNamespace(allow_hf32=False), types.SimpleNamespace(allow_hf32=True)


def device(_index):
    return contextlib.nullcontext()
