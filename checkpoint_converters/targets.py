"""The layouts that are written: which files with which tensors, and the configs beside them."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoint_converters import configs
from checkpoint_converters.companions import (
    GENERATION_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    Companions,
    add_image_tokens,
    complete_tokenizer,
    image_vocabulary,
    remove_image_tokens,
    rows_without_image,
)
from checkpoint_converters.plan import Job, Wanted, part_jobs, renamed, stored_dtype
from checkpoint_converters.write import VISION_ENCODER_FOLDER, write_json
from mindspeed_mm.models.describe import model_block
from mindspeed_mm.models.part import PartSpec
from mindspeed_mm.models.spec import PART_KINDS
from mindspeed_mm.weights.files import read_json_object
from mindspeed_mm.weights.layouts import PROJECTOR, TEXT, VISION, WRITTEN
from mindspeed_mm.weights.sources import PartSource, Source

logger = logging.getLogger(__name__)

TARGETS = {layout: tuple(parts) for layout, parts in WRITTEN.items()}
"""Layouts that can be written, with their parts."""

FILE_NAMES = {VISION: "converted_clip.pt", TEXT: "converted_vicuna.pt", PROJECTOR: "mlp.pt"}
"""Files of the layout mindspeed-mm, as the ancestor's guide names them."""

PROJECTOR_FILE = "mm_projector.bin"


@dataclass(frozen=True)
class Conversion:
    """What is converted: the parts with their specs, the files beside them, the type to store."""

    source: Source
    parts: dict[str, PartSource]
    specs: dict[str, PartSpec]
    companions: Companions
    dtype: torch.dtype | None = None
    stated_heads: bool = False

    def jobs(self, layout: str, kind: str, rows: int | None = None) -> list[Job]:
        """Jobs of one part in the names of a layout."""
        dialect, prefix = WRITTEN[layout][kind]
        jobs, filled = part_jobs(
            self.parts[kind],
            self.specs[kind],
            Wanted(dialect, prefix, self.dtype, rows if kind == TEXT else None, built_only=layout == "checkpoint"),
        )
        if kind == PROJECTOR and dialect == "llava" and self.specs[kind].num_layers == 1:
            jobs = [renamed(job, prefix + "0.", prefix) for job in jobs]  # LLaVA's linear is no sequence of modules
        if filled:
            logger.warning(
                "the source holds no %s: filled so that they change nothing; the feature is taken before them",
                ", ".join(sorted({".".join(name.split(".")[:3]) for name in filled})),
            )
        return jobs


@dataclass(frozen=True)
class WeightFiles:
    """Weights at `where` in the target: kind "torch" is one file, "safetensors" and "bin" a folder's shards."""

    where: str
    kind: str
    jobs: list[Job]
    record: dict[str, Any] | None = None
    write: Callable[..., None] | None = None
    """Writes jobs to `where`, in place of the writers of these kinds."""


@dataclass(frozen=True)
class TargetPlan:
    """All weight files of a target, and what writes the small files beside them."""

    files: list[WeightFiles]
    finish: Callable[[Path], None] = field(default=lambda folder: None)


def plan_target(conversion: Conversion, to: str) -> TargetPlan:
    """The plan of one layout of TARGETS. Raises WeightError where the source cannot be written in it."""
    return _PLANS[to](conversion)


def register_target(to: str, plan: Callable[[Conversion], TargetPlan]) -> None:
    """Add what plans a further layout of TARGETS (the training checkpoint)."""
    _PLANS[to] = plan


def own_record(source: PartSource, spec: PartSpec, *, stated_heads: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(what a file of ours says of itself, the Spec fields that had to be assumed)."""
    known = source.config is not None or stated_heads or source.part != VISION
    assumed = source.assumed if known else ("num_attention_heads",)
    block = spec.model_dump(mode="json", exclude_defaults=True)
    return {"config": {source.part: block}, "assumed": list(assumed)}, assumed


def _plan_ours(conversion: Conversion) -> TargetPlan:
    files = []
    for kind, source in conversion.parts.items():
        record, _ = own_record(source, conversion.specs[kind], stated_heads=conversion.stated_heads)
        files.append(WeightFiles(FILE_NAMES[kind], "torch", conversion.jobs("mindspeed-mm", kind), record))

    def finish(folder: Path) -> None:
        names = [] if TEXT not in conversion.parts else [*TOKENIZER_FILES, *GENERATION_FILES]
        conversion.companions.copy(folder, [*names, *(PROCESSOR_FILES if VISION in conversion.parts else ())])
        if set(conversion.parts) == set(PART_KINDS):
            write_json(folder / "model.json", model_block(conversion.specs))

    return TargetPlan(files, finish)


def _plan_hf(conversion: Conversion) -> TargetPlan:
    jobs = conversion.jobs("hf", TEXT)

    def finish(folder: Path) -> None:
        conversion.companions.copy(folder, (*TOKENIZER_FILES, *GENERATION_FILES))
        config = configs.hf_config(TEXT, conversion.specs[TEXT], stored_dtype(jobs))
        write_json(folder / "config.json", config | configs.text_tokens(conversion.source))

    return TargetPlan([WeightFiles(".", "safetensors", jobs)], finish)


def _plan_clip(conversion: Conversion) -> TargetPlan:
    jobs = conversion.jobs("clip", VISION)
    return TargetPlan(
        [WeightFiles(".", "safetensors", jobs)], lambda folder: _finish_vision_encoder(conversion, folder, jobs)
    )


def _finish_vision_encoder(conversion: Conversion, folder: Path, jobs: list[Job]) -> None:
    spec = conversion.specs[VISION]
    conversion.companions.copy(folder, PROCESSOR_FILES)
    if not (folder / PROCESSOR_FILES[0]).is_file():
        write_json(folder / PROCESSOR_FILES[0], configs.image_processor_config(spec))
    write_json(folder / "config.json", configs.hf_config(VISION, spec, stored_dtype(jobs)))


def _plan_projector(conversion: Conversion) -> TargetPlan:
    spec = conversion.specs[PROJECTOR]
    jobs = conversion.jobs("projector", PROJECTOR)
    config = configs.projector_config(spec)
    return TargetPlan(
        [WeightFiles(PROJECTOR_FILE, "torch", jobs)], lambda folder: write_json(folder / "config.json", config)
    )


def _plan_llava_hf(conversion: Conversion) -> TargetPlan:
    text = conversion.specs[TEXT]
    tokens = configs.text_tokens(conversion.source)
    vocabulary = image_vocabulary(conversion.companions, text.language_vocab_size, tokens.get("pad_token_id"))
    jobs = [job for kind in PART_KINDS for job in conversion.jobs("llava-hf", kind, vocabulary.rows)]
    config = configs.llava_hf_config(conversion.specs, stored_dtype(jobs), vocabulary, tokens)

    def finish(folder: Path) -> None:
        conversion.companions.copy(folder, (*TOKENIZER_FILES, *GENERATION_FILES, *PROCESSOR_FILES))
        if vocabulary.new:
            add_image_tokens(folder, vocabulary)
        complete_tokenizer(folder)
        if not (folder / PROCESSOR_FILES[0]).is_file():
            write_json(folder / PROCESSOR_FILES[0], configs.image_processor_config(conversion.specs[VISION]))
        write_json(folder / "processor_config.json", configs.processor_config(conversion.specs[VISION]))
        generation = folder / GENERATION_FILES[0]
        given = (
            read_json_object(generation) if generation.is_file() else {"bos_token_id": 1, "eos_token_id": 2} | tokens
        )
        write_json(generation, given | {"pad_token_id": vocabulary.pad_id})
        write_json(folder / "config.json", config)

    return TargetPlan([WeightFiles(".", "safetensors", jobs)], finish)


def _plan_llava(conversion: Conversion) -> TargetPlan:
    """The main checkpoint as torch files with an index; a vision encoder that has no hub name follows in its own
    folder, since LLaVA's loader takes the vision encoder from where mm_vision_tower points."""
    rows = rows_without_image(conversion.source, conversion.specs[TEXT].language_vocab_size)
    jobs = [job for kind in PART_KINDS for job in conversion.jobs("llava", kind, rows)]
    name = configs.own_vision_encoder_name(conversion.source)
    vision_encoder = [] if name else conversion.jobs("clip", VISION)
    files = [WeightFiles(".", "bin", jobs)] + (
        [WeightFiles(VISION_ENCODER_FOLDER, "safetensors", vision_encoder)] if vision_encoder else []
    )
    tokens = configs.text_tokens(conversion.source)
    if rows != conversion.specs[TEXT].language_vocab_size:
        tokens = {key: value for key, value in tokens.items() if key != "pad_token_id"} | {"pad_token_id": 0}
    config = configs.llava_config(
        conversion.specs, stored_dtype(jobs), conversion.source, name or VISION_ENCODER_FOLDER, tokens, rows
    )

    def finish(folder: Path) -> None:
        conversion.companions.copy(folder, (*TOKENIZER_FILES, *GENERATION_FILES))
        if rows != conversion.specs[TEXT].language_vocab_size:
            remove_image_tokens(folder)
            generation = folder / GENERATION_FILES[0]
            if generation.is_file():
                write_json(generation, read_json_object(generation) | {"pad_token_id": tokens["pad_token_id"]})
        if vision_encoder:
            _finish_vision_encoder(conversion, folder / VISION_ENCODER_FOLDER, vision_encoder)
        else:
            conversion.companions.copy(folder, PROCESSOR_FILES)
        write_json(folder / "config.json", config)

    return TargetPlan(files, finish)


_PLANS: dict[str, Callable[[Conversion], TargetPlan]] = {
    "mindspeed-mm": _plan_ours,
    "llava-hf": _plan_llava_hf,
    "llava": _plan_llava,
    "hf": _plan_hf,
    "clip": _plan_clip,
    "projector": _plan_projector,
}
