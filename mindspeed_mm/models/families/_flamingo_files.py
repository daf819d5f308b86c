"""What Flamingo's public files say of a model: a decoder under what was trained of it, and sizes that stand in the
tensors alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.describe import part_of_source
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.weights.more_rows import MoreRows
from mindspeed_mm.weights.overlay import Overlay
from mindspeed_mm.weights.sources import PartSource, Source

logger = logging.getLogger(__name__)

EMBEDDINGS, HEAD = ("model.embed_tokens.weight", "transformer.wte.weight"), "lm_head.weight"
"""Tensors with a row for each word."""

END_OF_CHUNK = "<|endofchunk|>"
"""What ends a text about an image."""

DECODER_LAYERS = {"llama": "model.layers.{}.", "mpt": "transformer.blocks.{}."}
"""The decoders, and what the names of their layers begin with."""

CHANNELS = 64
"""Of a head of perceiver and cross-attention, in all releases."""

CROSS_LAYER = re.compile(r"(?:model\.layers|transformer\.blocks)\.(\d+)\.gated_cross_attn_layer\.")


def named_weights(source: Source, config: dict[str, Any], key: str) -> Source | None:
    """The weights that a key of config.json names by a path relative to it. Raises WeightError where none lie there."""
    name = config.get(key)
    if not isinstance(name, str) or not name:
        return None
    folder = _folder(source)
    path = folder / name
    if not path.exists():
        raise WeightError(
            f"{folder / 'config.json'}: found {key} {name!r}, and there is nothing at {path}; expected a folder of "
            "weights. Correct the path; it is relative to the folder of config.json."
        )
    return open_source(path, follow=False)


def over_base(trained: PartSource, base: PartSource) -> PartSource:
    """A decoder with what was trained of it in the place of its own tensors, beside its cross-attention."""
    part = part_of_source(base)
    if part.name not in DECODER_LAYERS:
        raise WeightError(
            f'{base.path}: found a "{part.name}", a decoder without gated cross-attention; expected '
            f"{' or '.join(DECODER_LAYERS)}. Give the decoder that the checkpoint was trained on."
        )
    start, _ = DECODER_LAYERS[part.name].split("{}.")
    renamed = {re.sub(rf"^({re.escape(start)}\d+\.)", r"\1decoder_layer.", name): name for name in base.names}
    known = {*renamed, "lm_head.weight"}
    known |= {name for name in trained.names if CROSS_LAYER.match(name) or _is_copy(name)}
    if unknown := sorted(set(trained.names) - known):
        raise WeightError(
            f"{trained.path}: found tensors such as {unknown[0]}, which the decoder of {base.path} does not have; "
            "expected the decoder that the checkpoint was trained on. Correct lang_encoder_path in config.json."
        )
    return Overlay.join(trained, base, renamed)


def _is_copy(name: str) -> bool:
    return name.startswith(("old_decoder_blocks.", "gated_cross_attn_layers."))


def cross_config(source: Source, part: PartSource, config: dict[str, Any]) -> dict[str, Any]:
    """What a decoder's cross-attention is, by config.json, its tensors and the tokenizer beside."""
    layers = sorted({int(found[1]) for name in part.names if (found := CROSS_LAYER.match(name))})
    every = layers[0] + 1 if layers else None
    said = config.get("cross_attn_every_n_layers", every)
    if said != every:
        raise WeightError(
            f"{source.path}: config.json says cross_attn_every_n_layers {said}, and the weights have cross-attention "
            f"before layers {', '.join(map(str, layers[:4])) or 'of no number'} ...; expected {every}. Correct it."
        )
    name = next(name for name in part.names if name.endswith(".attn.to_kv.weight") and CROSS_LAYER.match(name))
    rows, memory = part.shape(name)
    return {
        "every": every,
        "memory_size": memory,
        "media_token_id": config["media_token_id"] if "media_token_id" in config else _media_token(source),
        "num_attention_heads": rows // (2 * CHANNELS),
        "kv_channels": CHANNELS,
        "latest_only": config.get("only_attend_immediate_media", True),
    }


def with_all_words(source: Source, part: PartSource) -> PartSource:
    """A decoder with a row for each word of the tokenizer beside it, to which its project adds words, and a config that
    says how many there are."""
    sizes = {name: part.shape(name)[0] for name in (*EMBEDDINGS, HEAD) if name in part.names}
    if not sizes:
        return part
    rows = max(*sizes.values(), _words(source))
    if short := [name for name, size in sizes.items() if size < rows]:
        logger.info("%s: %d rows of new words in %s", source.path, rows - min(sizes.values()), ", ".join(short))
        part = MoreRows.of(part, short, rows)
    return replace(part, config={**part.config, "vocab_size": rows})


def _words(source: Source) -> int:
    """Words of the tokenizer beside the weights; 0 where there is none."""
    from mindspeed_mm.data.tokenizer import load_tokenizer

    return load_tokenizer(_folder(source)).vocab_size if _has_tokenizer(source) else 0


def _folder(source: Source) -> Path:
    return source.path if source.path.is_dir() else source.path.parent


def _has_tokenizer(source: Source) -> bool:
    return any((_folder(source) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _media_token(source: Source) -> int:
    """The id of `<image>` in the tokenizer beside the weights."""
    from mindspeed_mm.data.tokenizer import load_tokenizer

    folder, known = _folder(source), _has_tokenizer(source)
    found = load_tokenizer(folder).token_to_id(IMAGE_TOKEN) if known else None
    if found is None:
        what = f"the tokenizer does not know {IMAGE_TOKEN}" if known else "there is no tokenizer"
        raise ConfigError(
            f"{folder}: {what}; expected the tokenizer of the model with {IMAGE_TOKEN} and {END_OF_CHUNK}, which its "
            "own code adds. Save it there (docs/flamingo.md), or put media_token_id into config.json."
        )
    return found


def perceiver_sizes(part: PartSource) -> dict[str, Any]:
    """Sizes of a perceiver by its tensors, its heads of 64 channels."""
    layers = _numbers(part.names, r"^layers\.(\d+)\.")
    query = next(name for name in part.names if name.endswith("to_q.weight"))
    size, width = part.shape(query)
    frames = part.shape("frame_embs")[0] if "frame_embs" in part.names else None
    return {
        "input_size": width,
        "hidden_size": width,
        "num_layers": len(layers),
        "num_latents": part.shape("latents")[0],
        "num_attention_heads": size // CHANNELS,
        "kv_channels": CHANNELS,
        "max_frames": frames,
    }


def perceiver_config(part: PartSource) -> dict[str, Any]:
    """The config of a perceiver as its part reads one."""
    return part.config | {"vision_config": {"hidden_size": part.shape("latents")[1]}}


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(found[1]) for name in names if (found := re.match(pattern, name))}
