"""How settings of a run are told to a reader."""

from collections.abc import Mapping
from typing import Any

from mindspeed_mm.generation.options import SAMPLING, GenerationOptions

_TOLD_FIRST = ("method", "max_new_tokens", "do_sample", "num_beams")
_NEVER_TOLD = ("logprobs", "bos_token_id", "pad_token_id")
"""They change no answer."""


def shots_text(report: Mapping[str, Any]) -> str | None:
    """The examples of a few-shot run in words; None without examples."""
    if "shots" not in report:
        return None
    return f"{report['shots']} of {report['shots_table']}, seed {report['shots_seed']}"


def cut(text: str, most: int) -> str:
    """The beginning of a text, with a mark where it goes on."""
    return text if len(text) <= most else text[:most] + " [...]"


def prompts_text(report: Mapping[str, Any]) -> str | None:
    """The style of a run's prompts; None for answers that were recorded elsewhere, whose prompts nobody knows."""
    return None if report.get("predictions") is not None else report.get("prompt_style")


def decoding_text(decoding: Mapping[str, Any] | None) -> str:
    """Decoding options in words: the method, the longest answer, and what differs from the defaults."""
    if not decoding:
        return "answers that were recorded elsewhere"
    method = decoding.get("method", "sampling" if decoding.get("do_sample") else "greedy")
    beams = decoding.get("num_beams") or 1
    parts = [method if beams == 1 else f"{method} with {beams} beams"]
    if "max_new_tokens" in decoding:
        parts.append(f"at most {decoding['max_new_tokens']} new tokens")
    for name, value in decoding.items():
        only_sampling = name in SAMPLING or name == "seed"
        if name in _TOLD_FIRST or name in _NEVER_TOLD or (only_sampling and method == "greedy"):
            continue
        field = GenerationOptions.model_fields.get(name)
        if value is not None and (field is None or value != field.default):
            parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)
