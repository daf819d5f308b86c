"""A training run: specs, weights and data joined with the driver; its steps and how many operations they take."""
