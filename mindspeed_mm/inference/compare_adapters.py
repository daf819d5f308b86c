"""Whether merged weights compute what their base computes with the adapter switched on, in float32 on the CPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from mindspeed_mm.inference.compare_outputs import (
    DECODER,
    MODEL,
    VISION_ENCODER,
    Differences,
    our_part,
    questions,
    random_ids,
)
from mindspeed_mm.models.adapters.peft_format import CONFIG, TENSORS, read_peft
from mindspeed_mm.models.part import SLOTS, part_of
from mindspeed_mm.weights.files import SafetensorsFile, read_json_object
from mindspeed_mm.weights.sources import Source

if TYPE_CHECKING:
    from mindspeed_mm.inference.loaded import LoadedVLM
    from mindspeed_mm.inference.locate import Located


def compare_merged(base: Source, adapter: Path, merged: Source) -> dict[str, dict[str, Any]]:
    """Figures (`Differences.figures`) of the whole model under "model" where the base is one, else of its decoder or
    its vision encoder; empty for what is neither.

    Args:
        base: the base, with what else is merged (further adapters, whole tensors) in its place.
        adapter: folder of the adapter that is switched on.
        merged: the result; a whole base may have become one part of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        pairs = _pairs_alone(adapter, Path(folder))
        if set(SLOTS) <= set(base.parts) == set(merged.parts):
            return {MODEL: _whole(base, pairs, merged)}
        found = {}
        for kind in (DECODER, VISION_ENCODER):
            if kind in base.parts and kind in merged.parts:
                found |= _part(kind, base, pairs, merged)
        return found


def in_float32(source: Source) -> bool:
    """Whether weights are rounded no more than their computation is."""
    return all(part.dtype(name) == torch.float32 for part in source.part_sources.values() for name in part.names)


def _pairs_alone(adapter: Path, folder: Path) -> Path:
    """A copy of an adapter's A and B without the whole tensors that go with them."""
    config = read_json_object(adapter / CONFIG) | {"modules_to_save": None}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    file = SafetensorsFile(adapter / TENSORS)
    saved = {f"base_model.model.{name}" for name in read_peft(adapter).saved}
    save_file({name: file.get(name) for name in file.names if name not in saved}, folder / TENSORS)
    return folder


def _whole(base: Source, adapter: Path, merged: Source) -> dict[str, Any]:
    from mindspeed_mm.inference.api import load_located
    from mindspeed_mm.inference.locate import locate_source

    asked, answers = [], []
    for source, own in ((base, adapter), (merged, None)):  # one after the other: each may fill the memory
        located = locate_source(source, source.path)
        vlm = load_located(located, device="cpu", dtype="fp32", adapter=own)
        asked = asked or _asked(vlm, located)
        answers.append([vlm.logits(ids, **inputs) for ids, inputs in asked])
        del vlm
    found = Differences("logits")
    for left, right in zip(*answers, strict=True):
        found.add(left, right)
    return found.figures(foreign=False)


def _asked(vlm: LoadedVLM, located: Located) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Random tokens around a random image; without one where nothing says how the family's images become pixels."""
    if located.image_processor is not None or vlm.spec.family.fixed_plan(vlm.spec) is not None:
        return list(questions(vlm, [], []))
    rows = min(vlm.spec.text_decoder.language_vocab_size, vlm.image_token_id or 2**31)
    return [(random_ids(rows, torch.Generator().manual_seed(0)).unsqueeze(0), {})]


def _part(kind: str, base: Source, adapter: Path, merged: Source) -> dict[str, dict[str, Any]]:
    from checkpoint_converters.specs import specs_of
    from mindspeed_mm.models.spec import all_families
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    specs = specs_of(base, base.parts)
    spec = specs[kind]
    generator = torch.Generator().manual_seed(0)
    if kind == DECODER:
        inputs = random_ids(spec.language_vocab_size, generator).unsqueeze(0)
    elif hasattr(spec, "num_image_tokens"):
        inputs = torch.randn(1, 3, spec.image_size, spec.image_size, generator=generator)
    else:  # images of any size
        return {}
    parts = {slot: part_of(slot, each) for slot, each in specs.items()}
    layouts = all_families()[base.family].layouts if base.family else ()
    opened = read_peft(adapter)
    modules = opened.sites(parts, specs, layouts).get(kind, {})
    found = Differences("logits" if kind == DECODER else "features")
    pairs = {module: opened.pair(name) for module, name in modules.items()}
    adapted = spec.model_copy(update={"lora": opened.block(modules)}) if modules else spec
    with torch.inference_mode():
        on = our_part(base.part(kind), spec, adapted=adapted, pairs=pairs)(inputs)
        found.add(on, our_part(merged.part(kind), specs_of(merged, [kind])[kind])(inputs))
    return {kind: found.figures(foreign=False)}
