"""Building blocks that every part shares: attention, norms, rotary embedding, layer specs on megatron.core."""
