"""Models of the training benchmarks: LLaVA-1.5's proportions at several sizes, as our model.json and as transformers'.

What decides where the time of a step goes is kept from LLaVA-1.5 7B: vocabulary 8 times the width, MLP 2.7 times, heads
of 128 channels, 576 image tokens of 336 x 336 pixels, a vision encoder a quarter as wide whose layers take 4 to 5 % of
the operations that the decoder spends on an image token. Small models have fewer layers, so that head and attention
weigh
more in them: see docs/performance.md.

"light" is no LLaVA-1.5: its vision encoder has five sixths as many parameters as its decoder, like CLIP-L before a
decoder of half a billion. "blocks" and "tiny blocks" have widths of whole blocks of 64 values, as weights in 4 bits
need them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

IMAGE_SIZE, PATCH = 336, 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
CONTEXT = 4096


class Shape(NamedTuple):
    """Decoder width, layers, heads, MLP, vocabulary; vision encoder width, layers, heads."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    vision_encoder_hidden: int
    vision_encoder_layers: int
    vision_encoder_heads: int

    @property
    def image_token_id(self) -> int:
        """The last id stands for an image token in transformers' inputs; ours are marked by -200."""
        return self.vocabulary - 1


SHAPES = {
    "tiny": Shape(256, 2, 2, 688, 2048, 64, 3, 1),
    "light": Shape(256, 6, 2, 688, 2048, 256, 6, 4),
    "small": Shape(512, 6, 4, 1376, 4096, 128, 6, 2),
    "blocks": Shape(512, 6, 4, 1408, 4096, 128, 6, 2),
    "tiny blocks": Shape(256, 2, 2, 704, 2048, 64, 3, 1),
    "7b": Shape(4096, 32, 32, 11008, 32000, 1024, 24, 16),
}


def model_json(size: str, trained: tuple[str, ...], weights: str | None, recompute: bool = False) -> dict[str, Any]:
    """Our model.json. `trained` names the parts that are not frozen; `weights` is a LLaVA folder, None: random ones."""
    shape = SHAPES[size]

    def block(kind: str, **keys: Any) -> dict[str, Any]:
        source = {"ckpt_path": weights} if weights else {"fresh": True}
        return keys | {"freeze": kind not in trained} | source

    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        "model_id": "llava",
        "text_decoder": block(
            "text_decoder",
            num_layers=shape.layers,
            hidden_size=shape.hidden,
            num_attention_heads=shape.heads,
            ffn_hidden_size=shape.ffn,
            language_vocab_size=shape.vocabulary,
            max_position_embeddings=CONTEXT,
            **(full if recompute else {}),
        ),
        "image_encoder": {
            "vision_encoder": block(
                "vision_encoder",
                num_layers=shape.vision_encoder_layers,
                hidden_size=shape.vision_encoder_hidden,
                num_attention_heads=shape.vision_encoder_heads,
                ffn_hidden_size=4 * shape.vision_encoder_hidden,
                image_size=IMAGE_SIZE,
                patch_size=PATCH,
            ),
            "vision_projector": block(
                "vision_projector", input_size=shape.vision_encoder_hidden, hidden_size=shape.hidden
            ),
        },
    }


def transformers_config(size: str):
    """LlavaConfig of the same model."""
    import transformers

    shape = SHAPES[size]
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.ffn,
            vocab_size=shape.vocabulary,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=shape.vision_encoder_hidden,
            num_hidden_layers=shape.vision_encoder_layers,
            num_attention_heads=shape.vision_encoder_heads,
            intermediate_size=4 * shape.vision_encoder_hidden,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
        ),
        image_token_index=shape.image_token_id,
    )


def save_model(size: str, folder: str) -> None:
    """Random weights in the hub's layout, which both sides read."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(transformers_config(size)).save_pretrained(folder)
