"""Flags of the originals that say what trains, as changes to a model.json: LLaVA's, and those of HA-DPO's fork of it.

LLaVA freezes in this order: freeze_backbone closes the decoder but its head, and the vision encoder; the projector
stays open, since the original opens it again after that. tune_mm_mlp_adapter closes all and opens the projector;
freeze_mm_mlp_adapter closes it. Once tune_lm_head is given, the rules are the fork's: freeze_backbone opens what it
does not close, the projector trains where tune_mm_mlp_adapter says so, the head where tune_lm_head does. The fork's
block trains where tune_post_interaction_block says so; the fork closes it with all else and opens it after that.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

from mindspeed_mm.errors import ConfigError

HEAD, ALL = "output_layer.*", "*"


@dataclass(frozen=True)
class TrainedParts:
    """What the flags say; None: nothing."""

    freeze_backbone: bool | None = None
    tune_mm_mlp_adapter: bool | None = None
    freeze_mm_mlp_adapter: bool | None = None
    tune_lm_head: bool | None = None
    tune_post_interaction_block: bool | None = None
    mm_projector_lr: float | None = None
    vision_encoder_lr: float | None = None
    pretrain_mm_mlp_adapter: str | None = None
    """Weights that the projector begins with, whatever the file says."""

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the flags that say something."""
        return tuple(own.name for own in fields(self) if getattr(self, own.name) is not None)

    def applied(self, model: dict[str, Any]) -> dict[str, Any]:
        """A copy of a model.json with what the flags say, which win over the file.

        Raises ConfigError for flags that contradict each other or the model, and for a learning rate of what they
        freeze.
        """
        model = copy.deepcopy(model)
        decoder, encoder = model.get("text_decoder"), model.get("image_encoder")
        if not isinstance(decoder, dict) or not isinstance(encoder, dict):
            return model  # which the schema refuses
        vision, projector = (encoder.setdefault(slot, {}) for slot in ("vision_encoder", "vision_projector"))
        backbone, head, projected = self._trained()
        self._check(model, decoder, projected)
        if backbone is not None:
            _set(decoder, trains=backbone)
            _set(vision, trains=backbone and not vision.get("freeze", False))
        if head is not None and (head is not backbone or self.tune_lm_head is not None):
            decoder["parameters"] = [*decoder.get("parameters", []), {"names": HEAD, "freeze": not head}]
        if projected is not None:
            _set(projector, trains=projected)
        if isinstance(model.get("interaction"), dict):
            opened = self.tune_post_interaction_block
            if opened is None and (self.tune_lm_head is not None or self.tune_mm_mlp_adapter):
                opened = False  # as everything that no flag opens
            if opened is not None:
                _set(model["interaction"], trains=opened)
        if self.pretrain_mm_mlp_adapter is not None:
            projector["ckpt_path"] = self.pretrain_mm_mlp_adapter
        for block, rate in ((projector, self.mm_projector_lr), (vision, self.vision_encoder_lr)):
            if rate is not None:
                block["lr"] = rate
        return model

    def _trained(self) -> tuple[bool | None, bool | None, bool | None]:
        """Whether decoder and vision encoder, head and projector train; None: as the file says."""
        if self.tune_lm_head is not None:
            backbone = None if self.freeze_backbone is None else not self.freeze_backbone
            projected = bool(self.tune_mm_mlp_adapter) and not self.freeze_mm_mlp_adapter
            return backbone, self.tune_lm_head, projected
        if self.tune_mm_mlp_adapter:
            return False, False, not self.freeze_mm_mlp_adapter
        closed = False if self.freeze_mm_mlp_adapter else None
        if self.freeze_backbone:
            return False, True, True if closed is None else closed
        return None, None, closed

    def _check(self, model: dict[str, Any], decoder: dict[str, Any], projected: bool | None) -> None:
        if self.tune_post_interaction_block is not None and not isinstance(model.get("interaction"), dict):
            raise ConfigError(
                "--tune-post-interaction-block is given for a model without one; expected an interaction block. Add "
                '"interaction": {} to model.json, or leave the flag out'
            )
        tied = decoder.get("share_embeddings_and_output_weights", False)
        if tied and self.tune_lm_head is not None:
            raise ConfigError(
                "--tune-lm-head: found share_embeddings_and_output_weights in the text_decoder; expected a head of its "
                "own, since this one is the embedding. Leave the flag out, or give the embedding a rule of parameters"
            )
        if self.tune_mm_mlp_adapter and self.tune_lm_head is None and decoder.get("lora"):
            raise ConfigError(
                "--tune-mm-mlp-adapter freezes all but the projector, and the text_decoder has a lora block; expected "
                "one of them. Remove the lora block (or the --lora flags), or leave the flag out"
            )
        if projected is False and self.mm_projector_lr is not None:
            raise ConfigError("--mm-projector-lr is given for a projector that the flags freeze: leave one of them out")


@dataclass(frozen=True)
class ModelFlags:
    """Flags that change the model.json of a run: keys of the text_decoder's lora block, further keys of the
    text_decoder, and what trains."""

    lora: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    parts: TrainedParts = TrainedParts()

    @property
    def given(self) -> bool:
        """Whether any of them is."""
        return bool(self.lora or self.decoder or self.parts.given)

    def applied(self, model: dict[str, Any]) -> dict[str, Any]:
        """A copy of a model.json with what the flags say, which win over the file. Raises ConfigError as
        `TrainedParts.applied` does."""
        model = copy.deepcopy(model)
        decoder = model.get("text_decoder")
        if isinstance(decoder, dict):
            decoder |= self.decoder
            if self.lora:
                decoder["lora"] = {**(decoder.get("lora") or {}), **self.lora}
        return self.parts.applied(model) if self.parts.given else model


def _set(block: dict[str, Any], *, trains: bool) -> None:
    """Open or close a part; adapters, which close what is beside them, stay."""
    if block.get("lora"):
        return
    block["freeze"] = not trains
    if not trains:
        for key in ("lr", "weight_decay", "layer_decay"):
            block.pop(key, None)
