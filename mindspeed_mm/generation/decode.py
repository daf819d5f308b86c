"""The decoding loop: fill in the prompts, then one token a step for all rows, through the key/value cache.

Legend: B rows, S prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import tensor_parallel

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.models.vlm import VLM


def pick_token(logits: torch.Tensor, options: GenerationOptions, generator: torch.Generator) -> int:
    """Choose the next token of one row.

    Args:
        logits: [V] float32 on the CPU.
        options: greedy, or sampling with temperature, then top-k, then top-p (the order of transformers' warpers).
        generator: CPU generator of this request.
    """
    if options.greedy:
        return int(logits.argmax())
    if options.temperature is not None:
        logits = logits / options.temperature
    if options.top_k:
        kth = logits.topk(min(options.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if options.top_p is not None and options.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.index_fill(0, order[before >= options.top_p], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


class Decoder:
    """Generates for one batch of expanded prompts."""

    def __init__(self, vlm: VLM, stop_ids: Sequence[int]) -> None:
        if not (vlm.pre_process and vlm.post_process):
            raise ConfigError("generation needs the whole model on each rank: use --pipeline-model-parallel-size 1")
        self.vlm = vlm
        self.stop_ids = frozenset(stop_ids)
        self.device = next(vlm.parameters()).device

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        pixel_values: torch.Tensor | None,
        options: GenerationOptions,
    ) -> list[list[int]]:
        """Continue every prompt.

        Args:
            prompts: B id lists of any lengths, IMAGE_TOKEN_INDEX at every image position (already expanded).
            pixel_values: [N, 3, h, w] of all prompts in reading order, or None.
            options: how to choose tokens.

        Returns:
            B lists of new ids, each ending with its stop id when one was generated.

        Raises:
            ConfigError: an empty prompt, or one that exceeds the model's context with max_new_tokens.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self._check_lengths(lengths.tolist(), options.max_new_tokens)
        cache = self.vlm.text_decoder.new_cache(len(prompts), int(lengths.max()) + options.max_new_tokens)
        self.vlm.text_decoder.use_cache(cache)
        try:
            return self._run(prompts, lengths, pixel_values, options, cache)
        finally:
            self.vlm.text_decoder.use_cache(None)

    def _check_lengths(self, lengths: list[int], new_tokens: int) -> None:
        limit = self.vlm.spec.text_decoder.max_position_embeddings
        if min(lengths) == 0:
            raise ConfigError("a prompt has no tokens: give it a text or an image")
        if max(lengths) + new_tokens > limit:
            raise ConfigError(
                f"a prompt of {max(lengths)} tokens and max_new_tokens {new_tokens} exceed the model's context of "
                f"{limit} tokens: shorten the prompt or lower max_new_tokens"
            )

    def _run(self, prompts, lengths, pixel_values, options, cache) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(options.seed) for _ in prompts]
        rows = list(range(len(prompts)))
        outputs: list[list[int]] = [[] for _ in prompts]
        logits = self._prefill(prompts, lengths, pixel_values, cache)
        for step in range(options.max_new_tokens):
            tokens = [pick_token(logits[i], options, generators[row]) for i, row in enumerate(rows)]
            for row, token in zip(rows, tokens, strict=True):
                outputs[row].append(token)
            going = [i for i, token in enumerate(tokens) if token not in self.stop_ids]
            if not going or step + 1 == options.max_new_tokens:
                break
            if len(going) < len(rows):
                kept = torch.tensor(going, device=self.device)
                cache.keep_rows(kept)
                lengths = lengths[kept]
                rows = [rows[i] for i in going]
                tokens = [tokens[i] for i in going]
            logits = self._step(tokens, lengths, cache)
            lengths = lengths + 1
        return outputs

    def _prefill(self, prompts, lengths, pixel_values, cache) -> torch.Tensor:
        """Run the right-padded prompts and return the logits after each one's last token, [B, V] float32 on the CPU."""
        width = int(lengths.max())
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        positions = torch.arange(width, device=self.device).expand(len(prompts), -1)
        if pixel_values is not None:
            pixel_values = pixel_values.to(self.device)
        embeddings = self.vlm.embed(ids.to(self.device), pixel_values)
        cache.begin(positions)
        hidden = self.vlm.text_decoder(embeddings, positions)
        hidden = self.vlm.text_decoder.gather_sequence(hidden)
        return self._logits(hidden[lengths - 1, torch.arange(len(prompts), device=self.device)])

    def _step(self, tokens: list[int], lengths: torch.Tensor, cache) -> torch.Tensor:
        """Run one new token of each row, [B, V] float32 on the CPU."""
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        positions = lengths.unsqueeze(1)
        cache.begin(positions)
        hidden = self.vlm.text_decoder(self.vlm.text_decoder.embed(ids), positions)
        return self._logits(self.vlm.text_decoder.gather_sequence(hidden)[0])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        local = self.vlm.text_decoder.logits(hidden.unsqueeze(0))
        full = tensor_parallel.gather_from_tensor_model_parallel_region(local)
        return full[0, :, : self.vlm.text_decoder.vocab_size].float().cpu()
