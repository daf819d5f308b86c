"""The planner's view of a real run (real_run.Work), and the small models that are compared."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from tests.planning.real_run import Work

TEXT = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "ffn_hidden_size": 352,
    "language_vocab_size": 1024,
    "max_position_embeddings": 2048,
}
VISION_ENCODER = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 256,
    "patch_size": 14,
    "image_size": 112,
}
STAGE_1 = ("vision_projector",)
STAGE_2 = ("text_decoder", "vision_projector")
EVERYTHING = (*STAGE_2, "vision_encoder")


SIGLIP = VISION_ENCODER | {"model_id": "siglip"}
PATCHES = VISION_ENCODER | {"model_id": "qwen2_5_vl", "full_attention_layers": [1]}
del PATCHES["image_size"]
TILES = {"model_id": "llava_next", "image_grid_pinpoints": [[112, 224], [224, 112]]}
MERGER = {"model_id": "patch_merger", "vision_start_token_id": 7, "vision_end_token_id": 8}
QFORMER = {"model_id": "qformer", "width": 96, "num_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 160}
QFORMER |= {"num_query_tokens": 16}
OTHERS = {
    "SigLIP and Qwen3": ("llava", {"model_id": "qwen3"}, SIGLIP, {}),
    "Gemma 2": ("llava", {"model_id": "gemma2", "language_max_sequence_length": 2048}, VISION_ENCODER, {}),
    "LLaVA-NeXT": ("llava_next", {}, VISION_ENCODER, TILES),
    "Qwen2.5-VL": ("qwen2_5_vl", {"model_id": "qwen2", "mrope_section": [2, 3, 3]}, PATCHES, MERGER),
    "BLIP-2": ("blip2", {}, VISION_ENCODER | {"model_id": "eva_vit"}, QFORMER),
}
"""(model_id, further keys of text_decoder, vision_encoder, further keys of vision_projector)."""


def other_model(name: str, trained: tuple[str, ...] = EVERYTHING) -> dict:
    """A model.json of random weights of another family or with other parts."""
    model_id, decoder, vision_encoder, projector = OTHERS[name]
    made = model(trained, **decoder)
    images = made["image_encoder"]
    images["vision_encoder"] = vision_encoder | {"freeze": "vision_encoder" not in trained, "fresh": True}
    images["vision_projector"] |= projector
    return made | ({} if model_id == "llava" else {"model_id": model_id})


CROSS = {"every": 2, "memory_size": VISION_ENCODER["hidden_size"], "media_token_id": 7}
OTTER = [
    {"names": "decoder.layers.*.gated_cross.*", "freeze": False},
    {"names": "embedding.word_embeddings.weight", "freeze": False, "rows": [7, 8]},
]
"""What Otter trains of its decoder."""


def flamingo_model(trained: tuple[str, ...] = EVERYTHING, every: int = 2, **decoder: Any) -> dict:
    """A Flamingo of random weights; `decoder` are further keys of its text_decoder."""
    made = model(trained, cross_attention=CROSS | {"every": every}, **decoder)
    images = made["image_encoder"]
    images["vision_encoder"]["select_layer"] = -1
    width = {"input_size": CROSS["memory_size"], "hidden_size": CROSS["memory_size"]}
    images["vision_projector"] |= {"model_id": "perceiver", "num_layers": 2, "num_latents": 16} | width
    return made | {"model_id": "flamingo"}


def layers_model(**encoder: Any) -> dict:
    """Features of several layers and a projector with ReLU and without biases; `encoder` are further keys of its
    vision_encoder."""
    made = model(EVERYTHING)
    images = made["image_encoder"]
    images["vision_encoder"] |= {"select_layer": [2, 0, 1]} | encoder
    width = 3 * VISION_ENCODER["hidden_size"]
    images["vision_projector"] |= {"input_size": width, "activation_func": "relu", "add_bias_linear": False}
    return made


def model(trained: tuple[str, ...] = STAGE_2, **decoder: Any) -> dict:
    """A model.json of random weights; `decoder` are further keys of its text_decoder."""

    def block(kind: str, shape: dict) -> dict:
        return shape | {"freeze": kind not in trained, "fresh": True}

    projector = {"input_size": VISION_ENCODER["hidden_size"], "hidden_size": TEXT["hidden_size"]}
    return {
        "text_decoder": block("text_decoder", TEXT | decoder),
        "image_encoder": {
            "vision_encoder": block("vision_encoder", VISION_ENCODER),
            "vision_projector": block("vision_projector", projector),
        },
    }


def planned(work: Work):
    """The TrainingJob of a real run."""
    from mindspeed_mm.platform import get_platform

    get_platform("cpu")
    from megatron.driver import arguments
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.planning.job import PlannedRow
    from mindspeed_mm.planning.planner import job_of

    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    together = max(1, work.packed)
    line = f"--lr 1e-4 --train-iters 9 --seq-length {work.tokens * together} {work.flags}"
    args = arguments.from_namespace(parser.parse_args(line.split()), world_size=work.world_size)
    row = PlannedRow(
        positions=work.tokens * together,
        lengths=(work.tokens,) * together,
        images=together,
        supervised=work.supervised * together,
    )
    return job_of(args, load_model_spec(work.model), row, torch.device("cpu").type)
