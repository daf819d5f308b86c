"""MLP projector between the vision encoder and the decoder.

Legend: F features, Hv width of the encoder, H width of the decoder.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm.models.kit.norm import RMSNorm
from mindspeed_mm.models.media import Features
from mindspeed_mm.models.runtime import Runtime, linears_config

MERGER_EPSILON = 1e-6
"""Of the merger's norm; transformers has the number in its code."""


class MLPProjector(MegatronModule):
    """Linears with an activation between them (LLaVA's linear and mlpNx_gelu, and what transformers makes of it)."""

    def __init__(self, spec, runtime: Runtime) -> None:
        config = linears_config(spec, runtime, num_layers=spec.num_layers)
        super().__init__(config=config)
        self.encoder = Linears(config, spec.sizes, bias=spec.add_bias_linear)

    def forward(self, features: Features) -> Features:
        """[F, Hv] -> [F, H]"""
        return features.of(self.encoder(features.values))


class PatchMerger(MLPProjector):
    """A norm of each patch, then the linears on each square of patches together (Qwen2-VL's merger)."""

    def __init__(self, spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        self.square = spec.spatial_merge_size**2
        self.norm = RMSNorm(spec.input_size, MERGER_EPSILON)

    def forward(self, features: Features) -> Features:
        """[F, Hv] -> [F / square, H]; the patches of a square stand together."""
        values = self.encoder(self.norm(features.values).view(-1, self.square * features.values.shape[1]))
        return Features(values, tuple(count // self.square for count in features.counts), features.media)


class Linears(MegatronModule):
    """linear_fc1 .. linear_fcN of sizes (input, output).

    Pairs are split over the tensor-parallel ranks as in a transformer's MLP: the first by rows of its weight, the
    second by columns. A last one without a partner is split by rows, and its outputs are gathered.
    """

    def __init__(self, config: TransformerConfig, sizes: list[tuple[int, int]], *, bias: bool = True) -> None:
        super().__init__(config=config)
        self.names = [f"linear_fc{number}" for number in range(1, len(sizes) + 1)]
        last = len(sizes) - 1
        for number, size in enumerate(sizes):
            init = config.output_layer_init_method if 0 < number == last else config.init_method
            common = {"config": config, "init_method": init, "bias": bias, "skip_bias_add": False}
            if number % 2:
                linear = RowParallelLinear(*size, input_is_parallel=True, **common)
            else:
                linear = ColumnParallelLinear(*size, gather_output=number == last, **common)
            self.add_module(self.names[number], linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., input of the first] -> [..., output of the last]"""
        for name in self.names:
            if name != self.names[0]:
                hidden = self.config.activation_func(hidden)
            hidden, _ = getattr(self, name)(hidden)
        return hidden
