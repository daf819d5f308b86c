"""torch_npu.profiler: torch's, without the card."""

import enum

import torch


class ProfilerActivity(enum.Enum):
    CPU = "CPU"
    NPU = "NPU"


def profile(activities):
    """Wants members of ProfilerActivity."""
    assert all(isinstance(activity, ProfilerActivity) for activity in activities)
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
