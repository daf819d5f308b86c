"""The model's passes: prompts into the key/value cache, then one token a row, on any tensor- and pipeline-parallel
layout.

Every rank runs the same passes in the same order; each returns the same logits on all of them.

Legend: R rows, S prompt length, V vocabulary, F features of an item, H decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state

from mindspeed_mm.errors import ConfigError, ContextError
from mindspeed_mm.generation.lean import LeanStep
from mindspeed_mm.models.fusion import image_positions, scatter_features
from mindspeed_mm.models.kit.kv_cache import KVCache
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.vlm import VLM


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
        self._lean = LeanStep(vlm.text_decoder) if LeanStep.fits(vlm.text_decoder) else None
        self.device = next(vlm.parameters()).device
        self.vocab_size = vlm.text_decoder.vocab_size
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

    @torch.inference_mode()
    def image_features(self, media: Sequence[Media]) -> list[torch.Tensor | None]:
        """Projected features [F, H] of items, each media of one; None on later pipeline stages."""
        if self.vlm.image_encoder is None or not media:
            return [None] * len(media)
        found = self.vlm.image_encoder.features(Media.join(media).to(self.device))
        found = self.vlm.image_encoder.project(found)
        return list(found.values.split(found.counts))

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        features: Sequence[torch.Tensor | None],
        first_row: int,
        starts: Sequence[int] | None = None,
        positions: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Fill prompts into the rows from `first_row` on.

        Args:
            prompts: id lists of any lengths, IMAGE_TOKEN_INDEX at every image position (expanded).
            starts: [R] tokens that the rows hold already, behind which the prompts go; None: none.
            features: what `image_features` gave for their images, in reading order.
            positions: [3, length] of each prompt, for a family with multimodal positions; None: they count up.

        Returns:
            [rows, V] float32, the logits behind each prompt's last token.
        """
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)
        starts = list(starts or [0] * len(prompts))
        if positions is None:
            held = torch.tensor(starts, device=self.device)
            places = held[:, None] + torch.arange(max(lengths), device=self.device)
        else:
            places = torch.zeros(3, len(prompts), max(lengths), dtype=torch.int64)
            for row, own in enumerate(positions):
                places[:, row, : own.shape[1]] = own
            places = places.to(self.device)
        self.cache.begin(first_row, starts, max(lengths))
        hidden = self._pass(self._embed(ids, features), places, len(prompts), max(lengths), self._modules)
        if hidden is not None:
            last = torch.tensor(lengths, device=self.device) - 1
            hidden = hidden[last, torch.arange(len(prompts), device=self.device)].unsqueeze(0)
        return self._logits(hidden, len(prompts))

    @torch.inference_mode()
    def step(self, tokens: list[int], lengths: list[int], positions: list[int] | None = None) -> torch.Tensor:
        """Append one token to each of the rows 0..R-1, which hold `lengths` [R] tokens: logits [R, V] float32.

        `positions` [R] of the tokens, where they are not `lengths`.
        """
        positions = torch.tensor(positions or lengths, device=self.device).unsqueeze(1)
        self.cache.begin(0, lengths, 1)
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        hidden = self._pass(self._embed(ids, ()), positions, len(tokens), 1, self._lean or self._modules)
        return self._logits(hidden, len(tokens))

    def _embed(self, ids: torch.Tensor, features: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """[R, S] -> [S, R, H] on the first pipeline stage, else None."""
        if not self.vlm.pre_process:
            return None
        if not features:
            return self.vlm.text_decoder.embed(ids)
        places = image_positions(ids)
        embeddings = self.vlm.text_decoder.embed(ids.masked_fill(places, 0))
        return scatter_features(embeddings, torch.cat(list(features)), places)

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
            return hidden
        torch.distributed.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None

    def _modules(self, hidden: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        decoder = self.vlm.text_decoder
        if not self.vlm.pre_process:
            decoder.set_input_tensor(hidden)
            hidden = None
        decoder.use_cache(cache)
        try:
            return decoder(hidden, positions)
        finally:
            decoder.use_cache(None)

    def _logits(self, hidden: torch.Tensor | None, rows: int) -> torch.Tensor:
        """[1, R, H] of the last stage -> [R, V] float32 on every rank."""
        if hidden is not None:
            logits = self.vlm.logits(hidden)[:, 0].contiguous()
        else:
            logits = torch.empty(rows, self.vocab_size, dtype=torch.float32, device=self.device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(logits, last, group=parallel_state.get_pipeline_model_parallel_group())
        return logits

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise ConfigError for a prompt without tokens or one that does not fit into the model's context."""
        if prompt_tokens == 0:
            raise ConfigError("a prompt has no tokens: give it a text or an image")
        if prompt_tokens + new_tokens > self.max_length:
            raise ContextError(
                f"a prompt of {prompt_tokens} tokens and max_new_tokens {new_tokens} exceed {self._limit}: shorten the "
                "prompt or lower max_new_tokens"
            )
