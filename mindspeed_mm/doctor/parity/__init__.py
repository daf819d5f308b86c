"""Whether a device computes what the CPU computes: the same cases in two processes, and what they differ by."""
