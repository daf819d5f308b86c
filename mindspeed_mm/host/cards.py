"""Which NPUs have the operators that the suite calls, by the names that torch.npu.get_device_name gives."""

from __future__ import annotations

from mindspeed_mm.host.finding import Level

TRAINING = ("Ascend910B", "Ascend910_93", "Ascend950")
"""Atlas A2, Atlas A3 and the generation behind them: beginnings of names."""

WITHOUT = ("Ascend910A", "Ascend910Pro", "Ascend310")
"""Older or inference cards, without fused attention for training and without bfloat16."""


def judge(name: str) -> tuple[Level, str]:
    """(level, what to change) for a card: bad where operators are known to lack, warn where nobody says."""
    if name.startswith(WITHOUT) or name == "Ascend910":
        return "bad", "npu_fusion_attention and bfloat16 exist from Atlas A2 on: use such a card, or --device cpu"
    if not name.startswith(TRAINING):
        return "warn", f"not known here (known: {', '.join(TRAINING)}): run mindspeed-mm doctor --parity first"
    return "ok", ""
