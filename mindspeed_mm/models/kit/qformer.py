"""BLIP-2's bridge on megatron.core's parallel linears: each tensor-parallel rank has a share of the heads.

Legend: R rows of pixels, Q queries, L words of an instruction, S = Q + L, P features of a row, W width of the Q-Former,
Hv of the encoder, H of the decoder.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.kit.layer_list import LayerList
from mindspeed_mm.models.media import Features, Media
from mindspeed_mm.models.runtime import Runtime, encoder_config, linears_config
from mindspeed_mm.platform import current_platform


class QFormerProjector(MegatronModule):
    """The encoder's final norm, learned queries that attend to its features, and a linear."""

    def __init__(self, spec, runtime: Runtime) -> None:
        config = encoder_config(spec, runtime, hidden_size=spec.width)
        super().__init__(config=config)
        self.spec = spec
        self.vision_norm = torch.nn.LayerNorm(spec.input_size, eps=spec.vision_norm_epsilon)
        self.query_tokens = torch.nn.Parameter(torch.empty(1, spec.num_query_tokens, spec.width))
        torch.nn.init.normal_(self.query_tokens, std=config.init_method_std)
        if spec.reads_instructions:
            self.text_embeddings = torch.nn.Embedding(spec.text_vocab_size, spec.width)
            self.text_positions = torch.nn.Embedding(spec.text_positions, spec.width)
            for table in (self.text_embeddings, self.text_positions):
                torch.nn.init.normal_(table.weight, std=config.init_method_std)
        self.input_norm = torch.nn.LayerNorm(spec.width, eps=spec.layernorm_epsilon)
        self.encoder = LayerList(config, (QFormerLayer(config, spec, number) for number in range(spec.num_layers)))
        self.linear_projection = _column(config, spec.width, spec.hidden_size, gather_output=True)

    def forward(self, features: Features) -> Features:
        """[R * P, Hv] -> [R * Q, H]

        Raises DataError where the projector reads questions and the items have none.
        """
        rows = sum(features.media.rows)
        memory = self.vision_norm(features.values.unflatten(0, (rows, -1)))
        queries = self.query_tokens.expand(rows, -1, -1)
        words, mask = self._words(features.media, rows) if self.spec.reads_instructions else (None, None)
        inputs = queries if words is None else torch.cat((queries, words), dim=1)
        hidden = self.encoder(self.input_norm(inputs), memory, mask)[:, : queries.shape[1]]
        values = scaled(self.linear_projection(hidden.flatten(0, 1))[0], self.spec.feature_scale)
        counts = tuple(self.spec.num_query_tokens * count for count in features.media.rows)
        return Features(values, counts, features.media)

    def project_blank(self, features: Features) -> Features:
        """`forward` of a blank image, which has no question: one word of padding takes its place, so that the same
        backward pass runs."""
        rows = sum(features.media.rows)
        asked = ((self.spec.text_pad_token_id,),) * rows if self.spec.reads_instructions else ()
        return self(replace(features, media=replace(features.media, instructions=asked)))

    def _words(self, media: Media, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The instruction of each row, embedded, [R, L, W], and which positions of queries and words may be attended
        to, bool [R, 1, S, S]."""
        pad, device = self.spec.text_pad_token_id, self.query_tokens.device
        given = media.instructions
        if len(given) != rows or not all(0 < len(ids) <= self.spec.text_positions for ids in given):
            raise DataError(
                f"{rows} images came with instructions of {[len(ids) for ids in given]} words; expected one "
                f"instruction of 1 to {self.spec.text_positions} words for each image: shorten the question"
            )
        lengths = torch.tensor([len(ids) for ids in given])
        ids = torch.full((rows, int(lengths.max())), pad)
        for row, own in enumerate(given):
            ids[row, : len(own)] = torch.tensor(own)
        queries = torch.ones(rows, self.spec.num_query_tokens, dtype=torch.bool)
        seen = torch.cat((queries, torch.arange(ids.shape[1]) < lengths[:, None]), dim=1)
        ids, seen = (x.to(device, non_blocking=True) for x in (ids, seen))
        words = self.text_embeddings(ids) + self.text_positions.weight[: ids.shape[1]]
        return words, seen[:, None, None].expand(-1, -1, seen.shape[1], -1)


class PatchConcat(MegatronModule):
    """The encoder's final norm without weights, and a linear on some neighbouring patches of a row at a time; the class
    token is left out (MiniGPT-4 without a Q-Former)."""

    def __init__(self, spec, runtime: Runtime) -> None:
        config = linears_config(spec, runtime, num_layers=1)
        super().__init__(config=config)
        self.spec = spec
        self.vision_norm = torch.nn.LayerNorm(spec.input_size, eps=spec.vision_norm_epsilon, elementwise_affine=False)
        inputs, outputs = spec.sizes[0]
        self.linear_projection = _column(config, inputs, outputs, gather_output=True)

    def forward(self, features: Features) -> Features:
        """[R * (1 + P), Hv] -> [R * P / patches, H]"""
        rows, patches = sum(features.media.rows), self.spec.patches
        found = self.vision_norm(features.values.unflatten(0, (rows, -1)))[:, 1:]
        inputs = found.unflatten(1, (-1, patches)).flatten(2)
        values = scaled(self.linear_projection(inputs.flatten(0, 1))[0], self.spec.feature_scale)
        counts = tuple(inputs.shape[1] * count for count in features.media.rows)
        return Features(values, counts, features.media)


def scaled(values: torch.Tensor, factor: float | None) -> torch.Tensor:
    """`values` times a factor, which is rounded to their type first, as transformers does with Gemma's."""
    return values if factor is None else values * torch.tensor(factor, dtype=values.dtype).item()


class QFormerLayer(MegatronModule):
    """Self-attention, cross-attention in every second layer, MLP; each with its norm behind the residual. Words have an
    MLP of their own and do not see the features."""

    def __init__(self, config: TransformerConfig, spec, number: int) -> None:
        super().__init__(config=config)
        self.self_attention = BertAttention(config, config.hidden_size)
        crosses = number % spec.cross_attention_every == 0
        self.cross_attention = BertAttention(config, spec.input_size) if crosses else None
        self.mlp = BertMLP(config)
        self.text_mlp = BertMLP(config) if spec.reads_instructions else None
        self.queries = spec.num_query_tokens

    def forward(self, hidden: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[R, S, W], [R, P, Hv] -> [R, S, W]"""
        hidden = self.self_attention(hidden, hidden, mask)
        queries, words = hidden[:, : self.queries], hidden[:, self.queries :]
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, memory)
        queries = self.mlp(queries)
        return queries if self.text_mlp is None else torch.cat((queries, self.text_mlp(words)), dim=1)


class BertAttention(MegatronModule):
    """Multi-head attention to `memory`, added to its input, then a norm."""

    def __init__(self, config: TransformerConfig, memory_size: int) -> None:
        super().__init__(config=config)
        size = config.kv_channels * config.num_attention_heads
        self.linear_q = _column(config, config.hidden_size, size)
        self.linear_k = _column(config, memory_size, size)
        self.linear_v = _column(config, memory_size, size)
        self.linear_proj = _row(config, size, config.hidden_size)
        self.norm = torch.nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.platform = current_platform()

    def forward(self, hidden: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend.

        Args:
            hidden: [R, S, W]; memory: [R, K, width of the memory].
            mask: bool [R, 1, S, K], True = may attend; None: to all.

        Returns:
            [R, S, W]
        """
        channels = self.config.kv_channels
        query, key, value = (
            linear(x)[0].unflatten(-1, (-1, channels)).transpose(1, 2)
            for linear, x in ((self.linear_q, hidden), (self.linear_k, memory), (self.linear_v, memory))
        )
        output = self.platform.attention(query, key, value, mask=mask, causal=False, scale=channels**-0.5, dropout=0.0)
        return self.norm(hidden + self.linear_proj(output.transpose(1, 2).flatten(2))[0])


class BertMLP(MegatronModule):
    """Linear, GELU, linear, added to its input, then a norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.linear_fc1 = _column(config, config.hidden_size, config.ffn_hidden_size)
        self.linear_fc2 = _row(config, config.ffn_hidden_size, config.hidden_size)
        self.norm = torch.nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, S, W] -> [R, S, W]"""
        inner = self.config.activation_func(self.linear_fc1(hidden)[0])
        return self.norm(hidden + self.linear_fc2(inner)[0])


def _column(config: TransformerConfig, inputs: int, outputs: int, *, gather_output: bool = False):
    options = {"config": config, "init_method": config.init_method, "bias": True, "skip_bias_add": False}
    return ColumnParallelLinear(inputs, outputs, gather_output=gather_output, **options)


def _row(config: TransformerConfig, inputs: int, outputs: int):
    init = config.output_layer_init_method
    options = {"config": config, "init_method": init, "bias": True, "skip_bias_add": False}
    return RowParallelLinear(inputs, outputs, input_is_parallel=True, **options)
