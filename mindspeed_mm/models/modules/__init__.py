"""The parts' torch modules. They need megatron.core, so a part's file imports its module only when it builds one."""
