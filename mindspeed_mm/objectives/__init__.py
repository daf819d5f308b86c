"""What a run minimises: one objective = one file, found by its name. It knows batches and a model, no families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mindspeed_mm.data.sample import Batch
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.media import Features
from mindspeed_mm.registry import find

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]]
"""The model's output -> (summed loss, number of what it is divided by, {log key: (sum, number)})."""


class Objective(ABC):
    """Subclasses stand in files of this folder, with an instance as OBJECTIVE."""

    name: str
    """As --objective says it."""

    loss_name = "lm loss"
    """What the log calls the loss."""

    metrics: tuple[str, ...] = ()
    """Further log keys that its loss functions report, besides "lm loss"."""

    preferences = False
    """Whether it trains on pairs of a chosen and a rejected answer, instead of conversations."""

    auxiliary = False
    """Whether a conversation of data.json's auxiliary_parameters goes beside each pair."""

    reference = False
    """Whether batches bring the log-probabilities of a reference model along (Batch.reference)."""

    def configured(self, options: Mapping[str, Any]) -> Objective:
        """The objective with options of data.json or of flags, by their keys. Raises ConfigError for unknown ones."""
        if options:
            raise ConfigError(
                f"the objective {self.name} has no options, found {', '.join(options)}: remove them, or choose "
                "--objective dpo"
            )
        return self

    def check(self, spec: Any) -> None:
        """Raises ConfigError where a ModelSpec cannot be trained with it."""
        return None

    @abstractmethod
    def forward(
        self, batch: Batch, model: torch.nn.Module, features: Features | None = None
    ) -> tuple[torch.Tensor, LossFunction]:
        """One micro-batch through this pipeline stage.

        Args:
            batch: in host memory; ids and labels stay there, so that nothing waits for the device.
            model: VLM, possibly wrapped.
            features: of the batch's images, where they stand in for the vision encoder.

        Returns:
            The model's output, and what turns the last stage's output into losses. The driver divides the sum once, by
            the number of the whole global batch, so that nothing depends on micro-batches and ranks.
        """

    def forward_step(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        """The next micro-batch through the model (megatron.core's forward_step_func)."""
        batch = next(data_iterator)
        return self.forward(batch, model, batch.encoded)


def find_objective(name: str) -> Objective:
    """The objective of a name. Raises ConfigError for an unknown one, with the nearest."""
    return find("mindspeed_mm.objectives", name, "OBJECTIVE", what="objective")


def chosen_objective(
    written: str | Mapping[str, Any] | None, name: str | None, options: Mapping[str, Any]
) -> Objective:
    """The objective of a name and options, or of data.json's "objective" (`written`), whose options count where it
    names the same one. Raises ConfigError for what is no objective."""
    file = {"name": written} if isinstance(written, str) else dict(written or {})
    given = file.pop("name", None)
    if given is not None and not isinstance(given, str):
        raise ConfigError(f'objective.name of the data config is {given!r}; expected a name, such as "dpo"')
    if file and given is None:
        raise ConfigError('the data config has an "objective" without a name: add one, such as "name": "dpo"')
    chosen = name or given or "sft"
    return find_objective(chosen).configured({**(file if chosen == given else {}), **options})
