"""Training checkpoints on disk: written, read, resumed, checked, locked."""
