"""The public layouts: by which tensor names each is recognised, and which names belong to which part.

Prefixes of a layout are taken off here, so that the names left are those that the rules of a dialect know.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

TEXT, VISION, PROJECTOR = "text_decoder", "vision_encoder", "vision_projector"


@dataclass(frozen=True)
class Prefix:
    """Names that start with `old` belong to `part` (None: known and dropped), where `new` replaces the prefix."""

    old: str
    part: str | None
    new: str = ""


@dataclass(frozen=True)
class Layout:
    """A layout is recognised when `marker` (a regular expression) is found in one of the names.

    Of its prefixes the longest that fits a name counts. `dialects` gives the rules of each part.
    """

    name: str
    marker: str
    prefixes: tuple[Prefix, ...]
    dialects: dict[str, str]

    def recognises(self, names: Iterable[str]) -> bool:
        """Whether the names are of this layout."""
        return any(re.search(self.marker, name) for name in names)

    def split(self, names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
        """(part -> {name in the dialect: name in the file}, dropped names, names of no part)."""
        parts: dict[str, dict[str, str]] = {}
        dropped, unknown = [], []
        for name in names:
            fitting = [prefix for prefix in self.prefixes if name.startswith(prefix.old)]
            if not fitting:
                unknown.append(name)
                continue
            prefix = max(fitting, key=lambda item: len(item.old))
            if prefix.part is None:
                dropped.append(name)
            else:
                parts.setdefault(prefix.part, {})[prefix.new + name[len(prefix.old) :]] = name
        return parts, dropped, unknown


def _nested(outer: str, part: str, new: str = "") -> tuple[Prefix, Prefix]:
    """A module with the prefix of transformers before 4.52 and, under `model.`, of the classes since."""
    return Prefix(outer, part, new), Prefix("model." + outer, part, new)


def _projector(outer: str) -> tuple[Prefix, ...]:
    """LLaVA's projector: an nn.Sequential, or for type linear one nn.Linear, which the rules know as its number 0."""
    return Prefix(outer, PROJECTOR), *(Prefix(outer + name, PROJECTOR, "0." + name) for name in ("weight", "bias"))


LLAVA_HF = Layout(
    "llava-hf",
    r"^(model\.)?multi_modal_projector\.",
    (
        Prefix("language_model.model.", TEXT, "model."),
        Prefix("language_model.lm_head.", TEXT, "lm_head."),
        Prefix("model.language_model.", TEXT, "model."),
        Prefix("lm_head.", TEXT, "lm_head."),
        *_nested("vision_tower.vision_model.", VISION),
        *_nested("vision_tower.", VISION),
        *_nested("multi_modal_projector.", PROJECTOR),
    ),
    {TEXT: "hf", VISION: "hf", PROJECTOR: "hf"},
)

LLAVA = Layout(
    "llava",
    r"^model\.(layers\.|embed_tokens\.)",  # and mm_projector, see LAYOUTS
    (
        Prefix("model.", TEXT, "model."),
        Prefix("lm_head.", TEXT, "lm_head."),
        Prefix("model.vision_tower.vision_tower.vision_model.", VISION),
        Prefix("model.vision_tower.vision_tower.", VISION),
        *_projector("model.mm_projector."),
    ),
    {TEXT: "hf", VISION: "hf", PROJECTOR: "llava"},
)

PROJECTOR_ONLY = Layout(
    "projector",
    r"(^|\.)mm_projector\.|^(0\.)?(weight|bias)$",
    (
        *_projector("model.mm_projector."),
        *_projector("mm_projector."),
        *_projector("")[1:],
        *(Prefix(digit, PROJECTOR, digit) for digit in "0123456789"),
    ),
    {PROJECTOR: "llava"},
)

OPENAI_CLIP = Layout(
    "openai-clip",
    r"^visual\.class_embedding$",
    (
        Prefix("visual.", VISION, "visual."),
        *(
            Prefix(name, None)
            for name in (
                "transformer.",
                "token_embedding.",
                "ln_final.",
                "positional_embedding",
                "text_projection",
                "logit_scale",
                "input_resolution",
                "context_length",
                "vocab_size",
            )
        ),
    ),
    {VISION: "openai"},
)

CLIP = Layout(
    "clip",
    r"^(vision_model\.)?embeddings\.class_embedding$",
    (
        Prefix("vision_model.", VISION),
        *(Prefix(name, VISION, name) for name in ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")),
        *(Prefix(name, None) for name in ("text_model.", "visual_projection.", "text_projection.", "logit_scale")),
    ),
    {VISION: "hf"},
)

_OURS = {TEXT: "ours", VISION: "ours", PROJECTOR: "ours"}

OUR_MODEL = Layout(
    "mindspeed-mm",
    r"^(text_decoder\.|image_encoder\.(encoder|projector)\.)",
    (
        Prefix("text_decoder.", TEXT),
        Prefix("image_encoder.encoder.", VISION),
        Prefix("image_encoder.projector.", PROJECTOR),
    ),
    _OURS,
)
OUR_VISION = Layout("mindspeed-mm", r"^class_token$", (Prefix("", VISION),), _OURS)
OUR_TEXT = Layout("mindspeed-mm", r"^embedding\.word_embeddings\.weight$", (Prefix("", TEXT),), _OURS)
OUR_PROJECTOR = Layout("mindspeed-mm", r"^encoder\.linear_fc[0-9]+\.weight$", (Prefix("", PROJECTOR),), _OURS)

HF = Layout(
    "hf",
    # The last two are InternLM2's.
    r"^(model\.)?(embed_tokens\.weight|layers\.[0-9]+\.(self_attn\.|attention\.wqkv\.))|^model\.tok_embeddings\.",
    (
        Prefix("model.", TEXT, "model."),
        Prefix("lm_head.", TEXT, "lm_head."),
        Prefix("output.", TEXT, "output."),
        *(Prefix(name, TEXT, "model." + name) for name in ("embed_tokens.", "layers.", "norm.")),
    ),
    {TEXT: "hf"},
)

LAYOUTS = (LLAVA_HF, OPENAI_CLIP, CLIP, OUR_MODEL, OUR_VISION, OUR_TEXT, OUR_PROJECTOR)

WRITTEN = {
    "llava-hf": {
        TEXT: ("hf", "language_model."),
        VISION: ("hf", "vision_tower.vision_model."),
        PROJECTOR: ("hf", "multi_modal_projector."),
    },
    "llava": {
        TEXT: ("hf", ""),
        VISION: ("hf", "model.vision_tower.vision_tower.vision_model."),
        PROJECTOR: ("llava", "model.mm_projector."),
    },
    "hf": {TEXT: ("hf", "")},
    "clip": {VISION: ("hf", "vision_model.")},
    "projector": {PROJECTOR: ("llava", "model.mm_projector.")},
    "mindspeed-mm": {TEXT: ("ours", ""), VISION: ("ours", ""), PROJECTOR: ("ours", "")},
    "checkpoint": {
        TEXT: ("ours", "text_decoder."),
        VISION: ("ours", "image_encoder.encoder."),
        PROJECTOR: ("ours", "image_encoder.projector."),
    },
}
"""Layouts that are written: the dialect of each part and the prefix of its names. Those of llava-hf are the hub's,
which transformers of every version reads."""


def recognise(names: Iterable[str]) -> Layout | None:
    """The layout that the names belong to, or None."""
    names = tuple(names)
    for layout in LAYOUTS:
        if layout.recognises(names):
            return layout
    if PROJECTOR_ONLY.recognises(names):
        return LLAVA if LLAVA.recognises(names) else PROJECTOR_ONLY
    return HF if HF.recognises(names) else None
