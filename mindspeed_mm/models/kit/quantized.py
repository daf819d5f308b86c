"""Weight-only 8-bit and 4-bit linears of the decoder, by bitsandbytes (LLM.int8, QLoRA's NF4), for inference."""

from __future__ import annotations

import importlib
import importlib.util
import logging

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from mindspeed_mm.errors import ConfigError

logger = logging.getLogger(__name__)

KINDS = ("int8", "nf4", "fp4")
LINEARS = (
    ("self_attention", "linear_qkv"),
    ("self_attention", "linear_proj"),
    ("mlp", "linear_fc1"),
    ("mlp", "linear_fc2"),
)
MIB = 2**20


class QuantizedLinear(torch.nn.Module):
    """Takes the place of one of megatron.core's parallel linears, in one process. A bias stays as it is."""

    def __init__(self, source: torch.nn.Module, kind: str) -> None:
        super().__init__()
        bnb = importlib.import_module("bitsandbytes")
        weight = source.weight.detach()
        size = {"input_features": weight.shape[1], "output_features": weight.shape[0], "bias": False}
        if kind == "int8":
            self.linear = bnb.nn.Linear8bitLt(**size, has_fp16_weights=False)
            self.linear.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            self.linear = bnb.nn.Linear4bit(**size, quant_type=kind, compute_dtype=weight.dtype)
            self.linear.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type=kind)
        self.linear.to(weight.device)
        self.bias = source.bias

    @property
    def weight(self) -> torch.Tensor:
        """The stored bytes."""
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., in] -> ([..., out], no bias left to add), in the dtype of `x`."""
        output = self.linear(x).to(x.dtype)
        return (output if self.bias is None else output + self.bias), None


def quantize_decoder(decoder: torch.nn.Module, kind: str) -> None:
    """Replace the linears of every layer of a text decoder; embeddings, head and norms stay. Logs the memory.

    Raises:
        ConfigError: unknown kind, bitsandbytes is not installed, or a layer that it cannot replace.
    """
    if kind not in KINDS:
        raise ConfigError(f"quantize {kind!r} is not known: expected one of {', '.join(KINDS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantize {kind} needs bitsandbytes, which is not installed: pip install 'mindspeed-mm[quantize]'"
        )
    before = after = 0
    for layer in decoder.decoder.layers:
        for block, name in LINEARS:
            parent = getattr(layer, block)
            source = getattr(parent, name)
            if not isinstance(source, ColumnParallelLinear | RowParallelLinear):
                raise ConfigError(
                    f"quantize {kind} works on plain linears; found {type(source).__name__} as {block}.{name}: load "
                    "the model without it"
                )
            new = QuantizedLinear(source, kind)
            before += source.weight.numel() * source.weight.element_size()
            after += new.weight.numel() * new.weight.element_size()
            setattr(parent, name, new)
    logger.info("linears of the decoder in %s: %.1f MiB, before %.1f MiB", kind, after / MIB, before / MIB)
