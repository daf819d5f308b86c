"""Constants shared by data and models."""

IGNORE_INDEX = -100
"""Label of a position that is not supervised (torch's cross-entropy default, used by HF and LLaVA)."""

IMAGE_TOKEN_INDEX = -200
"""Id that stands for an image position in input_ids (LLaVA's constants.py)."""

IMAGE_TOKEN = "<image>"
"""Placeholder of one image in text (LLaVA's constants.py)."""
