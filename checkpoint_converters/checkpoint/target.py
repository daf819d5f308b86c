"""Training checkpoints as one more target of conversions; importing this module registers it.

Written is what `train --load`, `infer` and `mm.load` start from: SAVE/release with the weights alone (the format shows
no parallel layout), SAVE/tokenizer, and the tracker that says `release`.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint_converters.checkpoint.quantized import as_quantized, facts_of, stored_jobs
from checkpoint_converters.companions import PROCESSOR_FILES, SAVED_TOKENIZER, TOKENIZER_FILES
from checkpoint_converters.plan import Job
from checkpoint_converters.stream import Runner
from checkpoint_converters.targets import Conversion, TargetPlan, WeightFiles
from megatron.driver.checkpoint import integrity, storage
from megatron.driver.checkpoint.reading import FORMAT
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.part import ALL_SLOTS, SLOTS
from mindspeed_mm.models.spec import find_family
from mindspeed_mm.weights.files import read_json_object
from mindspeed_mm.weights.layouts import OUR_MODEL, TEXT

FOLDER_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
FOLDER_FORMAT |= {"common_backend": "torch", "common_backend_version": 1}
"""metadata.json of megatron.core's dist_checkpointing (its CheckpointingConfig)."""


def plan_checkpoint(conversion: Conversion) -> TargetPlan:
    """The plan of layout checkpoint. Raises WeightError unless the source holds a whole model."""
    jobs = [job for kind in ALL_SLOTS if kind in conversion.parts for job in conversion.jobs(OUR_MODEL, kind)]
    precision, facts = {}, {}
    if conversion.quantize is not None:
        precision, facts = facts_of(conversion.source, conversion.specs[TEXT], jobs)
        stored = as_quantized(conversion.specs[TEXT], conversion.quantize, double_quant=conversion.double_quant)
        conversion = replace(conversion, specs=conversion.specs | {TEXT: stored})
        jobs = stored_jobs(jobs, stored)

    def finish(folder: Path) -> None:
        release = folder / storage.RELEASE
        packed = io.BytesIO()
        torch.save({}, packed)
        (release / "common.pt").write_bytes(packed.getvalue())
        (release / "metadata.json").write_text(json.dumps(FOLDER_FORMAT), encoding="utf-8")
        (folder / SAVED_TOKENIZER).mkdir()
        conversion.companions.copy(folder / SAVED_TOKENIZER, TOKENIZER_FILES)
        run = _run(conversion) | {"files": storage.sizes(release)}
        run["layout"] |= precision
        run["extra"] |= facts
        (release / storage.RUN_FILE).write_text(json.dumps(run, indent=1), encoding="utf-8")
        integrity.write(release, {})
        storage.write_text(folder / storage.TRACKER, storage.RELEASE)

    return TargetPlan([WeightFiles(storage.RELEASE, "torch_dist", jobs, write=write_torch_dist)], finish)


def write_torch_dist(folder: Path, jobs: Sequence[Job], runner: Runner, *, advance: Callable[[int], None]) -> None:
    """Write jobs of one tensor each in the format torch_dist, one tensor at a time."""
    folder.mkdir()
    by_name = {job.outputs[0].name: job for job in jobs}
    shapes = {
        name: torch.empty(job.outputs[0].shape, dtype=job.outputs[0].dtype, device="meta")
        for name, job in by_name.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
            dcp.save(
                shapes,
                storage_writer=dcp.FileSystemWriter(folder, thread_count=1, sync_files=False),
                planner=_MakeWhenWritten(by_name, runner, advance),
                no_dist=True,
            )
    except CheckpointException as failure:
        raise _cause(failure) from failure


def _cause(failure: CheckpointException) -> BaseException:
    """What went wrong in the one process that writes. A full disk hides behind an error of torch's zip writer."""
    first = error = failure.failures[0][0]
    while error is not None and not isinstance(error, OSError | WeightError):
        error = error.__cause__ or error.__context__
    return error or first


class _MakeWhenWritten(dcp.DefaultSavePlanner):
    """Gives torch's writer each tensor when its turn comes."""

    def __init__(self, jobs: dict[str, Job], runner: Runner, advance: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False)
        self._jobs, self._runner, self._advance = jobs, runner, advance

    def resolve_data(self, write_item: Any) -> torch.Tensor:
        """See torch.distributed.checkpoint.SavePlanner."""
        job = self._jobs[write_item.index.fqn]
        (tensor,) = self._runner.make(job)
        self._advance(tensor.nbytes)
        return tensor.contiguous()


def _run(conversion: Conversion) -> dict[str, Any]:
    """run.json of a checkpoint that no run wrote: weights, and what belongs to them."""
    specs = {kind: spec.model_dump(mode="json") for kind, spec in conversion.specs.items()}
    encoder = {kind: specs[kind] for kind in SLOTS[1:]}
    model = {"model_id": conversion.family, "text_decoder": specs["text_decoder"], "image_encoder": encoder}
    model |= {kind: specs[kind] for kind in ALL_SLOTS[len(SLOTS) :] if kind in specs}
    sizes = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    return {
        "format": FORMAT,
        "iteration": 0,
        "consumed_samples": 0,
        "skipped_iterations": 0,
        "scheduler": {},
        "rng": False,
        "layout": dict.fromkeys(sizes, 1) | {"bf16": False, "fp16": False},
        "optimizer": None,
        "frozen": None,
        "extra": {"model": model, "data": _data(conversion)},
    }


def _data(conversion: Conversion) -> dict[str, Any]:
    """What a run says of its data: image processor, padding and template."""
    source = conversion.source
    config = source.config or {}
    if source.layout == "checkpoint":
        return {key: value for key, value in config.get("data", {}).items() if key != "tokenizer"}
    family = find_family(conversion.family)
    found = conversion.companions.find(PROCESSOR_FILES[0])
    processor = read_json_object(found) if found else family.default_image_processor(conversion.model)
    processor = processor and family.gather(processor, conversion.companions.folders)
    pad = family.pads(config if source.family else {})
    return {"image_processor": processor, "pad": pad}
