from mindspeed_mm.models.known import Known

KNOWN = {
    "clip": Known(
        ("clip_vision_model", "clip"),
        (
            (r"^(vision_model\.)?embeddings\.class_embedding$",),
            (r"^visual\.class_embedding$",),
        ),
    ),
    "eva_vit": Known(
        ("blip_2_vision_model", "instructblip_vision_model"),
        ((r"^blocks\.0\.attn\.q_bias$", r"^pos_embed$", r"^patch_embed\.proj\.weight$"),),
    ),
    "qwen2_5_vl": Known(("qwen2_5_vl_vision", "qwen2_5_vl")),
    "siglip": Known(
        ("siglip_vision_model", "siglip"),
        (
            (
                r"^(vision_model\.)?embeddings\.patch_embedding\.bias$",
                r"^(vision_model\.)?embeddings\.position_embedding\.weight$",
                r"^(vision_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight$",
            ),
        ),
    ),
}
"""What they say of themselves (models/known.py)."""
