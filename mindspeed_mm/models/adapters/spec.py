"""The `lora` block of a part in a model.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, NamedTuple

import pydantic

from mindspeed_mm.config.load import StrictModel

if TYPE_CHECKING:
    from torch import Tensor

ALL_LINEAR = "all-linear"
"""target_modules that names every linear of the part's layers."""


class WholePair(NamedTuple):
    """A [r, in] and B [out, r] of one linear as PEFT has them, and DoRA's lengths of rows m [out]."""

    a: Tensor
    b: Tensor
    m: Tensor | None = None


class LoraSpec(StrictModel):
    """LoRA (Hu et al. 2021): W x + scale B A x, where W stays as it is and A [r, in] and B [out, r] are trained.

    target_modules: "all-linear", a list of names (Hugging Face's, such as q_proj, or ours, such as linear_qkv), or a
        regular expression that fits the whole Hugging Face name of a module.
    rank_pattern, alpha_pattern: r and alpha of single linears, by name or by a regular expression that fits the end of
        the Hugging Face name of a module, from a dot on (PEFT's rule); the first one that fits decides.
    use_rslora: the scale is alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r.
    use_dora: the rows of W + scale B A get trained lengths m [out] (DoRA, Liu et al. 2024), which start as those of W.
    modules_to_save: modules that are trained as a whole beside the adapters and saved with them, by the ends of their
        Hugging Face names (lm_head, embed_tokens).
    loraplus_lr_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024).
    load: folder in PEFT's format whose A and B are where training starts; None: A random, B zero.
    init_seed: of the random A. The same at every parallel layout.
    """

    r: Annotated[int, pydantic.Field(gt=0)] = 16
    alpha: Annotated[float, pydantic.Field(gt=0)] = 32.0
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    rank_pattern: dict[str, Annotated[int, pydantic.Field(gt=0)]] = pydantic.Field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, pydantic.Field(gt=0)]] = pydantic.Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] = pydantic.Field(default_factory=list)
    loraplus_lr_ratio: Annotated[float, pydantic.Field(gt=0)] = 1.0
    load: str | None = None
    init_seed: int = 0

    @pydantic.model_validator(mode="after")
    def _dora_drops_nothing(self) -> LoraSpec:
        if self.use_dora and self.dropout:
            raise ValueError(
                f"found dropout {self.dropout:g} with use_dora; expected 0, since DoRA's dropout would need a second "
                "product with the frozen weight. Remove dropout"
            )
        return self

    @pydantic.field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _keys_are_patterns(cls, pattern: dict[str, float]) -> dict[str, float]:
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(
                    f"found {key!r}, which is no regular expression ({error}); expected a name such as q_proj"
                ) from error
        return pattern

    def rank_of(self, module: str) -> int:
        """The rank of A and B of a module, by its Hugging Face name."""
        return int(of_pattern(self.rank_pattern, module, self.r))

    def alpha_of(self, module: str) -> float:
        """Its alpha."""
        return of_pattern(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """The factor of its B A x."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def of_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """What a pattern of PEFT's says of a module; `default` where none of its keys fits."""
    return next((value for key, value in pattern.items() if fits(key, module)), default)


def fits(key: str, module: str) -> bool:
    """Whether a key of a pattern is about a module."""
    return re.match(rf"(.*\.)?({key})$", module) is not None
