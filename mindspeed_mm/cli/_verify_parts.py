"""What parts compute, of two sources that are no whole models: a decoder's logits, a tower's features."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from mindspeed_mm.weights.sources import PartSource, Source

DECODER, TOWER = "text_decoder", "vision_encoder"

TEXT_TOKENS = 24
"""Random tokens that a decoder is asked about."""

TRANSFORMERS = {DECODER: "hf", TOWER: "clip"}
"""Layouts of single parts that transformers loads."""


def compare_outputs(a: Source, b: Source, num_attention_heads: int | None) -> dict[str, dict[str, Any]]:
    """Figures of the decoder and of the tower, as far as both sources hold them, in float32 on the CPU.

    The second side is computed with transformers where it can load it, else the first side where it can; random inputs.

    Returns:
        For each part: outputs ("logits" or "features"), positions, max and mean |d|, top1 (of logits), against.
    """
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    figures = {}
    for kind in (DECODER, TOWER):
        if kind in a.parts and kind in b.parts:
            ours, other = (a, b) if _foreign(b, kind) or not _foreign(a, kind) else (b, a)
            figures[kind] = _figures(kind, ours, other, num_attention_heads)
    return figures


def _foreign(source: Source, kind: str) -> bool:
    installed = importlib.util.find_spec("transformers") is not None
    return installed and source.layout == TRANSFORMERS[kind] and source.path.is_dir()


def _figures(kind: str, a: Source, b: Source, num_attention_heads: int | None) -> dict[str, Any]:
    from checkpoint_converters.compare import vision_heads
    from checkpoint_converters.convert import specs_of

    heads = vision_heads(a, b, num_attention_heads) if kind == TOWER else None
    specs = [specs_of(source, [kind], heads)[kind] for source in (a, b)]
    generator = torch.Generator().manual_seed(0)
    if kind == DECODER:
        rows = min(spec.language_vocab_size for spec in specs)
        inputs = torch.randint(min(3, rows - 1), rows, (1, TEXT_TOKENS), generator=generator)
    else:
        size = specs[0].image_size
        inputs = torch.randn(1, 3, size, size, generator=generator)
    with torch.inference_mode():
        left = _ours(a.part(kind), specs[0], inputs)
        foreign = _foreign(b, kind)
        right = STOCK[kind](str(b.path), specs[0], inputs) if foreign else _ours(b.part(kind), specs[1], inputs)
    columns = min(left.shape[-1], right.shape[-1])  # vocabularies may be padded
    left, right = left[..., :columns], right[..., :columns]
    difference = (left - right).abs()
    figures = {"outputs": "logits" if kind == DECODER else "features", "positions": left.shape[0] * left.shape[1]}
    figures |= {"max": float(difference.max()), "mean": float(difference.mean())}
    if kind == DECODER:
        figures["top1"] = float((left.argmax(-1) == right.argmax(-1)).float().mean())
    return figures | {"against": "transformers" if foreign else "ours"}


def _ours(source: PartSource, spec: Any, inputs: torch.Tensor) -> torch.Tensor:
    from mindspeed_mm.models.describe import part_of_source
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.weights.loading import load_part

    part = part_of_source(source)
    module = part.build(spec, Runtime(params_dtype=torch.float32)).eval()
    opened = Source(source.path, "part", None, {source.part: source})
    load_part(module, part, spec, opened, allow_nonfinite=True)
    if source.part == TOWER:
        return module(inputs)
    hidden = module(module.embed(inputs), torch.arange(inputs.shape[1]).unsqueeze(0))
    return module.logits(hidden).transpose(0, 1)


def _stock_logits(folder: str, _spec: Any, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits


def _stock_features(folder: str, spec: Any, pixels: torch.Tensor) -> torch.Tensor:
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    features = model(pixels, output_hidden_states=True).hidden_states[spec.num_built_layers]
    return features if spec.select_feature == "cls_patch" else features[:, 1:]


STOCK: dict[str, Callable[[str, Any, torch.Tensor], torch.Tensor]] = {DECODER: _stock_logits, TOWER: _stock_features}
