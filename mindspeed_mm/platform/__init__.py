"""The accelerator behind one small interface: cpu, cuda, npu.

Importing this package needs no accelerator stack; a platform's own imports happen when it is chosen.
"""

from mindspeed_mm.platform.base import MemoryStats, Platform, current_platform, get_platform

__all__ = ["MemoryStats", "Platform", "current_platform", "get_platform"]
