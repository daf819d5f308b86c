"""What commands import on their way, imported once: processes that are forked behind it start in a moment.

pool.py, ended_runs.py and killed_runs.py fork their ranks. Without this, each rank of theirs that trains imports 500
further modules, torch's compiler and matplotlib among them, for 8 s.
"""

import gc
import importlib

import torch
from PIL import Image

from mindspeed_mm.platform import get_platform

NAMES = (
    *(
        "torch._dynamo",
        "torch.utils.tensorboard",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "transformers",
    ),
    *("mindspeed_mm.cli.evaluate", "mindspeed_mm.cli.infer", "mindspeed_mm.cli.train", "mindspeed_mm.trainer.run"),
    *("mindspeed_mm.trainer.curves", "mindspeed_mm.objectives.sft", "evaluation.model_engine", "evaluation.runner"),
    *("megatron.driver.loop", "megatron.driver.setup", "megatron.driver.validation", "megatron.core.optimizer"),
    *("megatron.core.models.gpt", "mindspeed_mm.planning.planner"),
)

torch.set_num_threads(1)
get_platform("cpu")  # before megatron.core is imported
for name in NAMES:
    importlib.import_module(name)
from mindspeed_mm.models.spec import all_families  # noqa: E402  the platform comes first
from mindspeed_mm.registry import find_all  # noqa: E402

all_families()
for slot in ("text_decoder", "vision_encoder", "vision_projector"):
    find_all(f"mindspeed_mm.models.{slot}", "PART")
Image.init()
gc.freeze()  # it stays, and is not looked at again
