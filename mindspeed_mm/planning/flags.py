"""Flags of `mindspeed-mm plan` that the command and the search both know."""

STRATEGY_FLAGS = {
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline",
    "context_parallel_size": "context",
    "micro_batch_size": "micro_batch",
}
"""Flags of train that the search varies where they are not given."""
