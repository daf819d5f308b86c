"""The reference data of tests/data is whole once the tests have made what is left out there."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import reference


def test_every_file_is_what_was_made(golden, golden_eval, golden_flamingo, cases):
    folders = {"golden": golden, "golden_eval": golden_eval, "golden_flamingo": golden_flamingo, "cases": cases}
    manifest = json.loads((reference.DATA / "manifest.json").read_text())
    paths = {name: folders[name.partition("/")[0]] / name.partition("/")[2] for name in manifest}
    other = [name for name, path in paths.items() if reference.digest(path) != manifest[name]]
    assert not other and len(manifest) > 150


def test_a_changed_weight_has_another_digest(golden, tmp_path):
    from safetensors.torch import save_file

    source = golden / "models" / "clip_hf" / "model.safetensors"
    tensors = load_file(source)
    save_file(tensors, tmp_path / "same.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    assert reference.digest(tmp_path / "same.safetensors") == reference.digest(source)
    assert reference.digest(tmp_path / "other.safetensors") != reference.digest(source)


@pytest.mark.parametrize("name", ["llama_every1_latest", "mpt_every2_all"])
def test_flamingo_weights_have_both_names(golden_flamingo, name):
    stored = load_file(reference.DATA / "golden_flamingo" / f"{name}.weights.safetensors")
    whole = load_file(golden_flamingo / f"{name}.weights.safetensors")
    first = "lang_encoder.model.layers.3." if name.startswith("llama") else "lang_encoder.transformer.blocks.3."
    own = [key for key in whole if key.startswith(f"{first}decoder_layer.")]
    assert own and len(stored) < len(whole)
    for key in own:
        twin = key.replace(f"{first}decoder_layer.", "lang_encoder.old_decoder_blocks.3.")
        assert torch.equal(whole[key], whole[twin]) and twin not in stored


def test_a_written_file_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(reference, "DATA", tmp_path)
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "a.json").write_text("1")
    before = reference.snapshot()
    (tmp_path / "golden" / "a.json.index").write_text("2")
    assert reference.snapshot() != before
