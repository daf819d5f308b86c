from mindspeed_mm.models.known import Known

KNOWN = {
    "llava_next": Known(
        (),
        ((r"(^|\.)mm_projector\.", r"^(model\.)?image_newline$"),),
    ),
    "mlp": Known((), ((r"(^|\.)mm_projector\.|^(0\.)?(weight|bias)$",),)),
    "patch_concat": Known(),
    "patch_merger": Known(),
    "perceiver": Known(),
    "qformer": Known(),
}
"""What they say of themselves (models/known.py)."""
