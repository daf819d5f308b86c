"""Tiny random BLIP-2 and InstructBLIP models of transformers, with tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path

import transformers

from tests.helpers.tiny_llava import IMAGE_ID, TEXT, VISION, randomised
from tests.helpers.tiny_llava import save as save_folder

QUERIES = 5
QFORMER = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
OPT = {
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": TEXT["vocab_size"],
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def decoder(name: str) -> transformers.PreTrainedConfig:
    """An OPT or a Llama."""
    return transformers.OPTConfig(**OPT) if name == "opt" else transformers.LlamaConfig(**TEXT, pad_token_id=0)


def blip2(text: str = "opt"):
    """A Blip2ForConditionalGeneration with all values random."""
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=decoder(text),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_ID,
    )
    return randomised(transformers.Blip2ForConditionalGeneration(config))


def square_processor(side: int = 28):
    """transformers' processor of BLIP."""
    return transformers.BlipImageProcessorPil(size={"height": side, "width": side})


def save(model, folder: Path) -> Path:
    """The folder of a model with its tokenizer and image processor."""
    return save_folder(model, folder, square_processor())
