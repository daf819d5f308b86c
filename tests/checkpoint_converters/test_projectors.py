"""Projectors of one to four linears: through every layout, and the module against torch's own at TP 1 and 2."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.media import Features, Media
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.weights.loading import load_part
from tests.checkpoint_converters.converter_helpers import (
    TEXT,
    VISION,
    assert_equal,
    projector_state,
    tensors,
    write_llava,
)
from tests.helpers.golden_training import full_tensors, records

KINDS = ("linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu")


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_a_model_goes_round_through_every_layout_that_can_hold_it(golden, tmp_path, kind):
    source = write_llava(tmp_path / "source", golden, projector=kind)
    mm.convert(source, tmp_path / "ours", to="mindspeed-mm")
    mm.convert(tmp_path / "ours", tmp_path / "checkpoint", to="checkpoint")
    mm.convert(tmp_path / "checkpoint", tmp_path / "back", to="llava")
    mm.convert(tmp_path / "back", tmp_path / "alone", to="projector")
    expected = {name: tensor for (part, name), tensor in tensors(source).items() if part == "vision_projector"}
    for folder in ("back", "alone"):
        found = {name: tensor for (part, name), tensor in tensors(tmp_path / folder).items() if "projector" in part}
        assert_equal(found, expected)
        written = json.loads((tmp_path / folder / "config.json").read_text())["mm_projector_type"]
        assert written == ("mlp3x_gelu" if kind == "mlp3x_gelu" else "linear")
    ids, pixels = torch.tensor([[1, -200, -200, -200, -200, 9, 8]]), torch.randn(1, 3, 8, 8)
    logits = [mm.load(path, device="cpu").logits(ids, None, pixels) for path in (source, tmp_path / "checkpoint")]
    assert torch.equal(*logits)


def test_llavas_linear_has_its_own_names(golden, tmp_path):
    source = write_llava(tmp_path / "source", golden, projector="linear")
    mm.convert(source, tmp_path / "p.safetensors", to="projector")
    assert sorted(load_file(tmp_path / "p.safetensors")) == ["model.mm_projector.bias", "model.mm_projector.weight"]
    spec = describe_part(open_source(tmp_path / "p.safetensors").part("vision_projector"))
    assert (spec.num_layers, spec.input_size, spec.hidden_size) == (1, 8, 16)


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu"])
def test_llava_hf_cannot_hold_other_projectors(golden, tmp_path, kind):
    source = write_llava(tmp_path / "source", golden, projector=kind)
    with pytest.raises(WeightError, match="the projector has [13] linears .* which is all that llava-hf can hold"):
        mm.convert(source, tmp_path / "out", to="llava-hf")


def test_a_projector_type_without_weights_is_refused(golden, tmp_path):
    source = write_llava(tmp_path / "source", golden)
    config = json.loads((source / "config.json").read_text()) | {"mm_projector_type": "identity"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match='found mm_projector_type "identity" .it has no weights'):
        mm.convert(source, tmp_path / "out", to="llava")


@pytest.mark.parametrize("names", ["model.mm_projector.", "mm_projector.", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_linears_are_counted_where_there_is_no_config(tmp_path, names, kind):
    state = {names + name: tensor for name, tensor in projector_state(TEXT, VISION, kind=kind).items()}
    save_file(state, tmp_path / "p.safetensors")
    source = open_source(tmp_path / "p.safetensors")
    spec = describe_part(source.part("vision_projector"))
    assert spec.num_layers == (1 if kind == "linear" else int(kind[3])) and spec.sizes[-1][1] == 16
    mm.convert(source, tmp_path / "ours", to="mindspeed-mm")
    assert describe_part(open_source(tmp_path / "ours").part("vision_projector")).sizes == spec.sizes


def reference(state):
    """LLaVA's projector in torch's own modules."""
    weights = [tensor for name, tensor in state.items() if name.endswith("weight")]
    layers = []
    for number, weight in enumerate(weights):
        layers += [torch.nn.GELU()] * bool(number) + [torch.nn.Linear(weight.shape[1], weight.shape[0])]
    model = torch.nn.Sequential(*layers)
    names = [f"0.{name}" if name in ("weight", "bias") else name for name in state]
    model.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return model


def run_module(path):
    """(output, {our name: this rank's gradient}) of the module at the pool's tensor-parallel size."""
    from megatron.core import parallel_state, tensor_parallel

    from mindspeed_mm.models.part import find_part
    from mindspeed_mm.models.runtime import Runtime

    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    source = open_source(path)
    spec, part = describe_part(source.part("vision_projector")), find_part("vision_projector", "mlp")
    module = part.build(spec, Runtime(tensor_model_parallel_size=size))
    load_part(module, part, spec, source, tp_rank=parallel_state.get_tensor_model_parallel_rank(), tp_size=size)
    media = Media.of_images(torch.empty(1, 0))
    output = module(Features(torch.linspace(-2, 2, 24).reshape(3, 8), (3,), media)).values.unsqueeze(0)
    output.square().sum().backward()
    return output.detach(), {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_module_computes_and_learns_as_torchs_own(ranks, tmp_path, kind, size):
    state = projector_state(TEXT, VISION, kind=kind)
    save_file({"mm_projector." + name: tensor for name, tensor in state.items()}, tmp_path / "p.safetensors")
    model = reference(state)
    expected = model(torch.linspace(-2, 2, 24).reshape(1, 3, 8))
    expected.square().sum().backward()
    results = ranks(size).run(run_module, str(tmp_path / "p.safetensors"))
    linears = [module for module in model if isinstance(module, torch.nn.Linear)]
    for output, _ in results:
        torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-3)
    for number, linear in enumerate(linears):
        for kind_of, full in (("weight", linear.weight.grad), ("bias", linear.bias.grad)):
            shards = [gradients[f"encoder.linear_fc{number + 1}.{kind_of}"] for _, gradients in results]
            axis = 0 if number % 2 == 0 else (1 if kind_of == "weight" else None)
            found = torch.cat(shards, dim=axis) if axis is not None else shards[0]
            torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-2)


def train_through(golden, save, linears):
    """Two golden steps on this rank with a fresh projector of so many linears."""
    from tests.helpers import golden_training

    original = golden_training.description

    def changed(folder, layout):
        model = original(folder, layout)
        model["image_encoder"]["vision_projector"] |= {"num_layers": linears, "ckpt_path": None, "fresh": True}
        return model

    golden_training.description = changed
    layout = golden_training.GoldenLayout(tensor=torch.distributed.get_world_size(), trained="a")
    try:
        return golden_training.train_golden(golden, layout, save, "--exit-interval 2")
    finally:
        golden_training.description = original


@pytest.mark.parametrize("linears", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_training_goes_through_it(golden, ranks, tmp_path, linears):
    assert ranks(2).run(train_through, golden, str(tmp_path / "save"), linears) == [2, 2]
    assert all(record["grad_norm"] > 0 for record in records(tmp_path / "save"))
    names = {name for name in full_tensors(tmp_path / "save") if "projector" in name}
    kinds = ("weight", "bias")
    assert names == {f"image_encoder.projector.encoder.linear_fc{n + 1}.{k}" for n in range(linears) for k in kinds}
