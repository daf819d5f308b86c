"""What is known of the keys of a file that comes with a model: config.json, generation_config.json and the like.

Every key that transformers or LLaVA writes is one of three kinds: honoured (it decides something here), neutral (it is
known, and refused where its value would change something), harmless (it changes nothing here). Any other key is told,
once, unless it has no value. docs/weights.md shows all tables; a test holds them against the installed transformers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm.errors import ConfigError

logger = logging.getLogger(__name__)

EMPTY = (None, False, "", [], {})
"""Values with which an unknown key says nothing."""

COMMON = (
    *("architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "auto_map"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_commit_hash"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id"),
    *("chunk_size_feed_forward", "return_dict", "output_attentions", "output_hidden_states", "torchscript"),
    *("is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "pruned_heads"),
    *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task"),
    *("tokenizer_class", "prefix", "use_bfloat16", "tf_legacy_loss", "cache_implementation", "use_cache"),
    *("dtype", "torch_dtype", "initializer_range", "initializer_factor", "unsloth_version", "unsloth_fixed"),
)
"""Keys of any config.json that change no number here: names, ids, how transformers computes and what it returns."""

NO_CONFIG: dict[str, tuple[Any, ...]] = {"is_encoder_decoder": (False,), "quantization_config": ({},)}
"""Keys of any config.json that would make another model of it, or say that its weights are no plain numbers."""

OLD_OPTIONS = (
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "suppress_tokens"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "begin_suppress_tokens"),
)
"""Decoding options at their defaults, which transformers before 4.41 repeated in each config.json. Options come from
the user."""


@dataclass(frozen=True)
class FileKeys:
    """The keys of one kind of file.

    what: the file, as messages and docs/weights.md name it.
    neutral: the values with which a key changes nothing; null is always one of them.
    supported: for messages: what is supported instead of a refused value; `cure`: what to do then.
    """

    what: str
    honoured: frozenset[str]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    supported: str = "a model without that"
    cure: str = "Use weights of a supported model."

    @property
    def known(self) -> frozenset[str]:
        """All keys that are one of the three kinds."""
        return self.honoured | frozenset(self.neutral) | self.harmless

    def check(self, found: Mapping[str, Any], *, where: str | None = None) -> None:
        """Refuse keys whose values would change something that is not done here; tell unknown ones, once a process.

        `where` names the file. Raises ConfigError with all refused keys.
        """
        name = f"{self.what} ({where})" if where else self.what
        problems = [
            f"{key} {_show(found[key])}"
            for key, allowed in self.neutral.items()
            if key in found and key not in self.honoured and not _is_neutral(found[key], allowed)
        ]
        if problems:
            raise ConfigError(f"{name}: found {' and '.join(problems)}; {self.supported} is supported. {self.cure}")
        known = self.known
        unknown = [key for key, value in found.items() if key not in known and value not in EMPTY]
        if unknown:
            _tell(name, ", ".join(unknown))


def file_keys(
    what: str,
    honoured: Iterable[str],
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    harmless: Iterable[str] = (),
    supported: str = "a model without that",
    cure: str = FileKeys.cure,
) -> FileKeys:
    """A FileKeys in which what is honoured counts as nothing else, and what is neutral not as harmless."""
    honoured = frozenset(honoured)
    neutral = {key: values for key, values in (neutral or {}).items() if key not in honoured}
    return FileKeys(what, honoured, neutral, frozenset(harmless) - honoured - frozenset(neutral), supported, cure)


@functools.lru_cache(maxsize=256)
def _tell(name: str, keys: str) -> None:
    logger.warning("%s: keys that are not known here change nothing: %s", name, keys)


def _is_neutral(value: Any, allowed: tuple[Any, ...]) -> bool:
    return value is None or any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value!s:.80}"
