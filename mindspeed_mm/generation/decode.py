"""The model's passes: prompts into the key/value cache, then one token a row, on any tensor- and pipeline-parallel
layout.

Every rank runs the same passes in the same order; each returns the same logits on all of them.

Legend: R rows, S prompt length, V vocabulary, F features of an item, H decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from megatron.core import parallel_state

from mindspeed_mm.errors import ConfigError, ContextError
from mindspeed_mm.generation.single_token import SingleTokenStep
from mindspeed_mm.models.fusion import image_positions, scatter_features
from mindspeed_mm.models.interaction_memory import Memory, TextView
from mindspeed_mm.models.kit.kv_cache import KVCache
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.memory import MediaPlaces, pad_memory, row_memory
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.platform import current_platform


class ItemFeatures(NamedTuple):
    """What is kept of an image while its sequence is generated."""

    projected: torch.Tensor | None
    """[F, H] for the decoder; None on later pipeline stages. Features beside the text are on all stages."""
    shown: torch.Tensor | None = None
    """[F', W] for an interaction in front of the head; None without one and on other stages than the last."""


class Decoder:
    """One model with its cache. Rows 0..R-1 of the cache are in use; the caller keeps the books."""

    def __init__(self, vlm: VLM) -> None:
        if vlm.config.context_parallel_size > 1 or vlm.config.sequence_parallel:
            raise ConfigError(
                "generation decodes one token at a time, which context and sequence parallelism cannot split: found "
                f"context-parallel size {vlm.config.context_parallel_size} and sequence_parallel "
                f"{vlm.config.sequence_parallel}, use 1 and False"
            )
        self.vlm = vlm
        self.cache = vlm.text_decoder.new_cache()
        self._text_reader, self._reader_layer = None, 0
        if vlm.interaction is not None and vlm.interaction.reads_text:
            self._text_reader, self._reader_layer = vlm.interaction, vlm.interaction.extend(self.cache)
        self.packs = (
            current_platform().packs_prompts
            and vlm.text_decoder.cross is None
            and vlm.text_decoder.traits.attention_soft_cap is None
            and self._text_reader is None
        )
        """Whether prompts stand one behind the other in a pass; else they are padded to the longest."""
        self._single_token = SingleTokenStep(vlm.text_decoder) if SingleTokenStep.fits(vlm.text_decoder) else None
        self.device = next(vlm.parameters()).device
        self.vocab_size = vlm.text_decoder.vocab_size
        own = vlm.spec.interaction
        self.interacts = own is not None and own.cross_attention
        self.beside_text = vlm.spec.family.beside_text
        # Beyond `longest`, the rotation of the keys in the cache would change as a sequence grows (see kit/rotary.py).
        positions, longest = vlm.spec.text_decoder.max_position_embeddings, vlm.text_decoder.rotary.longest
        self.max_length = positions if longest is None else min(positions, longest)
        self._limit = f"the model's context of {self.max_length} tokens"
        if self.max_length < positions:
            self._limit = (
                f"{self.max_length} tokens, the original_max_position_embeddings of its rope_scaling, which generation "
                "does not leave"
            )
        config = vlm.text_decoder.config
        self.feature_bytes = config.hidden_size * config.params_dtype.itemsize
        if self.interacts:
            self.feature_bytes += own.input_size * config.params_dtype.itemsize
        self._cross, self._each = vlm.text_decoder.cross, 0
        if self._cross is not None:  # an image takes one position, and has its features beside it
            self._each = vlm.spec.vision_projector.num_latents
            self.feature_bytes = self._each * self._cross.memory_size * config.params_dtype.itemsize

    @torch.inference_mode()
    def image_features(self, media: Sequence[Media]) -> list[ItemFeatures]:
        """Features of items, each media of one."""
        if not media:
            return []
        projected, shown = [None] * len(media), [None] * len(media)
        found = None
        if self.vlm.image_encoder is not None:
            values, found = self.vlm.image_encoder.encode(Media.join(media).to(self.device))
            projected = list(values.values.split(values.counts))
        if self._cross is not None and parallel_state.get_pipeline_model_parallel_world_size() > 1:
            projected = self._on_all_stages(projected)
        found = self.vlm.passed_on(found)
        if found is not None:
            shown = list(found.values.split(found.counts))
        return [ItemFeatures(*pair) for pair in zip(projected, shown, strict=True)]

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        features: Sequence[torch.Tensor | None],
        first_row: int,
        starts: Sequence[int] | None = None,
        positions: Sequence[torch.Tensor] | None = None,
        shown: Sequence[Sequence[torch.Tensor | None]] = (),
    ) -> torch.Tensor:
        """Fill prompts into the rows from `first_row` on.

        Args:
            prompts: id lists of any lengths, IMAGE_TOKEN_INDEX at every image position (expanded).
            starts: [R] tokens that the rows hold already, behind which the prompts go; None: none.
            features: what `image_features` gave for their images (`projected`), in reading order.
            shown: [R] of each row (`shown`), of the images of all that it holds; read by an interaction alone.
            positions: [3, length] of each prompt, for a family with multimodal positions; None: they count up.

        Returns:
            [rows, V] float32, the logits behind each prompt's last token.
        """
        starts = list(starts or [0] * len(prompts))
        if self.packs:
            hidden = self._packed(prompts, features, first_row, starts, positions)
            return self._logits(hidden, len(prompts), shown)
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)
        if positions is None:
            held = torch.tensor(starts, device=self.device)
            places = held[:, None] + torch.arange(max(lengths), device=self.device)
        else:
            places = torch.zeros(3, len(prompts), max(lengths), dtype=torch.int64)
            for row, own in enumerate(positions):
                places[:, row, : own.shape[1]] = own
            places = places.to(self.device)
        self.cache.begin(first_row, starts, max(lengths))
        if self._cross is None:
            embeddings, layers = self._embed(ids, features), self._modules
        else:
            embeddings = self.vlm.embed_around(ids) if self.vlm.pre_process else None
            layers = self._seeing(ids, features, first_row)
        hidden = self._pass(embeddings, places, len(prompts), max(lengths), layers)
        if hidden is not None:
            last = torch.tensor(lengths, device=self.device) - 1
            hidden = hidden[last, torch.arange(len(prompts), device=self.device)].unsqueeze(0)
        return self._logits(hidden, len(prompts), shown)

    def _packed(
        self,
        prompts: Sequence[Sequence[int]],
        features: Sequence[torch.Tensor | None],
        first_row: int,
        starts: Sequence[int],
        positions: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor | None:
        """The pass of `prefill` with the prompts one behind the other: [1, R, H] of their last tokens on the last
        stage, else None. Ids and places are made in host memory, so that nothing waits for the device."""
        ids = torch.cat([torch.tensor(prompt, dtype=torch.int64) for prompt in prompts])[None]
        lengths = [len(prompt) for prompt in prompts]
        if positions is None:
            spans = zip(starts, lengths, strict=True)
            places = torch.cat([torch.arange(start, start + length) for start, length in spans])[None]
        else:
            places = torch.cat(list(positions), dim=1)[:, None]
        segments = self.cache.begin_packed(first_row, starts, lengths)
        layers = partial(self._modules, segments=segments)
        places = places.to(self.device, non_blocking=True)
        hidden = self._pass(self._embed(ids, features), places, 1, ids.shape[1], layers)
        return None if hidden is None else hidden[segments.offsets[1:].long() - 1, 0].unsqueeze(0)

    @torch.inference_mode()
    def step(
        self,
        tokens: list[int],
        lengths: list[int],
        positions: list[int] | None = None,
        shown: Sequence[Sequence[torch.Tensor | None]] = (),
    ) -> torch.Tensor:
        """Append one token to each of the rows 0..R-1, which hold `lengths` [R] tokens: logits [R, V] float32.

        `positions` [R] of the tokens, where they are not `lengths`; `shown` as for `prefill`.
        """
        positions = torch.tensor(positions or lengths, device=self.device).unsqueeze(1)
        self.cache.begin(0, lengths, 1)
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        layers = self._single_token or partial(self._modules, **pad_memory(self.cache.memory, len(tokens)))
        hidden = self._pass(self._embed(ids, ()), positions, len(tokens), 1, layers)
        return self._logits(hidden, len(tokens), shown)

    def _embed(self, ids: torch.Tensor, features: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """[R, S] -> [S, R, H] on the first pipeline stage, else None."""
        if not self.vlm.pre_process:
            return None
        if not features:
            return self.vlm.text_decoder.embed(ids)
        places = image_positions(ids)
        embeddings = self.vlm.text_decoder.embed(ids.masked_fill(places, 0))
        return scatter_features(embeddings, torch.cat(list(features)), places)

    def _on_all_stages(self, features: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Features [L, W] of items, which the first pipeline stage has, on every stage."""
        values = torch.empty(len(features) * self._each, self._cross.memory_size, dtype=self.vlm.config.params_dtype)
        values = torch.cat(list(features)).contiguous() if self.vlm.pre_process else values.to(self.device)
        first = parallel_state.get_pipeline_model_parallel_first_rank()
        torch.distributed.broadcast(values, first, group=parallel_state.get_pipeline_model_parallel_group())
        return list(values.split(self._each))

    def _seeing(self, ids: torch.Tensor, features: Sequence[torch.Tensor], first_row: int) -> Callable:
        """The layers with the features of prompts [R, S] beside them. What the tokens to come see of them is kept."""
        places = MediaPlaces.of(ids.cpu())
        width, dtype = self._cross.memory_size, self.vlm.config.params_dtype
        values = torch.cat(list(features)) if features else torch.empty(0, width, dtype=dtype, device=self.device)
        memory, begin = places.gather(values, self._each), 0
        for row, count in enumerate(places.counts, first_row):
            seen = row_memory(features[begin : begin + count], latest=self._cross.latest_only)
            self.cache.memory.pop(row, None)
            self.cache.memory |= {} if seen is None else {row: seen}
            begin += count
        mask = places.mask(self._each, latest=self._cross.latest_only, device=self.device)
        return partial(self._modules, memory=memory, memory_mask=mask)

    def _pass(
        self, hidden: torch.Tensor | None, positions: torch.Tensor, rows: int, length: int, layers: Callable
    ) -> torch.Tensor | None:
        """Run this stage's layers through the cache: [S, R, H] on the last stage, None on the others."""
        if hidden is None:
            config = self.vlm.text_decoder.config
            hidden = torch.empty(length, rows, config.hidden_size, dtype=config.params_dtype, device=self.device)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        hidden = layers(hidden, positions, self.cache)
        if self.vlm.post_process:
            return hidden if self._text_reader is None else self._read_text(hidden)
        torch.distributed.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None

    def _modules(self, hidden: torch.Tensor, positions: torch.Tensor, cache: KVCache, **inputs) -> torch.Tensor:
        decoder = self.vlm.text_decoder
        if not self.vlm.pre_process:
            decoder.set_input_tensor(hidden)
            hidden = None
        decoder.use_cache(cache)
        try:
            return decoder(hidden, positions, **inputs)
        finally:
            decoder.use_cache(None)

    def _read_text(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, R, H] behind an interaction that attends to the text, which it does through the cache as well."""
        self._text_reader.use_cache(self.cache, self._reader_layer)
        try:
            return self._text_reader.over_text(hidden, TextView())
        finally:
            self._text_reader.use_cache(None)

    def _logits(
        self, hidden: torch.Tensor | None, rows: int, shown: Sequence[Sequence[torch.Tensor | None]]
    ) -> torch.Tensor:
        """[1, R, H] of the last stage -> [R, V] float32 on every rank."""
        if hidden is not None:
            logits = self.vlm.logits(hidden, self._memory(hidden, shown))[:, 0].contiguous()
        else:
            logits = torch.empty(rows, self.vocab_size, dtype=torch.float32, device=self.device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(logits, last, group=parallel_state.get_pipeline_model_parallel_group())
        return logits

    def _memory(self, hidden: torch.Tensor, shown: Sequence[Sequence[torch.Tensor | None]]) -> Memory | None:
        """What the rows' last tokens see: the images of their own row. Rows of one prompt share its features. None
        where no interaction asks, or it has been through the text already."""
        if self.vlm.interaction is None or self._text_reader is not None:
            return None
        if not self.interacts:
            return Memory(None, None)
        pieces, places, ranges, end = [], {}, [], 0
        for own in shown:
            key = tuple(map(id, own))
            if key not in places:
                places[key] = end, end + sum(len(values) for values in own)
                end = places[key][1]
                pieces += own
            ranges.append(places[key])
        width = self.vlm.spec.interaction.input_size
        values = torch.cat(pieces) if pieces else hidden.new_empty(0, width)
        return Memory(values, torch.tensor(ranges, dtype=torch.int64)[:, None])

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise ConfigError for a prompt without tokens or one that does not fit into the model's context."""
        if prompt_tokens == 0:
            raise ConfigError("a prompt has no tokens: give it a text or an image")
        if prompt_tokens + new_tokens > self.max_length:
            raise ContextError(
                f"a prompt of {prompt_tokens} tokens and max_new_tokens {new_tokens} exceed {self._limit}: shorten the "
                "prompt or lower max_new_tokens"
            )
