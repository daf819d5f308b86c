"""Arguments that some versions of megatron.core lack."""

import io
import pickle
import sys
from types import ModuleType

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from megatron.driver.checkpoint.reading import METADATA_FILE, read_metadata
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.platform.core_versions import known_options, takes


def older(config):
    """A function of a version without the argument."""


def newer(config, vp_stage=None):
    """The same function with it."""


def test_options_that_are_known_go_through():
    assert known_options(newer, vp_stage=1) == {"vp_stage": 1}
    assert known_options(newer, vp_stage=None) == {"vp_stage": None}
    assert takes(newer, "vp_stage") and not takes(older, "vp_stage")


def test_nothing_asked_of_an_older_version():
    assert known_options(older, vp_stage=None) == {}


def test_an_option_that_an_older_version_lacks():
    with pytest.raises(ConfigError, match="vp_stage is 1, but older of .* does not have it: install"):
        known_options(older, vp_stage=1)


def test_metadata_of_older_versions(tmp_path, monkeypatch):
    """Written as megatron.core 0.14 and 0.15 do, with a subclass of their own."""
    name = "megatron.core.dist_checkpointing.strategies.torch"
    stand_in = ModuleType(name)
    stand_in.MCoreMetadata = type("MCoreMetadata", (Metadata,), {"__module__": name})
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, name, stand_in)
        file = io.BytesIO()
        pickle.dump(stand_in.MCoreMetadata(state_dict_metadata={}, storage_data={}), file)
    (tmp_path / METADATA_FILE).write_bytes(file.getvalue())
    assert type(read_metadata(tmp_path)) is Metadata
