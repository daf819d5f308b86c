"""Several adapters on one loaded model, of which one or none is switched on at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_mm.inference.api import refuse_stored_dora
from mindspeed_mm.inference.loaded import LoadedVLM
from mindspeed_mm.models.adapters.loaded import with_adapter
from mindspeed_mm.models.adapters.lora import AdaptedLinear
from mindspeed_mm.models.adapters.saved_values import SavedValue, forget_base, values_in
from mindspeed_mm.models.build import attach_adapters, opened_sources
from mindspeed_mm.models.runtime import Runtime


@dataclass(frozen=True, eq=False)
class AttachedAdapter:
    """This rank's matrices and whole tensors of one adapter, apart from what they belong to."""

    path: Path
    pairs: Mapping[torch.nn.Module, torch.nn.ModuleDict]
    values: tuple[SavedValue, ...] = ()


class AdapterSwitch:
    """Puts adapters onto the linears of a model and takes them off. The base weights are there once."""

    def __init__(self, vlm: LoadedVLM) -> None:
        """`vlm` has no adapter of its own."""
        config = vlm.model.config
        self._model, self._located = vlm.model, vlm.located
        self._runtime = Runtime(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            params_dtype=config.params_dtype,
        )
        self._on: AttachedAdapter | None = None
        self._linears: list[AdaptedLinear] = []

    def attach(self, folder: str | Path) -> AttachedAdapter:
        """Read an adapter in PEFT's format; it is not switched on. Every rank of a model that is spread calls this.

        Raises:
            WeightError: it is damaged, or another model's.
            ConfigError: the model has an adapter of its own; DoRA on weights in 8 or 4 bits.
        """
        spec = with_adapter(self._model.spec, folder)
        refuse_stored_dora(spec)
        self._put_values(active=False)
        before, self._on = self._on, None
        self._put()
        try:
            sources = opened_sources(spec, self._located.sources or {})
            attach_adapters(self._model, spec, self._runtime, sources, load_weights=True)
            pairs = {linear: linear.lora for linear in self._found() if linear.lora}
            return AttachedAdapter(Path(folder), pairs, tuple(values_in(self._model)))
        finally:
            for value in values_in(self._model):
                value.put(active=False)
            forget_base(self._model)
            self._model.requires_grad_(False)
            self._linears = self._found()
            self._on = before
            self._put()

    def use(self, adapter: AttachedAdapter | None) -> None:
        """Switch an adapter on, and the one before it off. None: the model is as it was loaded."""
        if adapter is not self._on:
            self._put_values(active=False)
            self._on = adapter
            self._put()

    def _found(self) -> list[AdaptedLinear]:
        return [module for module in self._model.modules() if isinstance(module, AdaptedLinear)]

    def _put(self) -> None:
        pairs = {} if self._on is None else self._on.pairs
        for linear in self._linears:
            linear.lora = pairs.get(linear) or torch.nn.ModuleDict()
        self._put_values(active=True)

    def _put_values(self, *, active: bool) -> None:
        for value in () if self._on is None else self._on.values:
            value.put(active=active)
