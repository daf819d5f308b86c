"""The layouts that are written: which files with which tensors, and the configs beside them."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint_converters import configs
from checkpoint_converters.companions import (
    GENERATION_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    Companions,
    ImageVocabulary,
    add_image_tokens,
    complete_tokenizer,
    image_vocabulary,
    remove_image_tokens,
    rows_without_image,
)
from checkpoint_converters.plan import Job, Wanted, part_jobs, renamed, stored_dtype
from checkpoint_converters.write import VISION_ENCODER_FOLDER, write_json
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.families.llava import LLAVA, ORIGINAL
from mindspeed_mm.models.part import ALL_SLOTS, SLOTS, PartSpec, all_parts, part_block, part_of, written_prefix
from mindspeed_mm.models.spec import DEFAULT_FAMILY, ModelSpec, all_families, find_family, load_model_spec, model_block
from mindspeed_mm.weights.files import read_json_object
from mindspeed_mm.weights.layouts import (
    HF_DECODER,
    INTERACTION,
    OUR_FILES,
    OUR_MODEL,
    OURS,
    PROJECTOR,
    TEXT,
    VISION,
    Layout,
)
from mindspeed_mm.weights.sources import PartSource, Source

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
"""The layout of training checkpoints, which another module writes."""


class Target(NamedTuple):
    """A layout that can be written, and the family whose it is (None: of any)."""

    layout: Layout
    family: str | None


@functools.cache
def targets() -> dict[str, tuple[Target, ...]]:
    """Layouts that can be written, by name. Two families may have one of the same name."""
    found: dict[str, tuple[Target, ...]] = {OURS: tuple(Target(layout, None) for layout in OUR_FILES.values())}
    for family in all_families().values():
        for layout in family.layouts:
            if layout.written:
                found[layout.name] = (*found.get(layout.name, ()), Target(layout, family.name))
    found["hf"] = (Target(HF_DECODER, None),)
    for slot in ALL_SLOTS[1:]:
        for part in all_parts(slot).values():
            for layout in part.layouts:
                if layout.written:
                    found[layout.name] = (Target(layout, None),)
    return found | {CHECKPOINT: (Target(OUR_MODEL, None),)}


def slots_of(to: str) -> tuple[str, ...]:
    """The slots that a layout has."""
    return tuple(slot for slot in ALL_SLOTS if any(slot in target.layout.written for target in targets()[to]))


def is_whole(to: str) -> bool:
    """Whether a layout holds whole models alone."""
    return to == CHECKPOINT or any(target.family for target in targets()[to])


FILE_NAMES = {
    VISION: "converted_clip.pt",
    TEXT: "converted_vicuna.pt",
    PROJECTOR: "mlp.pt",
    INTERACTION: "post_block.pt",
}
"""Files of the layout mindspeed-mm, as the ancestor's guide names them."""

PROJECTOR_FILE, INTERACTION_FILE = "mm_projector.bin", "post_block.bin"


@dataclass(frozen=True)
class Conversion:
    """What is converted: the parts with their specs, the files beside them, the type to store."""

    source: Source
    parts: dict[str, PartSource]
    specs: dict[str, PartSpec]
    companions: Companions
    dtype: torch.dtype | None = None
    stated_heads: bool = False
    family: str = DEFAULT_FAMILY
    quantize: str | None = None
    double_quant: bool = False
    """How the linears of a training checkpoint's decoder are stored; None: as they are."""

    @property
    def model(self) -> ModelSpec:
        """The whole model that the parts make."""
        return load_model_spec(model_block(self.specs, self.family), context=str(self.source.path))

    def jobs(self, layout: Layout, kind: str, rows: int | None = None) -> list[Job]:
        """Jobs of one part in the names of a layout."""
        dialect, prefix = layout.dialects[kind], written_prefix(layout, part_of(kind, self.specs[kind]))
        jobs, filled = part_jobs(
            self.parts[kind],
            self.specs[kind],
            Wanted(dialect, prefix, self.dtype, rows if kind == TEXT else None, built_only=layout is OUR_MODEL),
        )
        if kind == PROJECTOR and dialect == "llava" and self.specs[kind].num_layers == 1:
            jobs = [renamed(job, prefix + "0.", prefix) for job in jobs]  # LLaVA's linear is no sequence of modules
        if filled:
            logger.warning(
                "the source holds no %s: filled so that they change nothing; the feature is taken before them",
                ", ".join(sorted({".".join(name.split(".")[:3]) for name in filled})),
            )
        return jobs


def held(family: Any, conversion: Conversion, layout: Layout) -> list[str]:
    """The slots of a family's model, and the interaction where the source has one. Raises WeightError where the layout
    has no place for it."""
    if INTERACTION not in conversion.source.parts:
        return [*family.slots]
    if INTERACTION not in layout.written:
        raise WeightError(
            f"{conversion.source.path} has a post-interaction block, for which layout {layout.name} of {family.name} "
            f"has no place; expected another layout. Choose --to {OURS} or {CHECKPOINT}, or write the block by itself: "
            "--to post-block."
        )
    return [*family.slots, INTERACTION]


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
    """The plan of one of `targets()`. Raises WeightError where the source cannot be written in it."""
    if to in _PLANS:
        return _PLANS[to](conversion)
    fitting = [target for target in targets()[to] if target.family in (None, conversion.family)]
    if not fitting:
        families = ", ".join(target.family for target in targets()[to])
        raise WeightError(
            f"layout {to} holds models of {families}; the source is one of {conversion.family}. Choose another layout."
        )
    if fitting[0].family is not None:
        return _plan_family(conversion, fitting[0].layout)
    (slot,) = fitting[0].layout.written
    return _plan_part(conversion, fitting[0].layout, slot)


def register_target(to: str, plan: Callable[[Conversion], TargetPlan]) -> None:
    """Add what plans a layout that is written in a way of its own (the training checkpoint)."""
    _PLANS[to] = plan


def own_record(source: PartSource, spec: PartSpec, *, stated_heads: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(what a file of ours says of itself, the Spec fields that had to be assumed)."""
    known = source.config is not None or stated_heads or source.part != VISION
    assumed = source.assumed if known else ("num_attention_heads",)
    return {"config": {source.part: part_block(source.part, spec)}, "assumed": list(assumed)}, assumed


def _plan_ours(conversion: Conversion) -> TargetPlan:
    files = []
    for kind, source in conversion.parts.items():
        record, _ = own_record(source, conversion.specs[kind], stated_heads=conversion.stated_heads)
        files.append(WeightFiles(FILE_NAMES[kind], "torch", conversion.jobs(OUR_FILES[kind], kind), record))

    def finish(folder: Path) -> None:
        names = [] if TEXT not in conversion.parts else [*TOKENIZER_FILES, *GENERATION_FILES]
        conversion.companions.copy(folder, [*names, *(PROCESSOR_FILES if VISION in conversion.parts else ())])
        if set(SLOTS) <= set(conversion.parts):
            write_json(folder / "model.json", model_block(conversion.specs, conversion.family))
            family = find_family(conversion.family)
            family.write_companions(folder, family.gather({}, conversion.companions.folders))

    return TargetPlan(files, finish)


def _plan_part(conversion: Conversion, layout: Layout, slot: str) -> TargetPlan:
    """One part's own public folder."""
    spec, jobs = conversion.specs[slot], conversion.jobs(layout, slot)
    if layout not in (HF_DECODER, *part_of(slot, spec).layouts):
        raise WeightError(
            f"layout {layout.name} does not hold a {slot} {spec.model_id}. Choose --to "
            f"{' or '.join(own.name for own in part_of(slot, spec).layouts if own.written) or OURS}."
        )
    if slot == INTERACTION:
        config = {INTERACTION: part_block(slot, spec)}
        files = [WeightFiles(INTERACTION_FILE, "torch", jobs)]
        return TargetPlan(files, lambda folder: write_json(folder / "config.json", config))
    if slot == PROJECTOR:
        config = configs.hf_config(slot, spec, stored_dtype(jobs))
        files = [WeightFiles(PROJECTOR_FILE, "torch", jobs)]
        return TargetPlan(files, lambda folder: write_json(folder / "config.json", config))

    def finish(folder: Path) -> None:
        if slot == VISION:
            return _finish_encoder(conversion, folder, jobs)
        conversion.companions.copy(folder, (*TOKENIZER_FILES, *GENERATION_FILES))
        config = configs.hf_config(slot, spec, stored_dtype(jobs))
        write_json(folder / "config.json", config | configs.text_tokens(conversion.source))

    return TargetPlan([WeightFiles(".", "safetensors", jobs)], finish)


def _finish_encoder(conversion: Conversion, folder: Path, jobs: list[Job]) -> None:
    spec = conversion.specs[VISION]
    _add_image_processor(conversion, folder, part_of(VISION, spec).image_processor)
    write_json(folder / "config.json", configs.hf_config(VISION, spec, stored_dtype(jobs)))


def _add_image_processor(conversion: Conversion, folder: Path, default: Callable | None) -> None:
    """The source's image processor, else the one that all releases of the encoder have."""
    conversion.companions.copy(folder, PROCESSOR_FILES)
    if not (folder / PROCESSOR_FILES[0]).is_file():
        if default is None:
            raise WeightError(
                f"{conversion.source.path} came with no {PROCESSOR_FILES[0]}, and the encoder has no usual one. Give "
                "--image-processor (image_processor=), a folder that holds one."
            )
        write_json(folder / PROCESSOR_FILES[0], default(conversion.specs[VISION]))


def _plan_family(conversion: Conversion, layout: Layout) -> TargetPlan:
    """A folder that the family's transformers class reads."""
    family, text = find_family(conversion.family), conversion.specs[TEXT]
    tokens, vocabulary, rows = configs.text_tokens(conversion.source), None, None
    if family.adds_image_token:
        vocabulary = image_vocabulary(conversion.companions, text.language_vocab_size, tokens.get("pad_token_id"))
        rows = vocabulary.rows
        tokens |= {"image_token_id": vocabulary.image_id, "pad_token_id": vocabulary.pad_id, "rows": rows}
    elif (folder := conversion.companions.tokenizer_folder()) is not None:
        tokens |= family.token_ids(load_tokenizer(folder).token_to_id)
    jobs = [job for kind in held(family, conversion, layout) for job in conversion.jobs(layout, kind, rows)]
    config = family.join_config(layout.name, conversion.specs, stored_dtype(jobs), tokens)

    def finish(folder: Path) -> None:
        conversion.companions.copy(folder, (*TOKENIZER_FILES, *GENERATION_FILES))
        if vocabulary is not None and vocabulary.new:
            add_image_tokens(folder, vocabulary)
        complete_tokenizer(folder)
        _add_image_processor(conversion, folder, lambda _spec: family.default_image_processor(conversion.model))
        images = folder / PROCESSOR_FILES[0]
        found = read_json_object(images)
        gathered = family.gather(found, conversion.companions.folders)
        family.write_companions(folder, gathered)
        fitting = family.fit_image_processor(conversion.model, gathered)
        if fitting != found:
            write_json(images, fitting)
        processor = family.processor_config(conversion.model)
        if processor is not None:
            write_json(folder / "processor_config.json", processor)
        if vocabulary is not None:
            _finish_generation(folder, configs.text_tokens(conversion.source), vocabulary)
        write_json(folder / "config.json", config)

    return TargetPlan([WeightFiles(".", "safetensors", jobs)], finish)


def _finish_generation(folder: Path, tokens: dict[str, Any], vocabulary: ImageVocabulary) -> None:
    """generation_config.json as the source has it, else with the ids of its config, else with those of its tokenizer;
    padding becomes a <pad> that is new."""
    path = folder / GENERATION_FILES[0]
    if path.is_file():
        given = read_json_object(path)
    else:
        words = load_tokenizer(folder)
        given = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id} | tokens
    if vocabulary.new or given.get("pad_token_id") is None:
        given |= {"pad_token_id": vocabulary.pad_id}
    write_json(path, given)


def _plan_original(conversion: Conversion) -> TargetPlan:
    """LLaVA's original layout: the main checkpoint as torch files with an index.

    An encoder that has no hub name follows in its own folder, since LLaVA's loader takes it from mm_vision_tower.
    """
    family = find_family(conversion.family)
    layout = next((layout for layout in family.layouts if layout.name == ORIGINAL), LLAVA)
    rows = rows_without_image(conversion.source, conversion.companions, conversion.specs[TEXT].language_vocab_size)
    jobs = [job for kind in held(family, conversion, layout) for job in conversion.jobs(layout, kind, rows)]
    name = configs.own_encoder_name(conversion.source)
    folders = part_of(VISION, conversion.specs[VISION]).layouts
    encoder = [] if name else conversion.jobs(folders[0], VISION)
    files = [WeightFiles(".", "bin", jobs)] + (
        [WeightFiles(VISION_ENCODER_FOLDER, "safetensors", encoder)] if encoder else []
    )
    tokens = configs.text_tokens(conversion.source)
    if rows != conversion.specs[TEXT].language_vocab_size:
        tokens = {key: value for key, value in tokens.items() if key != "pad_token_id"} | {"pad_token_id": 0}
    config = family.join_config(ORIGINAL, conversion.specs, stored_dtype(jobs), tokens | {"rows": rows})
    config = configs.original_config(config, conversion.specs, conversion.source, name or VISION_ENCODER_FOLDER)

    def finish(folder: Path) -> None:
        conversion.companions.copy(folder, (*TOKENIZER_FILES, *GENERATION_FILES))
        if rows != conversion.specs[TEXT].language_vocab_size:
            remove_image_tokens(folder)
            generation = folder / GENERATION_FILES[0]
            if generation.is_file():
                write_json(generation, read_json_object(generation) | {"pad_token_id": tokens["pad_token_id"]})
        if encoder:
            _finish_encoder(conversion, folder / VISION_ENCODER_FOLDER, encoder)
        else:
            conversion.companions.copy(folder, PROCESSOR_FILES)
        write_json(folder / "config.json", config)

    return TargetPlan(files, finish)


_PLANS: dict[str, Callable[[Conversion], TargetPlan]] = {OURS: _plan_ours, ORIGINAL: _plan_original}
"""Layouts that are written in a way of their own."""
