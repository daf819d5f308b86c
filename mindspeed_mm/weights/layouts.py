"""A layout: by which tensor names it is recognised, and which names belong to which slot.

Prefixes of a layout are taken off here, so that the names left are those that the rules of a dialect know. Public
layouts are stated by the family or the part that they hold; here are those of our own files.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

TEXT, VISION, PROJECTOR = "text_decoder", "vision_encoder", "vision_projector"
INTERACTION = "interaction"


@dataclass(frozen=True)
class Prefix:
    """Names that start with `old` belong to `part` (None: known and dropped), where `new` replaces the prefix."""

    old: str
    part: str | None
    new: str = ""


@dataclass(frozen=True)
class Layout:
    """The tensor names of one public form of a model or of a part.

    name: as `--to` and messages say it.
    markers: regular expressions; the layout is recognised when each is found in one of the names.
    prefixes: of them the longest that fits a name counts.
    dialects: the names that are left, by slot: which rules of the part read them.
    written: the prefix of each slot's names where the layout is written; empty where it is only read. `{own}` in it
        stands for the prefix that the part has in its own folder.
    modules: the one of `prefixes` (its `old`) that each slot's modules have in transformers' class today; adapters are
        written with it.
    """

    name: str
    markers: tuple[str, ...]
    prefixes: tuple[Prefix, ...]
    dialects: dict[str, str]
    written: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)

    def recognises(self, names: Iterable[str]) -> bool:
        """Whether the names are of this layout."""
        names = tuple(names)
        return all(any(re.search(marker, name) for name in names) for marker in self.markers)

    def split(self, names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
        """(slot -> {name in the dialect: name in the file}, dropped names, names of no slot)."""
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


OURS = "mindspeed-mm"
"""Name of the layout of our own files."""

_OUR_DIALECTS = dict.fromkeys((TEXT, VISION, PROJECTOR, INTERACTION), "ours")

OUR_MODEL = Layout(
    OURS,
    (r"^(text_decoder\.|image_encoder\.(encoder|projector)\.|interaction\.)",),
    (
        Prefix("text_decoder.", TEXT),
        Prefix("image_encoder.encoder.", VISION),
        Prefix("image_encoder.projector.", PROJECTOR),
        Prefix("interaction.", INTERACTION),
    ),
    _OUR_DIALECTS,
    {
        TEXT: "text_decoder.",
        VISION: "image_encoder.encoder.",
        PROJECTOR: "image_encoder.projector.",
        INTERACTION: "interaction.",
    },
)

OUR_FILES = {
    VISION: Layout(OURS, (r"^class_token$",), (Prefix("", VISION),), _OUR_DIALECTS, {VISION: ""}),
    TEXT: Layout(OURS, (r"^embedding\.word_embeddings\.weight$",), (Prefix("", TEXT),), _OUR_DIALECTS, {TEXT: ""}),
    PROJECTOR: Layout(
        OURS, (r"^encoder\.linear_fc[0-9]+\.weight$",), (Prefix("", PROJECTOR),), _OUR_DIALECTS, {PROJECTOR: ""}
    ),
    INTERACTION: Layout(
        OURS, (r"^blocks\.layers\.0\.mlp\.",), (Prefix("", INTERACTION),), _OUR_DIALECTS, {INTERACTION: ""}
    ),
}
"""One part alone under our names. A file that says inside which slot it fills needs no marker; the ancestor's do."""

HF_DECODER = Layout(
    "hf",
    (
        r"^(model\.)?(decoder\.)?((embed_tokens|tok_embeddings)\.weight$|layers\.[0-9]+\.(self_attn|attention)\.)"
        r"|^(transformer\.)?blocks\.[0-9]+\.attn\.Wqkv\.",
    ),
    (
        Prefix("", TEXT),
        *(
            Prefix(name, TEXT, "model." + name) for name in ("embed_tokens.", "layers.", "norm.", "decoder.")
        ),  # of a bare base model
        *(Prefix(name, TEXT, "transformer." + name) for name in ("wte.", "blocks.", "norm_f.")),
    ),
    {TEXT: "hf"},
    {TEXT: ""},
)
"""A decoder's own Hugging Face folder."""
