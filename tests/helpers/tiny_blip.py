"""Tiny random BLIP-2 and InstructBLIP models of transformers, with tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.helpers.tiny_llava import IMAGE_ID, TEXT, VISION, decoder_config, randomised
from tests.helpers.tiny_llava import save as save_folder

QUERIES = 5
QFORMER = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 60,
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
    """An OPT, or a decoder of tests/helpers/tiny_decoders.py."""
    return transformers.OPTConfig(**OPT) if name == "opt" else decoder_config(name)


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


def instructblip(text: str = "llama"):
    """An InstructBlipForConditionalGeneration with all values random."""
    config = transformers.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=decoder(text),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_ID,
    )
    return randomised(transformers.InstructBlipForConditionalGeneration(config))


def question_words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the Q-Former's words, which puts a mark before and behind a question as BERT's does."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(4, QFORMER["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def square_processor(side: int = 28):
    """transformers' processor of BLIP."""
    return transformers.BlipImageProcessorPil(size={"height": side, "width": side})


def save(model, folder: Path) -> Path:
    """The folder of a model with its tokenizers and image processor."""
    if model.config.model_type == "instructblip":
        question_words().save_pretrained(folder / "qformer_tokenizer")
    return save_folder(model, folder, square_processor())
