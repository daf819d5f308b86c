"""Adapters in the format of the peft library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.peft_config import read_config
from mindspeed_mm.models.adapters.saved_modules import ENDS, module_of, tied_names
from mindspeed_mm.models.adapters.spec import LoraSpec, WholePair
from mindspeed_mm.models.adapters.targets import DIALECT, WEIGHT, all_sites
from mindspeed_mm.weights.adapter_names import state_name, written_name
from mindspeed_mm.weights.files import SafetensorsFile, TensorFile
from mindspeed_mm.weights.folders import open_file
from mindspeed_mm.weights.layouts import HF_DECODER, Layout
from mindspeed_mm.weights.loading import FLOATS
from mindspeed_mm.weights.rules import Drop

logger = logging.getLogger(__name__)

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BESIDE = "non_lora_trainables.bin"
"""What LLaVA's LoRA runs put beside their adapter: the trained projector."""

OUTER = "base_model.model."
"""What PEFT puts before every name of the model that it wraps."""

_A, _B, _M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter's folder, its config checked, or the adapters among the tensors of a state dict. Tensors are read when
    asked for."""

    path: Path
    r: int
    alpha: float | None
    """None where the file does not say it: a state dict."""
    dropout: float
    use_rslora: bool
    use_dora: bool
    names: tuple[str, ...]
    """Names of the adapted modules in the model that PEFT wrapped."""
    saved: tuple[str, ...] = ()
    """Names of whole tensors that go with it (PEFT's modules_to_save)."""
    outer: str | None = None
    """Of a state dict: what stands before the names of its adapted modules, `base_model.model.` left out."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """r and alpha of single modules, by its names."""

    def pair(self, name: str) -> WholePair:
        """A, B and DoRA's lengths of a module, on the CPU in their stored type."""
        if self.outer is not None:
            file = open_file(self.path)
            return WholePair(*(_value(file, written_name(self.outer, name, which), 2) for which in "AB"))
        file = _tensors(self.path)
        return WholePair(
            *(_value(file, OUTER + name + end, 1 if end == _M else 2) for end in tensor_ends(self.use_dora))
        )

    def tensor(self, name: str) -> Tensor:
        """One of the whole tensors, on the CPU in its stored type."""
        return _value(_tensors(self.path), OUTER + name)

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
        """Slot -> {Hugging Face's name of a tensor in the part: the adapter's name of its whole tensor}.

        Raises WeightError as `tensors` does, and for another head than embedding where the part ties them.
        """
        if not self.saved:
            return {}
        placed = self._placed(parts, specs, layouts)
        found = {
            slot: {tensor: name for tensor, name in names.items() if name in self.saved}
            for slot, names in placed.items()
        }
        for slot, names in found.items():
            pair = tied_names(parts[slot], specs[slot])
            held = [names[name] for name in pair or () if name in names]
            if held and (len(held) == 1 or not torch.equal(*map(self.tensor, held))):
                raise WeightError(
                    f"{self.path}: it changes {' and '.join(held)} apart from each other (modules_to_save), and this "
                    f"model ties {' and '.join(pair)}; expected equal tensors for both. Merge the adapter with PEFT, "
                    "which unties them, and give the merged weights with tie_word_embeddings false in their config.json"
                )
        return found

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
            known = {*to_ours.values(), *(tied_names(part, spec) or ())}
            for short, stored in names.items():
                name = to_ours.get(short, short)
                if name in known or _is_idle(part, spec, name):
                    found.setdefault(slot, {})[name] = stored
                else:
                    unknown.append(stored)
        return found, [name.removesuffix(WEIGHT) for name in unknown]

    def lora(self, **changes: Any) -> LoraSpec:
        """The block of a model.json that describes it. Raises WeightError where the file does not say its alpha."""
        if self.alpha is None:
            raise WeightError(
                f"{self.path}: found adapters without their alpha; expected it in a model.json: text_decoder.lora with "
                "load, r, alpha and target_modules. Give that model.json"
            )
        given = {"r": self.r, "alpha": self.alpha, "use_rslora": self.use_rslora, "use_dora": self.use_dora}
        given["dropout"] = 0.0 if self.use_dora else self.dropout
        try:
            return LoraSpec(**(given | {"load": str(self.path)} | changes))
        except pydantic.ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise WeightError(f"{self.path / CONFIG}: {wrong}. Save the adapter again") from error

    def block(self, modules: Mapping[str, str], saved: Sequence[str] = ()) -> LoraSpec:
        """The same for some of its modules: our Hugging Face names -> its own; `saved`: names of whole tensors."""
        whole = self.lora(rank_pattern=self.rank_pattern, alpha_pattern=self.alpha_pattern)
        ranks = {ours: whole.rank_of(name) for ours, name in modules.items()}
        alphas = {ours: whole.alpha_of(name) for ours, name in modules.items()}
        return self.lora(
            target_modules=list(modules),
            modules_to_save=list(dict.fromkeys(map(module_of, saved))),
            rank_pattern={ours: rank for ours, rank in ranks.items() if rank != self.r},
            alpha_pattern={ours: alpha for ours, alpha in alphas.items() if alpha != self.alpha},
        )

    def scale_of(self, name: str) -> float:
        """The factor of B A x of one of its modules."""
        return self.block({name: name}).scale_of(name)


def _tensors(folder: Path) -> TensorFile:
    """An adapter's file. Raises WeightError for one that is damaged or, whatever its name says, a pickle."""
    file = open_file(folder / TENSORS)
    if not isinstance(file, SafetensorsFile):
        raise WeightError(
            f"{file.path}: found a pickle, which is not read; expected safetensors. Save the adapter with "
            "safe_serialization=True (PEFT's default)"
        )
    return file


def _value(file: TensorFile, name: str, axes: int | None = None) -> Tensor:
    """A tensor of an adapter. Raises WeightError for one that is no floating point, or has other than `axes` axes."""
    shape, dtype = file.shape(name), file.dtype(name)
    if dtype not in FLOATS or axes not in (None, len(shape)):
        raise WeightError(
            f"{file.path}: {name} has type {dtype} and shape {list(shape)}; expected floating point of 16 bits or more"
            + (f" and {axes} axes" if axes else "")
            + ". Save the adapter again"
        )
    return file.get(name)


def tensor_ends(use_dora: bool) -> tuple[str, ...]:
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


def read_state(path: Path) -> PeftAdapter:
    """The adapters in a state dict such as MiniGPT-v2's checkpoint_N.pth, which has other tensors beside them.

    Raises WeightError for a file without adapters, a part of a pair alone, or adapters of several models.
    """
    file = open_file(path)
    pieces = [found for found in map(state_name, file.names) if found is not None]
    modules = sorted({piece.module for piece in pieces})
    outers = sorted({piece.outer.removesuffix(OUTER) for piece in pieces})
    wanted = {written_name(outer, module, which) for outer in outers for module in modules for which in "AB"}
    if not pieces or wanted != {piece.outer + piece.module + piece.end for piece in pieces}:
        found = f"{len(pieces)} tensors of adapters" + (f" behind {', '.join(outers)}" if outers else "")
        raise WeightError(
            f"{path}: found {found}; expected A and B ({written_name('llama_model.', 'MODULE', 'A')}) of each adapted "
            "module, of one model. Give a checkpoint with adapters, or remove lora.load"
        )
    ranks = {file.shape(written_name(outers[0], module, "A"))[0] for module in modules}
    return PeftAdapter(path, min(ranks), None, 0.0, False, False, tuple(modules), outer=outers[0])


def read_peft(folder: str | Path) -> PeftAdapter:
    """Open an adapter's folder, or a state dict with adapters.

    Raises:
        WeightError: a folder that holds none, a pickle, an adapter of another kind than LoRA, or one that needs more
            than A, B and whole tensors.
        ConfigError: its adapter_config.json has values of other types, or keys that are not known.
    """
    folder = Path(folder)
    if folder.name in (TENSORS, PICKLE):
        raise WeightError(f"{folder}: found one file of an adapter; expected its folder. Give {folder.parent}")
    if folder.is_file():
        return read_state(folder)
    if not (folder / CONFIG).is_file():
        raise WeightError(f"{folder}: found no {CONFIG}; expected a folder in PEFT's format. Correct the path")
    config = read_config(folder / CONFIG)
    if not (folder / TENSORS).is_file():
        pickle = f"; {PICKLE} is a pickle, which is not read" if (folder / PICKLE).is_file() else ""
        raise WeightError(
            f"{folder}: found no {TENSORS}{pickle}. Save the adapter with safe_serialization=True (PEFT's default)"
        )
    names = set(_tensors(folder).names)
    modules = sorted(name.removeprefix(OUTER).removesuffix(_A) for name in names if name.endswith(_A))
    # PEFT loads them also where modules_to_save does not say so: a head that it ties to a saved embedding.
    whole = {name for name in names if ".lora_" not in name and name.endswith(ENDS) and ".base_layer." not in name}
    saved = whole - {OUTER + name + WEIGHT for name in modules}
    wanted = {OUTER + name + end for name in modules for end in tensor_ends(config.use_dora)}
    if names - saved != wanted or not wanted:
        odd = sorted((names - saved) ^ wanted) or ["no tensor"]
        raise WeightError(
            f"{folder / TENSORS}: found {odd[0]} without its partner or of another kind; expected {OUTER}<module>{_A} "
            f"and {' and '.join(tensor_ends(config.use_dora)[1:])} for each module. The file is damaged or no plain "
            "LoRA on linears of layers. Of adapters on an embedding or a head: merge them with PEFT and give the "
            "merged weights"
        )
    return PeftAdapter(
        folder,
        config.r,
        config.lora_alpha,
        config.lora_dropout,
        config.use_rslora,
        config.use_dora,
        tuple(modules),
        tuple(sorted(name.removeprefix(OUTER) for name in saved)),
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
    )
