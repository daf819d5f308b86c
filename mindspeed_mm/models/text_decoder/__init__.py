from mindspeed_mm.models.known import Known

KNOWN = {
    "gemma": Known(("gemma",)),
    "gemma2": Known(("gemma2",)),
    "internlm2": Known(("internlm2",)),
    "llama": Known(("llama",)),
    "mistral": Known(("mistral",)),
    "mpt": Known(("mpt",)),
    "opt": Known(("opt",)),
    "phi3": Known(("phi3",)),
    "qwen2": Known(("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")),
    "qwen3": Known(("qwen3",)),
}
"""What they say of themselves (models/known.py)."""
