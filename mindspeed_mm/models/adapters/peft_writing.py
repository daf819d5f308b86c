"""Write adapters in the format of the peft library, which stock PEFT loads on transformers' model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.peft_format import CONFIG, OUTER, TENSORS, tensor_ends
from mindspeed_mm.models.adapters.saved_modules import module_of
from mindspeed_mm.models.adapters.spec import WholePair
from mindspeed_mm.models.spec import ModelSpec, find_family


def write_peft(
    folder: str | Path,
    spec: ModelSpec,
    pair: Callable[[str, str], WholePair],
    modules: dict[str, list[str]],
    *,
    base: str = "",
    decoder_only: bool = False,
    saved: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[Path]:
    """Write an adapter that stock PEFT loads on transformers' model; returns the files.

    Args:
        folder: must not exist or be empty.
        pair: (slot, Hugging Face's name of a module) -> whole A and B, and DoRA's lengths.
        modules: the adapted modules of each slot.
        base: base_model_name_or_path.
        decoder_only: names of the decoder's own class instead of the whole model's.
        saved: slot -> {Hugging Face's name: a whole tensor that goes with the adapter} (modules_to_save).

    Parts and linears may have an r and alpha of their own: those of the first part are the config's, the others stand
    in its rank_pattern and alpha_pattern.

    Raises WeightError for parts of which one alone has rsLoRA or DoRA, or a folder that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightError(f"{folder} exists and is not empty; expected a new folder. Choose another one")
    kinds = {slot: spec.part(slot).lora for slot, names in modules.items() if names}
    _check_kinds(kinds, decoder_only=decoder_only)
    outer = (lambda slot, name: name) if decoder_only else _whole_names(spec)
    tensors, targets, ranks, alphas = {}, [], {}, {}
    lora = next(iter(kinds.values()))
    for slot, name in ((kind, module) for kind in kinds for module in modules[kind]):
        targets.append(outer(slot, name))
        ranks[targets[-1]], alphas[targets[-1]] = kinds[slot].rank_of(name), kinds[slot].alpha_of(name)
        whole = [tensor for tensor in pair(slot, name) if tensor is not None]  # m is None without DoRA
        for end, tensor in zip(tensor_ends(kinds[slot].use_dora), whole, strict=True):
            tensors[OUTER + targets[-1] + end] = tensor.detach().to("cpu").contiguous()
    whole_modules = []
    for slot, own in (saved or {}).items():
        for name, tensor in ((outer(slot, inner), tensor) for inner, tensor in own.items()):
            tensors[OUTER + name] = tensor.detach().to("cpu").contiguous().clone()
            whole_modules.append(module_of(name))
    config = _config(lora, base, targets, ranks, alphas, whole_modules)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return [folder / CONFIG, folder / TENSORS]


def _config(
    lora: Any, base: str, targets: list[str], ranks: dict[str, int], alphas: dict[str, float], whole: list[str]
) -> dict[str, Any]:
    """adapter_config.json: `lora` is that of the first part, `whole` are the modules that are saved as a whole."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": targets,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != lora.r},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != lora.alpha},
        **({"modules_to_save": list(dict.fromkeys(whole))} if whole else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _check_kinds(kinds: Mapping[str, Any], *, decoder_only: bool) -> None:
    """Raise WeightError for adapters (by slot) that one config of PEFT cannot say together."""
    settings = {(lora.use_rslora, lora.use_dora) for lora in kinds.values()}
    if len(settings) != 1 or (decoder_only and set(kinds) != {"text_decoder"}):
        raise WeightError(
            f"found adapters on {', '.join(kinds) or 'nothing'} with use_rslora, use_dora {sorted(settings)}; expected "
            "the same ones on each part" + (", and none but the text_decoder's" if decoder_only else "")
        )


def _whole_names(spec: ModelSpec) -> Callable[[str, str], str]:
    """(slot, name in the part) -> name in transformers' class of the whole model."""
    layout = find_family(spec.model_id).layouts[0]
    if not layout.modules:
        raise WeightError(
            f"layout {layout.name} of model_id {spec.model_id} names no modules of a transformers class; expected "
            "adapters of a family that has one. Write those of the decoder alone (part text_decoder)"
        )
    prefixes = {prefix.part: prefix for prefix in layout.prefixes if prefix.old == layout.modules.get(prefix.part)}

    def whole(slot: str, name: str) -> str:
        own = prefixes[slot]
        if not name.startswith(own.new):
            return name  # such as lm_head, beside the decoder's own module
        return own.old + name.removeprefix(own.new)

    return whole
