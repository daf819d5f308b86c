"""A model ready for inference: logits, features and text.

Legend: B rows, S tokens, V vocabulary, N images, P tokens an image, Hv vision encoder width, H decoder width.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.expand import Encoding
from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.data.media import FixedSizeImages, MediaProcessor
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.template_choice import choose_template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.decode import Decoder
from mindspeed_mm.generation.defaults import ModelDefaults
from mindspeed_mm.generation.engine import GenerationEngine, GenerationRequest
from mindspeed_mm.generation.ids import continue_ids
from mindspeed_mm.generation.images import ImageFeatures
from mindspeed_mm.generation.prompts import as_prompts
from mindspeed_mm.generation.rules import PrefixAllowedTokens
from mindspeed_mm.inference.answer_losses import answer_losses
from mindspeed_mm.inference.locate import Located
from mindspeed_mm.models.adapters.lora import adapters_off
from mindspeed_mm.models.fusion import image_positions
from mindspeed_mm.models.masks import complete_mask
from mindspeed_mm.models.media import Features, Media
from mindspeed_mm.models.vlm import VLM

logger = logging.getLogger(__name__)


class LoadedVLM:
    """A model ready for inference. Made by `mindspeed_mm.inference.api.load`."""

    def __init__(self, vlm: VLM, located: Located, tokenizer: Tokenizer | None, media: MediaProcessor | None) -> None:
        self.model = vlm.eval().requires_grad_(False)
        self.spec = vlm.spec
        self.image_token_id: int | None = located.image_token_id
        self.pad = located.pad
        chosen = choose_template(None, located.template, tokenizer, *vlm.spec.family.usual_template(vlm.spec))
        self.template, self._chosen, self._told = chosen.name, chosen, ""
        self._placeholders = located.placeholder_ids
        self._tokenizer, self._media = tokenizer, media
        own = None if tokenizer is None else tokenizer.generation
        self.defaults = ModelDefaults() if own is None else ModelDefaults(own.options, own.where)
        """Decoding options of the model's own generation_config.json."""
        self.located, self._where = located, located.path
        self.device = next(vlm.parameters()).device

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises ConfigError when it came with none."""
        if self._tokenizer is None:
            raise ConfigError(
                f"{self._where} holds no tokenizer: give --tokenizer (tokenizer=), a folder with tokenizer.model or "
                "tokenizer.json"
            )
        return self._tokenizer

    @property
    def media(self) -> MediaProcessor:
        """How images become pixels and placeholders. Raises ConfigError when the checkpoint came without an image
        processor."""
        if self._media is None:
            raise ConfigError(
                f"{self._where} holds no preprocessor_config.json: add the vision encoder's, or give "
                "--image-processor (image_processor=), a folder that holds it"
            )
        return self._media

    @property
    def image_processor(self) -> ImageProcessor:
        """The checkpoint's image processor, as `mm.preprocess` takes it, of a model with images of one size. Raises
        ConfigError when it came with none, or takes images of any size."""
        if not isinstance(self.media, FixedSizeImages):
            raise ConfigError(
                f"{self._where} takes images of any size, which `mm.preprocess` does not make: vlm.media.item(image) "
                "gives its pixels"
            )
        return self.media.processor

    @property
    def tokens_per_image(self) -> int:
        """P. Raises ConfigError where the size of an image decides."""
        plan = self.spec.family.fixed_plan(self.spec)
        if plan is None:
            raise ConfigError(
                f"model_id {self.spec.model_id} has no one number of tokens an image: "
                "vlm.media.plan(height, width).count gives it"
            )
        return plan.count

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model answers without its adapter. Raises ConfigError where it has none."""
        if all(part.lora is None for part in self.spec.part_specs().values()):
            raise ConfigError(f"{self._where} was loaded without an adapter: nothing to switch off")
        return adapters_off(self.model)

    @torch.inference_mode()
    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Next-token logits of every position.

        Args:
            input_ids: [B, S] int64; image positions (already expanded) hold the family's own token id or -200.
            attention_mask: [B, S], 0 at padding (either side), or None.
            pixel_values, inputs: images in reading order, under the names that the family's transformers processor
                returns.

        Returns:
            [B, S, V] float32. Values at padded positions mean nothing.

        Raises:
            ConfigError: inputs that the family does not take, or of other shapes.
        """
        family = self.spec.family
        given = inputs | ({} if pixel_values is None else {"pixel_values": pixel_values})
        media = family.media_of_inputs(self.spec, {name: value for name, value in given.items() if value is not None})
        input_ids = input_ids.to(self.device)
        places = image_positions(input_ids)
        for token_id in self._placeholders:
            places |= input_ids == token_id
        ids = input_ids.masked_fill(places, IMAGE_TOKEN_INDEX)
        find = self._multimodal_positions if family.multimodal_positions else self._text_positions
        positions = find(ids, attention_mask, media).to(self.device)
        media = None if media is None else media.to(self.device)
        return self.model(ids, positions, media=media, attention_mask=complete_mask(attention_mask, ids))

    def _text_positions(self, ids: torch.Tensor, attention_mask: torch.Tensor | None, _: Media | None) -> torch.Tensor:
        """[1 or B, S] positions. Learned ones count what is not padding alone, as in transformers' OPT; where rotation
        or a bias tells how far apart two tokens are, padding before them all changes nothing."""
        if attention_mask is None or self.spec.text_decoder.traits.position_offset is None:
            return torch.arange(ids.shape[1]).unsqueeze(0)
        return (attention_mask.bool().cumsum(1) - 1).clamp(min=0)

    def _multimodal_positions(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, media: Media | None
    ) -> torch.Tensor:
        """[3, B, S] positions, each row's from its own ids and items; 0 at padding."""
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        counts = [] if media is None else list(self.spec.family.item_counts(self.spec, media))
        positions, item = torch.zeros(3, *ids.shape, dtype=torch.int64), 0
        for row, (own, kept) in enumerate(zip(ids.cpu(), real.cpu(), strict=True)):
            first, found = item, int((own[kept] == IMAGE_TOKEN_INDEX).sum())
            left = found
            while left > 0 and item < len(counts):
                left -= counts[item]
                item += 1
            if left:
                raise ConfigError(
                    f"row {row} of input_ids holds {found} image positions, which are not those of whole "
                    "images: expand each image by its own number, and let no row end inside one"
                )
            grids = torch.empty(0, 3, dtype=torch.int64) if media is None else media.grid[first:item]
            positions[:, row, kept] = self.spec.family.positions(self.spec, own[kept], grids)
        return positions

    @torch.inference_mode()
    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of the vision encoder, [N, 3, h, w] -> [N, P, Hv], of a model with images of one size. Raises
        ConfigError for another one."""
        self.tokens_per_image  # noqa: B018  raises
        media = self.spec.family.media_of_inputs(self.spec, {"pixel_values": pixel_values})
        values = self.model.image_encoder.features(media.to(self.device)).values
        return values.view(len(media), -1, values.shape[-1])

    @torch.inference_mode()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Projected features, [N, P, Hv] -> [N, P, H], of a model with images of one size. Raises ConfigError for
        another one."""
        self.tokens_per_image  # noqa: B018  raises
        images, count = features.shape[:2]
        media = Media.of_images(features.new_empty(images, 0))
        flat = Features(features.flatten(0, 1).to(self.device), (count,) * images, media)
        return self.model.image_encoder.projector(flat).values.view(images, count, -1)

    def engine(self, template: str | None = None, *, batch_size: int = 16) -> GenerationEngine:
        """Engine that answers requests with this model, in `template` (default: the model's own, `self.template`, see
        data/template_choice.py), up to `batch_size` sequences at a time."""
        chosen = str(self._chosen if template is None else choose_template(template))
        if chosen != self._told:
            logger.info("template: %s", chosen)
            self._told = chosen
        return GenerationEngine(
            self.model,
            self.tokenizer,
            self.media,
            template or self.template,
            batch_size=batch_size,
            image_token_id=self.image_token_id,
            defaults=self.defaults,
        )

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
        *,
        input_ids: torch.Tensor | Sequence | None = None,
        template: str | None = None,
        qformer_input_ids: Sequence[Sequence[int]] | torch.Tensor | None = None,
        prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
        **options: Any,
    ) -> list[str] | list[list[int]]:
        """Answer prompts, or continue ids.

        Args:
            prompts: one question or several; each is put into the template (`template`, default: the model's own).
            images: of one prompt: a list of PIL images or paths; of several prompts: a list with one such list for
                each. With input_ids: one flat list, or a tensor [N, 3, h, w] of preprocessed images.
            input_ids: [S], [B, S] or a list of lists; image positions as in `logits`, either one an image or expanded.
            qformer_input_ids: with input_ids, of a model whose projector reads questions (InstructBLIP): the one about
                each image in the projector's tokens, [N, L] or N lists without padding.
            prefix_allowed_tokens_fn: called before each token with the number of the prompt and the ids of it and its
                answer [S] int64; gives the tokens that may follow.
            options: names of transformers' GenerationConfig. What is not given is as the model's own
                generation_config.json has it, else greedy.

        Returns:
            num_return_sequences answer texts a prompt, or with input_ids the new ids of each row (stop id included).

        Raises:
            ConfigError: wrong options, prompts that do not fit the model's context.
            DataError: an image that cannot be used, another number of images than of placeholders.
        """
        chosen = self.defaults.options(options)
        if (prompts is None) == (input_ids is None):
            raise ConfigError("generate takes either prompts or input_ids")
        if input_ids is not None:
            return self._continue(input_ids, images, options, qformer_input_ids, prefix_allowed_tokens_fn)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [images or ()] if isinstance(prompts, str) else list(images or [()] * len(texts))
        if len(rows) != len(texts):
            raise ConfigError(f"{len(texts)} prompts came with {len(rows)} lists of images: give one list a prompt")
        requests = [
            GenerationRequest(str(i), turns=((text, None),), images=tuple(row))
            for i, (text, row) in enumerate(zip(texts, rows, strict=True))
        ]
        results = self.engine(template).generate(
            requests,
            options,
            max(1, len(requests)) * chosen.num_return_sequences,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        )
        return [sequence.text for result in results for sequence in result.sequences]

    @torch.inference_mode()
    def answer_losses(
        self, prompt: str, images: Sequence[Any], answers: Sequence[str], *, template: str | None = None
    ) -> list[float]:
        """How likely each of some answers to a prompt is, for choosing among them (MiniGPT-4's multi_select).

        Args:
            prompt, images: as `generate` takes one prompt; `template`: default the model's own.
            answers: texts; what the template writes behind an answer counts as a part of it.

        Returns:
            The mean loss of a token of each answer, whose smallest is the likeliest answer.

        Raises:
            ConfigError: no answers, more tokens than the model's context, or a model that is spread over stages.
            DataError: an empty answer, an image that cannot be used, another number of images than of placeholders.
        """
        form = get_template(template or self.template, self.tokenizer)
        encoding = Encoding(self.tokenizer, form, self.media)
        return answer_losses(self.model, encoding, prompt, images, answers)

    def _continue(self, input_ids, images, given, instructions, prefix_allowed_tokens_fn) -> list[list[int]]:
        rows = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
        rows = [rows] if rows and isinstance(rows[0], int) else rows
        rows = [[IMAGE_TOKEN_INDEX if token in self._placeholders else token for token in row] for row in rows]
        decoder = Decoder(self.model)
        image_features = ImageFeatures(decoder, self._media)
        shown = [] if images is None else list(images)
        found = image_features.find(shown, self._instructions(instructions, len(shown)))
        prompts = as_prompts(rows, [image.plan for image in found])
        longest = max(map(len, prompts), default=0)
        options = self.defaults.fitting(self.defaults.options(given), given, decoder.max_length - longest)
        stop_ids = options.eos_token_ids if options.eos_token_id is not None else self.tokenizer.end_ids
        return continue_ids(
            decoder,
            prompts,
            found,
            options,
            image_features=image_features,
            stop_ids=stop_ids,
            tokenizer=self._tokenizer,
            image_token_id=self.image_token_id,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        )

    def _instructions(self, given, images: int) -> list[tuple[int, ...]] | None:
        """The question about each image, where the projector reads it."""
        rows = None if given is None else [tuple(map(int, row)) for row in given]
        wanted = images if self.spec.vision_projector.reads_instructions else None
        if (None if rows is None else len(rows)) != (wanted or None):
            raise ConfigError(
                f"found qformer_input_ids for {len(rows or ())} images; expected "
                f"{wanted if wanted is not None else 'none, since the projector of this model reads no question'}: one "
                "list of the projector's tokens for each image"
            )
        return rows
