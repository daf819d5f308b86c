"""Building blocks that the parts share: attention, norms, MLPs, rotary positions, key/value cache, and the torch
modules made of them. What needs megatron.core is imported by a part only when it builds its module; decoder_spec,
decoder_rules and hf_config do not.
"""
