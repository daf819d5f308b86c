"""What differs between the versions of megatron.core, as seen by the code that calls it.

0.16 is the version that the code is written for. Older ones lack some arguments; each is listed with its first version:

- `vp_stage` of TransformerBlock, get_transformer_layer_offset and get_num_layers_to_build: 0.13. In 0.12 the number of
  the virtual stage is global state.
- `ffn_hidden_size` of MLP: 0.13. In 0.12 it comes from the config alone.
- `overlap_param_gather` of OptimizerConfig: 0.14. Before, the optimizer reads it from the DDP config alone.
- `pipeline_model_parallel_layout` of TransformerConfig (an uneven split): 0.13.
- `group` of copy_to_tensor_model_parallel_region: 0.13. In 0.12 there is one group for all layers.
- Values of parameter groups, tokens under context parallelism, the layout of the optimizer's state: core_optimizer.py.
- What fails without Transformer Engine, with numpy 2 or when groups are made anew: core_import.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from mindspeed_mm.errors import ConfigError


def takes(call: Callable, name: str) -> bool:
    """Whether the installed megatron.core's `call` has an argument of this name."""
    return name in inspect.signature(call).parameters


def known_options(call: Callable, **options: Any) -> dict[str, Any]:
    """Those of `options` that the installed megatron.core's `call` takes.

    An option that it does not take may be None, which asks for nothing.

    Raises:
        ConfigError: an option that is not None has no counterpart in the installed version.
    """
    taken = inspect.signature(call).parameters
    for name, value in options.items():
        if name not in taken and value is not None:
            raise ConfigError(
                f"{name} is {value!r}, but {call.__name__} of megatron-core {version('megatron-core')} "
                "does not have it: install a newer megatron-core, or leave this option out"
            )
    return {name: value for name, value in options.items() if name in taken}
