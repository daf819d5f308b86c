"""What two sources compute, in float32 on the CPU: the logits of whole models, else those of decoders, and the features
of vision encoders. Ours on one side; transformers on the other, where it loads that layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from mindspeed_mm.models.adapters.spec import WholePair
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.part import all_parts
from mindspeed_mm.models.spec import find_family
from mindspeed_mm.weights.sources import PartSource, Source

MODEL, DECODER, VISION_ENCODER = "model", "text_decoder", "vision_encoder"

TEXT_TOKENS = 24
"""Random tokens that stand in where no prompt is given."""

RANDOM_SIDE = 40
"""Height and width of the image that stands in where none is given and the size decides."""

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
    if importlib.util.find_spec("transformers") is None or not source.path.is_dir():
        return False
    if kind == MODEL:
        return source.family is not None and source.layout == find_family(source.family).layouts[0].name
    stock = [part.layouts[0].name for part in all_parts(kind).values() if part.layouts]
    return source.layout in (stock if kind == VISION_ENCODER else ["hf"])


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
    for ids, inputs in questions(vlm, images, prompts):
        found.add(ours(ids, inputs), other(ids, inputs))
    return found.figures(foreign=foreign)


def _our_model(vlm) -> Compute:
    return lambda ids, inputs: vlm.logits(ids, **inputs)


def questions(vlm, images: list[str], prompts: list[str]) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(ids [1, S] with -200 at image positions, the image as the family's processor returns it) of each question."""
    from mindspeed_mm.data.image import image_size, load_image

    generator = torch.Generator().manual_seed(0)
    for number in range(max(len(images), len(prompts), 1)):
        plan = vlm.spec.family.fixed_plan(vlm.spec)
        if plan is not None and not images:
            blank = vlm.model.image_encoder.encoder.blank()
            media = replace(blank, pixels=torch.randn(blank.pixels.shape, generator=generator))
        else:
            image = load_image(images[min(number, len(images) - 1)]) if images else _random_image(generator)
            plan, media = plan or vlm.media.plan(*image_size(image)), vlm.media.item(image)
        if prompts:
            text = vlm.tokenizer.encode(f"USER: \n{prompts[min(number, len(prompts) - 1)]} ASSISTANT:")
        else:
            rows = min(vlm.spec.text_decoder.language_vocab_size, vlm.image_token_id or 2**31)
            text = random_ids(rows, generator).tolist()
        ids = text[:1] + list(plan.ids) + text[1:]
        yield torch.tensor([ids]), vlm.spec.family.inputs_of_media(vlm.spec, media)


def _random_image(generator: torch.Generator) -> Image.Image:
    """Noise that stands in where no image is given."""
    pixels = torch.randint(256, (RANDOM_SIDE, RANDOM_SIDE, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def random_ids(rows: int, generator: torch.Generator) -> torch.Tensor:
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
        inputs = random_ids(rows, generator).unsqueeze(0)
    else:
        inputs = torch.randn(1, 3, ours.image_size, ours.image_size, generator=generator)
    foreign = _foreign(sources[1], kind)
    found = Differences("logits" if kind == DECODER else "features")
    with torch.inference_mode():
        right = STOCK[kind](str(sources[1].path), other) if foreign else our_part(sources[1].part(kind), other)
        found.add(our_part(sources[0].part(kind), ours)(inputs), right(inputs))
    return found.figures(foreign=foreign)


def our_part(
    source: PartSource, spec: Any, *, adapted: Any = None, pairs: dict[str, WholePair] | None = None
) -> Compute:
    """Our module of a decoder (ids -> logits) or a vision encoder (pixels -> features), in float32.

    `adapted`: the spec with a lora block whose adapters, `pairs` by Hugging Face's names, are switched on.
    """
    from mindspeed_mm.models.adapters.lora import attach_lora
    from mindspeed_mm.models.describe import part_of_source
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.weights.loading import load_part

    part = part_of_source(source)
    module = part.build(spec, Runtime(params_dtype=torch.float32)).eval()
    load_part(module, part, spec, Source(source.path, "part", None, {source.part: source}), allow_nonfinite=True)
    if pairs:
        attach_lora(module, part, adapted, tp_rank=0, tp_size=1, pairs=pairs)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        hidden = module(module.embed(ids), torch.arange(ids.shape[1]).unsqueeze(0))
        return module.logits(hidden).transpose(0, 1)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return module(Media.of_images(pixels)).values.unsqueeze(0)

    return features if source.part == VISION_ENCODER else logits


def _stock_model(folder: str) -> Compute:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    image_token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)

    @torch.inference_mode()
    def logits(ids: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return model(input_ids=ids.where(ids >= 0, image_token), **inputs).logits.float()

    return logits


def _stock_decoder(folder: str, _spec: Any) -> Compute:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model(input_ids=ids).logits


def _stock_vision_encoder(folder: str, spec: Any) -> Compute:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    model = AutoModel.from_config(getattr(config, "vision_config", config))
    model = type(model).from_pretrained(folder, dtype=torch.float32).eval()

    def features(pixels: torch.Tensor) -> torch.Tensor:
        states = model(pixels, output_hidden_states=True).hidden_states
        hidden = torch.cat([states[layer] for layer in spec.feature_layers], dim=-1)
        return hidden if spec.select_feature == "cls_patch" else hidden[:, getattr(spec, "class_token_len", 0) :]

    return features


STOCK: dict[str, Callable[[str, Any], Compute]] = {DECODER: _stock_decoder, VISION_ENCODER: _stock_vision_encoder}
