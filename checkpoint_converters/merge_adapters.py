"""LoRA adapters in PEFT's format merged into the tensors of a base folder, under the names that these have there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from checkpoint_converters.convert import specs_of
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.merged import MergedFile
from mindspeed_mm.models.adapters.peft_format import PeftAdapter, read_peft, translation
from mindspeed_mm.models.adapters.splits import of_length
from mindspeed_mm.models.adapters.targets import DIALECT
from mindspeed_mm.models.part import part_of
from mindspeed_mm.models.spec import all_families
from mindspeed_mm.weights.files import TensorFile
from mindspeed_mm.weights.sources import PartSource, Source


def with_adapters(source: Source, folders: Sequence[Path]) -> tuple[TensorFile, list[str]]:
    """The base's tensors with adapters added to them, one after the other, and the names that change.

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
        changes = _changes(source, read_peft(folder))
        file = MergedFile(file, changes)
        changed |= dict.fromkeys(changes)
    return file, list(changed)


def _changes(source: Source, adapter: PeftAdapter) -> dict[str, Callable[[Tensor], Tensor]]:
    """Stored name -> what the adapter does to the tensor."""
    specs = specs_of(source, source.parts)
    parts = {slot: part_of(slot, spec) for slot, spec in specs.items()}
    layouts = all_families()[source.family].layouts if source.family else ()
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for tensors, change in ((adapter.tensors, _add), (adapter.saved_tensors, _replace)):
        for slot, names in tensors(parts, specs, layouts).items():
            held = _held(source, slot, adapter)
            stored = translation(parts[slot], specs[slot], DIALECT, held.dialect)
            for tensor, name in names.items():
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
    weight = weight + adapter.lora().scale * (b.float() @ a.float())
    return weight if m is None else of_length(weight, m.float())
