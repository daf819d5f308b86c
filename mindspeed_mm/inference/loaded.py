"""A model ready for inference: logits, features and text.

Legend: B rows, S tokens, V vocabulary, N images, P tokens an image, Hv vision encoder width, H decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.decode import Decoder
from mindspeed_mm.generation.engine import GenerationEngine, GenerationRequest
from mindspeed_mm.generation.ids import continue_ids
from mindspeed_mm.generation.images import ImageFeatures
from mindspeed_mm.generation.options import generation_options
from mindspeed_mm.generation.prompts import as_prompts
from mindspeed_mm.inference.locate import Located
from mindspeed_mm.models.fusion import image_positions
from mindspeed_mm.models.masks import complete_mask
from mindspeed_mm.models.vlm import VLM


class LoadedVLM:
    """A model ready for inference. Made by `mindspeed_mm.inference.api.load`."""

    def __init__(
        self, vlm: VLM, located: Located, tokenizer: Tokenizer | None, image_processor: ImageProcessor | None
    ) -> None:
        self.model = vlm.eval().requires_grad_(False)
        self.spec = vlm.spec
        self.image_token_id: int | None = located.image_token_id
        self.template, self.pad = located.template, located.pad
        self._tokenizer, self._image_processor = tokenizer, image_processor
        self._where = located.path
        self.device = next(vlm.parameters()).device

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises ConfigError when it came with none."""
        if self._tokenizer is None:
            raise ConfigError(f"{self._where} holds no tokenizer: load a folder with tokenizer.model or tokenizer.json")
        return self._tokenizer

    @property
    def image_processor(self) -> ImageProcessor:
        """The checkpoint's image processor. Raises ConfigError when it came with none."""
        if self._image_processor is None:
            raise ConfigError(f"{self._where} holds no preprocessor_config.json: add the vision encoder's")
        return self._image_processor

    @property
    def tokens_per_image(self) -> int:
        """P"""
        return self.spec.vision_encoder.num_image_tokens

    @torch.inference_mode()
    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Next-token logits of every position.

        Args:
            input_ids: [B, S] int64; image positions (already expanded) hold `image_token_id` or -200.
            attention_mask: [B, S], 0 at padding (either side), or None.
            pixel_values: [N, 3, h, w] in reading order, or None.

        Returns:
            [B, S, V] float32. Values at padded positions mean nothing.
        """
        input_ids = input_ids.to(self.device)
        ids = input_ids.masked_fill(image_positions(input_ids, self.image_token_id), IMAGE_TOKEN_INDEX)
        positions = torch.arange(ids.shape[1], device=self.device).unsqueeze(0)
        pixels = None if pixel_values is None else pixel_values.to(self.device)
        return self.model(ids, positions, pixel_values=pixels, attention_mask=complete_mask(attention_mask, ids))

    @torch.inference_mode()
    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Selected vision encoder features, [N, 3, h, w] -> [N, P, Hv]."""
        return self.model.image_encoder.features(pixel_values.to(self.device))

    @torch.inference_mode()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Projected features, [N, P, Hv] -> [N, P, H]."""
        return self.model.image_encoder.projector(features.to(self.device))

    def engine(self, template: str | None = None, *, batch_size: int = 16) -> GenerationEngine:
        """Engine that answers requests with this model, in `template` (default: the checkpoint's, else v1), up to
        `batch_size` sequences at a time."""
        return GenerationEngine(
            self.model,
            self.tokenizer,
            self.image_processor,
            template or self.template,
            pad=self.pad,
            batch_size=batch_size,
            image_token_id=self.image_token_id,
        )

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
        *,
        input_ids: torch.Tensor | Sequence | None = None,
        template: str | None = None,
        **options: Any,
    ) -> list[str] | list[list[int]]:
        """Answer prompts, or continue ids.

        Args:
            prompts: one question or several; each is put into the template (`template`, default v1).
            images: of one prompt: a list of PIL images or paths; of several prompts: a list with one such list for
                each. With input_ids: one flat list, or a tensor [N, 3, h, w] of preprocessed images.
            input_ids: [S], [B, S] or a list of lists; image positions as in `logits`, either one an image or expanded.
            options: names of transformers' GenerationConfig; greedy by default.

        Returns:
            num_return_sequences answer texts a prompt, or with input_ids the new ids of each row (stop id included).

        Raises:
            ConfigError: wrong options, prompts that do not fit the model's context.
            DataError: an image that cannot be used, another number of images than of placeholders.
        """
        chosen = generation_options(options)
        if (prompts is None) == (input_ids is None):
            raise ConfigError("generate takes either prompts or input_ids")
        if input_ids is not None:
            return self._continue(input_ids, images, chosen)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [images or ()] if isinstance(prompts, str) else list(images or [()] * len(texts))
        if len(rows) != len(texts):
            raise ConfigError(f"{len(texts)} prompts came with {len(rows)} lists of images: give one list a prompt")
        requests = [
            GenerationRequest(str(i), turns=((text, None),), images=tuple(row))
            for i, (text, row) in enumerate(zip(texts, rows, strict=True))
        ]
        results = self.engine(template).generate(requests, chosen, max(1, len(requests)) * chosen.num_return_sequences)
        return [sequence.text for result in results for sequence in result.sequences]

    def _continue(self, input_ids, images, options) -> list[list[int]]:
        rows = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
        rows = [rows] if rows and isinstance(rows[0], int) else rows
        rows = [[IMAGE_TOKEN_INDEX if token == self.image_token_id else token for token in row] for row in rows]
        shown = [] if images is None else list(images)
        prompts = as_prompts(rows, len(shown), self.tokens_per_image)
        stop_ids = options.eos_token_ids if options.eos_token_id is not None else (self.tokenizer.eos_token_id,)
        decoder = Decoder(self.model)
        return continue_ids(
            decoder,
            prompts,
            shown,
            options,
            image_features=ImageFeatures(decoder, self._image_processor, pad=self.pad),
            stop_ids=stop_ids,
            tokenizer=self._tokenizer,
            image_token_id=self.image_token_id,
        )
