"""model.json, data.json and inference_llava.json of the toy, in the shape of examples/llava1.5."""

from pathlib import Path

from examples.quickstart.make_data import IMAGE_SIZE
from examples.quickstart.make_models import INITIALIZER_RANGE, MAX_POSITIONS, PATCH_SIZE, TEXT, VISION, write_json

LONGEST_SAMPLE = 256
"""Tokens of the longest sample that is trained on, at most."""


def model_config(converted: Path, vocab_size: int) -> dict:
    """All three parts train, which real LLaVA stages never do: these weights start from nothing."""
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
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "freeze": False,
                "ckpt_path": str(converted / "converted_clip.pt"),
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
            "ckpt_path": str(converted / "converted_vicuna.pt"),
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
    """Writes model.json, data_pretrain.json and data_finetune.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "model.json", model_config(converted, vocab_size))
    write_json(folder / "data_pretrain.json", data_config(data, "stage1.json", models, "plain"))
    write_json(folder / "data_finetune.json", data_config(data, "stage2.json", models, "v1"))
