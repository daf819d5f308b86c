"""tools.json of the ancestor: its profile block becomes --profile and its flags."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any, Literal

import pydantic

from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.load import StrictModel, load_config

logger = logging.getLogger(__name__)

ASCEND_ONLY = ("level", "aic_metrics_type", "data_simplification")
"""Keys that choose counters of Ascend's own profiler."""


class StaticParam(StrictModel):
    """Which steps are traced, and what is recorded."""

    level: str = "level1"
    with_stack: bool = False
    with_memory: bool = False
    record_shapes: bool = False
    with_cpu: bool = True
    save_path: str | None = None
    start_step: int | None = None
    end_step: int | None = None
    data_simplification: bool = False
    aic_metrics_type: str = "PipeUtilization"


class Profile(StrictModel):
    """The profile block."""

    enable: bool = False
    profile_type: Literal["static", "dynamic"] = "static"
    ranks: list[int] = [0]
    static_param: StaticParam = StaticParam()
    dynamic_param: dict[str, Any] = {}

    @pydantic.model_validator(mode="after")
    def _can_be_followed(self) -> Profile:
        if not self.enable:
            return self
        if self.profile_type != "static":
            raise ValueError('profile_type is "dynamic", which does not exist here: expected "static"')
        for key in ("with_stack", "with_memory", "record_shapes", "with_cpu"):
            found, supported = getattr(self.static_param, key), key == "with_cpu"
            if found != supported:
                raise ValueError(f"static_param.{key} is {str(found).lower()}: expected {str(supported).lower()}")
        return self


class MemoryProfile(StrictModel):
    """Snapshots over steps do not exist here; one is written when a device's memory is full."""

    enable: Literal[False] = False
    start_step: int = 0
    end_step: int = 2
    save_path: str = "./memory_snapshot"
    dump_ranks: list[int] = [0]
    stacks: str = "all"
    max_entries: int | None = None


class ToolsConfig(StrictModel):
    """The file. Unknown keys, and what is switched on but does not exist, are refused."""

    profile: Profile = Profile()
    memory_profile: MemoryProfile = MemoryProfile()
    sorafeature: dict[str, Any] = {}
    """Of the ancestor's video models; has no effect on others."""


def apply_tools(namespace: argparse.Namespace, path: str | Path) -> None:
    """Set --profile and its flags as the file's profile block asks, when it is enabled.

    Raises:
        ConfigError: wrong values, or something is switched on that does not exist here.
    """
    profile = load_config(ToolsConfig, read_config(path), what="tools config", context=str(path)).profile
    if not profile.enable:
        return
    static = profile.static_param
    namespace.profile, namespace.profile_ranks = True, tuple(profile.ranks)
    for flag, value in (
        ("profile_step_start", static.start_step),
        ("profile_step_end", static.end_step),
        ("profile_dir", namespace.profile_dir or static.save_path),
    ):
        if value is not None:
            setattr(namespace, flag, value)
    unused = [key for key in ASCEND_ONLY if key in static.model_fields_set]
    if unused:
        logger.info("--mm-tool: %s choose counters of Ascend's profiler and have no effect", ", ".join(unused))
