"""Conversion to the ancestor's files: bit-equal, self-describing, and the guide's three scripts."""

import json
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from checkpoint_converters.convert import convert, convert_part
from checkpoint_converters.stream import as_bytes
from checkpoint_converters.torch_zip import write_torch_zip
from checkpoint_converters.write import beside
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.describe import describe_model, describe_part
from mindspeed_mm.models.part import find_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.weights.loading import load_part
from tests.weights.weight_helpers import empty_state

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "llava1.5"
KINDS = ("text_decoder", "vision_encoder", "vision_projector")


@pytest.fixture
def models(golden):
    """The folder with one model in every public layout."""
    return golden / "models"


@pytest.fixture
def spec(models):
    """ModelSpec of the goldens."""
    return describe_model(open_source(models / "llava_original"))


def loaded(spec, kind, path):
    """All tensors that a module of `kind` gets from `path`."""
    part, part_spec = spec.parts()[kind], spec.part(kind)
    state = empty_state(part, part_spec, open_source(path).part(kind))
    load_part(state, part, part_spec, open_source(path))
    return state


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_whole_model_loads_equal_from_the_converted_folder(models, spec, tmp_path):
    done = convert(models / "llava_original", tmp_path / "out", to="mindspeed-mm")
    weights = ["converted_clip.pt", "converted_vicuna.pt", "generation_config.json", "mlp.pt", "model.json"]
    others = ["preprocessor_config.json", "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in done) == weights + others
    model = load_model_spec(tmp_path / "out" / "model.json")
    assert model.part_specs().keys() == spec.part_specs().keys() and model.vision_encoder.num_attention_heads == 4
    for kind in KINDS:
        assert_equal(loaded(spec, kind, models / "llava_original"), loaded(spec, kind, tmp_path / "out"))
    assert describe_model(open_source(tmp_path / "out")).vision_encoder.num_attention_heads == 4


def test_converting_again_changes_nothing(models, tmp_path):
    convert(models / "llava_original", tmp_path / "a", to="mindspeed-mm")
    convert(tmp_path / "a", tmp_path / "b", to="mindspeed-mm")
    for name in ("converted_clip.pt", "converted_vicuna.pt", "mlp.pt"):
        assert_equal(
            torch.load(tmp_path / "a" / name, weights_only=True), torch.load(tmp_path / "b" / name, weights_only=True)
        )


def test_names_and_shapes_are_those_of_the_ancestor(models, tmp_path):
    convert(models / "llava_original", tmp_path, to="mindspeed-mm")
    clip = torch.load(tmp_path / "converted_clip.pt", weights_only=True)
    assert len(clip) == 5 + 12 * 4 and clip["class_token"].shape == (1, 1, 64)  # 293 for the 24 layers of ViT-L
    assert clip["decoder.layers.3.self_attention.linear_qkv.bias"].shape == (192,)
    vicuna = torch.load(tmp_path / "converted_vicuna.pt", weights_only=True)
    assert len(vicuna) == 3 + 6 * 4  # 195 for 32 layers
    assert vicuna["decoder.layers.0.mlp.linear_fc1.weight"].shape == (352, 96)
    assert sorted(torch.load(tmp_path / "mlp.pt", weights_only=True)) == [
        "encoder.linear_fc1.bias",
        "encoder.linear_fc1.weight",
        "encoder.linear_fc2.bias",
        "encoder.linear_fc2.weight",
    ]


def test_an_assumed_head_count_does_not_bind_the_spec(models, spec, tmp_path):
    source = open_source(models / "clip_openai.pt").part("vision_encoder")
    done = convert_part(source, tmp_path / "converted_clip.pt")
    assert done.assumed == ("num_attention_heads",)  # 64 / 64 = 1, where the model has 4
    expected = loaded(spec, "vision_encoder", models / "clip_hf")
    assert_equal(loaded(spec, "vision_encoder", tmp_path / "converted_clip.pt"), expected)
    again = convert_part(open_source(tmp_path).part("vision_encoder"), tmp_path / "again" / "converted_clip.pt")
    assert again.assumed == ("num_attention_heads",)
    assert_equal(loaded(spec, "vision_encoder", tmp_path / "again"), expected)


def test_a_stated_head_count_binds_the_spec(models, spec, tmp_path):
    source = open_source(models / "clip_openai.pt").part("vision_encoder")
    for heads in (4, 2):
        assert convert_part(source, tmp_path / f"{heads}.pt", num_attention_heads=heads).assumed == ()
    assert_equal(loaded(spec, "vision_encoder", tmp_path / "4.pt"), loaded(spec, "vision_encoder", models / "clip_hf"))
    with pytest.raises(WeightError, match="num_attention_heads: the weights have 2, model.json says 4"):
        loaded(spec, "vision_encoder", tmp_path / "2.pt")


def test_files_of_the_ancestor_have_no_record_and_load(models, spec, tmp_path):
    convert(models / "llava_original", tmp_path / "ours", to="mindspeed-mm")
    for kind, name in zip(KINDS, ("converted_vicuna.pt", "converted_clip.pt", "mlp.pt"), strict=True):
        torch.save(torch.load(tmp_path / "ours" / name, weights_only=True), tmp_path / name)
        assert open_source(tmp_path / name).part(kind).config is None
        assert_equal(loaded(spec, kind, tmp_path / name), loaded(spec, kind, models / "llava_original"))


def test_a_vision_encoder_of_the_later_ancestor_lacks_its_last_layer(models, spec, tmp_path):
    convert(models / "clip_hf", tmp_path, to="mindspeed-mm")
    state = torch.load(tmp_path / "converted_clip.pt", weights_only=True)
    short = {name: tensor for name, tensor in state.items() if ".layers.3." not in name}
    torch.save(short, tmp_path / "converted_clip.pt")
    assert_equal(loaded(spec, "vision_encoder", tmp_path), loaded(spec, "vision_encoder", models / "clip_hf"))


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), (torch.float32, torch.float32)])
def test_dtype_is_cast(models, tmp_path, dtype, expected):
    convert(models / "mm_projector.bin", tmp_path, to="mindspeed-mm", dtype=dtype)
    assert {tensor.dtype for tensor in torch.load(tmp_path / "mlp.pt", weights_only=True).values()} == {expected}


def test_unknown_dtype_and_layout_are_refused(models, tmp_path):
    with pytest.raises(WeightError, match="found dtype 'int4'; expected one of fp32"):
        convert(models / "mm_projector.bin", tmp_path, to="mindspeed-mm", dtype="int4")
    with pytest.raises(WeightError, match="cannot convert to 'gguf'"):
        convert(models / "mm_projector.bin", tmp_path, to="gguf")


def test_a_llama_without_a_config_is_refused(models, tmp_path):
    with pytest.raises(WeightError, match="found no config.json beside the text_decoder"):
        convert(models / "vicuna" / "model.safetensors", tmp_path, to="mindspeed-mm")


def test_weights_that_lack_what_shows_their_size_are_refused(tmp_path):
    torch.save({"mm_projector.2.weight": torch.zeros(2, 2)}, tmp_path / "p.bin")
    with pytest.raises(WeightError, match="tensor 0.weight is missing; expected the weights of a mlp"):
        describe_part(open_source(tmp_path / "p.bin").part("vision_projector"))


@pytest.mark.parametrize(
    "record", ["[]", "{", '{"config": {}}', '{"config": {"vision_projector": {}}, "assumed": [1]}']
)
def test_a_record_that_is_nonsense_is_refused(tmp_path, record):
    torch.save({"encoder.linear_fc1.weight": torch.zeros(1)}, tmp_path / "mlp.pt")
    with zipfile.ZipFile(tmp_path / "mlp.pt", "a") as archive:
        archive.writestr("mlp/mindspeed_mm.json", record)
    with pytest.raises(WeightError, match="mlp.pt: the file is cut off or damaged"):
        open_source(tmp_path / "mlp.pt")


def test_a_record_that_is_too_large_is_refused(tmp_path, monkeypatch):
    outputs = [("encoder.linear_fc1.weight", (1,), torch.float32)]
    write_torch_zip(tmp_path / "mlp.pt", outputs, [as_bytes(torch.zeros(1))], record={"config": {}})
    monkeypatch.setattr("mindspeed_mm.weights.torch_file.MAX_JSON_BYTES", 4)
    with pytest.raises(WeightError, match="mindspeed_mm.json is larger than 4 bytes"):
        open_source(tmp_path / "mlp.pt")


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    target = tmp_path / "mlp.pt"
    target.write_text("old")

    def fail():
        with beside(target) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(WeightError, match="cannot write .*mlp.pt: No space left on device"):
        fail()
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["mlp.pt"]


def test_a_target_that_is_a_file_is_refused(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightError, match="file exists; expected a new folder or file"):
        convert(models / "mm_projector.bin", tmp_path / "file", to="mindspeed-mm")
    with pytest.raises(WeightError, match="cannot write"):
        convert(models / "mm_projector.bin", tmp_path / "file" / "below", to="mindspeed-mm")


@pytest.mark.parametrize("source", ["vicuna", "vicuna_bin", "llava_original"])
def test_the_decoder_goes_back_to_hf_bit_equal(models, tmp_path, source):
    convert(models / source, tmp_path / "ours", to="mindspeed-mm")
    written = convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= {path.name for path in written}
    part, original = (open_source(path).part("text_decoder") for path in (tmp_path / "hf", models / "vicuna"))
    assert_equal({name: part.get(name) for name in part.names}, {name: original.get(name) for name in original.names})
    assert describe_part(part) == describe_part(original)


def test_stock_transformers_computes_the_same_with_the_export(models, tmp_path):
    import transformers

    convert(models / "vicuna", tmp_path / "hf", to="hf", dtype="fp32")
    ids = torch.tensor([[1, 17, 300, 999]])
    loads = [
        transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "hf", models / "vicuna")
    ]
    with torch.no_grad():
        assert torch.equal(loads[0](ids).logits, loads[1](ids).logits)


def test_a_folder_that_exists_is_not_overwritten(models, tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(WeightError, match="exists; expected a new folder"):
        convert(models / "vicuna", tmp_path, to="hf")


def run_script(monkeypatch, name, *arguments):
    """Run a script in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return ended.value.code


def test_the_scripts_of_the_guide(models, spec, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "folder"
    commands = (
        ("clip_converter.py", "--download-root", models / "clip_openai.pt", "--output", out),
        ("vicuna_converter.py", "--load-dir", models / "vicuna_bin", "--save-dir", out, "--trust-remote-code", "True"),
        ("mlp_converter.py", "--load-file", models / "mm_projector.bin", "--output", out),
    )
    assert [run_script(monkeypatch, *command) for command in commands] == [0, 0, 0]
    said = capsys.readouterr()
    assert "converted_clip.pt: 53 tensors" in said.out and "Give --num-attention-heads where that is wrong" in said.err
    for kind in KINDS:
        assert_equal(loaded(spec, kind, out), loaded(spec, kind, models / "llava_original"))


def test_a_script_fails_with_a_message(models, tmp_path, monkeypatch, capsys):
    status = run_script(monkeypatch, "mlp_converter.py", "--ckpt-path", models / "vicuna", "--output", tmp_path)
    assert status == 1 and "expected a vision_projector" in capsys.readouterr().err


def test_heads_that_the_config_contradicts_are_refused(models, tmp_path, monkeypatch, capsys):
    """Case: the file was written with the heads given, so that the model it describes is another one."""
    wrong, message = {"num_attention_heads": 1}, "clip_hf/config.json: found num_attention_heads 4 and --num-attention"
    with pytest.raises(ConfigError, match=message):
        convert(models / "clip_hf", tmp_path / "out", to="mindspeed-mm", **wrong)
    with pytest.raises(ConfigError, match="found vision_config.num_attention_heads 4 and --num-attention-heads 1"):
        convert(models / "llava_hf", tmp_path / "out", to="mindspeed-mm", **wrong)
    flags = ("--download-root", models / "clip_hf", "--output", tmp_path / "out", "--num-attention-heads", "1")
    assert run_script(monkeypatch, "clip_converter.py", *flags) == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_script_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(EXAMPLES / "clip_converter.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "--download-root" in result.stdout and not result.stderr


def test_describing_takes_stated_fields_over_the_config(models):
    source = open_source(models / "clip_hf").part("vision_encoder")
    assert describe_part(source).num_attention_heads == 4
    given = describe_part(source, num_attention_heads=8)
    assert (given.num_attention_heads, given.num_query_groups, given.kv_channels) == (8, 8, 8)


def test_a_llava_without_its_vision_encoders_config_is_described_by_shapes(models, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(models / "llava_original", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -3}
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    spec = describe_model(open_source(folder))
    assert (spec.vision_encoder.num_attention_heads, spec.vision_encoder.num_built_layers) == (1, 2)  # 64 / 64
    convert(folder, tmp_path / "out", to="mindspeed-mm", num_attention_heads=4)
    vision_encoder = describe_model(open_source(tmp_path / "out")).vision_encoder
    assert (vision_encoder.num_attention_heads, vision_encoder.select_layer) == (4, -3)


def test_describing_from_shapes(models, spec):
    source = open_source(models / "clip_openai.pt").part("vision_encoder")
    found = describe_part(source, num_attention_heads=4)
    assert found.geometry == spec.vision_encoder.geometry
    assert (found.image_size, found.patch_size, found.ffn_hidden_size) == (56, 14, 128)
    projector = describe_part(open_source(models / "mm_projector.bin").part("vision_projector"))
    assert (projector.input_size, projector.ffn_hidden_size, projector.hidden_size) == (64, 96, 96)
    assert find_part("vision_projector", projector.model_id).from_shapes is not None
