"""`mindspeed-mm verify`: two sources of one model, tensor by tensor and by their logits."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import WeightError

if TYPE_CHECKING:
    import torch

HELP = "compare two sources of one model, tensor by tensor and by logits"
EXAMPLE = "mindspeed-mm verify llava-v1.5-7b llava-v1.5-7b-hf --images view.jpg --prompts 'What is this?'"

LOGIT_TOLERANCE = 1e-3
"""Largest |d logit| of equal weights in float32: what two implementations differ by, with some room."""

TEXT_TOKENS = 24
"""Random tokens of the question that stands in where no prompt is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="weights in any readable layout")
    parser.add_argument(
        "b",
        metavar="B",
        help="the same model in any layout; of two whole models, llava-hf is computed with transformers",
    )
    parser.add_argument("--images", nargs="+", default=[], help="pictures, one for each prompt (default: a random one)")
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

    Logits are compared where both are whole models, else the logits of decoders and the features of towers that both
    hold, on random inputs. They are judged where all tensors are equal; where types differ
    (bf16 against fp32), tensors must be equal after rounding and the logits are shown.

    Raises WeightError where they differ by more than the tolerances, which makes the exit code 1.
    """
    import mindspeed_mm.checkpoint_source  # noqa: F401  registers the checkpoint layout
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
    for kind, figures in _outputs(a, b, sources, images, prompts, num_attention_heads) if logits else ():
        sys.stdout.write(_outputs_line(kind, figures))
        result["logits" if kind == "model" else kind] = figures
        if figures["max"] > logit_tolerance and not any(part.rounded for part in parts):
            problems.append(f"{figures['outputs']} differ by {figures['max']:.3g}, allowed are {logit_tolerance:g}")
    if problems:
        error = WeightError(f"{a} and {b} differ: {'; '.join(problems)}. They are not the same model.")
        error.result = result  # what --json prints
        raise error
    return result


def _outputs(a, b, sources, images, prompts, num_attention_heads) -> Iterable[tuple[str, dict[str, Any]]]:
    """What two whole models compute, as "model", else what their common parts do, by kind."""
    pair = _models(a, b, sources)
    if pair is None:
        from mindspeed_mm.cli._verify_parts import compare_outputs

        return compare_outputs(*sources, num_attention_heads).items()
    return [("model", _compare_logits(*pair, list(images or []), list(prompts or [])))]


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


def _models(a: str | Mapping[str, str], b: str, sources) -> tuple[str, str, bool] | None:
    """(path for our model, path of the other, whether transformers computes it), None without two whole models.

    What was put together of several sources is no model of its own: then transformers judges ours on the result.
    """
    installed = importlib.util.find_spec("transformers") is not None
    stock = [installed and source.layout == "llava-hf" for source in sources]
    if any(len(source.parts) < 3 for source in sources) or (isinstance(a, Mapping) and not stock[1]):
        return None
    if isinstance(a, Mapping):
        return str(b), str(b), True
    return (str(b), str(a), True) if stock[0] and not stock[1] else (str(a), str(b), stock[1])


def _compare_logits(a: str, b: str, foreign: bool, images: list[str], prompts: list[str]) -> dict[str, Any]:
    """max and mean |d logit| and the share of positions with the same best token, in float32 on the CPU."""
    from mindspeed_mm import api

    vlm = api.load(a, device="cpu", dtype="fp32")
    other = None if foreign else api.load(b, device="cpu", dtype="fp32")
    largest, total, count, agreed, positions = 0.0, 0.0, 0, 0, 0
    for ids, pixels in _inputs(vlm, images, prompts):
        left = vlm.logits(ids, None, pixels)
        right = other.logits(ids, None, pixels) if other else _transformers_logits(b, ids, pixels)
        columns = min(left.shape[-1], right.shape[-1])
        left, right = left[..., :columns], right[..., :columns]
        difference = (left - right).abs()
        largest = max(largest, float(difference.max()))
        total, count = total + float(difference.sum()), count + difference.numel()
        agreed += int((left.argmax(-1) == right.argmax(-1)).sum())
        positions += ids.numel()
    figures = {"max": largest, "mean": total / count, "top1": agreed / positions, "positions": positions}
    return figures | {"outputs": "logits", "against": "transformers" if foreign else "ours"}


def _inputs(vlm, images: list[str], prompts: list[str]):
    """(ids [1, S] with -200 at image positions, pixel values [1, 3, h, w]) of each question."""
    import torch

    from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
    from mindspeed_mm.data.image import load_image, preprocess

    generator = torch.Generator().manual_seed(0)
    size = vlm.spec.vision_encoder.image_size
    for number in range(max(len(images), len(prompts), 1)):
        if images:
            picture = load_image(images[min(number, len(images) - 1)])
            pixels = preprocess(picture, vlm.image_processor, pad=vlm.pad)
        else:
            pixels = torch.randn(3, size, size, generator=generator)
        if prompts:
            text = vlm.tokenizer.encode(f"USER: \n{prompts[min(number, len(prompts) - 1)]} ASSISTANT:")
        else:
            rows = min(vlm.spec.text_decoder.language_vocab_size, vlm.image_token_id or 2**31)
            text = torch.randint(min(3, rows - 1), rows, (TEXT_TOKENS,), generator=generator).tolist()
        ids = text[:1] + [IMAGE_TOKEN_INDEX] * vlm.tokens_per_image + text[1:]
        yield torch.tensor([ids]), pixels.unsqueeze(0)


def _transformers_logits(folder: str, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    import torch
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=ids.where(ids >= 0, model.config.image_token_index), pixel_values=pixels).logits.float()
