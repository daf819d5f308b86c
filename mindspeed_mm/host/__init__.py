"""What a host must bring: versions and environment variables. Nothing here imports torch."""
