"""MiniGPT-4 (Zhu et al. 2023) and MiniGPT-v2: EVA-CLIP, a linear behind a frozen Q-Former or behind four patches at a
time, and a decoder (Vicuna, Llama 2, Gemma).

The public files hold parts: eva_vit_g.pth, the Q-Former's blip2_pretrained_*.pth, the linear's pretrained_minigpt4*.pth
or checkpoint_N.pth. A folder may hold the files of Q-Former and linear together. A whole model, under the names of the
original's state dict, has a config.json of ours.

Gemma multiplies word embeddings by the root of its width. In the guide's repository image features pass that
multiplication, too; `vision_projector.feature_scale` says by what they are multiplied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models import config_keys
from mindspeed_mm.models.families.blip2 import Blip2
from mindspeed_mm.models.families.llava import fit_problems
from mindspeed_mm.models.part import part_of
from mindspeed_mm.weights.layouts import PROJECTOR, TEXT, VISION, Layout, Prefix
from mindspeed_mm.weights.sources import PartSource, Source

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec

NAME = "minigpt4"

QFORMER, CONCAT = "qformer", "patch_concat"
"""Projectors of the family."""

MINIGPT4 = Layout(
    NAME,
    (r"^(llama_proj\.|Qformer\.bert\.)",),
    (
        Prefix("llama_model.", TEXT),
        Prefix("llm_model.", TEXT),  # the guide's repository
        Prefix("visual_encoder.", VISION),
        *(Prefix(name, PROJECTOR, name) for name in ("llama_proj.", "Qformer.", "query_tokens", "ln_vision.")),
        # Heads of BLIP-2's first stage, and the decoders that its second one was trained with.
        *(Prefix(name, None) for name in ("Qformer.cls.", "vision_proj.", "text_proj.", "itm_head.", "temp")),
        *(Prefix(f"{name}.", None) for name in ("t5_proj", "t5_model", "opt_proj", "opt_model")),
    ),
    {TEXT: "hf", VISION: "eva", PROJECTOR: "lavis"},
    {TEXT: "llama_model.", VISION: "visual_encoder.", PROJECTOR: ""},
)


class MiniGpt4(Blip2):
    """See the module."""

    name = NAME
    model_types = (NAME,)
    layouts = (MINIGPT4,)
    template = "minigpt4_vicuna"
    config_keys = {NAME: config_keys.MINIGPT4}
    architecture = "MiniGPT4"
    adds_image_token = False

    def default_template(self, spec: ModelSpec) -> str:
        if spec.text_decoder.traits.embedding_scale is not None:
            return "minigpt4_gemma"
        if spec.vision_projector.model_id == QFORMER:
            return self.template
        return "minigpt4_v2" if spec.vision_encoder.image_size > 224 else "minigpt4_llama2"

    def split_config(self, config: dict[str, Any], layout: str) -> dict[str, dict[str, Any] | None]:
        if not isinstance(config.get("has_qformer"), bool):
            raise ConfigError(
                f"config.json: found has_qformer {config.get('has_qformer')!r}; expected true or false, as a "
                f"conversion to {NAME} writes it."
            )
        if not config["has_qformer"]:
            config = {"qformer_config": {}, **config}
        return super().split_config(config, layout)

    def complete(self, source: Source, slots: dict[str, PartSource]) -> dict[str, PartSource]:
        """The projector is told by its names. Raises WeightError where config.json says another one."""
        if PROJECTOR not in slots:
            return slots
        names = slots[PROJECTOR].names
        found = any(name.startswith("Qformer.") for name in names)
        said = (source.config or {}).get("has_qformer", found)
        if said != found:
            raise WeightError(
                f"{source.path}: config.json says has_qformer {str(said).lower()}, and the weights hold "
                f"{'a' if found else 'no'} Q-Former; expected both alike. Correct has_qformer, or give the weights "
                "that belong to it."
            )
        return {**slots, PROJECTOR: replace(slots[PROJECTOR], model_id=QFORMER if found else CONCAT)}

    def join_config(self, layout: str, specs: dict[str, Any], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
        text, projector = specs[TEXT], specs[PROJECTOR]
        has_qformer = projector.model_id == QFORMER
        own: dict[str, Any] = {"patches_per_feature": None if has_qformer else projector.patches}
        if has_qformer:
            own |= {"num_query_tokens": projector.num_query_tokens}
            own |= {"qformer_config": part_of(PROJECTOR, projector).to_hf(projector, dtype)}
        return {
            "architectures": [self.architecture],
            "model_type": NAME,
            "has_qformer": has_qformer,
            **{key: value for key, value in own.items() if value is not None},
            "vision_norm_eps": projector.vision_norm_epsilon,
            "feature_scale": projector.feature_scale,
            "text_config": part_of(TEXT, text).to_hf(text, dtype) | tokens,
            "vision_config": part_of(VISION, specs[VISION]).to_hf(specs[VISION], dtype),
            "torch_dtype": dtype,
        }

    def image_token_id(self, config: dict[str, Any]) -> int | None:
        return None

    def processor_config(self, spec: ModelSpec) -> None:
        return None

    def tokens_per_image(self, spec: ModelSpec) -> int:
        projector = spec.vision_projector
        if projector.model_id == QFORMER:
            return projector.num_query_tokens
        return (spec.vision_encoder.num_positions - 1) // projector.patches

    def check(self, spec: ModelSpec) -> list[str]:
        encoder, projector, decoder = spec.vision_encoder, spec.vision_projector, spec.text_decoder
        problems = []
        if encoder.model_id != self.model_ids[VISION]:
            problems.append(
                f'image_encoder.vision_encoder.model_id: found "{encoder.model_id}", expected "eva_vit", the '
                f"vision_encoder of model_id {NAME}"
            )
        if projector.model_id not in (QFORMER, CONCAT):
            problems.append(
                f'image_encoder.vision_projector.model_id: found "{projector.model_id}", expected "{QFORMER}" or '
                f'"{CONCAT}", the projectors of model_id {NAME}'
            )
        if problems:
            return problems
        problems = fit_problems(spec)
        if projector.reads_instructions:
            problems.append(
                "image_encoder.vision_projector: found a text branch; expected none of text_vocab_size and "
                f"text_positions, since the Q-Former of model_id {NAME} takes no question"
            )
        if projector.model_id == CONCAT and (encoder.num_positions - 1) % projector.patches:
            problems.append(
                f"image_encoder.vision_projector.patches: found {projector.patches}, expected a divisor of the "
                f"{encoder.num_positions - 1} patches of an image"
            )
        scale = decoder.traits.embedding_scale
        if scale is not None and projector.feature_scale is None:
            problems.append(
                f"image_encoder.vision_projector.feature_scale: found none, expected {scale} (image features are "
                f"multiplied as {decoder.model_id}'s word embeddings are, as the guide's repository trained it) or 1.0"
            )
        if self.tokens_per_image(spec) >= decoder.language_max_sequence_length:
            problems.append(
                f"text_decoder.language_max_sequence_length: found {decoder.language_max_sequence_length}, expected "
                f"more than the {self.tokens_per_image(spec)} tokens of one image"
            )
        return problems


FAMILY = MiniGpt4()
"""The family."""
