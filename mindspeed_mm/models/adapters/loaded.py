"""Specs of models whose `lora` blocks name an adapter to load, and what of it belongs to each part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.adapters.peft_format import BESIDE, PeftAdapter, read_peft
from mindspeed_mm.models.adapters.saved_modules import is_of, module_of
from mindspeed_mm.models.adapters.spec import LoraSpec, WholePair
from mindspeed_mm.models.adapters.targets import sites
from mindspeed_mm.models.spec import ModelSpec


def with_adapter(spec: ModelSpec, folder: str | Path) -> ModelSpec:
    """The spec of a model with the adapter of a folder on it, for `build_vlm`, which loads it.

    Raises ConfigError for a model that has an adapter of its own already, and WeightError for an adapter that cannot be
    read or belongs to another model.
    """
    held = [part.lora.load for part in spec.part_specs().values() if part.lora]
    if held:
        raise ConfigError(
            f"found the adapter {folder} for a model whose lora block loads {held[0]} already; expected one of them. "
            "Leave one out, or merge one into the weights first (mindspeed-mm merge)"
        )
    if (Path(folder) / BESIDE).is_file():
        raise WeightError(
            f"{folder}: found {BESIDE} beside the adapter, full weights that go with it; expected an adapter alone. "
            f"Merge both into the base: mindspeed-mm merge BASE {folder} --output DIR"
        )
    adapter = read_peft(folder)
    found = adapter.sites(spec.parts(), spec.part_specs(), spec.family.layouts)
    whole = adapter.saved_tensors(spec.parts(), spec.part_specs(), spec.family.layouts)
    blocks = {slot: adapter.block(names, list(whole.get(slot, {}))) for slot, names in found.items()}
    return _with_blocks(spec, blocks)


def own_adapters(spec: ModelSpec, *, merged: bool) -> ModelSpec:
    """The spec for inference: of its `lora` blocks those stay that name an adapter to load. With `merged` none stays:
    the weights are those of a LoRA run, and its adapters are merged into them as they are read, whole ones also where
    the run stored them in fewer bits."""
    blocks = {slot: part.lora for slot, part in spec.part_specs().items() if part.lora and part.lora.load}
    return _with_blocks(spec, {}, quantize=None) if merged else _with_blocks(spec, blocks)


def _with_blocks(spec: ModelSpec, blocks: dict[str, LoraSpec], **others: Any) -> ModelSpec:
    parts = {
        slot: part.model_copy(
            update={"lora": blocks.get(slot), **others} | ({"freeze": False} if slot in blocks else {})
        )
        for slot, part in spec.part_specs().items()
    }
    encoder = spec.image_encoder.model_copy(
        update={"vision_encoder": parts["vision_encoder"], "vision_projector": parts["vision_projector"]}
    )
    return spec.model_copy(update={"text_decoder": parts["text_decoder"], "image_encoder": encoder})


def loaded_adapter(spec: ModelSpec, slot: str) -> tuple[PeftAdapter, dict[str, str]] | None:
    """(what a part's lora.load names, Hugging Face's names of its modules -> its own); None where it names none.

    Raises WeightError where it has another r, alpha or scale than the spec, or other modules, also whole ones.
    """
    part = spec.part(slot)
    lora = part.lora
    if lora is None or lora.load is None:
        return None
    adapter = read_peft(lora.load)
    if adapter.alpha is None and "alpha" in lora.model_fields_set:
        adapter = replace(adapter, alpha=lora.alpha)
    adapter.lora()  # raises where it does not say its alpha
    found = adapter.sites(spec.parts(), spec.part_specs(), spec.family.layouts)
    names = found.get(slot, {})
    for other in sorted(set(found) - {kind for kind, each in spec.part_specs().items() if _loads(each, lora.load)}):
        raise WeightError(
            f"{lora.load}: the adapter has A and B of the {other}, too, and {other}.lora does not load it; expected "
            "the whole adapter. Give that part a lora block with the same load"
        )
    own = adapter.block(names)
    for module in names:
        kind, stated = _kind(own, module), _kind(lora, module)
        if kind != stated:
            raise WeightError(
                f"{lora.load}: the adapter of {names[module]} has {kind}, {slot}.lora says {stated}. Make them equal"
            )
    idle = sorted(set(names) - {site.module for site in sites(spec.parts()[slot], part)})
    if idle:
        raise WeightError(
            f"{lora.load}: the adapter has A and B of {idle[0]}, which {slot}.lora.target_modules does not name; "
            "expected all of its modules there. Add it"
        )
    whole = adapter.saved_tensors(spec.parts(), spec.part_specs(), spec.family.layouts).get(slot, {})
    left = sorted({module_of(name) for name in whole if not any(is_of(name, each) for each in lora.modules_to_save)})
    if left:
        raise WeightError(
            f"{lora.load}: the adapter comes with {', '.join(left)} as a whole, which {slot}.lora.modules_to_save does "
            "not name; expected all of its whole modules there. Add it"
        )
    return adapter, names


def _loads(part: Any, folder: str) -> bool:
    return part.lora is not None and part.lora.load == folder


def _kind(lora: LoraSpec, module: str) -> dict[str, float]:
    """What a lora block and the adapter that it loads have alike of a module."""
    ranks = {"r": lora.rank_of(module), "alpha": lora.alpha_of(module)}
    return ranks | {"use_rslora": lora.use_rslora, "use_dora": lora.use_dora}


def pairs_of(spec: ModelSpec, slot: str) -> dict[str, WholePair] | None:
    """A and B that a part's lora.load names, by Hugging Face's names of the modules; None where it names none.

    Raises WeightError as loaded_adapter does.
    """
    found = loaded_adapter(spec, slot)
    return None if found is None else {module: found[0].pair(name) for module, name in found[1].items()}
