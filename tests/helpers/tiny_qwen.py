"""Tiny random Qwen2.5-VL models of transformers, with tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.helpers.tiny_llava import randomised

ROWS = 137
TAGS = {"vision_start_token_id": 130, "vision_end_token_id": 131, "image_token_id": 132, "video_token_id": 133}
PATCH = 6
"""Pixels of a side of a patch; two by two become one feature."""

VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 24,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 48,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]},
}


def qwen(vision: dict | None = None, text: dict | None = None, **changes):
    """A Qwen2_5_VLForConditionalGeneration in float32 with all values random."""
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | (text or {}), vision_config=VISION | (vision or {}), **(TAGS | changes)
    )
    return randomised(transformers.Qwen2_5_VLForConditionalGeneration(config).float())


def patch_processor(least: int = 300, most: int = 9000, **changes):
    """transformers' processor of patches."""
    sizes = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2} | changes
    return transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most}, **sizes)


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of ROWS words, the tags among them."""
    tags = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    names = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 130)), *tags, "w134", "w135", "w136"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=tags
    )


def save(model, folder: Path, processor=None) -> Path:
    """The folder of a model with its tokenizer and image processor."""
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    (processor or patch_processor()).save_pretrained(folder)
    return folder


def inputs(family, spec, encoded) -> dict[str, torch.Tensor]:
    """One sample as transformers takes it."""
    from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
    from mindspeed_mm.models.media import Media

    ids = torch.tensor([encoded.input_ids])
    found = {"mm_token_type_ids": (ids == IMAGE_TOKEN_INDEX).int()}
    if encoded.media:
        found |= family.inputs_of_media(spec, Media.join(encoded.media))
    return {"input_ids": ids.masked_fill(ids == IMAGE_TOKEN_INDEX, TAGS["image_token_id"]), **found}
