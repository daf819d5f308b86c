"""What two sources compute, in float32 on the CPU: the logits of whole models, else those of decoders, and the features
of vision encoders. Ours on one side; transformers on the other, where it loads that layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.weights.sources import PartSource, Source

MODEL, DECODER, VISION_ENCODER = "model", "text_decoder", "vision_encoder"

TEXT_TOKENS = 24
"""Random tokens that stand in where no prompt is given."""

TRANSFORMERS = {MODEL: "llava-hf", DECODER: "hf", VISION_ENCODER: "clip"}
"""Layouts that transformers loads."""

Sources = tuple[Source, Source]
Compute = Callable[..., torch.Tensor]


class Differences:
    """Figures of outputs [B, S, C] that should be equal."""

    def __init__(self, outputs: str) -> None:
        """`outputs`: "logits", of which best tokens are compared too, or "features"."""
        self._outputs = outputs
        self._largest = self._total = 0.0
        self._count = self._agreed = self._positions = 0

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Compare the columns that both have: vocabularies may be padded."""
        columns = min(left.shape[-1], right.shape[-1])
        left, right = left[..., :columns], right[..., :columns]
        difference = (left - right).abs()
        self._largest = max(self._largest, float(difference.max()))
        self._total, self._count = self._total + float(difference.sum()), self._count + difference.numel()
        self._agreed += int((left.argmax(-1) == right.argmax(-1)).sum())
        self._positions += left.shape[0] * left.shape[1]

    def figures(self, *, foreign: bool) -> dict[str, Any]:
        """outputs, positions, max and mean |d|, top1 (of logits): the share of positions with the same best token, and
        against: who computed the other side."""
        found = {"outputs": self._outputs, "positions": self._positions}
        found |= {"max": self._largest, "mean": self._total / self._count}
        if self._outputs == "logits":
            found["top1"] = self._agreed / self._positions
        return found | {"against": "transformers" if foreign else "ours"}


def compare_outputs(
    a: str | Mapping[str, str],
    b: str,
    sources: Sources,
    images: list[str],
    prompts: list[str],
    num_attention_heads: int | None,
) -> dict[str, dict[str, Any]]:
    """Figures of two whole models under "model", else of the decoder and the vision encoder as far as both sources hold
    them.

    Args:
        a, b: what `sources` were opened from.
        images, prompts: questions for whole models; without them, and for parts, random inputs.
    """
    pair = _models(a, b, sources)
    if pair is not None:
        return {MODEL: _compare_models(*pair, images, prompts)}
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    common = [kind for kind in (DECODER, VISION_ENCODER) if all(kind in source.parts for source in sources)]
    return {kind: _compare_parts(kind, sources, num_attention_heads) for kind in common}


def _foreign(source: Source, kind: str) -> bool:
    """Whether transformers computes this side."""
    installed = importlib.util.find_spec("transformers") is not None
    return installed and source.layout == TRANSFORMERS[kind] and source.path.is_dir()


def _models(a: str | Mapping[str, str], b: str, sources: Sources) -> tuple[str, str, bool] | None:
    """(path for our model, path of the other, whether transformers computes it), None without two whole models.

    What was put together of several sources is no model of its own: then transformers judges ours on the result.
    """
    stock = [_foreign(source, MODEL) for source in sources]
    if any(len(source.parts) < 3 for source in sources) or (isinstance(a, Mapping) and not stock[1]):
        return None
    if isinstance(a, Mapping):
        return str(b), str(b), True
    return (str(b), str(a), True) if stock[0] and not stock[1] else (str(a), str(b), stock[1])


def _compare_models(a: str, b: str, foreign: bool, images: list[str], prompts: list[str]) -> dict[str, Any]:
    from mindspeed_mm.inference import api

    vlm = api.load(a, device="cpu", dtype="fp32")
    ours = _our_model(vlm)
    other = _stock_model(b) if foreign else _our_model(api.load(b, device="cpu", dtype="fp32"))
    found = Differences("logits")
    for ids, pixels in _questions(vlm, images, prompts):
        found.add(ours(ids, pixels), other(ids, pixels))
    return found.figures(foreign=foreign)


def _our_model(vlm) -> Compute:
    return lambda ids, pixels: vlm.logits(ids, None, pixels)


def _questions(vlm, images: list[str], prompts: list[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids [1, S] with -200 at image positions, pixel values [1, 3, h, w]) of each question."""
    from mindspeed_mm.data.image import load_image, preprocess

    generator = torch.Generator().manual_seed(0)
    size = vlm.spec.vision_encoder.image_size
    for number in range(max(len(images), len(prompts), 1)):
        if images:
            image = load_image(images[min(number, len(images) - 1)])
            pixels = preprocess(image, vlm.image_processor, pad=vlm.pad)
        else:
            pixels = torch.randn(3, size, size, generator=generator)
        if prompts:
            text = vlm.tokenizer.encode(f"USER: \n{prompts[min(number, len(prompts) - 1)]} ASSISTANT:")
        else:
            rows = min(vlm.spec.text_decoder.language_vocab_size, vlm.image_token_id or 2**31)
            text = _random_ids(rows, generator).tolist()
        ids = text[:1] + [IMAGE_TOKEN_INDEX] * vlm.tokens_per_image + text[1:]
        yield torch.tensor([ids]), pixels.unsqueeze(0)


def _random_ids(rows: int, generator: torch.Generator) -> torch.Tensor:
    """[TEXT_TOKENS] ids of a vocabulary of so many rows, without its special tokens."""
    return torch.randint(min(3, rows - 1), rows, (TEXT_TOKENS,), generator=generator)


def _compare_parts(kind: str, sources: Sources, num_attention_heads: int | None) -> dict[str, Any]:
    from checkpoint_converters.compare import vision_heads
    from checkpoint_converters.convert import specs_of

    heads = vision_heads(*sources, num_attention_heads) if kind == VISION_ENCODER else None
    if _foreign(sources[0], kind) and not _foreign(sources[1], kind):
        sources = sources[::-1]
    ours, other = (specs_of(source, [kind], heads)[kind] for source in sources)
    generator = torch.Generator().manual_seed(0)
    if kind == DECODER:
        rows = min(ours.language_vocab_size, other.language_vocab_size)
        inputs = _random_ids(rows, generator).unsqueeze(0)
    else:
        inputs = torch.randn(1, 3, ours.image_size, ours.image_size, generator=generator)
    foreign = _foreign(sources[1], kind)
    found = Differences("logits" if kind == DECODER else "features")
    with torch.inference_mode():
        right = STOCK[kind](str(sources[1].path), other) if foreign else _our_part(sources[1].part(kind), other)
        found.add(_our_part(sources[0].part(kind), ours)(inputs), right(inputs))
    return found.figures(foreign=foreign)


def _our_part(source: PartSource, spec: Any) -> Compute:
    from mindspeed_mm.models.describe import part_of_source
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.weights.loading import load_part

    part = part_of_source(source)
    module = part.build(spec, Runtime(params_dtype=torch.float32)).eval()
    load_part(module, part, spec, Source(source.path, "part", None, {source.part: source}), allow_nonfinite=True)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        hidden = module(module.embed(ids), torch.arange(ids.shape[1]).unsqueeze(0))
        return module.logits(hidden).transpose(0, 1)

    return module if source.part == VISION_ENCODER else logits


def _stock_model(folder: str) -> Compute:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids.where(ids >= 0, model.config.image_token_index), pixel_values=pixels).logits.float()

    return logits


def _stock_decoder(folder: str, _spec: Any) -> Compute:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model(input_ids=ids).logits


def _stock_vision_encoder(folder: str, spec: Any) -> Compute:
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()

    def features(pixels: torch.Tensor) -> torch.Tensor:
        hidden = model(pixels, output_hidden_states=True).hidden_states[spec.num_built_layers]
        return hidden if spec.select_feature == "cls_patch" else hidden[:, 1:]

    return features


STOCK: dict[str, Callable[[str, Any], Compute]] = {DECODER: _stock_decoder, VISION_ENCODER: _stock_vision_encoder}
