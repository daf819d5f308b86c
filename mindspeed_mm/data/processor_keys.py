"""What is known of the keys of preprocessor_config.json and processor_config.json.

Keys of an image processor that nobody knows are refused: they may change every pixel.
"""

from mindspeed_mm.config.file_keys import file_keys
from mindspeed_mm.data import image, image_tiles, patch_images

_NEUTRAL = {key: (value,) for key, value in image.FIXED_KEYS.items()}

FIXED_SIZE = file_keys(
    "preprocessor_config.json of CLIP, SigLIP, ViT, LLaVA",
    (*image.ImageProcessor.model_fields, *image.TYPE_KEYS),
    _NEUTRAL,
    image.UNUSED_KEYS,
)

TILES = file_keys(
    "preprocessor_config.json of LLaVA-NeXT",
    (*image.ImageProcessor.model_fields, *image.TYPE_KEYS, *image_tiles.OWN_KEYS),
    _NEUTRAL,
    image.UNUSED_KEYS,
)

PATCHES = file_keys(
    "preprocessor_config.json of Qwen2.5-VL",
    (*image.ImageProcessor.model_fields, *image.TYPE_KEYS, *patch_images.OWN_KEYS),
    _NEUTRAL | {"do_resize": (True,), "do_center_crop": (False,), "do_pad": (False,)},
    image.UNUSED_KEYS,
)

PROCESSOR_TABLES = (FIXED_SIZE, TILES, PATCHES)

PROCESSOR_CONFIG = file_keys(
    "processor_config.json",
    ("image_processor",),
    {},
    (
        *("processor_class", "image_token", "patch_size", "vision_feature_select_strategy", "chat_template"),
        *("num_additional_image_tokens", "image_seq_length", "auto_map", "tokenizer", "video_processor"),
        *("num_query_tokens", "qformer_tokenizer", "image_token_id", "video_token", "video_token_id"),
    ),
)
"""transformers' own count of placeholders; here it follows from the model."""
