"""What tests on several ranks need, imported once for all their processes: see pool.py."""

import gc
import importlib

import torch

from mindspeed_mm.platform import get_platform

torch.set_num_threads(1)
get_platform("cpu")  # before megatron.core is imported
for name in ("torch.utils.tensorboard", "evaluation.model_engine", "evaluation.runner", "mindspeed_mm.cli.train"):
    importlib.import_module(name)
for name in ("mindspeed_mm.trainer.run", "tests.helpers.golden_training", "transformers"):
    importlib.import_module(name)
gc.freeze()
