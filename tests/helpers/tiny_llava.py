"""Tiny random LLaVA and LLaVA-NeXT models of transformers, with tokenizer and image processor, and their samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.sample import Encoded
from tests.helpers.tiny_decoders import FAMILIES

IMAGE_ID, ROWS = 130, 131

VISION = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
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
}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84]]
"""Height and width; with width first they would be another set."""

FULL = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
"""The feature selection of a vision encoder without a class token."""

SIZES = ((30, 50), (90, 20), (1, 1), (40, 41))
"""Heights and widths of images."""


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-4) -> None:
    """Assert that no element differs by more."""
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def clip(**changes) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**(VISION | changes))


def siglip(**changes) -> transformers.SiglipVisionConfig:
    return transformers.SiglipVisionConfig(**(VISION | changes))


def decoder_config(name: str, **changes) -> transformers.PreTrainedConfig:
    """The config of a decoder of tests/helpers/tiny_decoders.py, at the sizes of this file."""
    family = FAMILIES[name]
    return getattr(transformers, family.config)(**(TEXT | {"pad_token_id": 0} | family.keys | changes))


def llava(vision, decoder: str = "llama", **changes):
    """A LlavaForConditionalGeneration around any decoder; InternLM2 is a Llama until it is saved."""
    text = decoder_config(decoder, **changes.pop("text", {}))
    options = {"image_token_index": IMAGE_ID, "tie_word_embeddings": text.tie_word_embeddings, "pad_token_id": 0}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, **(options | changes))
    return randomised(transformers.LlavaForConditionalGeneration(config))


def llava_next(vision, **changes):
    """A LlavaNextForConditionalGeneration."""
    text = transformers.LlamaConfig(**(TEXT | changes.pop("text", {})))
    grids = {"image_grid_pinpoints": PINPOINTS} | changes
    config = transformers.LlavaNextConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_ID, **grids)
    return randomised(transformers.LlavaNextForConditionalGeneration(config))


def randomised(model, seed: int = 7):
    """The model with biases, norms and all else at random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tile_processor(side: int = 28, pinpoints=PINPOINTS, **changes):
    """transformers' processor of tiles."""
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}} | changes
    return transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=[list(pair) for pair in pinpoints], **sizes)


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of ROWS words, the last one the image's."""
    names = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, IMAGE_ID)), "<image>"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=["<image>"]
    )


def fixed_processor(kind: str, side: int = 28):
    """transformers' image processor of CLIP or SigLIP."""
    square = {"height": side, "width": side}
    if kind == "siglip":
        return transformers.SiglipImageProcessorPil(size=square)
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)


def save(model, folder: Path, processor=None) -> Path:
    """The folder of a model with its tokenizer and image processor."""
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def save_original(model, folder: Path, *, newline: bool = True, **config) -> Path:
    """A LLaVA-NeXT model in the original code's layout, its vision encoder in a folder of its own. Without `newline`
    it lacks that vector."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.multi_modal_projector."):
            number, kind = name.removeprefix("model.multi_modal_projector.linear_").split(".")
            renamed[f"model.mm_projector.{2 * int(number) - 2}.{kind}"] = tensor
        elif (name == "model.image_newline" and newline) or name.startswith("lm_head."):
            renamed[name] = tensor
        elif name.startswith("model.language_model."):
            renamed["model." + name.removeprefix("model.language_model.")] = tensor
    model.model.vision_tower.save_pretrained(folder / "encoder")
    text = model.config.text_config.to_dict()
    own = {
        "model_type": "llava_llama",
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "encoder",
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[width, height] for height, width in PINPOINTS],
    }
    (folder / "config.json").write_text(json.dumps(text | own | config))
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, folder / "model.safetensors")
    words().save_pretrained(folder)
    encoder = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    transformers.CLIPImageProcessorPil(**encoder).save_pretrained(folder / "encoder")
    return folder


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise of a size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def text(length: int, seed: int) -> list[int]:
    """Random ids of words."""
    return torch.randint(3, IMAGE_ID, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def sample(media, images, lengths, seed: int = 0) -> Encoded:
    """Texts of the given lengths with the images between them, as the data code makes it.

    Args:
        media: the MediaProcessor; one text more than images.
    """
    ids = text(lengths[0], seed)
    for number, (shown, length) in enumerate(zip(images, lengths[1:], strict=True), 1):
        ids += [*media.plan(shown.height, shown.width).ids, *text(length, seed + number)]
    labels = [
        IGNORE_INDEX if token == IMAGE_TOKEN_INDEX or place % 4 == 1 else token for place, token in enumerate(ids)
    ]
    return Encoded(str(seed), ids, labels, tuple(media.item(shown) for shown in images))


def inputs(family, spec, encoded: Encoded) -> dict[str, torch.Tensor]:
    """One sample as transformers takes it."""
    from mindspeed_mm.models.media import Media

    ids = torch.tensor([[IMAGE_ID if token == IMAGE_TOKEN_INDEX else token for token in encoded.input_ids]])
    media = Media.join(encoded.media) if encoded.media else None
    return {"input_ids": ids} | ({} if media is None else family.inputs_of_media(spec, media))


def their_greedy(model, given: dict[str, torch.Tensor], new_tokens: int = 9) -> list[int]:
    """The ids that transformers generates behind one sample of `inputs`, whatever they are."""
    mask = torch.ones_like(given["input_ids"])
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**given, attention_mask=mask, **options)[0, mask.shape[1] :].tolist()


def their_loss(model, family, spec, samples: list[Encoded]) -> torch.Tensor:
    """transformers' loss of a global batch: the mean over its supervised tokens."""
    total = 0.0
    counts = [sum(label != IGNORE_INDEX for label in encoded.labels[1:]) for encoded in samples]
    for encoded, count in zip(samples, counts, strict=True):
        labels = torch.tensor([encoded.labels])
        total = total + model(**inputs(family, spec, encoded), labels=labels).loss * count
    return total / sum(counts)
