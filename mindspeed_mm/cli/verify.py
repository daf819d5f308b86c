"""`mindspeed-mm verify`: two sources of one model, tensor by tensor and by their logits."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from mindspeed_mm.errors import WeightError

HELP = "compare two sources of one model, tensor by tensor and by logits"
EXAMPLE = "mindspeed-mm verify llava-v1.5-7b llava-1.5-7b-hf --images view.jpg --prompts 'What is this?'"

LOGIT_TOLERANCE = 1e-3
"""Largest |d logit| of equal weights in float32: what two implementations differ by, with some room."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="weights in any readable layout")
    parser.add_argument(
        "b",
        metavar="B",
        help="the same model in any layout; of two whole models, llava-hf is computed with transformers",
    )
    parser.add_argument("--images", nargs="+", default=[], help="images, one for each prompt (default: a random one)")
    parser.add_argument("--prompts", nargs="+", default=[], help="questions (default: random tokens)")
    parser.add_argument("--atol", type=float, default=0.0, help="largest difference of a tensor (default: %(default)s)")
    parser.add_argument(
        "--logit-tolerance", type=float, default=LOGIT_TOLERANCE, help="largest |d logit| (default: %(default)s)"
    )
    parser.add_argument("--no-logits", action="store_true", help="compare the tensors alone")
    parser.add_argument("--num-attention-heads", type=int, help="heads of a vision encoder whose weights do not say it")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Compare. Returns the figures for --json."""
    return verify(
        namespace.a,
        namespace.b,
        images=namespace.images,
        prompts=namespace.prompts,
        atol=namespace.atol,
        logit_tolerance=namespace.logit_tolerance,
        logits=not namespace.no_logits,
        num_attention_heads=namespace.num_attention_heads,
    )


def verify(
    a: str | Mapping[str, str],
    b: str,
    *,
    images: list[str] | None = None,
    prompts: list[str] | None = None,
    atol: float = 0.0,
    logit_tolerance: float = LOGIT_TOLERANCE,
    logits: bool = True,
    num_attention_heads: int | None = None,
) -> dict[str, Any]:
    """Compare two sources; the table goes to stdout.

    Logits are compared where both are whole models, else the logits of decoders and the features of vision encoders
    that both hold, on random inputs. They are judged where all tensors are equal; where types differ
    (bf16 against fp32), tensors must be equal after rounding and the logits are shown.

    Raises WeightError where they differ by more than the tolerances, which makes the exit code 1.
    """
    from checkpoint_converters.compare import compare
    from checkpoint_converters.convert import open_parts

    sources = open_parts(a), open_parts(b)
    parts = compare(*sources, num_attention_heads=num_attention_heads)
    sys.stdout.write(_table(parts))
    for one, other in (sources, sources[::-1]):
        if missing := [kind for kind in one.parts if kind not in other.parts]:
            sys.stdout.write(f"not compared, since {other.path} does not hold it: {', '.join(missing)}\n")
    result: dict[str, Any] = {"parts": [dataclasses.asdict(part) for part in parts], "logits": None}
    problems = [_problem(part) for part in parts if not part.within(atol)]
    outputs = {}
    if logits:
        from mindspeed_mm.inference.compare_outputs import compare_outputs

        outputs = compare_outputs(a, b, sources, images or [], prompts or [], num_attention_heads)
    for kind, figures in outputs.items():
        sys.stdout.write(_outputs_line(kind, figures))
        result["logits" if kind == "model" else kind] = figures
        if figures["max"] > logit_tolerance and not any(part.rounded for part in parts):
            problems.append(f"{figures['outputs']} differ by {figures['max']:.3g}, allowed are {logit_tolerance:g}")
    if problems:
        error = WeightError(f"{a} and {b} differ: {'; '.join(problems)}. They are not the same model.")
        error.result = result  # what --json prints
        raise error
    return result


def _outputs_line(kind: str, figures: dict[str, Any]) -> str:
    name = figures["outputs"] if kind == "model" else f"{kind} {figures['outputs']}"
    top1 = f", top-1 agreement {figures['top1']:.4f}" if "top1" in figures else ""
    return (
        f"{name} ({figures['positions']} positions, ours against {figures['against']}): "
        f"max |d| {figures['max']:.3g}, mean |d| {figures['mean']:.3g}{top1}\n"
    )


def _table(parts) -> str:
    lines = [f"{'part':<18}{'tensors':>8}{'equal':>7}{'rounded':>9}{'max |d|':>10}  worst"]
    for part in parts:
        lines.append(
            f"{part.part:<18}{part.tensors:>8}{part.equal:>7}{part.rounded:>9}{part.max_difference:>10.3g}  "
            f"{part.worst or '-'}" + (f"  (one side has {part.rows} more rows of vocabulary)" if part.rows else "")
        )
    return "\n".join(lines) + "\n"


def _problem(part) -> str:
    if part.only:
        return f"{part.part}: only one side has {', '.join(part.only[:4])}"
    return f"{part.part}: {part.worst} differs by {part.max_difference:.3g}"
