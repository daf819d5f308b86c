"""`_base_` of the suite's files: what is merged, what is replaced, and each error."""

import json
import re

import pytest

from mindspeed_mm.config.inherit import MAX_FILES, read_config
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(name, value):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def test_objects_are_merged_and_all_else_is_replaced(write):
    write("base/a.json", {"decoder": {"layers": 4, "lora": None, "sizes": [1, 2], "deep": {"x": 1, "y": 2}}, "n": 1})
    write("base/b.json", {"_base_": "a.json", "n": 2, "decoder": {"layers": 8}})
    write("c.json", {"n": 3, "other": True})
    own = {"_base_": ["base/b.json", "c.json"], "decoder": {"sizes": [3], "lora": {"r": 8}, "deep": {"y": None}}}
    assert read_config(write("d.json", own)) == {
        "decoder": {"layers": 8, "lora": {"r": 8}, "sizes": [3], "deep": {"x": 1, "y": None}},
        "n": 3,
        "other": True,
    }


def test_delete_replaces_an_object_and_false_merges(write):
    write("a.json", {"one": {"x": 1, "y": {"z": 1}}, "two": {"x": 1}, "three": 5})
    own = {"one": {"_delete_": True, "w": 2}, "two": {"_delete_": False, "w": 2}, "three": {"_delete_": True, "w": 1}}
    path = write("b.json", {"_base_": "a.json"} | own)
    assert read_config(path) == {"one": {"w": 2}, "two": {"x": 1, "w": 2}, "three": {"w": 1}}


def test_a_base_may_be_named_by_two_files(write):
    write("a.json", {"x": 1})
    write("b.json", {"_base_": "a.json"})
    write("c.json", {"_base_": "a.json", "y": 2})
    assert read_config(write("d.json", {"_base_": ["b.json", "c.json"]})) == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"_base_": "none.json"}, r"own\.json: _base_: cannot read .*none\.json: No such file"),
        ({"_base_": ["good.json", "list.json"]}, r"own\.json: _base_\[1\]: .*list\.json holds \[1\] \(array\)"),
        ({"_base_": "broken.json"}, r"own\.json: _base_: .*broken\.json is not JSON: .* at line 1, column 1"),
        ({"_base_": 3}, r"own\.json: _base_ is 3; expected the path of a JSON file"),
        ({"_base_": None}, r"own\.json: _base_ is None; expected the path"),
        ({"_base_": ["good.json", ""]}, r"own\.json: _base_\[1\] is ''; expected the path"),
        ({"_base_": "own.json"}, r"own\.json: _base_ makes a circle of files: .*own\.json -> .*own\.json; take"),
        ({"_base_": "round.json"}, r"own\.json: _base_: .*round\.json: _base_\[0\] makes a circle of files"),
        ({"_base_": "good.json", "a": {"b": {}}}, r"own\.json: a\.b is an object, but 1 in the base: add _delete_"),
        ({"_base_": "good.json", "c": {"_delete_": True}}, r"own\.json: c\._delete_ is true, but no base has c"),
        ({"_base_": "good.json", "a": {"_delete_": 1}}, r"own\.json: a\._delete_ is 1; expected true or false"),
        ({"_base_": "good.json", "_delete_": True}, r"own\.json: _delete_ at the top would replace all of the bases"),
    ],
)
def test_errors_name_the_file_and_the_place(write, own, message):
    write("good.json", {"a": {"b": 1}})
    write("list.json", [1])
    write("broken.json", "x")
    write("round.json", {"_base_": ["own.json"]})
    with pytest.raises(ConfigError, match=message):
        read_config(write("own.json", own))


def test_too_many_files_and_too_deep_ones(write):
    write("a.json", {})
    with pytest.raises(ConfigError, match=rf"more than {MAX_FILES} files are named by _base_"):
        read_config(write("many.json", {"_base_": ["a.json"] * MAX_FILES}))
    write("deep.json", '{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ConfigError, match=r"many\.json: _base_: .*deep\.json is not a configuration: it is nested too"):
        read_config(write("many.json", {"_base_": "deep.json"}))


def test_merging_what_is_nested_too_deeply_is_an_error(write, monkeypatch):
    def merge(*_):
        raise RecursionError

    monkeypatch.setattr("mindspeed_mm.config.inherit._merged", merge)
    with pytest.raises(ConfigError, match=r"a\.json is not a configuration: it is nested too deeply"):
        read_config(write("a.json", {}))


def test_an_unknown_key_of_a_base_gets_the_schemas_error(write):
    write("base.json", {"dataloader_param": {"shufle": True}})
    path = write("data.json", {"_base_": "base.json"})
    message = re.escape(f"data config ({path})") + '.*dataloader_param.shufle: unknown key; did you mean "shuffle"'
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
        DataConfig.load(path)
