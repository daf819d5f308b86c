"""The vision-language model: vision encoder, projector and decoder in one module.

Legend: B batch, S sequence, I items (images, videos), R rows of pixels, F features, H decoder width, V vocabulary.
"""

from __future__ import annotations

import contextlib

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm.models.fusion import image_positions, scatter_features
from mindspeed_mm.models.interaction_memory import (
    FeatureTransfer,
    InteractingDecoder,
    Memory,
    ShownImages,
    TextView,
    interacted,
    memory_of,
)
from mindspeed_mm.models.kit.asked_rows import AskedDecoder
from mindspeed_mm.models.kit.context import sequence_slice
from mindspeed_mm.models.loss import Head, supervised_places, token_losses
from mindspeed_mm.models.media import Features, Media
from mindspeed_mm.models.memory import MediaPlaces, carry, uncarry
from mindspeed_mm.models.neftune import with_noise
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.platform.regions import region
from mindspeed_mm.platform.segments import Segments


class ImageEncoder(MegatronModule):
    """Vision encoder and projector. A frozen encoder runs without autograd and keeps no activations.

    Context-parallel ranks share the rows of pixels as far as encoder and projector take each row by itself: each
    encodes an equal number of them, blank ones filling up, and all get all features. Backwards the gradient of a row is
    the sum over the ranks, whose slices of the sequence each hold some of its features.
    """

    def __init__(self, spec: ModelSpec, runtime: Runtime) -> None:
        parts = spec.parts()
        encoder = parts["vision_encoder"].build(spec.vision_encoder, runtime)
        projector = parts["vision_projector"].build(spec.vision_projector, runtime)
        super().__init__(config=encoder.config)
        self.spec, self.encoder, self.projector = spec, encoder, projector
        self.encoder_frozen = not spec.vision_encoder.trains
        self.context_group = parallel_state.get_context_parallel_group() if runtime.context_parallel_size > 1 else None
        own = spec.interaction
        self.shows = own.features if own is not None and own.cross_attention else None
        """Whose features the interaction looks at; None: there is none, or it looks at no image."""

    def features(self, media: Media) -> Features:
        """Features of the encoder, [F, Hv], of at least one item."""
        with region("vision_encoder"), torch.no_grad() if self.encoder_frozen else contextlib.nullcontext():
            return self.encoder(media)

    def project(self, features: Features) -> Features:
        """Features of the encoder as the decoder takes them, [F, H]."""
        with region("vision_projector"):
            return self.projector(features)

    def forward(self, media: Media | None, features: Features | None = None) -> tuple[torch.Tensor, ShownImages | None]:
        """[F, H], the features of all items in reading order; F is 0 without items. With the encoder's features,
        pixels are not looked at. Beside them what an interaction looks at, where the model has one.

        Without items a blank one goes through whatever is trained and none of its features are returned: every rank
        then runs the same backward pass, and the gradients of the blank item are exact zeros.
        """
        if features is None and (media is None or not len(media)):
            blank = self.encoder.blank_features() if self.encoder_frozen else self.features(self.encoder.blank())
            project = getattr(self.projector, "project_blank", self.projector)
            projected = project(blank)
            return projected.values[:0], self._shown(blank, projected, items=0)
        if features is None and self._shares_all:
            return self._shared(media, lambda share: self.project(self.features(share))).values, None
        projected, shown = self.encode(media, features)
        return projected.values, shown

    @property
    def _shares_all(self) -> bool:
        """Whether each context-parallel rank encodes and projects its share alone, and nothing else is asked for."""
        independent = self.spec.vision_encoder.independent_rows and self.spec.vision_projector.independent_rows
        return self.context_group is not None and independent and self.shows is None

    def encode(self, media: Media | None, features: Features | None = None) -> tuple[Features, ShownImages | None]:
        """Projected features of at least one item, and what an interaction looks at; see `forward`."""
        whole = self.context_group is None or not self.spec.vision_encoder.independent_rows
        if features is None:
            features = self.features(media) if whole else self._shared(media, self.features)
        projected = self.project(features)
        return projected, self._shown(features, projected, items=len(projected.counts))

    def _shown(self, features: Features, projected: Features, items: int) -> ShownImages | None:
        """The first `items` items as the interaction looks at them."""
        if self.shows is None:
            return None
        read = features if self.shows == "vision_encoder" else projected
        counts = tuple(read.counts[:items])
        return ShownImages(read.values[: sum(counts)], counts, tuple(projected.counts[:items]))

    def _shared(self, media: Media, encode) -> Features:
        """What `encode` gives for `media`, each rank encoding its share of the rows."""
        group, rows = self.context_group, media.pixels.shape[0]
        share = -(-rows // group.size())
        surplus = media.pixels.new_zeros(share * group.size() - rows, *media.pixels.shape[1:])
        own = torch.cat((media.pixels, surplus))[share * group.rank() :][:share]
        found = encode(Media.of_images(own))
        values = tensor_parallel.gather_from_sequence_parallel_region(found.values, group=group)
        per_row = found.counts[0]  # rows of one size give equally many features each
        return Features(values[: rows * per_row], tuple(per_row * count for count in media.rows), media)


class VLM(MegatronModule):
    """Decoder with the features of images at their positions.

    Data has expanded every placeholder to one position a feature; the model never splices, truncates or pads. Vision
    encoder and projector live on the first pipeline stage, the head and an interaction in front of it on the last.

    A decoder with gated cross-attention has features beside the text instead: a placeholder is one position, and the
    features go from stage to stage once a micro-batch, as rows behind the hidden states. Gradients come back the same
    way, and no stage but the first needs the encoder.
    """

    def __init__(
        self,
        spec: ModelSpec,
        runtime: Runtime,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        decoder = spec.parts()["text_decoder"].build(
            spec.text_decoder, runtime, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        super().__init__(config=decoder.config)
        self.spec = spec
        self.model_type = ModelType.encoder_or_decoder  # asked for by megatron.core's schedules
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = decoder.share_embeddings_and_output_weights
        self.text_decoder = decoder
        self.image_encoder = ImageEncoder(spec, runtime) if pre_process else None
        self._received: torch.Tensor | None = None
        self.interaction, self._transfer = None, None
        if spec.interaction is not None:
            if post_process:
                self.interaction = spec.parts()["interaction"].build(spec.interaction, runtime)
            looks = spec.interaction.cross_attention
            if looks and runtime.pipeline_model_parallel_size > 1 and (pre_process or post_process):
                self._transfer = FeatureTransfer(spec.interaction.input_size, runtime.params_dtype)

    def parts(self) -> dict[str, torch.nn.Module]:
        """The parts that this pipeline stage holds, by the name of their spec."""
        parts = {"text_decoder": self.text_decoder}
        if self.image_encoder is not None:
            parts["vision_encoder"] = self.image_encoder.encoder
            parts["vision_projector"] = self.image_encoder.projector
        if self.interaction is not None:
            parts["interaction"] = self.interaction
        return parts

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Weight that first and last stage share when the head is tied (asked for by megatron.core's gradient sums)."""
        return self.text_decoder.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor) -> None:
        """Hidden states from the previous pipeline stage; megatron.core passes a tensor or a list of one."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self._received = tensor
        self.text_decoder.set_input_tensor(tensor)

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor, segments: Segments | None = None) -> torch.Tensor:
        """Embeddings with projected features [F, H] at their placeholders, [B, S] -> [S, B, H]; see `forward`."""
        positions = image_positions(input_ids)
        embeddings = self.text_decoder.embed(input_ids.masked_fill(positions, 0))
        return scatter_features(self._noisy(embeddings, segments), features, positions)

    def embed_around(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [S, B, H] of a text whose placeholders stand for features beside it."""
        token = self.text_decoder.cross.media_token_id
        return self.text_decoder.embed(input_ids.masked_fill(image_positions(input_ids), token))

    def _noisy(self, embeddings: torch.Tensor, segments: Segments | None) -> torch.Tensor:
        """Embeddings with the noise that a training run asks for."""
        alpha = self.spec.text_decoder.neftune_noise_alpha
        return with_noise(embeddings, alpha, segments) if self.training and alpha else embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        media: Media | None = None,
        attention_mask: torch.Tensor | None = None,
        image_features: Features | None = None,
        segments: Segments | None = None,
        head: Head = token_losses,
    ) -> torch.Tensor:
        """One pass over this pipeline stage.

        Ids and labels may stay in host memory. The positions of images and of labels are then found there, and nothing
        waits for the device.

        Args:
            input_ids: [B, S] int64, IMAGE_TOKEN_INDEX at image positions.
            position_ids: [B or 1, S] int64, or [3, B or 1, S] for a decoder with multimodal positions.
            labels: [B, S] int64, the id each position predicts, IGNORE_INDEX where none; None for logits.
            media: the items in reading order, None without any.
            attention_mask: complete bool mask [B, 1, S, S], True = may attend; None = causal, which is right for
                right-padded rows.
            image_features: the encoder's features of all items where they are known already (a feature cache); `media`
                is not looked at then.
            segments: the sequences of a single row (B is 1): causal attention inside each of them.
            head: what is asked of the supervised positions.

        Returns:
            Last stage: with labels what `head` gives, by default the token losses [n] float32 of the n supervised
            positions; without, the logits [B, S, V] float32. Other stages: hidden states [S, B, H]. Under context
            parallelism all of them are those of this rank's slice of the sequence, while the arguments are whole.
        """
        hidden, shown, features, beside = None, None, None, (None, None)
        crosses = self.text_decoder.cross is not None
        with region("embedding"):
            if self.pre_process:
                features, shown = self.image_encoder(media, image_features)
                if crosses:
                    hidden = self._noisy(self.embed_around(input_ids), segments)
                else:
                    hidden = self.embed(input_ids, features, segments)
            if crosses:
                beside = self._beside(input_ids, features, segments)
        memory = self._memory(shown, input_ids, TextView(attention_mask, segments))
        places = self._places(labels)
        with region("decoder"):
            hidden = self.text_decoder(hidden, position_ids, attention_mask, segments, *beside, places=places)
        if not self.post_process:
            return carry(hidden, beside[0]) if crosses else hidden
        if labels is not None:
            with region("head and loss"):
                decoder = self._head(memory) if places is None else AskedDecoder(self.text_decoder)
                return head(decoder, hidden, sequence_slice(labels, 1))
        return self.logits(hidden, memory)

    def _places(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        """The positions that the decoder's last layer is asked for, [n] of this rank's slice; None: all.

        An interaction may attend to the text and asks for all. Where nothing is supervised all run as well, and give
        every parameter its gradient of zero.
        """
        if labels is None or not self.spec.asks_early or not self.text_decoder.takes_places:
            return None
        places = supervised_places(sequence_slice(labels, 1))
        return places if len(places) else None

    def _beside(
        self, input_ids: torch.Tensor, features: torch.Tensor | None, segments: Segments | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(features beside the text [K, B, W], who sees what). Later stages find them behind their hidden states."""
        cross, each = self.text_decoder.cross, self.spec.vision_projector.num_latents
        places = MediaPlaces.of(input_ids, segments)
        if features is None:
            rows = places.carried_rows(each, cross.memory_size, self.config.hidden_size)
            hidden, memory = uncarry(self._received, rows, places.most * each, cross.memory_size)
            self.text_decoder.set_input_tensor(hidden)
        else:
            memory = places.gather(features, each)
        return memory, places.mask(each, latest=cross.latest_only, device=memory.device)

    def _memory(self, shown: ShownImages | None, input_ids: torch.Tensor, text: TextView) -> Memory | None:
        """What the interaction of this stage looks at; None on the others."""
        shown = self.passed_on(shown)
        return None if self.interaction is None else memory_of(shown, input_ids, text)

    def passed_on(self, shown: ShownImages | None) -> ShownImages | None:
        """What the first pipeline stage shows its interaction, on the last one; None on the others. Each of both calls
        this once for the same images, in the same order."""
        if self._transfer is not None and self.pre_process:
            self._transfer.send(shown)
        if self.interaction is None:
            return None
        if self._transfer is not None:
            return self._transfer.receive(next(self.interaction.parameters()).device)
        return shown

    def _head(self, memory: Memory | None):
        return self.text_decoder if memory is None else InteractingDecoder(self.text_decoder, self.interaction, memory)

    def logits(self, hidden: torch.Tensor, memory: Memory | None = None) -> torch.Tensor:
        """Logits of the whole vocabulary, [S, B, H] -> [B, S, V] float32, equal on all tensor-parallel ranks.

        `memory` is what an interaction looks at at each of the positions; a model without one has none.
        """
        hidden = self.text_decoder.gather_sequence(hidden)
        if memory is not None:
            hidden = interacted(self.interaction, hidden, memory)
        local = self.text_decoder.logits(hidden)
        full = tensor_parallel.gather_from_tensor_model_parallel_region(local)
        return full[..., : self.text_decoder.vocab_size].transpose(0, 1).float()
