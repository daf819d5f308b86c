"""Adapters in a training checkpoint: merged into its weights, or written in PEFT's format."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from megatron.driver.checkpoint.reading import find_checkpoint, read_checkpoint, split_averaged
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.base_hash import write_base
from mindspeed_mm.models.adapters.merged import MergedFile
from mindspeed_mm.models.adapters.peft_writing import write_peft
from mindspeed_mm.models.adapters.saved_modules import saved_tensors
from mindspeed_mm.models.adapters.spec import WholePair
from mindspeed_mm.models.adapters.splits import add_product, their_b, with_lengths
from mindspeed_mm.models.adapters.targets import ADAPTER, WEIGHT, Site, sites
from mindspeed_mm.models.spec import ModelSpec, load_model_spec
from mindspeed_mm.weights.files import TensorFile
from mindspeed_mm.weights.layouts import OUR_MODEL

logger = logging.getLogger(__name__)


def merged(file: TensorFile, spec: ModelSpec) -> MergedFile:
    """The weights of a run with its adapters merged into them."""
    groups: dict[str, list[tuple[str, Site]]] = {}
    for slot, part in _adapted(spec).items():
        for site in sites(spec.parts()[slot], part):
            groups.setdefault(OUR_MODEL.written[slot] + site.step.target, []).append((slot, site))
    changes = {name: _merging(file, spec, found) for name, found in groups.items()}
    return MergedFile(file, changes, frozenset(name for name in file.names if ADAPTER in name))


def export_adapter(source: str | Path, target: str | Path, *, decoder_only: bool = False) -> list[Path]:
    """Write the adapters of a training checkpoint as a folder in PEFT's format; returns its files.

    Args:
        source: a save folder or one iteration's folder.
        target: folder to write; it must not exist or be empty.
        decoder_only: for the decoder's own class in transformers, instead of the whole model's.

    Raises WeightError for a path that is no checkpoint or holds no adapters.
    """
    folder, _ = split_averaged(source)
    if not folder.is_dir() or find_checkpoint(folder) is None:
        raise WeightError(f"{source} is no training checkpoint; expected the save folder of a LoRA run. Correct it")
    checkpoint = read_checkpoint(source)
    model = checkpoint.run["extra"].get("model")
    spec = None if model is None else load_model_spec(model, context=f"{source}: model in run.json")
    adapted = {} if spec is None else _adapted(spec)
    if not adapted:
        raise WeightError(f"{source} holds no adapters; expected the checkpoint of a LoRA run. Correct the path")
    for slot, part in spec.part_specs().items():
        if slot not in adapted and not part.freeze:
            logger.warning("%s was trained as well and is not in the adapter: convert it by itself", slot)
    found = {slot: {site.module: site for site in sites(spec.parts()[slot], part)} for slot, part in adapted.items()}

    def pair(slot: str, module: str) -> WholePair:
        return _pair(checkpoint, spec, slot, found[slot][module])

    files = write_peft(
        target,
        spec,
        pair,
        {slot: list(names) for slot, names in found.items()},
        base=spec.text_decoder.ckpt_path or "",
        decoder_only=decoder_only,
        saved={slot: _saved(checkpoint, spec, slot) for slot in found},
    )
    hashes = {slot: name for slot, name in checkpoint.run["extra"].get("base", {}).items() if slot in found}
    return [*files, write_base(Path(target), hashes)] if hashes else files


def _saved(checkpoint, spec: ModelSpec, slot: str) -> dict[str, Tensor]:
    """Whole tensors that go with a part's adapters, without the padding rows of a vocabulary."""
    part, own = spec.parts()[slot], spec.part(slot)
    padded = {step.target for step in part.rules["ours"].steps(own.geometry) if step.rule.padded}

    def get(name: str) -> Tensor:
        tensor = checkpoint.get(OUR_MODEL.written[slot] + name)
        return tensor[: own.geometry.vocab_size] if name in padded else tensor

    return dict(saved_tensors(part, own, get))


def adapters_of_run(source: Path, spec: ModelSpec, slot: str) -> dict[str, WholePair]:
    """Whole A and B of a part in a training checkpoint, by Hugging Face's names of the modules."""
    checkpoint = read_checkpoint(source)
    return {site.module: _pair(checkpoint, spec, slot, site) for site in sites(spec.parts()[slot], spec.part(slot))}


def _adapted(spec: ModelSpec) -> dict:
    return {slot: part for slot, part in spec.part_specs().items() if part.lora is not None}


def _pair(file, spec: ModelSpec, slot: str, site: Site) -> WholePair:
    """Whole A, B and DoRA's lengths of one linear, in Hugging Face's order of rows."""
    outer = f"{OUR_MODEL.written[slot]}{site.step.target.removesuffix(WEIGHT)}{ADAPTER}{site.short}."
    geometry = spec.part(slot).geometry
    a, b = file.get(outer + "a"), their_b(site, file.get(outer + "b"), geometry)
    if not spec.part(slot).lora.use_dora:
        return WholePair(a, b)
    return WholePair(a, b, their_b(site, file.get(outer + "m")[:, None], geometry)[:, 0])


def _merging(file: TensorFile, spec: ModelSpec, found: list[tuple[str, Site]]) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        for slot, site in found:
            part = spec.part(slot)
            a, b, m = _pair(file, spec, slot, site)
            weight = add_product(site, weight, part.lora.scale_of(site.module) * (b.float() @ a.float()), part.geometry)
            if m is not None:
                weight = with_lengths(site, weight, m.float(), part.geometry)
        return weight

    return change
