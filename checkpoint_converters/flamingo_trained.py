"""What a Flamingo holds beside its decoder and CLIP, as one file in the form of OpenFlamingo's checkpoint.pt.

OpenFlamingo's releases are flat state dicts of the perceiver, the gated cross-attention and the words: what was
trained, and what the decoder's own weights lack.
"""

from pathlib import Path
from typing import Any

import torch

from checkpoint_converters.plan import Job, Wanted, part_jobs, total_bytes
from checkpoint_converters.progress import bytes_bar
from checkpoint_converters.specs import family_of, specs_of
from checkpoint_converters.stream import Runner
from checkpoint_converters.write import beside, check_space, check_target, write_torch
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.targets import WEIGHT, sites
from mindspeed_mm.models.families.flamingo import FLAMINGO_LAYOUT, NAME
from mindspeed_mm.models.kit.cross_spec import CROSS
from mindspeed_mm.models.part import part_of, written_prefix
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.models.trainable import names_of, setting
from mindspeed_mm.weights.layouts import PROJECTOR, TEXT, VISION
from mindspeed_mm.weights.overlay import trained_names
from mindspeed_mm.weights.sources import PartSource, Source

FLAMINGO_TRAINED = f"{NAME}-trained"
"""Name of the layout."""

WORDS, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def export_flamingo(
    opened: Source,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> list[Path]:
    """Write the perceiver, and of the decoder the cross-attention, the words and what else was trained; returns the
    file. A head of its own is written unless a checkpoint.pt without one says that nobody trained it.

    Args:
        opened: a Flamingo in any layout, or a run's checkpoint; adapters of a run are merged.
        target: the file, such as checkpoint.pt.
        dtype: type to store; None keeps each tensor's own.
        overwrite: replace an earlier file.
        allow_nonfinite: write NaN or Inf, which are else refused.

    Raises WeightError for weights of another family, or a run that trained the vision encoder, which has no place.
    """
    if family_of(opened) != NAME:
        raise WeightError(
            f"{opened.path}: found weights of model_id {family_of(opened)}; expected a {NAME}, for layout "
            f"{FLAMINGO_TRAINED}. Choose another layout"
        )
    check_target(target, overwrite=overwrite)
    run = _run_specs(opened)
    if VISION in run and _trained(run[VISION], VISION):
        raise WeightError(
            f"{opened.path}: the run trained the vision_encoder, for which OpenFlamingo's checkpoint.pt has no place; "
            f"expected a frozen one. Give --to {NAME} or otter"
        )
    specs = specs_of(opened, (TEXT, VISION, PROJECTOR))
    jobs = []
    for slot in (TEXT, PROJECTOR):
        source, spec = opened.part(slot), specs[slot]
        kept = _kept(source, spec) | _trained(run.get(slot), slot) if slot == TEXT else None
        jobs += _jobs(source, spec, kept, dtype)
    check_space(target.absolute().parent, total_bytes(jobs))
    with bytes_bar(target.name, total_bytes(jobs)) as advance, beside(target) as temporary:
        write_torch(temporary, jobs, Runner(allow_nonfinite=allow_nonfinite), advance=advance)
    return [target]


def _run_specs(opened: Source) -> dict[str, Any]:
    """The specs of a training checkpoint with what the run had set; none of other weights."""
    model = (opened.config or {}).get("model") if opened.layout == "checkpoint" else None
    return {} if model is None else load_model_spec(model, context=f"{opened.path}: its model").part_specs()


def _trained(spec: Any, slot: str) -> set[str]:
    """Our names of a part's weights that its run has changed."""
    if spec is None:
        return set()
    part = part_of(slot, spec)
    adapted = [] if spec.lora is None else sites(part, spec)
    return {name for name in names_of(part, spec) if setting(spec, name).trained} | {
        site.owner + WEIGHT for site in adapted
    }


def _kept(source: PartSource, spec: Any) -> set[str]:
    """Our names of a decoder's weights that its own folder lacks."""
    part = part_of(TEXT, spec)
    known = trained_names(source)
    if known is not None:
        steps = part.rules[source.dialect].steps(spec.geometry)
        return {step.target for step in steps if known.intersection(step.sources)}
    steps = part.rules["ours"].steps(spec.geometry)
    cross = {step.target for step in steps if step.rule.target.startswith(CROSS)}
    return cross | {WORDS} | (set() if spec.share_embeddings_and_output_weights else {HEAD})


def _jobs(source: PartSource, spec: Any, kept: set[str] | None, dtype: torch.dtype | None) -> list[Job]:
    """The jobs of some weights of a part (None: all) under OpenFlamingo's names."""
    part, dialect = part_of(source.part, spec), FLAMINGO_LAYOUT.dialects[source.part]
    prefix = written_prefix(FLAMINGO_LAYOUT, part)
    jobs, _ = part_jobs(source, spec, Wanted(dialect, prefix, dtype))
    if kept is None:
        return jobs
    steps = part.rules[dialect].steps(spec.geometry)
    names = {prefix + name for step in steps if step.target in kept for name in step.sources}
    return [job for job in jobs if names.issuperset(output.name for output in job.outputs)]
