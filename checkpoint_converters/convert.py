"""Convert weights between layouts, as a library; each part goes through our names and back by one rule set."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_converters.write import beside, write_json, write_pt, write_safetensors
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import describe_model, describe_part, model_block, part_of_source
from mindspeed_mm.models.part import DTYPES, PartSpec
from mindspeed_mm.models.spec import PART_KINDS
from mindspeed_mm.weights.sources import PartSource, Source, open_source

FILE_NAMES = {
    "vision_encoder": "converted_clip.pt",
    "text_decoder": "converted_vicuna.pt",
    "vision_projector": "mlp.pt",
}
"""Files of the layout mindspeed-mm, as the ancestor's guide names them."""

COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
)
"""Files that a model needs beside its weights."""

TARGETS = ("mindspeed-mm", "hf")


@dataclass(frozen=True)
class Converted:
    """What one part became: its file, number of tensors and bytes, and the Spec fields that had to be assumed."""

    part: str
    path: Path
    tensors: int
    nbytes: int
    assumed: tuple[str, ...]


def convert(
    source: str | Path | Source,
    target: str | Path,
    *,
    to: str,
    dtype: str | torch.dtype | None = None,
    num_attention_heads: int | None = None,
) -> list[Path]:
    """Convert every part that a source holds, with its tokenizer and image processor; returns the written files.

    Args:
        source: weights in any readable layout.
        target: folder to write; it is created. Files of layout mindspeed-mm replace those of the same name when they
            are complete; for "hf" the folder must not exist.
        to: layout to write; "mindspeed-mm" = converted_clip.pt, converted_vicuna.pt, mlp.pt, and for a whole model the
            model.json that describes them; "hf" = the text decoder as a Llama folder.
        dtype: type to store (fp32, fp16, bf16 or torch's); None keeps each tensor's own.
        num_attention_heads: heads of a vision encoder whose source does not say (None: width / 64).

    Raises WeightError for a source that cannot be read or a target that cannot be written.
    """
    if to not in TARGETS:
        raise WeightError(f"cannot convert to {to!r}; expected {', '.join(TARGETS)}.")
    opened = source if isinstance(source, Source) else open_source(source)
    if to == "hf":
        return _convert_to_hf(opened.part("text_decoder"), Path(target), dtype) + _copy_beside(opened, Path(target))
    return _convert_to_ours(opened, Path(target), dtype, num_attention_heads) + _copy_beside(opened, Path(target))


def _convert_to_ours(
    source: Source, folder: Path, dtype: str | torch.dtype | None, num_attention_heads: int | None
) -> list[Path]:
    """Layout mindspeed-mm: one file per part, and a model.json where all parts are there."""
    whole = set(source.parts) == set(PART_KINDS)
    specs = describe_model(source, num_attention_heads=num_attention_heads).part_specs() if whole else {}
    written = []
    for kind in source.parts:
        heads = num_attention_heads if kind == "vision_encoder" else None
        path = folder / FILE_NAMES[kind]
        convert_part(source.part(kind), path, spec=specs.get(kind), dtype=dtype, num_attention_heads=heads)
        written.append(path)
    if whole:
        write_json(folder / "model.json", model_block(specs))
        written.append(folder / "model.json")
    return written


def _convert_to_hf(source: PartSource, folder: Path, dtype: str | torch.dtype | None) -> list[Path]:
    """Layout hf: config.json and safetensors, whole or not at all."""
    if folder.exists():
        raise WeightError(f"{folder} exists; expected a new folder. Remove it or choose another target.")
    part, spec = part_of_source(source), describe_part(source)
    state = part.rules["hf"].export(_cast(our_state(source, spec), dtype), spec.geometry)
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    with beside(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / "config.json", part.to_hf(spec, stored.pop() if len(stored) == 1 else "float32"))
        write_safetensors(temporary, state)
    return sorted(folder.iterdir())


def _copy_beside(source: Source, folder: Path) -> list[Path]:
    """Copy tokenizer and image processor: of the source's folder, else of its tower's."""
    origins = [source.path, *(part.path for part in source.part_sources.values())]
    if source.layout == "llava" and source.config and source.config.get("mm_vision_tower"):
        origins.append(source.path / source.config["mm_vision_tower"])
    copied = []
    for name in COMPANIONS:
        found = next((origin / name for origin in origins if (origin / name).is_file()), None)
        if found is not None and found.resolve() != (folder / name).resolve():
            with beside(folder / name) as temporary:
                shutil.copyfile(found, temporary)
            copied.append(folder / name)
    return copied


def convert_part(
    source: PartSource,
    path: Path,
    *,
    spec: PartSpec | None = None,
    dtype: str | torch.dtype | None = None,
    num_attention_heads: int | None = None,
) -> Converted:
    """Write one part under our names as a flat .pt file of full tensors, as the ancestor's converters do.

    All layers of the source are kept, also those that a model with a feature before the last layer never builds. The
    file says inside what it holds (see weights/files.py), so that it loads without a further config. `spec` is what
    the source is, None to take it from the source; see `convert` for the others.
    """
    spec = spec or describe_part(source, num_attention_heads=num_attention_heads)
    known = source.config is not None or num_attention_heads is not None or source.part != "vision_encoder"
    assumed = source.assumed if known else ("num_attention_heads",)
    state = _cast(our_state(source, spec), dtype)
    block = {**spec.model_dump(mode="json", exclude_defaults=True), "params_dtype": None}
    write_pt(path, state, {"config": {source.part: block}, "assumed": list(assumed)})
    return Converted(source.part, path, len(state), sum(tensor.nbytes for tensor in state.values()), assumed)


def our_state(source: PartSource, spec: PartSpec) -> dict[str, Tensor]:
    """All tensors of a part under our names, with every layer of the source, in their stored type.

    Raises WeightError when the source is not the model that `spec` describes.
    """
    rules = part_of_source(source).rules[source.dialect]
    geometry = spec.geometry  # steps of layers behind the feature are marked unused, their rules are not
    steps = rules.match(source.names, geometry, where=f"{source.path} ({source.part})").steps
    return {
        step.target: step.rule.to_ours([source.get(name) for name in step.sources], geometry)
        for step in steps
        if not step.rule.unused
    }


def _cast(state: Mapping[str, Tensor], dtype: str | torch.dtype | None) -> dict[str, Tensor]:
    if dtype is None:
        return dict(state)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise WeightError(f"found dtype {dtype!r}; expected one of {', '.join(DTYPES)}.")
    wanted: Any = DTYPES[dtype] if isinstance(dtype, str) else dtype
    return {name: tensor.to(wanted) for name, tensor in state.items()}
