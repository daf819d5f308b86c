"""Open weights in any public layout: recognised from their contents, never from their name."""

import glob
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights import configs
from mindspeed_mm.weights.files import Span, TensorFile, damaged, read_json_object
from mindspeed_mm.weights.folders import TensorFiles, find_groups, open_file
from mindspeed_mm.weights.layouts import PROJECTOR, TEXT, VISION, Layout, recognise

PEFT_PREFIX = "base_model.model."
"""Put before every name by PEFT; LLaVA's non_lora_trainables.bin has it."""

Detector = Callable[[Path], "Source | None"]

_DETECTORS: list[Detector] = []


def register_detector(detector: Detector) -> None:
    """Add a reader of a further layout (the training checkpoint). It is asked before the built-in ones and returns None
    for paths that are not its own. Adding it again has no effect."""
    if detector not in _DETECTORS:
        _DETECTORS.append(detector)


@dataclass(frozen=True)
class PartSource:
    """The tensors of one part, under the names that the rules of `dialect` know.

    dialect: text_decoder "hf" | "ours"; vision_encoder "hf" | "openai" | "ours"; vision_projector "llava" | "hf" |
    "ours".
    config: the part's HF config (for "ours": its block of a model.json), or None where the layout has none.
    assumed: keys of the config that the converter had to assume (the head count of an OpenAI archive).
    """

    part: str
    dialect: str
    path: Path
    config: dict[str, Any] | None
    _files: TensorFile
    _stored: dict[str, str]
    assumed: tuple[str, ...] = ()

    @property
    def files(self) -> TensorFile:
        """The file or files that hold the tensors, which may hold other parts too."""
        return self._files

    @property
    def names(self) -> tuple[str, ...]:
        """All names, also of tensors that are not used."""
        return tuple(self._stored)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU, in its stored type."""
        return self._files.get(self._stored[name])

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis of a tensor onto the CPU."""
        return self._files.get_slice(self._stored[name], axis, start, stop)

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor in its file; None where they lie in another order than row by row."""
        return self._files.span(self._stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._files.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        return self._files.dtype(self._stored[name])

    def stored_name(self, name: str) -> str:
        """The name that a tensor has in its file."""
        return self._stored[name]

    def meta(self, name: str) -> Tensor:
        """A tensor without values: its shape and type alone."""
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")


@dataclass(frozen=True)
class Source:
    """Weights at a path.

    config: the folder's config.json (of layout mindspeed-mm: its model.json), or None.
    dropped: stored names that belong to no part of ours (a text vision encoder, say).
    """

    path: Path
    layout: str
    config: dict[str, Any] | None
    part_sources: dict[str, PartSource]
    dropped: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that can be read from here."""
        return tuple(self.part_sources)

    def part(self, part: str) -> PartSource:
        """The tensors of one part. Raises WeightError when they are not here."""
        if part in self.part_sources:
            return self.part_sources[part]
        cure = f"Give the path of the {part}'s own weights."
        if part == VISION and self.config and self.config.get("mm_vision_tower"):
            vision_encoder = self.config["mm_vision_tower"]
            cure = (
                f"Its config names the vision encoder {vision_encoder!r}, which is not a path here. "
                "Put the path of the vision encoder's folder or file into mm_vision_tower of config.json; "
                "or join the parts, by ckpt_path in a model.json or by "
                f"`mindspeed-mm convert --text-decoder {self.path} --projector {self.path} "
                "--vision-encoder VISION_ENCODER`."
            )
        raise WeightError(
            f"{self.path}: found layout {self.layout} with {', '.join(self.parts)}; expected a {part}. {cure}"
        )


def open_source(path: str | Path) -> Source:
    """Open a file or folder of weights in any readable layout; tensors are read when asked for.

    Raises WeightError when the path does not exist, is damaged or unsafe, or holds no known layout.
    """
    path = Path(path)
    for detector in _DETECTORS:
        source = detector(path)
        if source is not None:
            return source
    source = _open(path)
    return replace(source, part_sources=_with_vision_encoder(source)) if source.layout == "llava" else source


def _open(path: Path) -> Source:
    """Open a path; the vision encoder that a liuhaotian checkpoint names is not followed."""
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        aside = sorted(path.parent.glob(f".{glob.escape(path.name)}.*.old"))
        hint = f" A conversion that was to replace it was interrupted: rename {aside[0]} to {path}." if aside else ""
        raise WeightError(f"{path}: no such file or folder; expected weights.{hint or ' Correct the path.'}")
    return _classify(path, TensorFiles(path, [open_file(path)]), None)


def _open_folder(folder: Path) -> Source:
    config_file = folder / "config.json"
    config = read_json_object(config_file) if config_file.is_file() else None
    groups = find_groups(folder)
    layouts = [recognise(group.names) for group in groups]
    if len(groups) > 1 and all(layout and layout.name == "mindspeed-mm" for layout in layouts):
        return _combine(folder, [_classify(group.path, group, None) for group in groups])
    source = _classify(folder, groups[0] if len(groups) == 1 else _one_set(folder, groups, layouts), config)
    return _combine(folder, [source]) if source.layout == "mindspeed-mm" else source


def _one_set(folder: Path, groups: list[TensorFiles], layouts: list[Layout | None]) -> TensorFiles:
    """Shards without an index. Files of different layouts in one folder are ambiguous."""
    names = sorted({layout.name for layout in layouts if layout})
    if len(names) > 1:
        listing = ", ".join(
            f"{group.path.name} ({layout.name if layout else 'unknown'})"
            for group, layout in zip(groups, layouts, strict=True)
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
    return Source(folder, "mindspeed-mm", read_json_object(model_file) if model_file.is_file() else None, parts)


def _classify(path: Path, files: TensorFiles, config: dict[str, Any] | None) -> Source:
    """Recognise one set of tensors by its names and hand them out to the parts."""
    if any(".lora_" in name or name.startswith("lora_") for name in files.names):
        raise WeightError(
            f"{path}: found LoRA adapters; expected full weights. Merge them into their base model first."
        )
    stored = {name.removeprefix(PEFT_PREFIX): name for name in files.names}
    layout = recognise(stored)
    if layout is None:
        shown = ", ".join(files.names[:4]) or "no tensor"
        raise WeightError(
            f"{path}: found no known layout (tensors such as {shown}); expected CLIP, Llama, projector or LLaVA "
            "weights. Correct the path."
        )
    split, dropped, unknown = layout.split(stored)
    if unknown:
        raise WeightError(
            f"{path}: found {len(unknown)} tensors that layout {layout.name} does not have, such as {unknown[0]}. "
            "Remove them or give weights of a supported model."
        )
    parts = {
        part: PartSource(
            part,
            layout.dialects[part],
            path,
            _part_config(layout, part, config),
            files,
            {short: stored[name] for short, name in names.items()},
        )
        for part, names in split.items()
    }
    if layout.name == "mindspeed-mm" and files.record is not None:
        parts = {name: _recorded(part, files.record) for name, part in parts.items()}
    return Source(path, layout.name, config, parts, tuple(dropped))


def _recorded(part: PartSource, record: dict[str, Any]) -> PartSource:
    """A part with what our own file says of it: {"config": {kind: block of a model.json}, "assumed": [keys]}."""
    blocks, assumed = record.get("config"), record.get("assumed", [])
    block = blocks.get(part.part) if isinstance(blocks, dict) else None
    if not isinstance(block, dict) or not isinstance(assumed, list) or not all(type(key) is str for key in assumed):
        raise damaged(part.path, "its record does not describe its tensors")
    return replace(part, config=block, assumed=tuple(assumed))


def _part_config(layout: Layout, part: str, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The config that describes one part of a layout, if the layout's config.json does."""
    if config is None:
        return None
    if layout.name == "llava-hf":
        return {TEXT: configs.text_config, VISION: configs.vision_config, PROJECTOR: dict}[part](config)
    if layout.name in ("llava", "projector"):
        known = part == TEXT or (part == PROJECTOR and "mm_hidden_size" in config)
        return config if known else None
    return config if layout.name in ("hf", "clip") else None


def _with_vision_encoder(source: Source) -> dict[str, PartSource]:
    """A liuhaotian checkpoint names its vision encoder by path, relative to its folder; tensors inside come first."""
    config, parts = source.config or {}, source.part_sources
    select = configs.vision_select(config)
    vision_encoder = _vision_encoder_source(source.path, config)
    described = vision_encoder.config if vision_encoder else None
    if described is not None and vision_encoder.dialect == "hf":
        described = {**described, **select}
    if VISION in parts:
        hf = described if vision_encoder and vision_encoder.dialect == "hf" else None
        return {**parts, VISION: replace(parts[VISION], config=hf)}
    return {**parts, VISION: replace(vision_encoder, config=described)} if vision_encoder else parts


def _vision_encoder_source(folder: Path, config: dict[str, Any]) -> PartSource | None:
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        return None
    path = folder / name  # an absolute name replaces the folder
    return _open(path).part(VISION) if path.exists() else None
