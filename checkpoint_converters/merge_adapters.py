"""LoRA adapters in PEFT's format merged into the tensors of a base folder, under the names that these have there."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_converters.specs import specs_of
from checkpoint_converters.write import write_json
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.base_hash import check_base
from mindspeed_mm.models.adapters.merged import MergedFile
from mindspeed_mm.models.adapters.peft_format import TENSORS, PeftAdapter, read_peft, translation
from mindspeed_mm.models.adapters.saved_modules import tied_names
from mindspeed_mm.models.adapters.splits import of_length
from mindspeed_mm.models.adapters.targets import DIALECT
from mindspeed_mm.models.part import part_of
from mindspeed_mm.models.spec import ModelSpec, all_families
from mindspeed_mm.weights.files import TensorFile, read_json_object
from mindspeed_mm.weights.sources import PartSource, Source

MERGED = "merged_adapters.json"
"""In a merged folder: digest of each adapter's tensors that was merged into it -> the adapter's folder."""


def check_not_merged(base: Path, folders: Sequence[Path]) -> None:
    """Raise WeightError for an adapter that a base holds already."""
    held = _merged_into(base)
    for folder in folders:
        if (folder / TENSORS).is_file() and (digest := _digest(folder)) in held:
            raise WeightError(
                f"{folder} was merged into {base} already (as {held[digest]}, says its {MERGED}); expected an adapter "
                "that it does not hold. Merge into the base that it was trained on."
            )


def record_merged(base: Path, partial: Sequence[str | Path], target: Path) -> None:
    """Write into a merged folder which adapters it holds, those of its base included."""
    held = _merged_into(base)
    folders = [Path(path) for path in partial if (Path(path) / TENSORS).is_file()]
    held |= {_digest(folder): folder.name for folder in folders}
    if held:
        write_json(target / MERGED, held)


def _merged_into(base: Path) -> dict[str, str]:
    return read_json_object(base / MERGED) if (base / MERGED).is_file() else {}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    with (folder / TENSORS).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:32]


def with_adapters(source: Source, folders: Sequence[Path], *, last: bool = True) -> tuple[TensorFile, list[str]]:
    """The base's tensors with adapters added to them, one after the other, and the names that change, which are in
    float32. `last` False leaves out A and B of the last one.

    Raises WeightError for an adapter of another model, the same folder twice, and one of a vision encoder that lies
    beside the base.
    """
    file: TensorFile = next(iter(source.part_sources.values())).files
    changed: dict[str, None] = {}
    done: set[Path] = set()
    for folder in folders:
        if folder.resolve() in done:
            raise WeightError(f"{folder} comes twice; expected each adapter once. Leave one out.")
        done.add(folder.resolve())
        changes = adapter_changes(source, read_peft(folder), pairs=last or folder != folders[-1])
        file = MergedFile(file, changes, dtype=torch.float32)
        changed |= dict.fromkeys(changes)
    return file, list(changed)


def adapter_changes(
    source: Source, adapter: PeftAdapter, *, pairs: bool = True, model: ModelSpec | None = None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Stored name -> what the adapter does to the tensor.

    Args:
        pairs: with A and B; else its whole tensors alone.
        model: what the adapter is of, where `source` holds some of its parts alone.

    Raises WeightError for an adapter of another model.
    """
    if model is None:
        specs = specs_of(source, source.parts)
        parts = {slot: part_of(slot, spec) for slot, spec in specs.items()}
        layouts = all_families()[source.family].layouts if source.family else ()
    else:
        specs, parts, layouts = model.part_specs(), model.parts(), model.family.layouts
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    kinds = [(adapter.tensors, _add)] if pairs else []
    for tensors, change in (*kinds, (adapter.saved_tensors, _replace)):
        for slot, names in tensors(parts, specs, layouts).items():
            if model is not None and slot not in source.parts:
                continue
            held = _held(source, slot, adapter)
            check_base(adapter.path, slot, parts[slot], specs[slot], source)
            stored = translation(parts[slot], specs[slot], DIALECT, held.dialect)
            tied = tied_names(parts[slot], specs[slot])
            for tensor, name in names.items():
                if tied and tensor == tied[0] and tensor not in held.names:
                    continue  # a tied head is not stored
                weight = _stored(held, stored.get(tensor, tensor), name, adapter)
                found[weight] = functools.partial(change, adapter, name, source, weight)
    return found


def _held(source: Source, slot: str, adapter: PeftAdapter) -> PartSource:
    """A part of the base. Raises WeightError for one that lies beside it."""
    held = source.part(slot)
    if held.path != source.path:
        raise WeightError(
            f"{adapter.path}: it adapts the {slot}, which lies in {held.path}; expected it in {source.path}. "
            "Convert the base to llava-hf and merge into that."
        )
    return held


def _replace(adapter: PeftAdapter, name: str, source: Source, stored: str, weight: Tensor) -> Tensor:
    """The whole tensor that goes with the adapter, in float32."""
    tensor = adapter.tensor(name)
    if tensor.shape != weight.shape:
        raise WeightError(
            f"{adapter.path}: {name} has shape {list(tensor.shape)}; {stored} of {source.path} has "
            f"{list(weight.shape)}. Give an adapter of this base model."
        )
    return tensor.float()


def _stored(held: PartSource, tensor: str, name: str, adapter: PeftAdapter) -> str:
    if tensor not in held.names:
        raise WeightError(
            f"{adapter.path}: it changes {name}, and {held.path} has no {tensor}; expected it there. Give the base "
            "model that it was trained on."
        )
    return held.stored_name(tensor)


def _add(adapter: PeftAdapter, name: str, source: Source, stored: str, weight: Tensor) -> Tensor:
    """The stored weight [out, in] with scale B A added, its rows of DoRA's lengths."""
    a, b, m = adapter.pair(name)
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise WeightError(
            f"{adapter.path}: the adapter of {name} is for a weight of shape {[b.shape[0], a.shape[1]]}; {stored} of "
            f"{source.path} has {list(weight.shape)}. Give an adapter of this base model."
        )
    weight = weight + adapter.scale_of(name) * (b.float() @ a.float())
    return weight if m is None else of_length(weight, m.float())
