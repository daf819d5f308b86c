"""Untrained CLIP and Llama folders for the study of boxes, small enough for a CPU, and what they read."""

import json
import math
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from examples.grounding.digits_data import ANSWER, QUESTION, SIDE, STEP, expression
from examples.quickstart.make_data import NAMES
from examples.quickstart.make_models import DELIMITER, SYSTEM_TEXT, make_tokenizer, write_json

PATCH_SIZE = 8
WIDTH = 64
VISION_LAYERS, TEXT_LAYERS = 2, 3
HEADS = 4
INITIALIZER_RANGE = 0.08  # the usual 0.02 is for models 60 times as wide
MAX_POSITIONS = 128
PAPER, INK = 1.0, 0.9
"""Mean and standard deviation of the image processor: white paper is zero, as most of a canvas is white, and grey
counts three times, once in each channel."""


def tokenizer_lines() -> list[str]:
    """All questions and answers as the template v1 renders them; see training_lines of the quickstart.

    A phrase is one piece, in questions and answers alike. So is a number, with the bracket before it: the first number
    follows the phrase at once.
    """
    lines = []
    for digit in range(len(NAMES)):
        for number in (f"{place / SIDE:.3f}" for place in range(0, SIDE + 1, STEP)):
            box = DELIMITER.join((f"[{number},", f"{number},", number, "]"))
            line = DELIMITER.join((SYSTEM_TEXT, " USER:", f" {QUESTION} ASSISTANT:", f" {ANSWER}"))
            for place, words in (("<expr>", expression(digit)), ("<boxes>", box), ("in <image>", "in")):
                line = line.replace(f" {place}", f"{DELIMITER} {words}{DELIMITER}")
            lines.append(line)
    return lines


def make_models(folder: Path, seed: int) -> dict[str, int]:
    """Writes clip/ and vicuna/ (with its tokenizer) into `folder`; returns the sizes."""
    transformers_logging.disable_progress_bar()
    vocabulary = make_tokenizer(folder / "vicuna", tokenizer_lines(), split_digits=False)
    torch.manual_seed(seed)
    text = LlamaForCausalLM(llama_config(vocabulary))
    text.save_pretrained(folder / "vicuna")
    vision = CLIPVisionModel(clip_config())
    with torch.no_grad():
        (places,) = (value for name, value in vision.named_parameters() if name.endswith("position_embedding.weight"))
        places[1:] = waves(SIDE // PATCH_SIZE, WIDTH)
    vision.save_pretrained(folder / "clip")
    square = {"height": SIDE, "width": SIDE}
    processor = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE}}
    processor |= {"resample": 3, "do_center_crop": True, "crop_size": square, "do_convert_rgb": True}
    processor |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    write_json(
        folder / "clip/preprocessor_config.json", processor | {"image_mean": [PAPER] * 3, "image_std": [INK] * 3}
    )
    return {
        "vocabulary": vocabulary,
        "vicuna parameters": text.num_parameters(),
        "clip parameters": vision.num_parameters(),
    }


def clip_config() -> CLIPVisionConfig:
    """The encoder's sizes."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH_SIZE,
        hidden_act="quick_gelu",
        initializer_range=INITIALIZER_RANGE,
    )


def llama_config(vocabulary: int) -> LlamaConfig:
    """The decoder's sizes."""
    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        initializer_range=INITIALIZER_RANGE,
        vocab_size=vocabulary,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column: [side * side, width] float32, patches in reading order.

    CLIP's small random ones are hardly seen beside the patches' content.
    """
    frequencies = math.pi * torch.logspace(math.log10(1 / (2 * side)), 0, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    along = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows, columns = along[:, None].expand(side, side, -1), along[None].expand(side, side, -1)
    return torch.cat((rows, columns), dim=-1).reshape(side * side, width)


def model_config(models: Path) -> dict:
    """model.json: all three parts train, which real LLaVA stages never do, since these weights start from nothing."""
    return {
        "model_id": "llava",
        "image_encoder": {
            "vision_encoder": {
                "model_id": "clip",
                "select_layer": -1,
                "freeze": False,
                "ckpt_path": str(models / "clip"),
            },
            "vision_projector": {
                "model_id": "mlp",
                "input_size": WIDTH,
                "ffn_hidden_size": WIDTH,
                "hidden_size": WIDTH,
                "init_method_std": INITIALIZER_RANGE,
                "freeze": False,
                "ckpt_path": None,
            },
        },
        "text_decoder": {"freeze": False, "ckpt_path": str(models / "vicuna")},
    }


def data_config(lessons: Path, images: Path, models: Path) -> dict:
    """data_rec.json of this folder with a file of grounding items."""
    config = json.loads(Path(__file__).with_name("data_rec.json").read_text(encoding="utf-8"))
    param = config["dataset_param"]
    block = param["basic_parameters"]
    del block["grounding"]["template_string"]
    param["dataset_type"] = "grounding"
    block |= {"data_path": str(lessons), "data_folder": str(images)}
    param["preprocess_parameters"] = {"image_processer_path": str(models / "clip"), "pad2square": True}
    param["tokenizer_config"]["from_pretrained"] = str(models / "vicuna")
    return config
