"""Direct preference optimisation and its relatives: the chosen answer is to gain on the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from megatron.core import parallel_state
from pydantic import Field, model_validator

from mindspeed_mm.config.load import StrictModel, load_config
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.models.loss import token_log_probs
from mindspeed_mm.models.media import Features
from mindspeed_mm.objectives import LossFunction, Objective
from mindspeed_mm.objectives._pairs import PairRow, PairSums, pair_row, pair_sums
from mindspeed_mm.objectives._preference_losses import LOSSES, LossSettings, PairScores
from mindspeed_mm.platform import current_platform
from mindspeed_mm.platform.segments import BranchedSegments

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


HADPO_KEYS = {"logps": "policy_logps", "reference_logps": "referece_logps"}
"""What HA-DPO's log calls ours; readers of its logs look for the second one as it is spelt there."""

AUXILIARY = "auxiliary loss"
"""Log key of the conversations beside the pairs."""


class DpoOptions(StrictModel):
    """Options of the objective, as data.json's block "objective" and the flags --pref-* give them."""

    loss: Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"] = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the preferences that are taken to be turned round."""
    gamma: NotNegative = 0.5
    """Margin of SimPO."""
    length_average: bool = False
    """Log-probabilities of a token on average instead of the answer's sum."""
    reference_free: bool = False
    """Compare with a reference that finds both answers equally likely."""
    ftx: NotNegative = 0.0
    """Weight of the chosen answer's own loss, the mean over its tokens."""
    auxiliary_weight: NotNegative = 0.0
    """Weight of the loss of the conversation that goes beside each pair (auxiliary_parameters of data.json), the mean
    over its tokens: HA-DPO's gamma."""
    hadpo_keys: bool = False
    """Log log-probabilities under HA-DPO's names as well, the misspelt one as it is (HADPO_KEYS)."""

    @model_validator(mode="after")
    def _used(self) -> DpoOptions:
        """An option that the loss does not read would be dropped silently."""
        loss = LOSSES[self.loss]
        for name in ("label_smoothing", "length_average", "gamma"):
            if name in self.model_fields_set and getattr(self, name) and name not in loss.uses:
                hint = " (HA-DPO's gamma is auxiliary_weight here)" if name == "gamma" else ""
                raise ValueError(f'{name} is given, but the loss "{self.loss}" does not use it; leave it out{hint}')
        if self.reference_free and not loss.reference:
            raise ValueError(f'the loss "{self.loss}" has no reference anyway; leave reference_free out')
        return self


class Dpo(Objective):
    """The mean of a loss over the preference pairs of the global batch."""

    name = "dpo"
    loss_name = "dpo loss"
    preferences = True

    def __init__(self, options: DpoOptions | None = None) -> None:
        self.options = options or DpoOptions()
        self._loss = LOSSES[self.options.loss]
        self.reference = self._loss.reference and not self.options.reference_free
        self.auxiliary = self.options.auxiliary_weight > 0
        names = _metric_names(self.reference, self.options.ftx > 0, self.auxiliary)
        self.metrics = (*names, *(_hadpo_keys(names) if self.options.hadpo_keys else ()))

    def configured(self, options: Mapping[str, Any]) -> Dpo:
        """With these options; see DpoOptions. Raises ConfigError."""
        return Dpo(load_config(DpoOptions, dict(options), what="options of the objective dpo"))

    def check(self, spec: Any) -> None:
        """Policy and reference must be one computation, so that nothing may be dropped at random."""
        for kind, part in spec.part_specs().items():
            if part.lora is not None and part.lora.dropout:
                raise ConfigError(
                    f"{kind}.lora.dropout is {part.lora.dropout}, but the objective dpo compares log-probabilities of "
                    "policy and reference, which dropout would make random: set it to 0 in the model config"
                    + (", or leave --lora-dropout out" if kind == "text_decoder" else "")
                )
        if spec.text_decoder.neftune_noise_alpha:
            raise ConfigError(
                f"text_decoder.neftune_noise_alpha is {spec.text_decoder.neftune_noise_alpha:g}, but the objective dpo "
                "compares log-probabilities of policy and reference, which noise would make random: set it to 0 in the "
                "model config, or leave --neftune-noise-alpha out"
            )
        if all(part.freeze for part in spec.part_specs().values()):
            raise ConfigError(
                "the objective dpo has nothing to train: freeze is true for every part. Give --lora-r for adapters on "
                "the text decoder, or set freeze to false for a part"
            )

    @property
    def start_loss(self) -> float:
        """The loss of a policy that is its reference."""
        same = torch.zeros(1, 2)
        return self._loss.formula(PairScores(same, same, torch.ones(1, 2)), self._settings).item()

    @property
    def _settings(self) -> LossSettings:
        options = self.options
        return LossSettings(options.beta, options.label_smoothing, options.gamma, options.length_average)

    def forward(
        self, batch: Batch, model: torch.nn.Module, features: Features | None = None
    ) -> tuple[torch.Tensor, LossFunction]:
        row, output = self._through(batch, model, features)
        return output, partial(self._measure, row)

    def reference_forward(
        self, batch: Batch, model: torch.nn.Module, features: Features | None = None
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]:
        """As `forward`, with a function that reports {"log_probs": [N, 2]} of the N pairs and no loss."""
        row, output = self._through(batch, model, features)

        def report(values: torch.Tensor) -> tuple:
            nothing = torch.zeros((), device=values.device)
            return nothing, nothing.int(), {"log_probs": pair_sums(values, row).log_probs.detach()}

        return output, report

    def _through(self, batch: Batch, model: torch.nn.Module, features: Features | None) -> tuple[PairRow, torch.Tensor]:
        device = current_platform().device()
        row = pair_row(batch, model.config)
        packed = row.batch
        output = model(
            packed.input_ids,
            packed.position_ids.to(device, non_blocking=True),
            labels=packed.labels,
            media=None if packed.media is None else packed.media.to(device),
            segments=BranchedSegments.of_branches(row.branches, device),
            image_features=features,
            head=token_log_probs,
        )
        return row, output

    def _measure(self, row: PairRow, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Loss sum with graph, number of pairs, and what is logged; see LossFunction.

        Context-parallel ranks hold the same sums: each derives its own part of the gradient from them, and the first
        one reports.
        """
        sums = pair_sums(values, row)
        reference = self._reference_of(row, sums)
        scores = PairScores(sums.log_probs, reference, sums.lengths)
        losses = self._loss.formula(scores, self._settings)
        own = -scores.policy_means[:, 0]
        if self.options.ftx:
            losses = losses + self.options.ftx * own
        beside = -sums.beside
        total = losses.sum() + self.options.auxiliary_weight * beside.sum()
        reports = parallel_state.get_context_parallel_rank() == 0
        count = torch.full((), len(losses) if reports else 0, dtype=torch.int, device=values.device)
        logged = self._logged(sums, scores, own)
        found = {name: (figures.sum() * reports, count) for name, figures in logged.items()}
        found["lm loss"] = (total.detach() * reports, count)
        if self.auxiliary:
            found[AUXILIARY] = (beside.detach().sum() * reports, len(beside) * reports)
        for number, side in enumerate(("chosen", "rejected")):
            found[f"logits/{side}"] = (sums.logits[:, number].sum() * reports, sums.lengths[:, number].sum() * reports)
        return total, count, found

    def _reference_of(self, row: PairRow, sums: PairSums) -> torch.Tensor:
        if not self.reference:
            return torch.zeros_like(sums.log_probs)
        if row.batch.reference is None:
            raise DataError(
                "the batch has no log-probabilities of the reference model: run the objective through "
                "trainer/reference.py, or set reference_free"
            )
        return row.batch.reference.to(sums.log_probs.device, non_blocking=True)

    def _logged(self, sums: PairSums, scores: PairScores, own: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N] of each log key. Without a reference the reward is what the loss compares."""
        policy = scores.policy.detach()
        rewards = self.options.beta * (scores.ratios(mean=False) if self._loss.reference else scores.policy_means)
        chosen, rejected = rewards.detach().unbind(1)
        found = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": policy[:, 0],
            "logps/rejected": policy[:, 1],
        }
        if self.reference:
            names = ("reference_logps/chosen", "reference_logps/rejected")
            found |= dict(zip(names, scores.reference.unbind(1), strict=True))
        if self.options.hadpo_keys:
            found |= {theirs: found[ours] for theirs, ours in _hadpo_keys(found).items()}
        return found | ({"sft loss": own.detach()} if self.options.ftx else {})


def _metric_names(reference: bool, own_loss: bool, auxiliary: bool) -> list[str]:
    names = [f"rewards/{what}" for what in ("chosen", "rejected", "accuracies", "margins")]
    names += [f"{what}/{side}" for what in ("logps", "logits") for side in ("chosen", "rejected")]
    names += ["reference_logps/chosen", "reference_logps/rejected"] if reference else []
    return [*names, *(["sft loss"] if own_loss else []), *([AUXILIARY] if auxiliary else [])]


def _hadpo_keys(names: Iterable[str]) -> dict[str, str]:
    """HA-DPO's name of each of ours that has one there -> ours."""
    split = [(*name.partition("/"), name) for name in names]
    return {f"{HADPO_KEYS[what]}/{side}": name for what, _, side, name in split if what in HADPO_KEYS}


OBJECTIVE = Dpo()
