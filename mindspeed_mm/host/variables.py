"""The environment variables of the guide, with what each may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.host.finding import Finding

GROUP = "variables"


@dataclass(frozen=True)
class Variable:
    """One variable: what it does and which texts it may hold."""

    name: str
    meaning: str
    expected: str
    """In words, for messages."""
    pattern: str
    lowest: int | None = None
    highest: int | None = None

    def accepts(self, text: str) -> bool:
        """Whether the variable may hold this text."""
        if re.fullmatch(self.pattern, text) is None:
            return False
        if self.lowest is None:
            return True
        return self.lowest <= int(text) and (self.highest is None or int(text) <= self.highest)


def _integer(name: str, meaning: str, lowest: int, highest: int | None, unit: str = "") -> Variable:
    unit = f" {unit}" if unit else ""
    limits = f"in [{lowest}, {highest}]{unit}" if highest is not None else f"of at least {lowest}{unit}"
    return Variable(name, meaning, f"an integer {limits}", r"0|[1-9]\d{0,9}", lowest, highest)


def _switch(name: str, meaning: str, *levels: str) -> Variable:
    return Variable(name, meaning, f"one of {', '.join(levels)}", "|".join(levels))


GUIDE = (
    Variable(
        "ASCEND_RT_VISIBLE_DEVICES", "the NPUs of this run", "numbers of NPUs such as 0,1,2,3", r"\d{1,4}(,\d{1,4})*"
    ),
    _switch("ASCEND_SLOG_PRINT_TO_STDOUT", "whether CANN's log goes to the screen", "0", "1"),
    _switch("ASCEND_GLOBAL_LOG_LEVEL", "CANN's log from debug (0) to none (4)", *"01234"),
    _switch("TASK_QUEUE_ENABLE", "how operators are queued", "0", "1", "2"),
    _switch("COMBINED_ENABLE", "whether pairs of non-contiguous operators are joined", "0", "1"),
    Variable(
        "CPU_AFFINITY_CONF",
        "how operators' threads are bound to cores",
        "0, 1 or 2, and perhaps npu0:0-1 and the like behind commas",
        r"[012](,npu\d+:\d+-\d+)*",
    ),
    _integer("HCCL_CONNECT_TIMEOUT", "how long devices wait to connect", 120, 7200, "s"),
    _integer("HCCL_EXEC_TIMEOUT", "how long devices wait for each other in a collective", 0, 2147483647, "s"),
    _integer("NPUS_PER_NODE", "ranks of each host", 1, None),
)
"""guides/llava1.5_guide.md, last section, and CANN's documentation of HCCL."""

RUN = (
    _integer("MASTER_PORT", "port at which the ranks meet", 1, 65535),
    _integer("CUDA_DEVICE_MAX_CONNECTIONS", "queues to a device", 1, None),
    _integer("OMP_NUM_THREADS", "threads of a rank", 1, None),
)
"""Of torchrun and Megatron."""


def look(environment: Mapping[str, str]) -> list[Finding]:
    """A finding for each variable of GUIDE and RUN that is set; bad where it holds what it may not."""
    return [
        _finding(variable, environment[variable.name]) for variable in (*GUIDE, *RUN) if variable.name in environment
    ]


def _finding(variable: Variable, text: str) -> Finding:
    if not variable.accepts(text):
        return Finding(GROUP, variable.name, repr(text), "bad", f"expected {variable.expected} ({variable.meaning})")
    if variable.name == "ASCEND_RT_VISIBLE_DEVICES" and len(set(text.split(","))) < len(text.split(",")):
        return Finding(GROUP, variable.name, repr(text), "bad", "name each NPU once")
    return Finding(GROUP, variable.name, text)


def check(environment: Mapping[str, str]) -> None:
    """Raises ConfigError that lists every variable that holds what it may not."""
    wrong = [str(finding) for finding in look(environment) if finding.level == "bad"]
    if wrong:
        raise ConfigError("environment variables:\n  " + "\n  ".join(wrong))
