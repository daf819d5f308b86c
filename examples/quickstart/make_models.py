"""Tiny, randomly initialised models in the public folder formats, and a tokenizer trained on the toy set's own text.

`clip/` looks like a CLIP folder and `vicuna/` like a Vicuna folder of the hub, so that the quickstart starts where a
real run starts: at weights somebody else wrote.
"""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from examples.quickstart.make_data import IMAGE_SIZE

VOCABULARY = 1024  # 3 control symbols, 256 bytes, the rest from the text
PATCH_SIZE = 8
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8}
MAX_POSITIONS = 512
INITIALIZER_RANGE = 0.08  # about 1 / sqrt(hidden size); the usual 0.02 is for models 30 times as wide
# Mean and standard deviation of OpenAI's CLIP preprocessing (preprocessor_config.json of clip-vit-large-patch14-336).
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# The system text of LLaVA's template v1, and the words around it; every prompt starts with them.
SYSTEM_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
DELIMITER = "\t"


def training_lines(records: list[dict]) -> list[str]:
    """The set's conversations as template v1 renders them, one line each.

    DELIMITER stands between a question's lines, before and after a role and before an answer: no piece may span those,
    so that a question and its answer never share a token.
    """
    lines = []
    for record in records:
        segments = [SYSTEM_TEXT, " USER:"]
        for message in record["conversations"]:
            if message["from"] == "human":
                first, *others = message["value"].replace("<image>", "").split("\n")
                segments += [f" {first}" if first else "", *others, " ASSISTANT:"]
            else:
                segments += [f" {message['value']}", "USER:"]
        lines.append(DELIMITER.join(segments))
    return lines


def make_tokenizer(folder: Path, lines: list[str], *, split_digits: bool = True) -> int:
    """A SentencePiece BPE model with the settings of Llama's, saved like a slow Llama tokenizer; returns its size.

    Without `split_digits` a whole number may be one piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=split_digits,
        split_by_unicode_script=False,
        split_by_whitespace=False,
        max_sentencepiece_length=200,
        pretokenization_delimiter=DELIMITER,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "padding_side": "right",
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).vocab_size()


def make_clip(folder: Path, seed: int, image_size: int = IMAGE_SIZE) -> int:
    """A CLIPVisionModel folder (config, safetensors, preprocessor) for images of so many pixels a side.

    Returns its number of parameters.
    """
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        **VISION,
        image_size=image_size,
        patch_size=PATCH_SIZE,
        hidden_act="quick_gelu",
        initializer_range=INITIALIZER_RANGE,
    )
    model = CLIPVisionModel(config)
    model.save_pretrained(folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": image_size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": image_size, "width": image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "do_convert_rgb": True,
        },
    )
    return model.num_parameters()


def make_llama(folder: Path, vocab_size: int, seed: int) -> int:
    """A LlamaForCausalLM folder (config, safetensors); returns its number of parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **TEXT,
        initializer_range=INITIALIZER_RANGE,
        vocab_size=vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def make_models(folder: Path, data: Path, seed: int) -> dict[str, int]:
    """Writes clip/ and vicuna/ (with its tokenizer) into `folder` from the set in `data`; returns the sizes."""
    transformers_logging.disable_progress_bar()
    records = [
        record
        for name in ("stage1.json", "stage2.json")
        for record in json.loads((data / name).read_text(encoding="utf-8"))
    ]
    vocab_size = make_tokenizer(folder / "vicuna", training_lines(records))
    return {
        "vocabulary": vocab_size,
        "vicuna parameters": make_llama(folder / "vicuna", vocab_size, seed),
        "clip parameters": make_clip(folder / "clip", seed),
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
