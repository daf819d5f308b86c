"""Decoding options of a model's own generation_config.json, below what the user says, as transformers' generate has
them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mindspeed_mm.generation.options import SAMPLING, GenerationOptions, generation_options

logger = logging.getLogger(__name__)

TOP_K = 50
"""What transformers takes for a file that asks for sampling without a top_k."""


class ModelDefaults:
    """What a model's own file says of the choice of tokens."""

    def __init__(self, values: Mapping[str, Any] | None = None, where: str = "") -> None:
        """`values`: names and values of GenerationOptions as the file `where` has them.

        Raises ConfigError for a value that an option of sampling, or max_new_tokens, cannot have; the others are
        checked where they are used.
        """
        self.values, self.where = dict(values or {}), where
        self._told = False
        alone = {name: value for name, value in self.values.items() if name in (*SAMPLING, "max_new_tokens")}
        generation_options(alone | {"do_sample": True}, context=where)

    @property
    def asked(self) -> str:
        """Those that ask for something, for people; "" where none does."""
        fields = GenerationOptions.model_fields
        neutral = {name: SAMPLING.get(name, (fields[name].default,)) for name in self.values if name in fields}
        return ", ".join(
            f"{name} {value}" for name, value in self.values.items() if value not in neutral.get(name, (None,))
        )

    def under(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` with the file's options below. What the user says wins, also where one option excludes another:
        greedy decoding takes none of the file's sampling, beams of the user's are not sampled."""
        own = {name: value for name, value in self.values.items() if name not in given}
        if not own:
            return dict(given)
        values = {**own, **given}
        if (values.get("num_beams") or 1) > 1 and values.get("do_sample"):
            if "num_beams" in given:
                own.pop("do_sample", None)
            elif "do_sample" in given:
                own.pop("num_beams", None)
        values = {**own, **given}
        sampled = bool(values.get("do_sample")) and values.get("temperature") != 0
        if not sampled:
            own = {name: value for name, value in own.items() if name not in SAMPLING}
        elif self.values.get("do_sample"):
            own.setdefault("top_k", TOP_K)
        if given.get("min_new_tokens") or given.get("min_length"):
            own = {name: value for name, value in own.items() if name not in ("min_new_tokens", "min_length")}
        most = given.get("max_new_tokens")
        if isinstance(most, int) and isinstance(own.get("min_new_tokens"), int):
            own["min_new_tokens"] = min(own["min_new_tokens"], most)
        return {**own, **given}

    def options(self, given: Mapping[str, Any]) -> GenerationOptions:
        """Checked options. Raises ConfigError as `generation_options` does, with the file's name where it has a say."""
        values = self.under(given)
        if len(values) == len(given):
            return generation_options(values)
        options = generation_options(values, context=f"with the defaults of {self.where}")
        self._tell()
        return options

    def fitting(
        self, options: GenerationOptions, given: Mapping[str, Any] | GenerationOptions, room: int
    ) -> GenerationOptions:
        """`options` that were made of `given`, for a prompt behind which the context leaves `room` tokens: a
        max_new_tokens of the file is shortened to it, one of the user's stays."""
        said = isinstance(given, GenerationOptions) or "max_new_tokens" in given
        if said or "max_new_tokens" not in self.values or room < max(1, options.min_new_tokens):
            return options
        return options.model_copy(update={"max_new_tokens": min(options.max_new_tokens, room)})

    def _tell(self) -> None:
        if not self._told and self.asked:
            self._told = True
            logger.info("from %s: %s, unless an option says otherwise", self.where, self.asked)
