"""What is known of the keys of the files beside a tokenizer: tokenizer_config.json, special_tokens_map.json and
generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_mm.config.file_keys import file_keys
from mindspeed_mm.config.load import read_json
from mindspeed_mm.errors import ConfigError

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Roles of tokens that are used."""

OTHER_ROLES = ("sep_token", "cls_token", "mask_token")
"""Roles whose tokens are in the vocabulary, and that nothing asks for."""

LISTS = ("additional_special_tokens", "extra_special_tokens")
"""Further special tokens; transformers 5 writes the second name."""

NAMED = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token", "vision_bos_token", "vision_eos_token")
"""Special tokens under names of their own, which transformers writes for multimodal tokenizers."""

TOKENIZER_CONFIG = file_keys(
    "tokenizer_config.json",
    (*ROLES, *OTHER_ROLES, *LISTS, *NAMED, "added_tokens_decoder", "chat_template", "tokenizer_class")
    + ("legacy", "add_bos_token", "add_prefix_space"),
    {
        "add_eos_token": (False,),
        "split_special_tokens": (False,),
        "do_lower_case": (False,),
        "fix_mistral_regex": (False,),
        "sp_model_kwargs": ({},),
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (False,),
    },
    (
        *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "use_default_system_prompt", "errors"),
        *("model_max_length", "max_len", "padding_side", "truncation_side", "padding", "truncation", "max_length"),
        *("stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "max_pixels", "min_pixels"),
        *("model_input_names", "name_or_path", "processor_class", "image_processor_class", "tokenizer_file"),
        *("special_tokens_map_file", "vocab_file", "merges_file", "vocab", "merges", "from_slow", "use_fast"),
        *("auto_map", "verbose", "device_map", "trust_remote_code", "backend", "is_local", "local_files_only"),
        *("files_loaded", "transformers_version", "unsloth_version", "model_specific_special_tokens", "extra_ids"),
        *("response_schema", "response_template", "chat_control_tokens", "tokenizer_object", "init_inputs"),
        *("cache_dir", "token", "revision", "decode_with_prefix_space", "sp_model_file", "post_processor"),
    ),
    "a tokenizer without that",
)
"""Templates say where an answer ends, so add_eos_token would put a second end there. Lengths and sides of padding are
the run's. Texts are given as the model wrote them, without transformers' cleaning of spaces."""

SPECIAL_TOKENS_MAP = file_keys("special_tokens_map.json", (*ROLES, *OTHER_ROLES, *LISTS, *NAMED))

GENERATION_NAME = "generation_config.json"

DECODING = (
    *("max_new_tokens", "min_new_tokens", "min_length", "stop_strings", "exponential_decay_length_penalty"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "renormalize_logits"),
    *("num_beams", "num_return_sequences", "length_penalty", "early_stopping"),
)
"""Options of generation (generation/options.py) that such a file decides where the user says nothing."""

GENERATION_CONFIG = file_keys(
    GENERATION_NAME,
    ("eos_token_id", *DECODING),
    {
        **dict.fromkeys(("force_words_ids", "forced_decoder_ids", "constraints"), ([],)),
        **dict.fromkeys(("penalty_alpha", "diversity_penalty"), (0,)),
        "watermarking_config": ({},),
        "guidance_scale": (1,),
        "num_beam_groups": (1,),
        "max_time": (),
        "token_healing": (False,),
        "dola_layers": ([],),
    },
    (
        *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config"),
        *(
            "max_length",
            "use_cache",
            "cache_implementation",
            "cache_config",
            "max_cache_len",
            "return_legacy_cache",
            "low_memory",
        ),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile"),
        *("continuous_batching_config", "prefill_chunk_size", "use_mtp", "generation_kwargs", "chat_format"),
        *("max_window_size", "user_token_id", "assistant_token_id", "trust_remote_code"),
    ),
    "decoding without that",
    "Take it out of the file, or set it to null.",
)
"""max_length counts the prompt, and is there in most files; without max_new_tokens an answer has the default's
length."""


@dataclass(frozen=True)
class GenerationSettings:
    """Ids that end an answer besides the tokenizer's EOS, as generation_config.json says, else config.json; and the
    decoding options that the former has, with its path."""

    ids: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    @classmethod
    def read(cls, folder: Path) -> GenerationSettings:
        """Of a model's or a tokenizer's folder. Raises ConfigError for damaged files and for options that change
        answers and are not supported."""
        path = folder / GENERATION_NAME
        if path.is_file():
            found = read_json(path)
            GENERATION_CONFIG.check(found, where=str(path))
            options = {name: found[name] for name in DECODING if found.get(name) is not None}
            return cls(_ids(found.get("eos_token_id"), path), options, str(path))
        path = folder / "config.json"
        if not path.is_file():
            return cls()
        found = read_json(path)
        inner = found.get("text_config")
        inner = inner.get("eos_token_id") if isinstance(inner, dict) else None
        return cls(_ids(inner if found.get("eos_token_id") is None else found["eos_token_id"], path))

    def save(self, folder: Path) -> None:
        """Write ids and options into a folder that keeps the tokenizer."""
        if self.ids or self.options:
            content = json.dumps(({"eos_token_id": list(self.ids)} if self.ids else {}) | self.options, indent=2)
            (folder / GENERATION_NAME).write_text(content + "\n", encoding="utf-8")


def _ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int and number >= 0 for number in ids):
        raise ConfigError(f"{path}: eos_token_id is {value!r:.80}; expected a token's id or a list of ids. Correct it.")
    return tuple(ids)
