"""The `lora` block of a part in a model.json."""

from __future__ import annotations

import math
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
    use_rslora: the scale is alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r.
    use_dora: the rows of W + scale B A get trained lengths m [out] (DoRA, Liu et al. 2024), which start as those of W.
    loraplus_lr_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024).
    load: folder in PEFT's format whose A and B are where training starts; None: A random, B zero.
    init_seed: of the random A. The same at every parallel layout.
    """

    r: Annotated[int, pydantic.Field(gt=0)] = 16
    alpha: Annotated[float, pydantic.Field(gt=0)] = 32.0
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    use_rslora: bool = False
    use_dora: bool = False
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

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
