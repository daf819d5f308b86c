"""Text decoders on megatron.core's parallel layers: Llama and what differs from it by the traits of a DecoderSpec.

Legend: S sequence, B batch, H hidden size, V vocabulary, T tensor-parallel size.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mindspeed_mm.models.kit.asked_rows import AskedRows
from mindspeed_mm.models.kit.context import sequence_slice
from mindspeed_mm.models.kit.kv_cache import KVCache
from mindspeed_mm.models.kit.rotary import RotaryEmbedding
from mindspeed_mm.models.kit.specs import LayerOptions, block_spec
from mindspeed_mm.models.runtime import Runtime, attention_fields, transformer_config
from mindspeed_mm.platform.core_versions import known_options
from mindspeed_mm.platform.segments import Segments
from mindspeed_mm.weights.shards import padded_vocab_size

HIDDEN_LOGIT = -1e30
"""Logit of the columns that only fill the vocabulary up to a multiple of T: their probability is 0 in every dtype."""


class TextDecoder(LanguageModule):
    """Embedding (first stage), transformer layers, final norm and head (last stage)."""

    def __init__(
        self,
        spec,
        runtime: Runtime,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        traits = spec.traits
        config = transformer_config(
            spec,
            runtime,
            num_layers=spec.num_layers,
            pipelined=True,
            qk_layernorm=traits.qk_norm,
            layernorm_zero_centered_gamma=traits.zero_centered_norm,
            **attention_fields(spec),
        )
        super().__init__(config=config)
        self.spec, self.traits = spec, traits
        self.cross = getattr(spec, "cross_attention", None)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = spec.share_embeddings_and_output_weights
        self.vocab_size = spec.language_vocab_size
        self.padded_vocab_size = padded_vocab_size(self.vocab_size, runtime.tensor_model_parallel_size)
        self.position_embeddings = None
        if pre_process and traits.position_offset is not None:
            rows = spec.max_position_embeddings + traits.position_offset
            self.position_embeddings = torch.nn.Embedding(rows, config.hidden_size)
            torch.nn.init.normal_(self.position_embeddings.weight, std=config.init_method_std)
        self.rotary = self._rotary()
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=self.padded_vocab_size,
                max_sequence_length=spec.max_position_embeddings,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=False,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(self._layer_options(), causal=True),
            pre_process=pre_process,
            post_process=post_process,
            **known_options(TransformerBlock, vp_stage=vp_stage),
        )
        self.takes_places = False
        """Whether `forward` takes places: on the last stage, where no rank holds only a part of the positions."""
        if post_process and self.cross is None and not config.sequence_parallel and len(self.decoder.layers):
            self.takes_places = True
            self.decoder.layers[-1].cross_attention = AskedRows()
        if post_process:
            self.output_layer = self._head(runtime)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def _rotary(self) -> RotaryEmbedding:
        """The tables that queries and keys are rotated by."""
        spec = self.spec
        return RotaryEmbedding(
            self.traits.rotary_channels or self.config.kv_channels,
            spec.rotary_base,
            spec.rope_scaling.model_dump() if spec.rope_scaling else None,
            max_positions=spec.max_position_embeddings,
            sections=self.traits.mrope_section,
        )

    def _head(self, runtime: Runtime) -> tensor_parallel.ColumnParallelLinear:
        """The linear that gives logits; without a weight of its own where this stage holds the embedding it is tied
        to."""
        head = tensor_parallel.ColumnParallelLinear(
            self.config.hidden_size,
            self.padded_vocab_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
        )
        # The head receives gathered (whole-sequence) hidden states, see `logits`.
        head.sequence_parallel = False
        head.allreduce_dgrad = runtime.tensor_model_parallel_size > 1
        return head

    def _layer_options(self) -> list[LayerOptions]:
        """Those of this stage's layers."""
        stage = known_options(get_num_layers_to_build, vp_stage=self.vp_stage)
        traits, first = self.traits, get_transformer_layer_offset(self.config, **stage)
        numbers = range(first, first + get_num_layers_to_build(self.config, **stage))
        return [
            LayerOptions(
                qk_norm=traits.qk_norm,
                post_norms=traits.post_norms,
                scale=traits.attention_scale,
                window=traits.window(number),
                soft_cap=traits.attention_soft_cap,
                alibi_bias_max=traits.alibi_bias_max,
                norm_bias=traits.norm_bias,
                cross=self.cross if self.cross is not None and (number + 1) % self.cross.every == 0 else None,
            )
            for number in numbers
        ]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings of legal ids, [B, S] int64 in host memory or on the device -> [S, B, H] (whole sequence on
        every tensor-parallel rank)."""
        weight = self.embedding.word_embeddings.weight
        embeddings = self.embedding(input_ids.to(weight.device, non_blocking=True), None)
        if self.traits.embedding_scale is None:
            return embeddings
        # transformers rounds the factor to the type of the weights first.
        return embeddings * torch.tensor(self.traits.embedding_scale, dtype=weight.dtype).item()

    def forward(
        self,
        hidden: torch.Tensor | None,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        segments: Segments | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Transformer layers of this stage.

        Args:
            hidden: [S, B, H] embeddings (first stage) or None (later stages, see set_input_tensor).
            position_ids: [B or 1, S] int64, of the whole sequence like `hidden` and the mask; [3, B or 1, S] for time,
                height and width where the decoder's rotary positions have sections.
            attention_mask: complete bool mask [B or 1, 1, S, S], True = may attend; None = causal.
            segments: the sequences of a single row (B is 1), instead of a mask.
            memory, memory_mask: features [K, B, W] for gated cross-attention, the same on every rank and stage, and
                bool [B, 1, S, K] of the whole sequence, True = may attend.
            places: the positions of this rank's slice that are asked for, [n] int64 counted column by column; None:
                all. Only where `takes_places`.

        Returns:
            [n, 1, H] of the places, or [S, B, H], split along S over the context-parallel ranks and, under sequence
            parallelism, over the tensor-parallel ranks.
        """
        if hidden is not None:
            hidden = sequence_slice(self._placed(hidden, position_ids), 0)
        if hidden is not None and self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return self.decoder(
            hidden_states=hidden,
            attention_mask=attention_mask,
            rotary_pos_emb=self._cos_sin(position_ids, segments),
            packed_seq_params=segments,
            context=memory,
            context_mask=places if memory_mask is None else sequence_slice(memory_mask, 2),
        )

    def _placed(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of words and features [S, B, H] with those of their positions, where these are learned."""
        if self.position_embeddings is None:
            return hidden
        table = self.position_embeddings
        places = position_ids.to(table.weight.device, non_blocking=True) + self.traits.position_offset
        return hidden + table(places).transpose(0, 1)

    def _cos_sin(self, position_ids: torch.Tensor, segments: Segments | None) -> torch.Tensor | None:
        """Rotation of this rank's slice of the sequence; None where none rotates."""
        if not self.traits.rotary:
            return None
        long = self.rotary.long_positions(position_ids.shape[-1], segments)
        if isinstance(long, torch.Tensor):
            long = sequence_slice(long, 0)
        return self.rotary.cos_sin(sequence_slice(position_ids, -1), self.config.params_dtype, long)

    def gather_sequence(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `forward` returned, [S, B, H], no longer split over the tensor-parallel ranks."""
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden

    def picked(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """What `forward` returned at some positions, [n, H]: `places` [n] int64 count them column by column, best in
        host memory."""
        return self.gather_sequence(hidden).flatten(0, 1)[places.to(hidden.device, non_blocking=True)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary-parallel logits [..., H] -> [..., V_padded / T] of gathered hidden states."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        if self.traits.final_soft_cap is not None:
            logits = torch.tanh(logits / self.traits.final_soft_cap) * self.traits.final_soft_cap
        return self._hide_padding(logits)

    def _hide_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Give the columns beyond the vocabulary probability zero."""
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        valid = self.vocab_size - first
        if valid >= logits.shape[-1]:
            return logits
        columns = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill(columns >= valid, HIDDEN_LOGIT if logits.dtype != torch.float16 else -6e4)

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """Hidden states from the previous pipeline stage."""
        self.decoder.set_input_tensor(input_tensor)

    def new_cache(self) -> KVCache:
        """Key/value cache of this stage's layers, without memory yet."""
        attention = self.decoder.layers[0].self_attention
        parameter = attention.linear_proj.weight
        return KVCache(
            len(self.decoder.layers),
            attention.num_query_groups_per_partition,
            attention.hidden_size_per_attention_head,
            self.config.params_dtype,
            parameter.device,
        )

    def use_cache(self, cache: KVCache | None) -> None:
        """Attend through `cache` in the next forward passes, or not at all (None)."""
        for index, layer in enumerate(self.decoder.layers):
            layer.self_attention.core_attention.cache = cache
            layer.self_attention.core_attention.cache_layer = index
