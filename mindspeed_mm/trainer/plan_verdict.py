"""What plan says of a run that is about to start: the memory that it needs, and whether the device has it."""

from __future__ import annotations

import logging
import os

from megatron.driver.initialize import is_rank_0
from mindspeed_mm.models.adapters.targets import ADAPTER, sites
from mindspeed_mm.models.part import Part, PartSpec
from mindspeed_mm.models.trainable import names_of, setting
from mindspeed_mm.planning.memory import host_memory, on_one_rank, peak_memory, state_bytes
from mindspeed_mm.planning.parameters import part_parameters
from mindspeed_mm.planning.planner import job_of
from mindspeed_mm.trainer.inputs import RunInputs
from mindspeed_mm.trainer.out_of_memory import described, longest_row, remedies

logger = logging.getLogger(__name__)

USABLE = 0.9
"""Share of a device that a run may plan with: the default --reserve of `mindspeed-mm plan`."""
GB = 1e9


def tell_verdict(inputs: RunInputs) -> None:
    """Log on rank 0 the predicted memory of a rank beside what its device has. A warning where it will not fit."""
    if is_rank_0():
        logger.info("%s", trained_table(inputs))
        fits, text = verdict(inputs)
        logger.log(logging.INFO if fits else logging.WARNING, "%s", text)


def trained_table(inputs: RunInputs) -> str:
    """What is trained: parameters of each part, their highest learning rates, bytes of optimizer state of all ranks."""
    job = on_one_rank(job_of(inputs.args, inputs.spec, longest_row(inputs), inputs.platform.name))
    lines = [f"{'part':18}{'parameters':>16}{'trained':>16}{'optimizer':>14}  learning rate"]
    for slot, part in inputs.spec.part_specs().items():
        count = part_parameters(job, slot, 0)
        rates = learning_rates(inputs.spec.parts()[slot], part, inputs.args.lr)
        state = f"{state_bytes(job, count) / 1e9:.3f} GB"
        lines.append(f"{slot:18}{count.total:>16,}{count.trained:>16,}{state:>14}  {rates if count.trained else '-'}")
    return "\n  ".join(lines)


def learning_rates(part: Part, spec: PartSpec, run: float) -> str:
    """The highest learning rates of a part's parameters; `run` is the run's. Several are shown by their ends."""
    found = {}
    names = list(names_of(part, spec))
    if spec.lora is not None:
        names += [f"{site.owner}{ADAPTER}{site.short}.{which}" for site in sites(part, spec) for which in "ab"]
    for name in names:
        own = setting(spec, name)
        if own.trained:
            found[run * own.lr_factor if own.lr is None else own.lr] = None
    ordered = [f"{rate:g}" for rate in sorted(found)]
    return ", ".join(ordered) if len(ordered) <= 4 else f"{ordered[0]} to {ordered[-1]} ({len(ordered)} of them)"


def verdict(inputs: RunInputs) -> tuple[bool, str]:
    """(whether the longest rows fit, what is said of it). The ranks of a host share its memory where that is used."""
    row = longest_row(inputs)
    job = job_of(inputs.args, inputs.spec, row, inputs.platform.name)
    peak = peak_memory(job)
    usable = USABLE * inputs.platform.memory().total * 2**20
    if inputs.platform.name == "cpu":
        usable /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    need = (
        f"{peak.peak / GB:.2f} GB on a rank with rows of {row.positions} tokens (parameters "
        f"{peak.parameters / GB:.2f}, gradients {peak.gradients / GB:.2f}, optimizer "
        f"{peak.optimizer / GB:.2f}, activations {peak.activations / GB:.2f}); {usable / GB:.2f} GB can be used"
    )
    if peak.peak <= usable:
        return True, f"plan: the run fits, {need}; host memory {host_memory(job).total / GB:.2f} GB a rank"
    lines = [f"plan: the run WILL NOT FIT, it needs {need}. What helps most cheaply:"]
    found = remedies(job)
    lines += [f"{number}. {described(remedy, job)}" for number, remedy in enumerate(found, 1)]
    if not found:
        lines.append("no single change of the layout on these devices: take more devices, or a shorter --seq-length")
    return False, "\n  ".join(lines)
