"""What is known of the keys of whole models' config.json, by family and layout, beside those of their parts."""

from mindspeed_mm.config.file_keys import COMMON, NO_CONFIG, OLD_OPTIONS, FileKeys, file_keys
from mindspeed_mm.models.kit.hf_config import DEFAULTS, NEUTRAL, ROPE_KEYS
from mindspeed_mm.models.kit.hf_config import HARMLESS as OF_DECODERS

_LLAVA_HF = (
    *("text_config", "vision_config", "image_token_index", "image_token_id", "projector_hidden_act"),
    *("multimodal_projector_bias", "vision_feature_layer", "vision_feature_select_strategy", "tie_word_embeddings"),
    *("model_type", "vocab_size"),
)

LLAVA_HF = file_keys(
    "config.json of transformers' LLaVA",
    _LLAVA_HF,
    {**NO_CONFIG, "use_image_newline_parameter": (True, False), "mm_use_im_start_end": (False,)},
    (*COMMON, *OLD_OPTIONS, "image_seq_length", "ignore_index", "hidden_size", "max_position_embeddings"),
)
"""LlavaConfig. The number of tokens of an image follows from the encoder, whatever image_seq_length says."""

LLAVA_NEXT_HF = file_keys(
    "config.json of transformers' LLaVA-NeXT",
    (*_LLAVA_HF, "image_grid_pinpoints"),
    {**NO_CONFIG, "use_image_newline_parameter": (True,)},
    (*COMMON, *OLD_OPTIONS, "image_seq_length", "ignore_index", "hidden_size", "max_position_embeddings"),
)

QWEN2_5_VL = file_keys(
    "config.json of transformers' Qwen2.5-VL",
    ("text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "model_type")
    + ("vision_end_token_id", "tie_word_embeddings"),
    NO_CONFIG,
    (*COMMON, *OLD_OPTIONS, *OF_DECODERS, *DEFAULTS, *NEUTRAL, *ROPE_KEYS, "vision_token_id"),
)
"""Qwen2_5_VLConfig with a text_config, beside which some versions repeat the decoder's keys; without one, the keys at
the top are the decoder's and checked as such."""

BLIP2 = file_keys(
    "config.json of transformers' BLIP-2 and InstructBLIP",
    ("text_config", "vision_config", "qformer_config", "image_token_index", "image_token_id", "num_query_tokens")
    + ("tie_word_embeddings", "model_type"),
    {**NO_CONFIG, "use_decoder_only_language_model": (True,)},
    (*COMMON, *OLD_OPTIONS, "image_text_hidden_size", "hidden_size"),
)

MINIGPT4 = file_keys(
    "config.json of a converted MiniGPT-4",
    ("text_config", "vision_config", "qformer_config", "num_query_tokens", "has_qformer", "patches_per_feature")
    + ("vision_norm_eps", "feature_scale", "model_type"),
    NO_CONFIG,
    (*COMMON, *OLD_OPTIONS),
)
"""MiniGPT-4's own files have none; a conversion writes it."""

FLAMINGO = file_keys(
    "config.json of Otter and of an OpenFlamingo folder",
    ("text_config", "vision_config", "cross_attn_every_n_layers", "only_attend_immediate_media", "media_token_id")
    + ("max_num_frames", "lang_encoder_path", "vision_encoder_path", "tie_word_embeddings", "model_type"),
    {**NO_CONFIG, "only_attend_previous": (True,)},
    (*COMMON, *OLD_OPTIONS, "use_media_placement_augmentation", "hidden_size"),
)
"""Media are never moved at inference, whatever use_media_placement_augmentation says of the training."""

QFORMER = file_keys(
    "qformer_config of BLIP-2, InstructBLIP and MiniGPT-4",
    (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("layer_norm_eps", "cross_attention_frequency", "encoder_hidden_size", "vocab_size", "pad_token_id"),
        *("max_position_embeddings", "use_qformer_text_input", "initializer_range"),
    ),
    {**NO_CONFIG, "position_embedding_type": ("absolute",)},
    (*COMMON, *OLD_OPTIONS, "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"),
)
"""Models are trained without dropout here."""

_TRAINING = (
    *("freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "unfreeze_mm_vision_tower", "unfreeze_language_model"),
    *("mm_projector_lr", "mm_vision_tower_lr", "mm_tunable_parts", "tune_mm_vision_resampler", "tune_entire_model"),
    *("unfreeze_mm_language_model", "mm_vision_sampler_lr", "unfreeze_mm_vision_sampler", "tune_mm_vision_sampler"),
    *("freeze_backbone", "pretrain_mm_mlp_adapter", "mm_vision_resampler_lr", "vision_tower_pretrained"),
)
"""How the original code trained the weights that lie there."""

_OF_VIDEOS = (
    *("mm_newline_position", "mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_spatial_pool_out_channels"),
    *(
        "mm_pooling_position",
        "add_faster_video",
        "faster_token_stride",
        "add_time_instruction",
        "force_sample",
        "frames_upbound",
        "video_fps",
    ),
)

ORIGINAL = file_keys(
    "config.json of the original LLaVA",
    (
        *("mm_vision_tower", "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer", "mm_patch_merge_type"),
        *("mm_vision_select_feature", "image_aspect_ratio", "image_grid_pinpoints", "mm_use_im_start_end"),
        *("interaction", "align_hidden_act"),
    ),
    {
        "mm_resampler_type": ("",),
        "use_mm_proj": (True,),
        "s2": (False,),
        "s2_scales": ("",),
        "use_pos_skipping": (False,),
        "mm_use_grid": (False,),
        "use_s2": (False,),
    },
    (
        *("delay_load", "image_crop_resolution", "image_split_resolution", "max_length", "max_sequence_length"),
        *("tokenizer_model_max_length", "tokenizer_padding_side", "pos_skipping_range", "mm_use_im_patch_token"),
        *("mm_resampler_location", "mm_vision_tower_config", "use_cache", *_TRAINING, *_OF_VIDEOS),
    ),
    "LLaVA-1.5 or LLaVA-1.6 without that",
)
"""LLaVA's own keys; the rest of its config.json is the decoder's. <im_patch> is in the vocabulary of models with
mm_use_im_patch_token and in no prompt. The keys of videos have no say over images."""


def is_of_llava(key: str) -> bool:
    """Whether a key of an original config.json is LLaVA's own, and not the decoder's."""
    return "mm_" in key or (key in ORIGINAL.known and key not in ("use_cache", "max_length"))


def own_part(config: dict[str, object]) -> dict[str, object]:
    """LLaVA's own keys of an original config.json."""
    return {key: value for key, value in config.items() if is_of_llava(key)}


TABLES: tuple[FileKeys, ...] = (LLAVA_HF, LLAVA_NEXT_HF, QWEN2_5_VL, BLIP2, MINIGPT4, FLAMINGO, QFORMER, ORIGINAL)
"""In the order of docs/weights.md."""
