"""Recognising layouts by their contents, and refusing what is damaged, unsafe or ambiguous."""

import io
import json
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.sources import open_source, recognise, register_detector
from tests.weights.conftest import TINY_LLAMA
from tests.weights.weight_helpers import CallsCode

LAYOUTS = {
    "clip_openai.pt": ("openai-clip", {"vision_encoder": ("openai", 56)}),
    "clip_hf": ("clip", {"vision_encoder": ("hf", 71)}),
    "vicuna": ("hf", {"text_decoder": ("hf", 39)}),
    "vicuna_bin": ("hf", {"text_decoder": ("hf", 43)}),
    "mm_projector.bin": ("projector", {"vision_projector": ("llava", 4)}),
    "llava_original": (
        "llava",
        {"text_decoder": ("hf", 39), "vision_encoder": ("hf", 71), "vision_projector": ("llava", 4)},
    ),
    "llava_hf": (
        "llava-hf",
        {"text_decoder": ("hf", 39), "vision_encoder": ("hf", 71), "vision_projector": ("hf", 4)},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_golden_layouts_are_recognised(golden_models, name):
    layout, parts = LAYOUTS[name]
    source = open_source(golden_models / name)
    assert source.layout == layout
    found = {kind: (source.part(kind).dialect, len(source.part(kind).names)) for kind in source.parts}
    assert found == parts


def test_the_name_of_a_file_does_not_matter(golden_models, tmp_path):
    shutil.copy(golden_models / "clip_openai.pt", tmp_path / "mm_projector.bin")
    assert open_source(tmp_path / "mm_projector.bin").layout == "openai-clip"


def test_names_of_transformers_5_are_recognised(golden_models):
    names = json.loads((golden_models / "llava_hf_v5" / "tensor_names_and_shapes.json").read_text())
    layout = recognise(names, None).layout
    parts, dropped, unknown = layout.split(names)
    assert layout.name == "llava-hf" and not dropped and not unknown
    assert sorted(parts) == ["text_decoder", "vision_encoder", "vision_projector"]
    old = open_source(golden_models / "llava_hf")
    assert {kind: sorted(names) for kind, names in parts.items()} == {
        kind: sorted(old.part(kind).names) for kind in old.parts
    }


def test_names_under_model_are_recognised():
    names = ["model.language_model.embed_tokens.weight", "lm_head.weight", "model.multi_modal_projector.linear_1.bias"]
    names += ["model.vision_tower.vision_model.embeddings.class_embedding"]
    parts, _, unknown = recognise(names, None).layout.split(names)
    assert not unknown
    assert set(parts["text_decoder"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(parts["vision_encoder"]) == {"embeddings.class_embedding"}
    assert set(parts["vision_projector"]) == {"linear_1.bias"}


def test_a_whole_clip_model_gives_its_vision_encoder(tmp_path):
    names = ["vision_model.embeddings.class_embedding", "text_model.x", "logit_scale", "visual_projection.weight"]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    assert source.layout == "clip" and source.part("vision_encoder").names == ("embeddings.class_embedding",)
    assert sorted(source.dropped) == ["logit_scale", "text_model.x", "visual_projection.weight"]


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
def test_projector_prefixes(tmp_path, prefix):
    torch.save({f"{prefix}mm_projector.0.weight": torch.zeros(2)}, tmp_path / "file.bin")
    source = open_source(tmp_path / "file.bin")
    assert source.layout == "projector" and source.part("vision_projector").names == ("0.weight",)


def test_a_state_dict_of_our_whole_model_is_read_with_its_placeholders(tmp_path):
    state = {
        "text_decoder.embedding.word_embeddings.weight": torch.zeros(1),
        "text_decoder.decoder.layers.0.mlp.linear_fc1._extra_state": None,
        "image_encoder.encoder.class_token": torch.zeros(1),
        "image_encoder.projector.encoder.linear_fc1.weight": torch.zeros(1),
    }
    torch.save(state, tmp_path / "model.pt")
    source = open_source(tmp_path / "model.pt")
    assert source.layout == "mindspeed-mm"
    assert source.part("text_decoder").names == ("embedding.word_embeddings.weight",)
    assert source.part("vision_projector").names == ("encoder.linear_fc1.weight",)


def test_shards_without_an_index_are_read_together(tiny_llama):
    folder, _, state = tiny_llama
    names = sorted(state)
    (folder / "model.safetensors").unlink()
    save_file({name: state[name] for name in names[:5]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: state[name] for name in names[5:]}, folder / "model-00002-of-00002.safetensors")
    source = open_source(folder)
    assert source.layout == "hf" and sorted(source.part("text_decoder").names) == names


@pytest.fixture
def original_shards(golden_models, tmp_path):
    """The original code's folder, whose shards would each pass for another layout, without their index."""
    shutil.copytree(golden_models / "llava_original", tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin.index.json").unlink()
    return tmp_path / "model"


def test_letter_d_shards_are_recognised_together(golden_models, original_shards):
    found, wanted = open_source(original_shards), open_source(golden_models / "llava_original")
    assert found.layout == wanted.layout == "llava"
    assert {slot: sorted(part.names) for slot, part in found.part_sources.items() if slot != "vision_encoder"} == {
        slot: sorted(part.names) for slot, part in wanted.part_sources.items() if slot != "vision_encoder"
    }


def test_letter_d_a_missing_shard_is_named(original_shards):
    (original_shards / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightError, match="1 of 2 shards and no index; missing are pytorch_model-00002-of-00002.bin"):
        open_source(original_shards)


def test_letter_d_shards_of_two_models_are_refused(original_shards):
    for number in (1, 2):
        name = f"-0000{number}-of-00002.bin"
        shutil.copy(original_shards / f"pytorch_model{name}", original_shards / f"other{name}")
    with pytest.raises(WeightError, match=r"several models: other-\*-of-00002.bin, pytorch_model-\*-of-00002.bin"):
        open_source(original_shards)


def test_letter_d_a_copy_in_another_format_is_no_second_model(tiny_llama):
    """As where there are indexes: safetensors come first."""
    folder, _, state = tiny_llama
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    torch.save(state, folder / "pytorch_model-00001-of-00001.bin")
    source = open_source(folder)
    assert source.layout == "hf" and sorted(source.part("text_decoder").names) == sorted(state)


def test_legacy_torch_files_are_read(tmp_path):
    state = {"mm_projector.0.weight": torch.randn(2, 3)}
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    part = open_source(tmp_path / "old.bin").part("vision_projector")
    assert torch.equal(part.get("0.weight"), state["mm_projector.0.weight"]) and part.shape("0.weight") == (2, 3)


def test_a_registered_detector_is_asked_first(tmp_path, monkeypatch):
    from mindspeed_mm.models import sources

    monkeypatch.setattr(sources, "_DETECTORS", [])
    mine = sources.Source(tmp_path, "checkpoint", None, {})
    register_detector(lambda path: mine if path == tmp_path else None)
    assert open_source(tmp_path) is mine
    with pytest.raises(WeightError, match="no such file"):
        open_source(tmp_path / "other")


def test_a_vision_encoder_is_found_by_the_relative_path_of_the_config(golden_models, tmp_path):
    shutil.copytree(golden_models / "clip_hf", tmp_path / "clip_hf")
    folder = tmp_path / "llava"
    folder.mkdir()
    state = {"model.embed_tokens.weight": torch.zeros(2), "model.mm_projector.0.weight": torch.zeros(2)}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "../clip_hf", "mm_vision_select_layer": -3}))
    part = open_source(folder).part("vision_encoder")
    assert part.path == folder / "../clip_hf" and part.config["vision_feature_layer"] == -3
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}))
    with pytest.raises(WeightError, match="names the vision encoder 'openai/clip-vit-large-patch14-336'"):
        open_source(folder).part("vision_encoder")


def test_a_checkpoint_that_names_itself_as_its_vision_encoder(tiny_llama):
    folder, _, state = tiny_llama
    save_file({**state, "model.mm_projector.0.weight": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, "mm_vision_tower": "."}))
    with pytest.raises(WeightError, match="found layout llava with .*; expected a vision_encoder"):
        open_source(folder)


def test_an_unknown_select_feature_is_refused(tiny_llama):
    folder, _, state = tiny_llama
    save_file({**state, "model.mm_projector.0.weight": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"mm_vision_select_feature": "all"}))
    with pytest.raises(WeightError, match="found mm_vision_select_feature 'all'"):
        open_source(folder)


# --- damaged and unsafe files --------------------------------------------------------------------------------------


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(WeightError, match="nowhere: no such file or folder"):
        open_source(tmp_path / "nowhere")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(WeightError, match="found no weight file"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "neither safetensors nor a torch file"), (b"version https://git-lfs.github.com/spec/v1", "git lfs pull")],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(WeightError, match=message):
        open_source(tmp_path / "w.bin")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    from pathlib import Path

    (tmp_path / "w.bin").write_bytes(b"x")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WeightError, match="cannot read .*w.bin: Permission denied"):
        open_source(tmp_path / "w.bin")


@pytest.mark.parametrize("cut", [4, 40, 2000])
def test_truncated_safetensors_are_refused(tiny_llama, cut):
    folder, _, _ = tiny_llama
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightError, match="model.safetensors: the file is cut off or damaged"):
        open_source(folder)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": 1}',
        b"[1]",
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b"{" * 5000,
    ],
)
def test_nonsense_safetensors_headers_are_refused(tmp_path, header):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(WeightError, match="cut off or damaged"):
        open_source(tmp_path / "w.safetensors")


def test_a_huge_safetensors_header_is_not_read(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(WeightError, match=f"claims {2**60} bytes"):
        open_source(tmp_path / "w.safetensors")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_calls_code_is_refused(tmp_path, new_format):
    torch.save({"mm_projector.0.weight": CallsCode()}, tmp_path / "w.bin", _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightError, match=r"w.bin: refused, because reading it would call \w+.eval"):
        open_source(tmp_path / "w.bin")


@pytest.mark.parametrize("content", [[1], {"a": 1}, {"optimizer": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}])
def test_a_pickle_of_other_things_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(WeightError, match="expected a (flat )?dict from names to tensors"):
        open_source(tmp_path / "w.bin")


def saved(new_format):
    """The bytes of a small torch file."""
    buffer = io.BytesIO()
    torch.save({"mm_projector.0.weight": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=new_format)
    return buffer.getvalue()


SAVED = {new_format: saved(new_format) for new_format in (True, False)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.booleans(), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_torch_files_cut_or_changed_anywhere_never_crash(tmp_path_factory, new_format, cut, where, mask):
    raw = bytearray(SAVED[new_format])
    position = int(where * len(raw))
    if cut:
        raw = raw[:position]
    else:
        raw[position] ^= mask
    path = tmp_path_factory.mktemp("cut") / "w.bin"
    path.write_bytes(raw)
    try:
        open_source(path)
    except WeightError as error:
        assert "w.bin" in str(error)


def test_unknown_tensors_are_refused(tmp_path):
    save_file({"something.else": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightError, match=r"found no known layout \(tensors such as something.else\)"):
        open_source(tmp_path / "w.safetensors")
    save_file({"embeddings.class_embedding": torch.zeros(1), "other": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightError, match="1 tensors that layout clip does not have, such as other"):
        open_source(tmp_path / "w.safetensors")


def test_lora_adapters_are_refused(tmp_path):
    save_file({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightError, match="found LoRA adapters"):
        open_source(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightError, match=r"found a LoRA adapter .*--adapter .*mindspeed-mm merge BASE"):
        open_source(tmp_path)


def test_letter_d_files_of_several_layouts_in_one_folder_are_ambiguous(golden_models):
    with pytest.raises(WeightError, match=r"several layouts: clip_openai.pt \(openai-clip\), mm_projector.bin"):
        open_source(golden_models)


def test_two_files_of_one_part_are_refused(tmp_path):
    for name in ("mlp.pt", "converted_mlp.pt"):
        torch.save({"encoder.linear_fc1.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(WeightError, match="both converted_mlp.pt and mlp.pt hold a vision_projector"):
        open_source(tmp_path)


def test_a_part_that_is_not_there_is_refused(golden_models):
    with pytest.raises(WeightError, match="found layout hf with text_decoder; expected a vision_encoder"):
        open_source(golden_models / "vicuna").part("vision_encoder")
