"""Families of models. One family = one file, found by its model_id."""

from mindspeed_mm.models.known import Known

KNOWN = {
    "blip2": Known(
        ("blip-2",),
        ((r"^language_projection\.", r"^qformer\.layernorm\.", r"^query_tokens$", r"^language_model\."),),
    ),
    "flamingo": Known(
        ("otter", "flamingo"),
        (
            (r"^(module\.)?perceiver\.layers\.0\.norm_media\.", r"^(module\.)?lang_encoder\."),
            (r"^(module\.)?perceiver\.layers\.0\.0\.norm_media\.", r"^(module\.)?lang_encoder\."),
        ),
    ),
    "instructblip": Known(
        ("instructblip",),
        ((r"^language_projection\.", r"^qformer\.embeddings\.", r"^query_tokens$", r"^language_model\."),),
    ),
    "llava": Known(
        ("llava",),
        (
            (r"^(model\.)?multi_modal_projector\.",),
            (r"(^|\.)mm_projector\.", r"^model\.(layers\.|embed_tokens\.|tok_embeddings\.)"),
        ),
    ),
    "llava_next": Known(
        ("llava_next",),
        (
            (r"^(model\.)?multi_modal_projector\.", r"^(model\.)?image_newline$"),
            (r"(^|\.)mm_projector\.", r"^model\.(layers\.|embed_tokens\.|tok_embeddings\.)", r"^model\.image_newline$"),
            (r"(^|\.)mm_projector\.", r"^model\.(layers\.|embed_tokens\.|tok_embeddings\.)"),
        ),
    ),
    "minigpt4": Known(("minigpt4",), ((r"^(llama_proj\.|Qformer\.bert\.)",),)),
    "qwen2_5_vl": Known(
        ("qwen2_5_vl",),
        ((r"^(model\.)?visual\.merger\.ln_q\.", r"^(model\.)?visual\.blocks\.0\.mlp\.gate_proj\."),),
    ),
}
"""What they say of themselves (models/known.py)."""
