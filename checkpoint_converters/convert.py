"""Convert weights between layouts, as a library; each part goes through our names and back by one rule set."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint_converters.checkpoint import register_checkpoints
from checkpoint_converters.checkpoint.adapters import export_adapter
from checkpoint_converters.companions import companions_of
from checkpoint_converters.plan import Wanted, as_dtype, part_jobs, total_bytes
from checkpoint_converters.progress import bytes_bar
from checkpoint_converters.stream import Runner
from checkpoint_converters.targets import (
    CHECKPOINT,
    FILE_NAMES,
    Conversion,
    WeightFiles,
    is_whole,
    own_record,
    plan_target,
    slots_of,
    targets,
)
from checkpoint_converters.write import (
    SHARD_BYTES,
    beside,
    check_space,
    check_target,
    new_folder,
    recover,
    write_folder,
    write_safetensors,
    write_torch,
)
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import describe_model, describe_part, part_of_source
from mindspeed_mm.models.part import SLOTS, PartSpec, part_block
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import DEFAULT_FAMILY, load_model_spec
from mindspeed_mm.weights.layouts import OURS
from mindspeed_mm.weights.sources import PartSource, Source

logger = logging.getLogger(__name__)

PEFT = "peft"
"""Adapters alone, in the format of the peft library."""

FILE_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")

RUN_KEYS = (
    *("freeze", "lr", "weight_decay", "parameters", "lora", "quantize"),
    *("ckpt_path", "fresh", "params_dtype", "bf16", "fp16"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers"),
)
"""Spec keys that say how a run used the part, which is nothing of the weights."""

__all__ = ["FILE_NAMES", "Converted", "convert", "convert_part", "open_parts", "specs_of", "targets"]


@dataclass(frozen=True)
class Converted:
    """What one part became: its file, number of tensors and bytes, and the Spec fields that had to be assumed."""

    part: str
    path: Path
    tensors: int
    nbytes: int
    assumed: tuple[str, ...]


def convert(
    source: str | Path | Source | Mapping[str, str | Path],
    target: str | Path,
    *,
    to: str,
    dtype: str | torch.dtype | None = None,
    num_attention_heads: int | None = None,
    parts: Sequence[str] | None = None,
    shard_size: int = SHARD_BYTES,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    tokenizer: str | Path | None = None,
    image_processor: str | Path | None = None,
) -> list[Path]:
    """Convert the parts that a source holds, with config, tokenizer and image processor; returns the written files.

    Args:
        source: weights in any readable layout, or {kind of part: path} where they lie apart.
        target: folder to write; it must not exist or be empty. "projector" also takes the name of one file.
        to: layout to write: "mindspeed-mm" (converted_clip.pt, converted_vicuna.pt, mlp.pt, and for a whole model
            model.json; may join other files of a folder), "llava-hf", "llava", "hf" (the decoder), "clip" (the vision
            encoder), "projector", "checkpoint" (weights alone, as the folder that training and inference start from),
            "peft" (the adapters of a LoRA run; parts ["text_decoder"] names them as the decoder's own class does).
        dtype: type to store (fp32, fp16, bf16 or torch's); None and "keep" keep each tensor's own.
        num_attention_heads: heads of a vision encoder whose source does not say (None: width / 64).
        parts: kinds to convert, None for all that source and target have.
        shard_size: largest shard in bytes.
        overwrite: replace an earlier conversion, when its successor is complete.
        allow_nonfinite: write weights with NaN or Inf, which are else refused.
        tokenizer, image_processor: folders whose files are taken instead of the source's.

    Raises WeightError for a source that cannot be read or a target that cannot be written; the source is never changed.
    """
    if to == PEFT:
        given = {"dtype": dtype, "num_attention_heads": num_attention_heads, "tokenizer": tokenizer}
        given |= {"image_processor": image_processor, "overwrite": overwrite or None}
        return _adapters(source, target, parts, [key for key, value in given.items() if value not in (None, "keep")])
    if to not in targets():
        raise WeightError(f"cannot convert to {to!r}; expected {', '.join((*targets(), PEFT))}.")
    if shard_size <= 0:
        raise WeightError(f"found shard size {shard_size}; expected a positive number of bytes.")
    target = Path(target)
    opened = open_parts(source)
    kinds = _chosen(opened, to, parts)
    _check_apart(opened, target)
    conversion = Conversion(
        opened,
        {kind: opened.part(kind) for kind in kinds},
        specs_of(opened, kinds, num_attention_heads),
        companions_of(opened, tokenizer, image_processor),
        as_dtype(dtype),
        stated_heads=num_attention_heads is not None,
        family=family_of(opened),
    )
    plan = plan_target(conversion, to)
    runner = Runner(allow_nonfinite=allow_nonfinite)
    total = sum(total_bytes(files.jobs) for files in plan.files)
    joins = to == OURS and target.is_dir() and not target.is_symlink()
    if to == "projector" and target.suffix in FILE_SUFFIXES:
        return _convert_to_file(plan.files[0], target, runner, overwrite=overwrite)
    if not joins:
        check_target(target, overwrite=overwrite)
    check_space(target, total)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(bytes_bar(f"convert to {to}", total))
        opening = _joining(target, overwrite=overwrite) if joins else new_folder(target, overwrite=overwrite)
        folder = stack.enter_context(opening)
        for files in plan.files:
            _write(files, folder, runner, shard_size, advance)
        plan.finish(folder)
        written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [target / name for name in written]


def _adapters(source: object, target: str | Path, parts: Sequence[str] | None, given: list[str]) -> list[Path]:
    """Write the adapters of a LoRA run. Raises WeightError for options that do not go with them."""
    if given or not isinstance(source, str | Path) or parts not in (None, ["text_decoder"]):
        raise WeightError(
            f"peft: found {', '.join(given) or 'parts'}; expected the checkpoint of a LoRA run, with no other option "
            "than part text_decoder, for the decoder's own class in transformers. Leave the rest out."
        )
    return export_adapter(source, target, decoder_only=parts is not None)


def open_parts(source: str | Path | Source | Mapping[str, str | Path]) -> Source:
    """Open a source, or one that is put together of several. Raises WeightError."""
    register_checkpoints()
    if isinstance(source, Source):
        return source
    if not isinstance(source, Mapping):
        return open_source(source)
    unknown = sorted(set(source) - set(SLOTS))
    if unknown or not source:
        raise WeightError(f"found sources for {unknown or 'nothing'}; expected some of {', '.join(SLOTS)}.")
    parts = {kind: open_source(path).part(kind) for kind, path in source.items()}
    return Source(next(iter(parts.values())).path, "parts", None, parts)


def specs_of(source: Source, kinds: Sequence[str], num_attention_heads: int | None = None) -> dict[str, PartSpec]:
    """Specs of the named parts of a source, without what a run had set. A whole model is checked as one."""
    model = _model_config(source)
    if model and set(kinds) == set(SLOTS):
        specs = load_model_spec(model, context=f"{source.path}: its model config").part_specs()
    elif set(kinds) == set(SLOTS):
        specs = describe_model(source, num_attention_heads=num_attention_heads).part_specs()
    else:
        heads = {"vision_encoder": num_attention_heads}
        specs = {kind: describe_part(source.part(kind), num_attention_heads=heads.get(kind)) for kind in kinds}
    return {kind: _as_weights(source.part(kind), spec) for kind, spec in specs.items()}


def family_of(source: Source) -> str:
    """model_id of the family that a source's model belongs to; the default one where it does not say."""
    return source.family or _model_config(source).get("model_id") or DEFAULT_FAMILY


def _model_config(source: Source) -> dict[str, Any]:
    """The model.json that a source of our own carries; empty where there is none."""
    config = source.config or {}
    return config["model"] if source.layout == CHECKPOINT else config if source.layout == OURS else {}


def convert_part(
    source: PartSource,
    path: Path,
    *,
    spec: PartSpec | None = None,
    dtype: str | torch.dtype | None = None,
    num_attention_heads: int | None = None,
) -> Converted:
    """Write one part under our names as a flat .pt file of full tensors, as the ancestor's converters do.

    All layers of the source are kept, also those that a model with a feature before the last layer never builds. The
    file says inside what it holds (see weights/files.py), so that it loads without a further config. `spec` is what
    the source is, None to take it from the source; see `convert` for the others. A file of that name is replaced when
    the new one is complete.
    """
    spec = _as_weights(source, spec or describe_part(source, num_attention_heads=num_attention_heads))
    jobs, _ = part_jobs(source, spec, Wanted("ours", dtype=as_dtype(dtype)))
    record, assumed = own_record(source, spec, stated_heads=num_attention_heads is not None)
    check_space(path.parent, total_bytes(jobs))
    with bytes_bar(path.name, total_bytes(jobs)) as advance, beside(path) as temporary:
        write_torch(temporary, jobs, Runner(), record=record, advance=advance)
    return Converted(source.part, path, sum(len(job.outputs) for job in jobs), total_bytes(jobs), assumed)


def _as_weights(source: PartSource, spec: PartSpec) -> PartSpec:
    block = {k: v for k, v in part_block(source.part, spec).items() if k not in RUN_KEYS}
    return part_of_source(source).read_config(block, "ours")


def _chosen(source: Source, to: str, parts: Sequence[str] | None) -> list[str]:
    """The kinds to convert. Raises WeightError for those that the source or the target lacks."""
    offered = slots_of(to)
    unknown = sorted(set(parts or ()) - set(offered))
    if unknown:
        raise WeightError(f"layout {to} has no {', '.join(unknown)}; expected {', '.join(offered)}.")
    if is_whole(to) and parts and set(parts) != set(offered):
        raise WeightError(f"layout {to} holds a whole model; expected no choice of parts. Choose another layout.")
    needed = parts or (offered if to != OURS else source.parts)
    for kind in needed:
        source.part(kind)  # raises, with the reason that fits the layout
    return [kind for kind in SLOTS if kind in needed]


def _check_apart(source: Source, target: Path) -> None:
    """A target is neither the source nor around it: the source is never changed."""
    goal = target.resolve()
    for path in {source.path, *(part.path for part in source.part_sources.values())}:
        origin = path.resolve()
        if goal == origin or goal in origin.parents and target.exists():
            raise WeightError(f"{target} holds the source {path}; expected another folder. Choose a new target.")


def _convert_to_file(files: WeightFiles, target: Path, runner: Runner, *, overwrite: bool) -> list[Path]:
    check_target(target, overwrite=overwrite)
    write = write_safetensors if target.suffix == ".safetensors" else write_torch
    with beside(target) as temporary:
        write(temporary, files.jobs, runner)
    return [target]


def _write(files: WeightFiles, folder: Path, runner: Runner, shard_size: int, advance) -> None:
    where = folder / files.where
    if files.write is not None:
        files.write(where, files.jobs, runner, advance=advance)
        return
    if files.kind == "torch":
        write_torch(where, files.jobs, runner, record=files.record, advance=advance)
        return
    where.mkdir(exist_ok=True)
    write_folder(where, files.jobs, runner, kind=files.kind, shard_bytes=shard_size, advance=advance)


@contextlib.contextmanager
def _joining(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder inside `target` whose files are moved into it when the block ends well.

    Raises WeightError where weights of the same name are there, unless `overwrite`.
    """
    try:
        recover(target / "convert")
        temporary = target / f".convert.{os.getpid()}.part"
        temporary.mkdir()
        try:
            yield temporary
            paths = sorted(temporary.iterdir(), key=lambda path: path.name == "model.json")
            taken = [path.name for path in paths if (target / path.name).exists()]
            if taken and not overwrite:
                raise WeightError(
                    f"{target} holds {', '.join(taken)} already; expected none of them. Give --overwrite "
                    "(overwrite=True), or another target."
                )
            if "model.json" in taken:
                (target / "model.json").unlink()  # a folder with some parts of each model does not look whole
            for path in paths:
                os.replace(path, target / path.name)
        finally:
            shutil.rmtree(temporary)
    except OSError as error:
        raise WeightError(
            f"cannot write {target}: {error.strerror or error}; expected a writable folder with enough space. "
            "Choose another target."
        ) from error
