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


@pytest.fixture
def added(monkeypatch):
    """An empty table of what other packages register."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    return registry.register


def test_what_is_registered_is_found_beside_the_modules(family, added):
    added(family, "gamma", "c")
    added(family, "gamma", "c")  # a module that is imported twice
    assert registry.available(family) == ["alpha", "beta", "gamma"]
    assert registry.find(family, "gamma", "PART") == "c" and registry.registered(family) == {"gamma": "c"}
    for name in ("gamma", "alpha"):
        with pytest.raises(ConfigError, match=f'"{name}" of some_family exists already; register it under another'):
            added(family, name, "other")


def test_a_template_of_a_known_name_is_refused(added, tmp_path):
    from mindspeed_mm.data.template import PACKAGE, get_template, template_names
    from mindspeed_mm.errors import TemplateError

    path = tmp_path / "mine.json"
    form = '{"aliases": [%s], "human": "{text}", "gpt": "{text}", "end": "</s>", "stop": []}'
    path.write_text(form % '"my own"')
    added(PACKAGE, "mine", path)
    assert get_template("my own") == get_template("mine") and "mine" in template_names()
    path.write_text(form % '"v1"')
    with pytest.raises(TemplateError, match='the template name "v1" is used twice, the second time in .*mine.json'):
        get_template("mine")


def test_a_benchmark_of_a_known_name_is_refused(added):
    from evaluation.benchmarks import known_benchmarks
    from evaluation.benchmarks.yesno._yesno import YesNo

    added("evaluation.benchmarks", "mine", YesNo("Mine"))
    assert known_benchmarks()["mine"].name == "Mine"
    added("evaluation.benchmarks", "second", YesNo("Second", aliases=("pope",)))
    with pytest.raises(ConfigError, match="two benchmarks are called pope"):
        known_benchmarks()
