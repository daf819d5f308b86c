"""Letter O: mistakes in weights and launch settings are told before data are read and anything is built."""

import copy
import json

import pytest
import torch

from mindspeed_mm.errors import CheckpointError, ConfigError, WeightError
from mindspeed_mm.models.headers import check_weights
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.trainer import inputs as inputs_module
from mindspeed_mm.trainer.inputs import RunInputs
from tests.helpers.golden_model import model_json

FLAGS = "--lr 1e-3 --train-iters 1 --micro-batch-size 1 --global-batch-size 2 --num-workers 0"


@pytest.fixture
def model(golden):
    return model_json(golden, trained=("vision_projector",))


def decoder(model, **changes):
    changed = copy.deepcopy(model)
    changed["text_decoder"] |= changes
    return changed


def encoder(model, **changes):
    changed = copy.deepcopy(model)
    changed["image_encoder"]["vision_encoder"] |= changes
    return changed


@pytest.fixture
def run_inputs(tmp_path, golden, monkeypatch, single_process):
    """run_inputs(model, *flags): what a run reads, on the CPU; data sets are never opened."""
    from mindspeed_mm.platform import get_platform

    monkeypatch.setattr(inputs_module, "build_dataset", lambda *_args, **_options: None)
    data = {
        "dataset_type": "multimodal",
        "basic_parameters": {"data_path": "none.json", "data_folder": "none"},
        "preprocess_parameters": {"image_processer_path": str(golden / "models" / "clip_hf")},
        "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
    }

    def read(model, *flags, world_size=1, **options):
        import argparse

        from megatron.driver.arguments import add_arguments, from_namespace

        (tmp_path / "model.json").write_text(json.dumps(model))
        (tmp_path / "data.json").write_text(json.dumps({"dataset_param": data}))
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = from_namespace(parser.parse_args([*FLAGS.split(), *flags]), world_size=world_size)
        paths = str(tmp_path / "model.json"), str(tmp_path / "data.json")
        return RunInputs(args, get_platform("cpu"), *paths, **options)

    return read


def test_weights_that_fit_are_told_apart_without_reading_a_value(model, monkeypatch):
    for method in ("get", "get_slice"):
        monkeypatch.setattr(f"mindspeed_mm.weights.sources.PartSource.{method}", None)
    check_weights(load_model_spec(model))


@pytest.mark.parametrize("layout", ["clip_openai.pt", "clip_hf"])
def test_headers_of_every_layout_are_enough(model, golden, layout):
    check_weights(load_model_spec(encoder(model, ckpt_path=str(golden / "models" / layout))))


def test_another_width_is_told(model, tmp_path):
    """No config lies beside a projector: its shapes alone tell."""
    projector = tmp_path / "mm_projector.bin"
    torch.save({"0.weight": torch.zeros(8, 8), "0.bias": torch.zeros(8)}, projector)
    changed = copy.deepcopy(model)
    changed["image_encoder"]["vision_projector"]["ckpt_path"] = str(projector)
    with pytest.raises(WeightError, match="mm_projector.bin"):
        check_weights(load_model_spec(changed))
    width = changed["image_encoder"]["vision_projector"]["hidden_size"]
    inner = changed["image_encoder"]["vision_projector"].get("ffn_hidden_size", width)
    inputs = changed["image_encoder"]["vision_projector"]["input_size"]
    tensors = {"0.weight": torch.zeros(inner, inputs + 1), "0.bias": torch.zeros(inner)}
    torch.save(tensors | {"2.weight": torch.zeros(width, inner), "2.bias": torch.zeros(width)}, projector)
    with pytest.raises(WeightError, match=r"gives encoder.linear_fc1.weight the shape .*; expected .*another model"):
        check_weights(load_model_spec(changed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 1}, "num_layers: the weights have 4, model.json says 1"),
        ({"language_vocab_size": 999}, "language_vocab_size"),
        ({"num_attention_heads": 2, "num_query_groups": 2}, "num_attention_heads: the weights have"),
        ({"ckpt_path": "nowhere"}, "nowhere: no such file or folder"),
        ({"ckpt_path": None}, "text_decoder: found neither ckpt_path nor fresh"),
    ],
)
def test_another_decoder_is_told_before_data_and_devices(run_inputs, model, changes, message):
    with pytest.raises(WeightError, match=message):
        run_inputs(decoder(model, **changes))


def test_letter_o_nothing_to_train_and_a_save_that_is_a_file_are_told_before_weights(run_inputs, model, tmp_path):
    gone = decoder(model, ckpt_path="nowhere")
    (tmp_path / "file").write_text("")
    for save in ("file", "file/run"):
        with pytest.raises(CheckpointError, match=f"--save .*{save} cannot be written to: .*file is no folder"):
            run_inputs(gone, "--save", str(tmp_path / save))
    gone["image_encoder"]["vision_projector"]["freeze"] = True
    with pytest.raises(ConfigError, match="nothing to train: all parts are frozen"):
        run_inputs(gone)


def test_a_plan_needs_no_weights(run_inputs, model):
    assert run_inputs(decoder(model, ckpt_path="nowhere"), weights=False).args.seq_length == 2048


def test_a_checkpoint_of_another_architecture_is_told_before_data(run_inputs, model, tmp_path, monkeypatch):
    from mindspeed_mm.trainer import architecture

    saved = load_model_spec(model).model_dump(mode="json")
    monkeypatch.setattr(architecture, "find_checkpoint", lambda folder, step: tmp_path / folder)
    monkeypatch.setattr(architecture, "read_run", lambda path: {"extra": {"model": saved}})
    monkeypatch.setattr(architecture, "check_folders", lambda args: None)
    run_inputs(decoder(model, ckpt_path="never read"), "--load", "save")
    with pytest.raises(
        CheckpointError, match="save has another architecture than the model config:\n.*num_layers: the"
    ):
        run_inputs(decoder(model, num_layers=1), "--load", "save")


def test_an_iteration_that_is_not_there_is_told_before_data(run_inputs, model, tmp_path):
    with pytest.raises(CheckpointError, match="--ckpt-step names 7, but .*iter_0000007 is missing"):
        run_inputs(model, "--load", str(tmp_path), "--ckpt-step", "7")


def test_the_length_of_samples_follows_from_the_model(run_inputs, model):
    assert run_inputs(decoder(model, language_max_sequence_length=300)).args.seq_length == 300
    assert run_inputs(model, "--seq-length", "64").args.seq_length == 64
    stages = run_inputs(model, "--pipeline-model-parallel-size", "2", world_size=2).args
    assert stages.seq_length == 2048, "stages exchange tensors of that size"


def test_flags_that_repeat_the_model_are_accepted_silently(run_inputs, model, caplog):
    spec = load_model_spec(model)
    size = str(spec.vision_encoder.image_size)
    flags = ["--vocab-size", "1000", "--img-h", size, "--img-w", size, "--num-layers", "4"]
    with caplog.at_level("INFO"):
        run_inputs(model, *flags, "--patch-dim", str(spec.vision_encoder.patch_size))
    assert not [record for record in caplog.records if not record.name.endswith("template_choice")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", "32000"], "--vocab-size is 32000, but text_decoder.language_vocab_size is 1000: make them"),
        (
            ["--img-h", "448"],
            "--img-h is 448, but vision_encoder.image_size is .*: make them equal, or leave the flag out",
        ),
        (["--patch-dim", "16"], "--patch-dim is 16, but vision_encoder.patch_size is"),
        (["--seq-length", "301"], "--seq-length 301 exceeds text_decoder.language_max_sequence_length 300"),
        (["--hidden-size", "1"], "--hidden-size is 1, but text_decoder.hidden_size is"),
    ],
)
def test_flags_that_contradict_the_model_are_refused(run_inputs, model, flags, message):
    with pytest.raises(ConfigError, match=message):
        run_inputs(decoder(model, language_max_sequence_length=300), *flags)


def test_an_image_processor_of_another_size_is_told(run_inputs, model):
    larger = 2 * model["image_encoder"]["vision_encoder"]["image_size"]
    with pytest.raises(ConfigError, match=f"{larger}"):
        run_inputs(encoder(model, image_size=larger, ckpt_path=None, fresh=True))


def test_infer_tells_it_too(model, tmp_path, golden):
    import mindspeed_mm as mm

    keys = {"tokenizer": str(golden / "tokenizer"), "image_processor": str(golden / "models" / "clip_hf")}
    (tmp_path / "m.json").write_text(json.dumps(decoder(model, num_layers=1)))
    with pytest.raises(WeightError, match="num_layers: the weights have 4, model.json says 1"):
        mm.load(str(tmp_path / "m.json"), device="cpu", **keys)
