"""Training steps: what turns a batch into a loss, and how many operations that takes."""
