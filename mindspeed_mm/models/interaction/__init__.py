from mindspeed_mm.models.known import Known

KNOWN = {
    "post_block": Known((), ((r"^(base_model\.model\.)?(model\.)?(post_interaction_block|post_decoder)\.",),)),
}
"""What they say of themselves (models/known.py)."""
