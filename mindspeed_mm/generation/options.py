"""Generation options under the names of transformers' GenerationConfig."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import StrictModel, load_config
from mindspeed_mm.errors import ConfigError

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "force_words_ids": (),
    "decoder_start_token_id": (),
    "forced_decoder_ids": (),
    "constraints": (),
    "guidance_scale": (),
    "low_memory": (),
    "penalty_alpha": (),
    "max_time": (),
    "prompt_lookup_num_tokens": (),
    "num_assistant_tokens": (5,),
    "num_assistant_tokens_schedule": ("heuristic", "constant"),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "return_dict_in_generate": (False,),
    "cache_implementation": (),
    "generation_kwargs": ({},),
    "max_length": (20, 2048, 4096),
    "use_cache": (True, False),
    "use_mtp": (False,),
    "cache_config": (False,),
    "max_cache_len": (False,),
    "token_healing": (False,),
    "watermarking_config": (False,),
    "is_assistant": (False,),
    "assistant_confidence_threshold": (False,),
    "max_matching_ngram_size": (False,),
    "assistant_early_exit": (False,),
    "assistant_lookbehind": (False,),
    "target_lookbehind": (False,),
    "assistant_ensemble_weight": (False,),
    "speculation_type": (False,),
    "compile_config": (False,),
    "disable_compile": (False,),
    "continuous_batching_config": (False,),
    "dola_layers": (False,),
    "prefill_chunk_size": (False,),
}
"""Keys of a full GenerationConfig that the guide's files carry, with the values that ask for nothing (null always
does).
`max_length` is always superseded by max_new_tokens, and the cache is always used: it changes no token."""

MOVED = "transformers 5 has it no more either, it loads it as code from a model hub, which is never run here"
"""Why a way of decoding that older transformers had is left out."""

REASONS = {
    "num_beam_groups": f"diverse beam search: {MOVED}. Use num_beams, or do_sample with num_return_sequences",
    "diversity_penalty": f"it belongs to diverse beam search: {MOVED}. Use do_sample with num_return_sequences",
    "force_words_ids": f"constrained beam search: {MOVED}. Use prefix_allowed_tokens_fn in Python, or sequence_bias",
    "constraints": f"constrained beam search: {MOVED}. Use prefix_allowed_tokens_fn in Python, or sequence_bias",
    "penalty_alpha": f"contrastive search: {MOVED}. Use repetition_penalty",
    "dola_layers": f"DoLa: {MOVED}. Leave it out",
}
"""Why an option is not supported and what to use, where there is more to say."""

SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 0, 1),
    "top_k": (None, 0, 50),
    "top_p": (None, 1),
    "min_p": (None, 0),
    "top_h": (None,),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
}
"""Options that are for sampling only, with the values that greedy decoding may carry: those that change nothing, and
transformers' defaults, which many files state."""

RULES = (
    *("sequence_bias", "encoder_repetition_penalty", "repetition_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    "begin_suppress_tokens",
)
"""Options that change what the likeliest token is, in the order in which they do it."""

NOTES = ("_from_model_config", "transformers_version")
"""Keys that say where a GenerationConfig comes from; any value."""


TokenId = Annotated[int, pydantic.Field(ge=0)]
TokenIds = Annotated[list[TokenId], pydantic.Field(min_length=1)]
ARRAY = pydantic.Field(strict=False)
"""JSON knows no tuples, and the values of options have passed through a validator that sees Python's lists."""


class GenerationOptions(StrictModel):
    """How to choose tokens. Defaults are greedy decoding."""

    max_new_tokens: Annotated[int, pydantic.Field(gt=0)] = 512
    min_new_tokens: Annotated[int, pydantic.Field(ge=0)] = 0
    """Stop ids cannot be chosen before so many tokens; stop strings still end a text."""
    do_sample: bool = False
    temperature: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None = None
    """Divides the logits before sampling; 0 asks for greedy decoding, as LLaVA's and the ancestor's tools take it."""
    top_k: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Sample among the k likeliest tokens; 0 or None: all."""
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    """Sample among the likeliest tokens that together reach this probability; None: all."""
    min_p: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    """Sample among the tokens at least this share as likely as the likeliest; None: all."""
    top_h: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    """Sample among the likeliest of 100 tokens that together hold this share of their entropy; None: all."""
    typical_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    """Sample among the tokens nearest to the expected information that together reach this probability."""
    epsilon_cutoff: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None
    """Sample among the tokens at least so likely; 0 or None: all."""
    eta_cutoff: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None
    """As epsilon_cutoff, and less where the entropy is high; 0 or None: all."""
    min_length: Annotated[int, pydantic.Field(ge=0)] = 0
    """Stop ids cannot be chosen before prompt and answer have so many tokens, those of images included."""
    sequence_bias: list[Annotated[tuple[TokenIds, float], ARRAY]] | None = None
    """What is added to the logit of the token that would complete a sequence: [[[id, ...], bias], ...]."""
    bad_words_ids: Annotated[list[TokenIds], pydantic.Field(min_length=1)] | None = None
    """Sequences that never occur in an answer; a stop id by itself is passed over."""
    suppress_tokens: list[TokenId] | None = None
    """Tokens that are never chosen."""
    begin_suppress_tokens: list[TokenId] | None = None
    """Tokens that are not chosen first."""
    forced_bos_token_id: TokenId | None = None
    """The first token after a prompt of one token, as transformers takes it; no other prompt is changed."""
    forced_eos_token_id: TokenId | TokenIds | None = None
    """What the last token of an answer that reaches max_new_tokens is."""
    exponential_decay_length_penalty: (
        Annotated[tuple[Annotated[int, pydantic.Field(ge=0)], Annotated[float, pydantic.Field(gt=0)]], ARRAY] | None
    ) = None
    """[start, factor]: behind so many new tokens, stop ids become likelier by a growing power of the factor."""
    renormalize_logits: bool = False
    """Make the scores log-probabilities again after all rules; decides among beams."""
    remove_invalid_values: bool = False
    """Replace NaN by 0 and infinities by the largest numbers before exponential_decay_length_penalty."""
    encoder_repetition_penalty: Annotated[float, pydantic.Field(gt=0)] = 1.0
    """Multiplies positive and divides negative logits of tokens that stand in the prompt."""
    encoder_no_repeat_ngram_size: Annotated[int, pydantic.Field(ge=0)] = 0
    """No run of so many tokens of the prompt occurs in the answer; 0: no such rule."""
    repetition_penalty: Annotated[float, pydantic.Field(gt=0)] = 1.0
    """Divides positive and multiplies negative logits of tokens that stand in the prompt or the answer."""
    no_repeat_ngram_size: Annotated[int, pydantic.Field(ge=0)] = 0
    """No run of so many tokens occurs twice in prompt and answer; 0: no such rule."""
    stop_strings: str | list[str] = []
    """Texts that end an answer; they are not part of it."""
    num_return_sequences: Annotated[int, pydantic.Field(gt=0, le=1024)] = 1
    num_beams: Annotated[int, pydantic.Field(gt=0, le=64)] = 1
    length_penalty: Annotated[float, pydantic.Field(ge=-20, le=20)] = 1.0
    """Beam scores are divided by length ** length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """When beam search ends: True, at num_beams finished ones; False, when none running is likely to win; "never", when
    none running can win."""
    seed: int = 0
    """Seed of the sampling; every sequence has its own generator, so results do not depend on the batch."""
    logprobs: Annotated[int, pydantic.Field(ge=0, le=100)] | None = None
    """Return the log-probability (of the model, before any option) of each token and of so many likeliest others."""
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
            known = key in cls.model_fields
            if key in NOTES or (value is None and (known or key in NEUTRAL_VALUES)):
                continue
            if known or key not in NEUTRAL_VALUES:
                kept[key] = value
            elif value not in NEUTRAL_VALUES[key]:
                expected = " or ".join(map(repr, NEUTRAL_VALUES[key] or (None,)))
                why = f" ({REASONS[key]})" if key in REASONS else ""
                raise ValueError(f"{key}: found {value!r}, expected {expected}: this option is not supported{why}")
        return kept

    @pydantic.model_validator(mode="after")
    def _check(self) -> GenerationOptions:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}")
        if self.min_length and self.min_new_tokens:
            raise ValueError(
                f"min_length {self.min_length} and min_new_tokens {self.min_new_tokens} both say how short an answer "
                "may be: keep one of them (min_length counts the prompt, too)"
            )
        self._check_forced()
        if not self.do_sample:
            for name, neutral in SAMPLING.items():
                value = getattr(self, name)
                if value not in neutral:
                    raise ValueError(
                        f"{name} {value} asks for sampling, and do_sample is False: set do_sample, or leave {name} out"
                    )
        if not all(self.stops):
            raise ValueError("stop_strings: found an empty text, which would end every answer at once; remove it")
        if self.num_beams > 1:
            if self.do_sample:
                raise ValueError(
                    f"num_beams {self.num_beams} does not go with do_sample: beams are the likeliest continuations and "
                    "are not drawn. Use one of the two"
                )
        elif self.greedy and self.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} of greedy decoding would be equal: set do_sample, "
                "or num_beams to at least as many"
            )
        if 1 < self.num_beams < self.num_return_sequences:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} exceeds num_beams {self.num_beams}: raise num_beams"
            )
        return self

    def _check_forced(self) -> None:
        """A token that must come and must not leaves none to choose."""
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            forced = [] if value is None else value if isinstance(value, list) else [value]
            if forced and set(forced) <= set(self.suppress_tokens or ()):
                raise ValueError(
                    f"{name} {value} is also among suppress_tokens, so that no token is left: take it out of one"
                )

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken."""
        return not self.do_sample or self.temperature == 0

    @functools.cached_property
    def ruled(self) -> bool:
        """True where a rule may make another token the likeliest."""
        return any(getattr(self, name) != type(self).model_fields[name].default for name in RULES)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The stop ids given here, none when left to the tokenizer."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def generation_options(values: Mapping[str, Any], *, context: str | None = None) -> GenerationOptions:
    """Check option names and values; ConfigError lists every problem with the nearest known name."""
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"generation options: found a {type(values).__name__}; expected an object of names and values"
        )
    values = dict(values)
    bias = values.get("sequence_bias")
    if isinstance(bias, Mapping):  # transformers' older form, whose keys are tuples
        values["sequence_bias"] = [[_listed(ids), value] for ids, value in bias.items()]
    return load_config(GenerationOptions, values, what="generation options", context=context)


def _listed(ids: Any) -> Any:
    return list(ids) if isinstance(ids, tuple) else ids
