"""Convert weights between layouts, as a library; each part goes through our names and back by one rule set."""

import contextlib
import difflib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint_converters.box_tokens import with_box_tokens
from checkpoint_converters.checkpoint import register_checkpoints
from checkpoint_converters.checkpoint.adapters import export_adapter
from checkpoint_converters.checkpoint.trained import TRAINED, export_trained
from checkpoint_converters.companions import companions_of
from checkpoint_converters.flamingo_trained import FLAMINGO_TRAINED, export_flamingo
from checkpoint_converters.model_file import open_model_file
from checkpoint_converters.plan import Wanted, as_dtype, part_jobs, total_bytes
from checkpoint_converters.progress import bytes_bar
from checkpoint_converters.specs import as_weights, family_of, specs_of
from checkpoint_converters.stream import Runner
from checkpoint_converters.targets import (
    CHECKPOINT,
    FILE_NAMES,
    Conversion,
    TargetPlan,
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
from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.interaction.post_block import BLOCK_ONLY
from mindspeed_mm.models.part import ALL_SLOTS, PartSpec
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.weights.blockwise import KINDS
from mindspeed_mm.weights.layouts import INTERACTION, OURS
from mindspeed_mm.weights.sources import PartSource, Source

logger = logging.getLogger(__name__)

PEFT = "peft"
"""Adapters alone, in the format of the peft library."""

OF_A_RUN = (PEFT, TRAINED, FLAMINGO_TRAINED)
"""Layouts of what a run has trained, beside those that hold whole parts."""

FILE_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")

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
    box_tokens: bool = False,
    quantize: str | None = None,
    double_quant: bool = False,
) -> list[Path]:
    """Convert the parts that a source holds, with config, tokenizer and image processor; returns the written files.

    Args:
        source: weights in any readable layout, {kind of part: path} where they lie apart, or a model.json whose
            ckpt_path entries name them; adapters that it loads are merged.
        target: folder to write; it must not exist or be empty. "projector" also takes the name of one file.
        to: layout to write, one of `targets()` or of OF_A_RUN; docs/weights.md says what each is.
        dtype: type to store (fp32, fp16, bf16 or torch's); None and "keep" keep each tensor's own.
        num_attention_heads: heads of a vision encoder whose source does not say (None: width / 64).
        parts: kinds to convert, None for all that source and target have; `shard_size`: largest shard in bytes.
        overwrite: replace an earlier conversion, when its successor is complete.
        allow_nonfinite: write weights with NaN or Inf, which are else refused.
        tokenizer, image_processor: folders whose files are taken instead of the source's.
        box_tokens: add Shikra's words of boxes and points to the vocabulary (box_tokens.py).
        quantize: "nf4", "fp4" or "int8", to "checkpoint" alone: the decoder's linears as a QLoRA run stores them;
            `double_quant`: their scales in 8 bits, too.

    Raises WeightError for a source that cannot be read or a target that cannot be written; the source is never changed.
    """
    if to in OF_A_RUN:
        given = {"num_attention_heads": num_attention_heads, "tokenizer": tokenizer, "image_processor": image_processor}
        given |= {"dtype": as_dtype(dtype), "overwrite": overwrite, "allow_nonfinite": allow_nonfinite}
        more = {"box_tokens": box_tokens, "quantize": quantize, "double_quant": double_quant, "parts": parts}
        return _of_a_run(source, target, to, given | more)
    _check_layout(to, shard_size)
    _check_quantize(to, quantize, double_quant=double_quant)
    target, opened = Path(target), open_parts(source, as_dtype(dtype))
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
        quantize=quantize,
        double_quant=double_quant,
    )
    runner = Runner(allow_nonfinite=allow_nonfinite)
    with with_box_tokens(conversion) if box_tokens else contextlib.nullcontext(conversion) as chosen:
        return _written(plan_target(chosen, to), target, to, shard_size, overwrite, runner)


def _check_layout(to: str, shard_size: int) -> None:
    """Raise WeightError for a layout that is not written, with the nearest one, and for shards of no size."""
    if to not in targets():
        known = (*targets(), *OF_A_RUN)
        close = difflib.get_close_matches(to, known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? Known are" if close else "expected"
        raise WeightError(f"cannot convert to {to!r}; {hint} {', '.join(known)}.")
    if shard_size <= 0:
        raise WeightError(f"found shard size {shard_size}; expected a positive number of bytes.")


def _check_quantize(to: str, kind: str | None, *, double_quant: bool) -> None:
    """Raise WeightError for weights in fewer bits that a layout has no place for."""
    if kind is None and double_quant:
        raise WeightError("found double_quant without quantize; expected both. Give quantize (--quantize), too.")
    if kind is not None and (to != CHECKPOINT or kind not in KINDS):
        raise WeightError(
            f"found quantize {kind!r} for layout {to}; expected one of {', '.join(KINDS)}, for layout {CHECKPOINT} "
            "alone: other layouts hold whole weights. Leave it out, or choose --to checkpoint."
        )


def _written(plan: TargetPlan, target: Path, to: str, shard_size: int, overwrite: bool, runner: Runner) -> list[Path]:
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


def _of_a_run(source: object, target: str | Path, to: str, options: dict[str, Any]) -> list[Path]:
    """Write what a run has trained. Raises WeightError for options that do not go with it."""
    given = {key: value for key, value in options.items() if value is not None and value is not False}
    allowed = ("parts",) if to == PEFT else ("dtype", "overwrite", "allow_nonfinite")
    idle = sorted(set(given) - set(allowed))
    decoder = "parts" in given
    if idle or not isinstance(source, str | Path) or (decoder and list(given["parts"]) != ["text_decoder"]):
        run = "a LoRA run" if to == PEFT else "a run"
        beside = "part text_decoder, for the decoder's own class in transformers" if to == PEFT else ", ".join(allowed)
        raise WeightError(
            f"{to}: found {', '.join(idle) or 'parts'}; expected the checkpoint of {run}, with no other option than "
            f"{beside}. Leave the rest out."
        )
    if to == PEFT:
        return export_adapter(source, target, decoder_only=decoder)
    if to == FLAMINGO_TRAINED:
        return export_flamingo(open_parts(source), Path(target), **given)
    return export_trained(source, target, **given)


def open_parts(source: str | Path | Source | Mapping[str, str | Path], dtype: torch.dtype | None = None) -> Source:
    """Open a source, or one that is put together of several. `dtype`: of tensors that a model.json's adapters change;
    None: as they are stored. Raises WeightError."""
    register_checkpoints()
    if isinstance(source, Source):
        return source
    if not isinstance(source, Mapping):
        return open_model_file(Path(source), dtype) if Path(source).suffix == ".json" else open_source(source)
    unknown = sorted(set(source) - set(ALL_SLOTS))
    if unknown or not source:
        raise WeightError(f"found sources for {unknown or 'nothing'}; expected some of {', '.join(ALL_SLOTS)}.")
    parts = {kind: open_source(path).part(kind) for kind, path in source.items()}
    return Source(next(iter(parts.values())).path, "parts", None, parts)


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
    spec = as_weights(source, spec or describe_part(source, num_attention_heads=num_attention_heads))
    jobs, _ = part_jobs(source, spec, Wanted("ours", dtype=as_dtype(dtype)))
    record, assumed = own_record(source, spec, stated_heads=num_attention_heads is not None)
    check_space(path.parent, total_bytes(jobs))
    with bytes_bar(path.name, total_bytes(jobs)) as advance, beside(path) as temporary:
        write_torch(temporary, jobs, Runner(), record=record, advance=advance)
    return Converted(source.part, path, sum(len(job.outputs) for job in jobs), total_bytes(jobs), assumed)


def _chosen(source: Source, to: str, parts: Sequence[str] | None) -> list[str]:
    """The kinds to convert. Raises WeightError for those that the source or the target lacks."""
    offered = slots_of(to)
    unknown = sorted(set(parts or ()) - set(offered))
    if unknown:
        raise WeightError(f"layout {to} has no {', '.join(unknown)}; expected {', '.join(offered)}.")
    if is_whole(to) and parts and set(parts) - {INTERACTION} != set(offered) - {INTERACTION}:
        raise WeightError(f"layout {to} holds a whole model; expected no choice of parts. Choose another layout.")
    optional = set() if to == BLOCK_ONLY.name else {INTERACTION} - set(source.parts)
    needed = parts or ([kind for kind in offered if kind not in optional] if to != OURS else source.parts)
    for kind in needed:
        source.part(kind)  # raises, with the reason that fits the layout
    return [kind for kind in ALL_SLOTS if kind in needed]


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
