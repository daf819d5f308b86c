"""Building blocks that the parts share: attention, norms, MLPs, rotary positions, key/value cache, and the torch modules
made of them. They need megatron.core, so a part's file imports its module only when it builds one."""
