"""Adapters in the format of the peft library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.adapters.spec import LoraSpec, WholePair
from mindspeed_mm.models.adapters.targets import DIALECT, WEIGHT, all_sites
from mindspeed_mm.models.spec import ModelSpec, find_family
from mindspeed_mm.weights.files import SafetensorsFile, read_json_object
from mindspeed_mm.weights.layouts import HF_DECODER, Layout
from mindspeed_mm.weights.rules import Drop

logger = logging.getLogger(__name__)

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BESIDE = "non_lora_trainables.bin"
"""What LLaVA's LoRA runs put beside their adapter: the trained projector."""

OUTER = "base_model.model."
"""What PEFT puts before every name of the model that it wraps."""

_A, _B, _M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_MUST_BE = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
}
"""Keys of adapter_config.json at which another value would change the result."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter's folder, its config checked. Tensors are read when asked for."""

    path: Path
    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    names: tuple[str, ...]
    """Names of the adapted modules in the model that PEFT wrapped."""
    saved: tuple[str, ...] = ()
    """Names of whole tensors that go with it (PEFT's modules_to_save)."""

    def pair(self, name: str) -> WholePair:
        """A, B and DoRA's lengths of a module, on the CPU in their stored type."""
        file = SafetensorsFile(self.path / TENSORS)
        return WholePair(*(file.get(OUTER + name + end) for end in _ends(self.use_dora)))

    def tensor(self, name: str) -> Tensor:
        """One of the whole tensors, on the CPU in its stored type."""
        return SafetensorsFile(self.path / TENSORS).get(OUTER + name)

    def alone(self) -> PeftAdapter:
        """Itself. Raises WeightError where whole tensors go with it, which only a merge puts in their place."""
        if self.saved:
            raise WeightError(
                f"{self.path}: found {len(self.saved)} whole tensors beside the adapter (modules_to_save), such as "
                f"{self.saved[0]}; expected an adapter alone. Merge it into the base: mindspeed-mm merge BASE "
                f"{self.path} --output DIR"
            )
        return self

    def sites(
        self, parts: dict[str, Any], specs: dict[str, Any], layouts: tuple[Layout, ...]
    ) -> dict[str, dict[str, str]]:
        """Slot -> {our Hugging Face name of a linear: the adapter's name of it}, of the linears that our model builds.

        Modules that features never come from (the last layer of a CLIP, say) are left out, with a word in the log.
        Raises WeightError where the adapter names a module that the model does not have or that takes no adapter.
        """
        tensors = self.tensors(parts, specs, layouts)
        linears = {slot: {site.module for site in all_sites(parts[slot], specs[slot])} for slot in specs}
        found: dict[str, dict[str, str]] = {}
        idle = []
        for slot, names in tensors.items():
            for tensor, name in names.items():
                module = tensor.removesuffix(WEIGHT)
                if module in linears[slot]:
                    found.setdefault(slot, {})[module] = name
                elif _is_idle(parts[slot], specs[slot], tensor):
                    idle.append(name)
                else:
                    raise WeightError(
                        f"{self.path}: it adapts {name}, which takes no adapter here; expected linears of layers and "
                        "of the projector alone. Merge the adapter with PEFT and give the merged weights"
                    )
        if idle:
            logger.info("%s: %d adapters of layers that are not used, such as %s", self.path, len(idle), idle[0])
        return found

    def tensors(
        self, parts: dict[str, Any], specs: dict[str, Any], layouts: tuple[Layout, ...]
    ) -> dict[str, dict[str, str]]:
        """Slot -> {Hugging Face's name of an adapted weight in the part: the adapter's name of the module}.

        Raises WeightError where the adapter names a module that the model does not have, with some that it has.
        """
        placed, adapted = self._placed(parts, specs, layouts), {name + WEIGHT for name in self.names}
        return {
            slot: {tensor: name.removesuffix(WEIGHT) for tensor, name in names.items() if name in adapted}
            for slot, names in placed.items()
        }

    def saved_tensors(
        self, parts: dict[str, Any], specs: dict[str, Any], layouts: tuple[Layout, ...]
    ) -> dict[str, dict[str, str]]:
        """Slot -> {Hugging Face's name of a tensor in the part: the adapter's name of its whole tensor}."""
        placed = self._placed(parts, specs, layouts)
        return {
            slot: {tensor: name for tensor, name in names.items() if name in self.saved}
            for slot, names in placed.items()
        }

    def _placed(
        self, parts: dict[str, Any], specs: dict[str, Any], layouts: tuple[Layout, ...]
    ) -> dict[str, dict[str, str]]:
        """Slot -> {Hugging Face's name of a tensor in the part: the adapter's name of it}, adapted and whole ones."""
        best: list[str] = [*self.names, *self.saved]
        for layout in (*layouts, HF_DECODER):
            found, unknown = self._split(layout, parts, specs)
            if not unknown:
                return found
            best = min(best, unknown, key=len)
        have = [site.module for slot in specs for site in all_sites(parts[slot], specs[slot])]
        raise WeightError(
            f"{self.path}: it adapts {len(best)} modules that this model does not have, such as {best[0]}; expected "
            f"some like {', '.join(have[:3])}. Give an adapter of this base model"
        )

    def _split(
        self, layout: Layout, parts: dict[str, Any], specs: dict[str, Any]
    ) -> tuple[dict[str, dict[str, str]], list[str]]:
        """(what `_placed` returns, names that fit nothing) where the names are those of a layout."""
        split, _, unknown = layout.split([*(name + WEIGHT for name in self.names), *self.saved])
        found: dict[str, dict[str, str]] = {}
        for slot, names in split.items():
            if slot not in specs:
                unknown += names.values()
                continue
            part, spec = parts[slot], specs[slot]
            to_ours = translation(part, spec, layout.dialects[slot], DIALECT)
            known = set(to_ours.values())
            for short, stored in names.items():
                name = to_ours.get(short, short)
                if name in known or _is_idle(part, spec, name):
                    found.setdefault(slot, {})[name] = stored
                else:
                    unknown.append(stored)
        return found, [name.removesuffix(WEIGHT) for name in unknown]

    def lora(self, **changes: Any) -> LoraSpec:
        """The block of a model.json that describes it."""
        given = {"r": self.r, "alpha": self.alpha, "use_rslora": self.use_rslora, "use_dora": self.use_dora}
        given["dropout"] = 0.0 if self.use_dora else self.dropout
        return LoraSpec(**(given | {"load": str(self.path)} | changes))


def _ends(use_dora: bool) -> tuple[str, ...]:
    """Ends of the names of one module's tensors."""
    return (_A, _B, _M) if use_dora else (_A, _B)


def _is_idle(part: Any, spec: Any, name: str) -> bool:
    """Whether a part's weights have this tensor, but our model never builds it."""
    rules = part.rules[DIALECT]
    unused = any(step.unused and name in step.sources for step in rules.steps(spec.geometry))
    return unused or any(isinstance(rule, Drop) and rule.matches(name) for rule in rules.rules)


def translation(part: Any, spec: Any, old_dialect: str, new_dialect: str) -> dict[str, str]:
    """Names of one dialect of a part -> those of another, where both have the same tensors."""
    theirs = {step.target: step.sources for step in part.rules[old_dialect].steps(spec.geometry)}
    ours = {step.target: step.sources for step in part.rules[new_dialect].steps(spec.geometry)}
    return {
        old: new
        for target, names in theirs.items()
        if len(names) == len(ours.get(target, ()))
        for old, new in zip(names, ours[target], strict=True)
    }


def read_peft(folder: str | Path) -> PeftAdapter:
    """Open an adapter's folder.

    Raises WeightError for a folder that holds none, a pickle, an adapter of another kind than LoRA, or one that needs
    more than A and B.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise WeightError(f"{folder}: found no {CONFIG}; expected a folder in PEFT's format. Correct the path")
    config = read_json_object(folder / CONFIG)
    for key, allowed in _MUST_BE.items():
        if key in config and config[key] not in allowed:
            raise WeightError(
                f"{folder / CONFIG}: found {key} {config[key]!r}; expected {allowed[0]!r}, the only one that is "
                "supported. Merge the adapter with PEFT and give the merged weights"
            )
    if not (folder / TENSORS).is_file():
        pickle = f"; {PICKLE} is a pickle, which is not read" if (folder / PICKLE).is_file() else ""
        raise WeightError(
            f"{folder}: found no {TENSORS}{pickle}. Save the adapter with safe_serialization=True (PEFT's default)"
        )
    names = set(SafetensorsFile(folder / TENSORS).names)
    kept = config.get("modules_to_save") or []
    saved = {name for name in names if ".lora_" not in name and any(f".{module}." in name for module in kept)}
    modules = sorted(name.removeprefix(OUTER).removesuffix(_A) for name in names if name.endswith(_A))
    use_dora = bool(config.get("use_dora", False))
    wanted = {OUTER + name + end for name in modules for end in _ends(use_dora)}
    if names - saved != wanted or not wanted:
        odd = sorted((names - saved) ^ wanted) or ["no tensor"]
        raise WeightError(
            f"{folder / TENSORS}: found {odd[0]} without its partner or of another kind; expected {OUTER}<module>{_A} "
            f"and {' and '.join(_ends(use_dora)[1:])} for each module. The file is damaged or no plain LoRA"
        )
    return PeftAdapter(
        folder,
        int(config["r"]),
        float(config["lora_alpha"]),
        float(config.get("lora_dropout", 0.0)),
        bool(config.get("use_rslora", False)),
        use_dora,
        tuple(modules),
        tuple(sorted(name.removeprefix(OUTER) for name in saved)),
    )


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
    adapter = read_peft(folder).alone()
    found = adapter.sites(spec.parts(), spec.part_specs(), spec.family.layouts)
    return _with_blocks(spec, {slot: adapter.lora(target_modules=list(names)) for slot, names in found.items()})


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


def pairs_of(spec: ModelSpec, slot: str) -> dict[str, WholePair] | None:
    """What a part's lora.load names, by Hugging Face's names of the modules; None where it names none.

    Raises WeightError where the folder has another r, alpha or scale than the spec, or modules that it does not name.
    """
    part = spec.part(slot)
    lora = part.lora
    if lora is None or lora.load is None:
        return None
    adapter = read_peft(lora.load).alone()
    stated = {key: getattr(lora, key) for key in ("r", "alpha", "use_rslora", "use_dora")}
    found = {key: getattr(adapter, key) for key in stated}
    if found != stated:
        raise WeightError(f"{lora.load}: the adapter has {found}, {slot}.lora says {stated}. Make them equal")
    names = adapter.sites(spec.parts(), spec.part_specs(), spec.family.layouts).get(slot, {})
    return {module: adapter.pair(name) for module, name in names.items()}


def write_peft(
    folder: str | Path,
    spec: ModelSpec,
    pair: Callable[[str, str], WholePair],
    modules: dict[str, list[str]],
    *,
    base: str = "",
    decoder_only: bool = False,
) -> list[Path]:
    """Write an adapter that stock PEFT loads on transformers' model; returns the files.

    Args:
        folder: must not exist or be empty.
        pair: (slot, Hugging Face's name of a module) -> whole A and B, and DoRA's lengths.
        modules: the adapted modules of each slot.
        base: base_model_name_or_path.
        decoder_only: names of the decoder's own class instead of the whole model's.

    Raises WeightError for parts with different r, alpha or scale, or a folder that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightError(f"{folder} exists and is not empty; expected a new folder. Choose another one")
    kinds = {slot: spec.part(slot).lora for slot, names in modules.items() if names}
    settings = {(lora.r, lora.alpha, lora.use_rslora, lora.use_dora) for lora in kinds.values()}
    if len(settings) != 1 or (decoder_only and set(kinds) != {"text_decoder"}):
        raise WeightError(
            f"found adapters on {', '.join(kinds) or 'nothing'} with r, alpha, use_rslora, use_dora "
            f"{sorted(settings)}; expected the same ones on each part"
            + (", and none but the text_decoder's" if decoder_only else "")
        )
    outer = (lambda slot, name: name) if decoder_only else _whole_names(spec)
    tensors, targets = {}, []
    for slot, name in ((kind, module) for kind in kinds for module in modules[kind]):
        targets.append(outer(slot, name))
        for end, tensor in zip(_ends(kinds[slot].use_dora), pair(slot, name), strict=False):  # m is None without DoRA
            tensors[OUTER + targets[-1] + end] = tensor.detach().to("cpu").contiguous()
    lora = next(iter(kinds.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return [folder / CONFIG, folder / TENSORS]


def _whole_names(spec: ModelSpec) -> Callable[[str, str], str]:
    """(slot, name in the part) -> name in transformers' class of the whole model."""
    layout = find_family(spec.model_id).layouts[0]
    if not layout.modules:
        raise WeightError(
            f"layout {layout.name} of model_id {spec.model_id} names no modules of a transformers class; expected "
            "adapters of a family that has one. Write those of the decoder alone (part text_decoder)"
        )
    prefixes = {prefix.part: prefix for prefix in layout.prefixes if prefix.old == layout.modules.get(prefix.part)}
    return lambda slot, name: prefixes[slot].old + name.removeprefix(prefixes[slot].new)
