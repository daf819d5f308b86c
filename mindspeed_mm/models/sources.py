"""Open weights in any public layout: recognised from their contents, never from the name of the file or folder."""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.known import known
from mindspeed_mm.models.part import ALL_SLOTS, DEFAULT_MODEL_IDS, find_part
from mindspeed_mm.models.spec import FAMILIES, find_family
from mindspeed_mm.weights.adapter_names import is_adapter, state_names
from mindspeed_mm.weights.files import damaged, read_json_object
from mindspeed_mm.weights.folders import TensorFiles, find_groups, open_file
from mindspeed_mm.weights.layouts import HF_DECODER, OUR_FILES, OUR_MODEL, OURS, Layout
from mindspeed_mm.weights.sources import PartSource, Source, errors_name

PEFT_PREFIX = "base_model.model."
"""Put before every name by PEFT; LLaVA's non_lora_trainables.bin has it."""

Detector = Callable[[Path], Source | None]

_DETECTORS: list[Detector] = []


def register_detector(detector: Detector) -> None:
    """Add a reader of a further layout (the training checkpoint). It is asked before the built-in ones and returns None
    for paths that are not its own."""
    if detector not in _DETECTORS:
        _DETECTORS.append(detector)


def open_source(path: str | Path, *, follow: bool = True, adapters: Iterable[str | Path] = ()) -> Source:
    """Open a file or folder of weights in any readable layout; tensors are read when asked for.

    Args:
        follow: also open the parts that its config names elsewhere.
        adapters: files whose LoRA adapters are loaded by themselves (lora.load of a model.json). Those that stand
            beside the weights in another file are refused, since without them the model would be another one.

    Raises:
        WeightError: the path does not exist, is damaged or unsafe, or holds no known layout.
    """
    path = Path(path)
    for detector in _DETECTORS:
        source = detector(path)
        if source is not None:
            return source
    if path.is_dir():
        source = _open_folder(path, adapters)
    elif path.exists():
        source = _classify(path, TensorFiles(path, [open_file(path)]), None, adapters)
    else:
        aside = sorted(path.parent.glob(f".{glob.escape(path.name)}.*.old"))
        hint = f" A conversion that was to replace it was interrupted: rename {aside[0]} to {path}." if aside else ""
        raise WeightError(f"{path}: no such file or folder; expected weights.{hint or ' Correct the path.'}")
    if source.family is None or not follow:
        return source
    family = find_family(source.family)
    parts = dict(
        sorted(family.complete(source, source.part_sources).items(), key=lambda item: ALL_SLOTS.index(item[0]))
    )
    advice = {slot: text for slot in family.slots if (text := family.missing(source, slot)) is not None}
    return replace(source, part_sources=parts, advice=advice)


class Recognised(NamedTuple):
    """A layout, the family whose it is (None for a part's own), and the parts that it holds where it says so."""

    layout: Layout
    family: str | None
    model_ids: dict[str, str]


def recognise(names: Iterable[str], config: dict[str, Any] | None) -> Recognised | None:
    """The layout that tensor names belong to; None where none is known.

    The family that reads the config comes first. Without one, a layout with more markers comes before one with fewer.
    """
    names = tuple(names)
    held = functools.cache(lambda marker: any(re.search(marker, name) for name in names))
    fitting = [found for found in _known_layouts() if all(map(held, found.markers))]
    if config is not None:
        for found in fitting:
            if found.kind == FAMILIES and find_family(found.name).reads(config):
                return found.recognised()
    if fitting:
        return max(fitting, key=lambda found: len(found.markers)).recognised()  # of equals the first
    own = (OUR_MODEL, *OUR_FILES.values(), HF_DECODER)
    return next((Recognised(layout, None, {}) for layout in own if layout.recognises(names)), None)


class _KnownLayout(NamedTuple):
    """A layout of a family or a part that need not be imported: its place among the layouts of that, and its markers.

    kind: FAMILIES or a slot.
    """

    kind: str
    name: str
    place: int
    markers: tuple[str, ...]

    def recognised(self) -> Recognised:
        if self.kind == FAMILIES:
            family = find_family(self.name)
            return Recognised(family.layouts[self.place], family.name, family.model_ids)
        part = find_part(self.kind, self.name)
        return Recognised(part.layouts[self.place], None, {self.kind: part.name})


def _known_layouts() -> list[_KnownLayout]:
    """Families first."""
    return [
        _KnownLayout(kind, name, place, markers)
        for kind, package, attribute in (
            (FAMILIES, FAMILIES, "FAMILY"),
            *((slot, f"mindspeed_mm.models.{slot}", "PART") for slot in ALL_SLOTS),
        )
        for name, said in known(package, attribute).items()
        for place, markers in enumerate(said.markers)
    ]


PART_CONFIGS = ("text_config", "vision_config", "qformer_config")
"""Keys of a whole model's config.json with the config of a part."""


def _open_folder(folder: Path, adapters: Iterable[str | Path]) -> Source:
    config_file = folder / "config.json"
    config = _with_whole_parts(read_json_object(config_file), config_file) if config_file.is_file() else None
    groups = find_groups(folder)
    found = [_recognise_group(group, None) for group in groups] if len(groups) > 1 else []
    if found and all(layout == OURS for layout in found):
        return _combine(folder, [_classify(group.path, group, None) for group in groups])
    files = groups[0] if len(groups) == 1 else _one_set(folder, groups, found)
    source = _classify(folder, files, config, adapters)
    return _combine(folder, [source]) if source.layout == OURS else source


def _with_whole_parts(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A config.json without configs of parts that are null, which are as those that are not there. Raises ConfigError
    for one that is no object."""
    for key in PART_CONFIGS:
        if not isinstance(config.get(key), dict | None):
            raise ConfigError(f"{path}: found {key} {config[key]!r:.80}; expected an object. Correct it.")
    return {key: value for key, value in config.items() if key not in PART_CONFIGS or value is not None}


def _recognise_group(files: TensorFiles, config: dict[str, Any] | None) -> str | None:
    if files.record is not None:
        return OURS
    found = recognise(files.names, config)
    return found.layout.name if found else None


def _one_set(folder: Path, groups: list[TensorFiles], layouts: list[str | None]) -> TensorFiles:
    """Shards without an index. Files of different layouts in one folder are ambiguous."""
    names = sorted({layout for layout in layouts if layout})
    if len(names) > 1:
        listing = ", ".join(
            f"{group.path.name} ({layout or 'unknown'})" for group, layout in zip(groups, layouts, strict=True)
        )
        raise WeightError(f"{folder}: found files of several layouts: {listing}. Give the path of one of them.")
    return TensorFiles(folder, groups)


def _combine(folder: Path, sources: list[Source]) -> Source:
    """converted_clip.pt, converted_vicuna.pt and mlp.pt of one folder, and the model.json beside them."""
    parts: dict[str, PartSource] = {}
    for source in sources:
        for name, part in source.part_sources.items():
            if name in parts:
                raise WeightError(
                    f"{folder}: both {parts[name].path.name} and {part.path.name} hold a {name}; expected one. "
                    "Remove the one that does not belong here or give a file."
                )
            parts[name] = part
    model_file = folder / "model.json"
    return Source(folder, OURS, read_json_object(model_file) if model_file.is_file() else None, parts)


def _classify(
    path: Path, files: TensorFiles, config: dict[str, Any] | None, adapters: Iterable[str | Path] = ()
) -> Source:
    """Recognise one set of tensors by its names and hand them out to the slots."""
    held = _adapters(path, files, adapters)
    stored = {name.removeprefix(PEFT_PREFIX): name for name in files.names if name not in held}
    if files.record is not None:
        found = Recognised(_recorded_layout(path, files.record), None, {})
    else:
        found = recognise(stored, config)
    if found is None:
        shown = ", ".join(files.names[:4]) or "no tensor"
        raise WeightError(
            f"{path}: found no known layout (tensors such as {shown}); expected weights of a supported model or of one "
            "of its parts. Correct the path."
        )
    layout, family, model_ids = found
    split, dropped, unknown = layout.split(stored)
    if unknown:
        raise WeightError(
            f"{path}: found {len(unknown)} tensors that layout {layout.name} does not have, such as {unknown[0]}. "
            "A model without them would be another one: give weights of a supported model."
        )
    with errors_name(path):
        configs = _configs(layout, family, config)
    parts = {
        slot: PartSource(
            slot,
            layout.dialects[slot],
            path,
            configs.get(slot),
            files,
            {short: stored[name] for short, name in names.items()},
            model_id=model_ids.get(slot),
        )
        for slot, names in sorted(split.items(), key=lambda found: ALL_SLOTS.index(found[0]))
    }
    if files.record is not None:
        parts = {slot: _recorded(part, files.record) for slot, part in parts.items()}
    parts = {slot: _with_form(part) for slot, part in parts.items()}
    return Source(path, layout.name, config, parts, tuple(dropped), family)


def _adapters(path: Path, files: TensorFiles, loaded: Iterable[str | Path]) -> set[str]:
    """Names of adapters that are loaded by themselves. Raises WeightError for others."""
    found = {name for name in files.names if is_adapter(name)}
    beside = set(state_names(found))
    if found - beside:
        raise WeightError(
            f"{path}: found LoRA adapters; expected full weights. Merge an adapter's folder into its base model "
            "(mindspeed-mm merge BASE FOLDER --output DIR), and adapters inside of a whole model with PEFT "
            "(merge_and_unload)."
        )
    known = {Path(file).resolve() for file in loaded}
    lost = [name for name in sorted(beside) if files.file_of(name).resolve() not in known]
    if lost:
        raise WeightError(
            f"{path}: found {len(beside)} LoRA adapters of the decoder beside the weights, such as {lost[0]}; "
            f'expected them to be loaded, too. Add "lora": {{"load": "{files.file_of(lost[0])}", "r": ..., '
            '"alpha": ..., "target_modules": [...]} to the text_decoder of model.json, as the model was trained'
        )
    return beside


def _configs(layout: Layout, family: str | None, config: dict[str, Any] | None) -> dict[str, dict[str, Any] | None]:
    """The config of each slot, as far as the config.json describes it."""
    if config is None or layout.name == OURS:
        return {}
    if family is not None:
        return find_family(family).split_config(config, layout.name)
    return dict.fromkeys(layout.dialects, config)


def _with_form(source: PartSource) -> PartSource:
    """A part whose config says all that its tensors show of it."""
    part = find_part(source.part, source.model_id or DEFAULT_MODEL_IDS[source.part])
    if part.with_form is None or source.config is None or source.dialect == "ours":
        return source
    return replace(source, config=part.with_form(source))


def _recorded_layout(path: Path, record: dict[str, Any]) -> Layout:
    """The layout of one of our files, which says inside what it holds."""
    blocks = record.get("config")
    slots = [slot for slot in ALL_SLOTS if isinstance(blocks, dict) and slot in blocks]
    if len(slots) != 1:
        raise damaged(path, "its record does not describe its tensors")
    return OUR_FILES[slots[0]]


def _recorded(part: PartSource, record: dict[str, Any]) -> PartSource:
    """A part with what our own file says of it: {"config": {slot: block of a model.json}, "assumed": [keys]}."""
    block, assumed = record["config"][part.part], record.get("assumed", [])
    if not isinstance(block, dict) or not isinstance(assumed, list) or not all(type(key) is str for key in assumed):
        raise damaged(part.path, "its record does not describe its tensors")
    return replace(part, config=block, assumed=tuple(assumed))
