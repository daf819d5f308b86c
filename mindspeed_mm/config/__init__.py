"""Strict JSON configuration: read, checked against pydantic models, all errors at once."""

from mindspeed_mm.config.load import StrictModel, load_config, read_json

__all__ = ["StrictModel", "load_config", "read_json"]
