"""Server-sent events of the protocol."""

from __future__ import annotations

import json
from typing import Any

DONE = "data: [DONE]\n\n"


def event(values: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
