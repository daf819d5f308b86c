"""The weights that a model.json names, as one source: parts that lie apart, adapters that it loads merged into them."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoint_converters.merge_adapters import adapter_changes
from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.loaded import loaded_adapter
from mindspeed_mm.models.adapters.merged import MergedFile
from mindspeed_mm.models.adapters.peft_format import PeftAdapter
from mindspeed_mm.models.complete import read_model
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import MODEL_KEYS, ModelSpec, model_block
from mindspeed_mm.weights.layouts import OURS
from mindspeed_mm.weights.sources import PartSource, Source


def open_model_file(path: Path, dtype: torch.dtype | None = None) -> Source:
    """The whole model of a model.json; tensors that its adapters change have `dtype`, or that which is stored.

    Raises:
        WeightError: a part has no weights or keeps random values, or weights cannot be read.
        ConfigError: the file does not describe a model.
    """
    values = {key: value for key, value in read_config(path).items() if key in MODEL_KEYS}
    spec = read_model(values, context=str(path))
    found = [loaded_adapter(spec, slot) for slot in spec.part_specs()]
    adapters = {adapter.path: adapter for adapter, _ in filter(None, found)}
    parts = {slot: _part(path, spec, slot, list(adapters.values()), dtype) for slot in spec.part_specs()}
    return Source(path, OURS, model_block(spec.part_specs(), spec.model_id), parts, family=spec.model_id)


def _part(path: Path, spec: ModelSpec, slot: str, adapters: list[PeftAdapter], dtype: torch.dtype | None) -> PartSource:
    own = spec.part(slot)
    if own.ckpt_path is None or own.fresh_names:
        lack = "no ckpt_path" if own.ckpt_path is None else f"random values in {', '.join(own.fresh_names)}"
        raise WeightError(f"{path}: the {slot} has {lack}; expected weights of the whole model. Train it first")
    held = open_source(own.ckpt_path, adapters=spec.adapter_files).part(slot)
    for adapter in adapters:
        changes = adapter_changes(Source(held.path, OURS, None, {slot: held}), adapter, model=spec)
        held = held.changed(MergedFile(held.files, changes, dtype=dtype)) if changes else held
    return held
