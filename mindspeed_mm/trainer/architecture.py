"""What a run begins with fits its model config, or the run ends before data are read and processes meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.driver.arguments import DriverArguments
from megatron.driver.checkpoint.reading import check_folders, find_checkpoint, read_run
from megatron.driver.checkpoint.storage import check_place
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.models.headers import check_weights
from mindspeed_mm.models.spec import ModelSpec

NOT_ARCHITECTURE = {"freeze", "ckpt_path", "fresh", "params_dtype", "bf16", "fp16", "pipeline_num_layers"}
NOT_ARCHITECTURE |= {"lr", "weight_decay", "layer_decay", "parameters", "neftune_noise_alpha"}
NOT_ARCHITECTURE |= {"dropout", "load", "init_seed", "loraplus_lr_ratio", "modules_to_save"}  # of a lora block
"""Spec keys that may differ between a checkpoint and the run that loads it (besides recompute_*)."""


def starting_checkpoint(args: DriverArguments) -> Path | None:
    """The checkpoint that a run begins with, whole or its weights alone; None where the model config's weights are.

    Raises:
        CheckpointError: the tracker, or --ckpt-step, names an iteration that is not there.
    """
    # --ckpt-step is about --load alone.
    places = ((args.load, args.ckpt_step), (args.pretrained_checkpoint, None))
    return next((found for folder, step in places if folder and (found := find_checkpoint(folder, step))), None)


def check_trains(spec: ModelSpec) -> None:
    """Raise ConfigError where every part is frozen."""
    if not any(part.trains for part in spec.part_specs().values()):
        raise ConfigError("nothing to train: all parts are frozen; set freeze to false for at least one part")


def check_start(args: DriverArguments, spec: ModelSpec) -> None:
    """Compare the model config with the checkpoint that the run begins with, else with the weights that it names.

    Raises:
        ConfigError: nothing is trained.
        WeightError: the weights are missing or those of another model.
        CheckpointError: the checkpoint is not whole, or of another architecture, or --save can be no folder.
    """
    check_trains(spec)
    if args.save is not None:
        check_place(Path(args.save))
    check_folders(args)
    path = starting_checkpoint(args)
    if path is None:
        check_weights(spec)
        return
    saved = read_run(path)["extra"].get("model", {})
    _check_dora(path, saved, spec)
    differences = compare_architectures(saved, spec.model_dump(mode="json"))
    if differences:
        raise CheckpointError(
            f"checkpoint {path} has another architecture than the model config:\n  "
            + "\n  ".join(differences)
            + "\nUse the model config that it was trained with"
        )


def _check_dora(path: Path, saved: dict[str, Any], spec: ModelSpec) -> None:
    """DoRA begins beside weights that are there when the model is built."""
    encoder = saved.get("image_encoder") or {}
    for slot, part in spec.part_specs().items():
        held = (saved if slot in saved else encoder).get(slot) or {}
        if part.lora is not None and part.lora.use_dora and held.get("lora") is None:
            raise CheckpointError(
                f"{slot}.lora.use_dora begins with the lengths of the weights' rows, and checkpoint {path} has no "
                f"adapters; expected weights in ckpt_path. Give the checkpoint as ckpt_path of the {slot}"
            )


def compare_architectures(saved: dict[str, Any], current: dict[str, Any], path: str = "") -> list[str]:
    """One line for each field in which two model specs (as JSON) differ, settings of the run left out."""
    lines = []
    for key in sorted(set(saved) | set(current)):
        if key in NOT_ARCHITECTURE or key.startswith("recompute_"):
            continue
        ours, theirs = current.get(key), saved.get(key)
        if key == "lora" and theirs is None:
            continue  # adapters may begin beside a run's weights; whether they may here, the driver decides
        if key not in saved and (ours is False or ours == {}):
            continue  # an older checkpoint, of before there was such a key
        if isinstance(ours, dict) and isinstance(theirs, dict):
            lines += compare_architectures(theirs, ours, f"{path}{key}.")
        elif ours != theirs:
            lines.append(f"{path}{key}: the checkpoint has {theirs!r}, the model config {ours!r}")
    return lines
