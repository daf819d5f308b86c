"""The reference model of preference training, without a second model.

The reference is the policy as it was before the first step. Adapters that began at zero are switched off for its pass.
Of whatever else is trained the first values are kept, and take the place of the trained ones for the length of the
pass; everything frozen is shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron.driver.collectives import gather
from megatron.driver.initialize import is_rank_0
from megatron.driver.loop import forward_backward
from megatron.driver.state import TrainState
from mindspeed_mm.data.reference_store import ReferenceStore
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.errors import ConfigError, TrainingError
from mindspeed_mm.models.adapters.lora import LoraPair, adapters_off
from mindspeed_mm.models.build import build_vlm
from mindspeed_mm.trainer.inputs import RunInputs
from mindspeed_mm.trainer.model_fingerprint import model_fingerprint

logger = logging.getLogger(__name__)

ADAPTERS_OFF, FIRST_VALUES = "adapters switched off", "first values"

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""How far a log-probability of the untrained policy may be from the reference's, as a share of it (of 1 at least)."""


class ReferenceModel:
    """Gives batches the log-probabilities of the reference (`prepare`, a hook of the driver)."""

    def __init__(self, inputs: RunInputs) -> None:
        self._inputs = inputs
        self.kind: str | None = None
        """Known once training has begun; a checkpoint says it."""
        self._first: list[dict[str, torch.Tensor]] = []
        """Of each chunk, first values of trained parameters by name."""
        self._begun = False
        self.folder: Path | None = None
        """Where log-probabilities are kept from one epoch or run to the next; None: nowhere."""
        self._store: ReferenceStore | None = None

    def resume_from(self, kind: str | None) -> None:
        """Take over what a checkpoint says of its run's reference."""
        self.kind = kind

    def prepare(self, state: TrainState, batches: list[Batch]) -> list[Batch]:
        """Micro-batches with `reference` on the last pipeline stage and, on the first one, the features of a vision
        encoder that is not trained: both passes share them. Collective.

        Before the first step it also makes sure that the policy still is the reference.

        Raises:
            TrainingError: it is not.
            ConfigError: a resumed run's reference cannot be had again.
        """
        first, self._begun = not self._begun, True
        if first:
            self._begin(state)
        if self._are_known(batches):
            reference = self._stored(batches)
        else:
            batches = self._encoded(state, batches)
            with self._in_place(state):
                reference = self._log_probs(state, batches)
            self._keep(batches, reference)
        if first and state.iteration == 0:
            self._check(state, batches, reference)
        if not reference:
            return batches
        return [dataclasses.replace(batch, reference=found) for batch, found in zip(batches, reference, strict=True)]

    def _are_known(self, batches: list[Batch]) -> bool:
        """Whether the store has every pair, on all ranks that would share the pass. Collective where there is one."""
        if self._store is None:
            return False
        known = all(
            batch.pair_keys is not None and all(key in self._store for key in batch.pair_keys) for batch in batches
        )
        anywhere = torch.tensor(float(not known), device=self._inputs.platform.device())
        torch.distributed.all_reduce(anywhere, group=parallel_state.get_model_parallel_group())
        torch.distributed.all_reduce(anywhere, group=parallel_state.get_context_parallel_group())
        return not anywhere.item()

    def _stored(self, batches: list[Batch]) -> list[torch.Tensor]:
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return []
        device = self._inputs.platform.device()
        return [self._store.values(batch.pair_keys).to(device) for batch in batches]

    def _keep(self, batches: list[Batch], reference: list[torch.Tensor]) -> None:
        """Know what was computed; one of the ranks that hold it writes. Earlier stages know that it is there."""
        if self._store is None:
            return
        last = bool(reference)
        writes = last and not (
            parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank()
        )
        for number, batch in enumerate(batches):
            if batch.pair_keys is not None:
                values = reference[number].cpu() if last else torch.full((len(batch.pair_keys), 2), torch.nan)
                self._store.add(batch.pair_keys, values, write=writes)

    def _open_store(self, state: TrainState) -> None:
        """Find the folder of this reference. Collective."""
        assert self.folder is not None
        inputs = self._inputs
        with self._in_place(state):
            name = model_fingerprint(
                inputs.spec,
                state.modules,
                inputs.runtime.params_dtype,
                inputs.platform.device(),
                adapters=self.kind != ADAPTERS_OFF,
            )
        self._store = ReferenceStore(self.folder, name)
        if is_rank_0():
            logger.info("log-probabilities of the reference: %d pairs are in %s", len(self._store), self._store.folder)

    def on_disk(self) -> dict[str, Any]:
        """Where the log-probabilities are, how many pairs have one by now, whichever rank wrote it, and how many more
        that is than at the start. Read anew: each rank knows its own share. Collective.

        Raises TrainingError where some could not be written.
        """
        assert self._store is not None
        if unwritten := sum(gather(self._store.unwritten)):
            raise TrainingError(
                f"--pref-cache {self.folder}: {unwritten} pairs could not be written; expected a folder with room. "
                "Free some space, or name another folder; what was written is not computed again"
            )
        now = ReferenceStore(self._store.folder.parent, self._store.folder.name)
        return {"folder": str(now.folder), "pairs": len(now), "computed": len(now) - self._store.found}

    def _encoded(self, state: TrainState, batches: list[Batch]) -> list[Batch]:
        encoder = state.modules[0].image_encoder
        # Context-parallel ranks each encode a share of the images in the pass itself.
        if encoder is None or not encoder.encoder_frozen or encoder.context_group is not None:
            return batches
        device = self._inputs.platform.device()
        with torch.no_grad():
            return [
                batch
                if batch.media is None
                else dataclasses.replace(batch, encoded=encoder.features(batch.media.to(device)))
                for batch in batches
            ]

    def _log_probs(self, state: TrainState, batches: list[Batch]) -> list[torch.Tensor]:
        """[N, 2] of each micro-batch on the last pipeline stage, nothing on others."""
        objective: Any = self._inputs.objective

        def forward_step(data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple:
            batch = next(data_iterator)
            return objective.reference_forward(batch, model, batch.encoded)

        with torch.no_grad():
            reported = forward_backward(state, self._inputs.args, forward_step, batches, forward_only=True)
        return [found["log_probs"] for found in reported]

    def _begin(self, state: TrainState) -> None:
        """Find out what makes the reference, and keep it."""
        self.kind = next((kind for kind in gather(self.kind) if kind is not None), None)  # one rank reads checkpoints
        if state.iteration == 0:
            self.kind = ADAPTERS_OFF if _only_fresh_adapters(state) else FIRST_VALUES
        if self.kind is None:
            raise ConfigError(
                "the checkpoint does not say what the reference of its run is: it was written under another objective. "
                "Start a new run from it with --pretrained-checkpoint"
            )
        if self.kind == FIRST_VALUES:
            self._first = [_trained(module) for module in state.modules] if state.iteration == 0 else self._again(state)
        if is_rank_0():
            kept = sum(tensor.nbytes for chunk in self._first for tensor in chunk.values())
            logger.info("reference model: %s%s", self.kind, f", {kept / 1e9:.2f} GB on rank 0" if kept else "")
        if self.folder is not None:
            self._open_store(state)

    def _again(self, state: TrainState) -> list[dict[str, torch.Tensor]]:
        """The first values of a run that goes on, from where it took them."""
        args = self._inputs.args
        if args.pretrained_checkpoint:
            raise ConfigError(
                "a run that goes on cannot read its reference again, since it began from --pretrained-checkpoint "
                f"{args.pretrained_checkpoint}: convert that checkpoint, give the result as ckpt_path in the model "
                "config, and leave --pretrained-checkpoint out"
            )
        first = []
        for module in state.modules:
            stage = {name: getattr(module, name) for name in ("pre_process", "post_process", "vp_stage")}
            built, _ = build_vlm(self._inputs.spec, self._inputs.runtime, self._inputs.platform.device(), **stage)
            first.append(_trained(built))
        return first

    @contextlib.contextmanager
    def _in_place(self, state: TrainState) -> Iterator[None]:
        """Inside, the model is the reference."""
        with contextlib.ExitStack() as stack:
            if self.kind == ADAPTERS_OFF:
                for module in state.modules:
                    stack.enter_context(adapters_off(module))
            for module, first in zip(state.modules, self._first, strict=True) if self._first else ():
                stack.enter_context(_exchanged(module, first))
            yield

    def _check(self, state: TrainState, batches: list[Batch], reference: list[torch.Tensor]) -> None:
        """Before anything is trained, policy and reference must agree on the first global batch."""
        policy = self._log_probs(state, batches)
        shares = [(own - ref).abs() / ref.abs().clamp(min=1) for own, ref in zip(policy, reference, strict=True)]
        worst = torch.zeros((), device=self._inputs.platform.device())
        for share in shares:
            worst = torch.maximum(worst, share.max() if share.numel() else worst)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        allowed = TOLERANCES[self._inputs.runtime.params_dtype]
        if not worst.item() <= allowed:
            raise TrainingError(
                f"before the first step log-probabilities of policy and reference differ by {worst.item():.2g} of "
                f"their size, where at most {allowed:g} is rounding: the reference is not the model that training "
                "starts from"
            )
        if is_rank_0():
            objective: Any = self._inputs.objective
            logger.info(
                "step 0: the policy is the reference (largest difference %.2g): loss %.4f, margins 0",
                *(worst.item(), objective.start_loss),
            )


def _only_fresh_adapters(state: TrainState) -> bool:
    """Whether all that is trained are adapters whose B is still zero. Collective."""
    other = torch.zeros((), device=state.platform.device())
    for module in state.modules:
        pairs = [pair for pair in module.modules() if isinstance(pair, LoraPair)]
        adapters = {id(tensor) for pair in pairs for tensor in (pair.a, pair.b)}
        trained = [tensor for tensor in module.parameters() if tensor.requires_grad]
        if any(id(tensor) not in adapters for tensor in trained) or any(pair.b.any() for pair in pairs):
            other += 1
    torch.distributed.all_reduce(other, group=parallel_state.get_model_parallel_group())
    return not other.item()


def _trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a module's trained parameters by name."""
    named = module.named_parameters()
    return {name: tensor.detach().clone() for name, tensor in named if tensor.requires_grad}


@contextlib.contextmanager
def _exchanged(module: torch.nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, parameters of the module have other values. They are exchanged, not copied: the optimizer's views of the
    trained ones stay as they are."""
    parameters = dict(module.named_parameters())
    trained = {name: parameters[name].data for name in values}
    for name, value in values.items():
        parameters[name].data = value
    try:
        yield
    finally:
        for name, value in trained.items():
            parameters[name].data = value
