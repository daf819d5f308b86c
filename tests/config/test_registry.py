"""Implementations are found by file name."""

import sys

import pytest

from mindspeed_mm import registry
from mindspeed_mm.errors import ConfigError


@pytest.fixture
def family(tmp_path, monkeypatch):
    package = tmp_path / "some_family"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "alpha.py").write_text("PART = 'a'\n")
    (package / "beta.py").write_text("raise RuntimeError('imported without being asked for')\n")
    (package / "_helper.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_family"
    for name in [name for name in sys.modules if name.split(".")[0] == "some_family"]:
        del sys.modules[name]


def test_find_imports_only_what_is_asked_for(family):
    assert registry.available(family) == ["alpha", "beta"]
    assert registry.find(family, "alpha", "PART") == "a"


def test_unknown_name(family):
    with pytest.raises(ConfigError, match='unknown vision encoder "alhpa"; did you mean "alpha"'):
        registry.find(family, "alhpa", "PART", what="vision encoder")
    with pytest.raises(ConfigError, match='unknown some family "zzz"; known: alpha, beta'):
        registry.find(family, "zzz", "PART")
