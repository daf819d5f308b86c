"""Kinds of data files, one per module; `dataset_type` in data.json names them."""
