"""Figures of devices: those of data sheets (hardware.json, each with its source), given ones, or measured ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from mindspeed_mm.errors import ConfigError

TABLE = Path(__file__).with_name("hardware.json")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and what connects it. Rates in operations or bytes a second, None where unknown."""

    name: str
    device: str
    """cuda, npu or cpu."""
    memory: float | None = None
    """Bytes."""
    peak_flops: float | None = None
    """Dense matrix products in bf16, or in the type that was measured."""
    memory_bandwidth: float | None = None
    interconnect: float | None = None
    """Sent by each device to the others of its host."""
    network: float | None = None
    """Sent by each device to other hosts; None: like the interconnect."""
    devices_per_host: int = 8
    efficiency: float = 1.0
    """Share of the peak that matrix products reach."""
    source: str = ""
    measured: bool = False
    """Whether peak_flops is what whole training steps reached, so that nothing else is added."""
    calibrated: bool = False
    """Whether peak_flops is what products of the model's width reached, so that it is no bound."""

    @property
    def times_known(self) -> bool:
        """Whether there is enough to predict a time."""
        return self.peak_flops is not None and (self.measured or self.memory_bandwidth is not None)

    def given(self, **figures: float | int | str | None) -> Hardware:
        """The same with the figures that are not None."""
        return replace(self, **{name: value for name, value in figures.items() if value is not None})


@lru_cache
def known() -> dict[str, Hardware]:
    """The table, by name."""
    return {name: Hardware(name=name, **entry) for name, entry in json.loads(TABLE.read_text()).items()}


def find_hardware(name: str) -> Hardware:
    """A device of the table. Raises ConfigError for an unknown one."""
    matches = [entry for key, entry in known().items() if key.lower() == name.lower()]
    if not matches:
        raise ConfigError(
            f"--hardware {name} is not in the table: expected one of {', '.join(known())}; for another device give "
            "--memory, --peak-tflops, --memory-bandwidth and --interconnect"
        )
    return matches[0]


def from_records(path: str, devices: int) -> float:
    """FLOP/s per device that a run reached: the median over the steps of its metrics.jsonl, the first one left out.

    Raises ConfigError for a file that is none, or holds too few steps or no operation counts.
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        rates = sorted(line["flops"] / line["seconds"] / devices for line in lines[1:])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--measured {path} cannot be read as metrics.jsonl of a training run ({error}): give the file of a --save "
            "folder"
        ) from None
    if not rates or rates[len(rates) // 2] <= 0:
        raise ConfigError(f"--measured {path} holds {len(rates)} steps after the first with operation counts: need 1")
    return rates[len(rates) // 2]
