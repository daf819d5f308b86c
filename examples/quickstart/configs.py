"""model.json, data.json and inference_llava.json of the toy, in the shape of examples/llava1.5."""

import copy
from pathlib import Path

from examples.quickstart.make_data import IMAGE_SIZE
from examples.quickstart.make_models import INITIALIZER_RANGE, MAX_POSITIONS, PATCH_SIZE, TEXT, VISION, write_json

LONGEST_SAMPLE = 256
"""Tokens of the longest sample that is trained on, at most."""


def model_config(vision: Path, text: Path, vocab_size: int, image_size: int = IMAGE_SIZE) -> dict:
    """All three parts train, which real LLaVA stages never do: these weights start from nothing.

    `vision` and `text` are the weights of both, in any layout.
    """
    return {
        "model_id": "llava",
        "text_encoder": None,
        "video_encoder": None,
        "image_encoder": {
            "vision_encoder": {
                "model_id": "clip",
                "num_layers": VISION["num_hidden_layers"],
                "hidden_size": VISION["hidden_size"],
                "ffn_hidden_size": VISION["intermediate_size"],
                "num_attention_heads": VISION["num_attention_heads"],
                "image_size": image_size,
                "patch_size": PATCH_SIZE,
                "freeze": False,
                "ckpt_path": str(vision),
            },
            "vision_projector": {
                "model_id": "mlp",
                "input_size": VISION["hidden_size"],
                "ffn_hidden_size": TEXT["hidden_size"],
                "hidden_size": TEXT["hidden_size"],
                "init_method_std": INITIALIZER_RANGE,
                "freeze": False,
                "ckpt_path": None,
            },
        },
        "text_decoder": {
            "num_layers": TEXT["num_hidden_layers"],
            "hidden_size": TEXT["hidden_size"],
            "num_attention_heads": TEXT["num_attention_heads"],
            "num_query_groups": TEXT["num_attention_heads"],
            "ffn_hidden_size": TEXT["intermediate_size"],
            "language_vocab_size": vocab_size,
            "max_position_embeddings": MAX_POSITIONS,
            "language_max_sequence_length": LONGEST_SAMPLE,
            "freeze": False,
            "ckpt_path": str(text),
        },
    }


def data_config(data: Path, records: str, models: Path, template: str) -> dict:
    """Images and records of one stage."""
    return {
        "dataset_param": {
            "dataset_type": "multimodal",
            "basic_parameters": {"data_path": str(data / records), "data_folder": str(data / "images")},
            "preprocess_parameters": {
                "image_reader_type": "CLIPImageProcessor",
                "image_processer_path": str(models / "clip"),
            },
            "tokenizer_config": {
                "hub_backend": "hf",
                "autotokenizer_name": "AutoTokenizer",
                "from_pretrained": str(models / "vicuna"),
            },
            "template_name": template,
        },
        "dataloader_param": {
            "dataloader_mode": "sampler",
            "sampler_type": "BaseRandomBatchSampler",
            "shuffle": True,
            "drop_last": True,
            "collate_param": {"model_name": "llava", "pad_token_id": 0},
        },
    }


def write_configs(folder: Path, data: Path, models: Path, converted: Path, vocab_size: int) -> None:
    """Writes model.json and the data configs of the two stages and of the third act into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = converted / "converted_clip.pt", converted / "converted_vicuna.pt"
    write_json(folder / "model.json", model_config(*weights, vocab_size))
    write_json(folder / "data_pretrain.json", data_config(data, "stage1.json", models, "plain"))
    write_json(folder / "data_finetune.json", data_config(data, "stage2.json", models, "v1"))
    write_json(folder / "data_parity.json", data_config(data, "parity.json", models, "v1"))


def lora_config(model: dict, trained: Path) -> dict:
    """The model.json of the third act: adapters of the decoder, on the weights of a save folder."""
    model = copy.deepcopy(model)
    for block in (*model["image_encoder"].values(), model["text_decoder"]):
        block |= {"freeze": True, "ckpt_path": str(trained)}
    model["text_decoder"] |= {"freeze": False, "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"}}
    return model
