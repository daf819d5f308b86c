"""Generation options under the names of transformers' GenerationConfig."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from mindspeed_mm.config.load import StrictModel, load_config

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "length_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (None, 0),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "early_stopping": (False,),
    "bad_words_ids": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "decoder_start_token_id": (None,),
    "begin_suppress_tokens": (None,),
    "suppress_tokens": (None,),
    "forced_decoder_ids": (None,),
    "constraints": (None,),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None,),
    "low_memory": (None,),
    "penalty_alpha": (None,),
    "max_time": (None,),
    "stop_strings": (None,),
    "prompt_lookup_num_tokens": (None,),
    "num_assistant_tokens": (5,),
    "num_assistant_tokens_schedule": ("heuristic", "constant"),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (None, False),
    "return_dict_in_generate": (False,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "cache_implementation": (None,),
    "generation_kwargs": ({},),
    "max_length": (20, 2048, 4096),
    "use_cache": (True, False),
    "_from_model_config": (True, False),
    "transformers_version": (),
}
"""Keys of a full GenerationConfig that the guide's files carry, with the values that ask for nothing. Any value is
accepted for an empty tuple. `max_length` is always superseded by max_new_tokens, and the cache is always used: it
changes no token."""


class GenerationOptions(StrictModel):
    """How to choose tokens. Defaults are greedy decoding."""

    max_new_tokens: Annotated[int, pydantic.Field(gt=0)] = 512
    do_sample: bool = False
    temperature: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None = None
    """Divides the logits before sampling; 0 asks for greedy decoding, as LLaVA's and the ancestor's tools take it."""
    top_k: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Sample among the k likeliest tokens; 0 or None: all."""
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    """Sample among the likeliest tokens that together reach this probability; None: all."""
    seed: int = 0
    """Seed of the sampling; every request has its own generator, so results do not depend on the batch."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    """Ids default to the tokenizer's; bos and pad are accepted for the ancestor's files and not used."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_neutral_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for key, value in data.items():
            if key not in NEUTRAL_VALUES:
                kept[key] = value
            elif NEUTRAL_VALUES[key] and value not in NEUTRAL_VALUES[key]:
                raise ValueError(
                    f"{key}: found {value!r}, expected {' or '.join(map(repr, NEUTRAL_VALUES[key]))}: "
                    "this option is not supported"
                )
        return kept

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken."""
        return not self.do_sample or self.temperature == 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The stop ids given here, none when left to the tokenizer."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def generation_options(values: dict[str, Any], *, context: str | None = None) -> GenerationOptions:
    """Check option names and values; ConfigError lists every problem with the nearest known name."""
    return load_config(GenerationOptions, values, what="generation options", context=context)
