"""LoRA beside weights in 4 and 8 bits: the codes of bitsandbytes, PEFT's steps on the same values, every layout."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.weights.blockwise import (
    Blocks,
    bytes_of,
    dequantize,
    plain_values,
    quantize,
    shrink_scales,
    stored_scales,
    whole_scales,
)
from tests.adapters.test_lora_training import check_spread, gradients_of
from tests.helpers.decoder_ranks import DecoderStep, Spread, labels_of, take_step
from tests.helpers.golden_training import full_tensors
from tests.helpers.tiny_decoders import make, rows, save
from tests.parallel.test_command import describe_data, train
from tests.parallel.test_command import folder as base_folder  # noqa: F401  a fixture

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
IDS = rows(length=24)
LABELS = labels_of(IDS)
SPREADS = {
    "one process": Spread(),
    "TP2": Spread(tensor=2),
    "TP2 SP": Spread(tensor=2, sequence_parallel=True),
    "PP2": Spread(pipeline=2),
}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_values_are_those_of_bitsandbytes(kind, dtype):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = (torch.randn(96, 320, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)
    ours = quantize(weight, kind)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    codes_alike = torch.equal(ours.codes, codes.view(96, -1))
    assert codes_alike or (kind, dtype) == (
        "fp4",
        torch.bfloat16,
    )  # half-way between levels they choose by another rule
    assert torch.equal(ours.scales, state.absmax.view(96, -1).float())
    ours = Blocks(codes.view(96, -1), ours.scales)
    theirs = functional.dequantize_4bit(codes, state)
    assert torch.equal(plain_values(ours, kind, dtype), theirs)
    assert torch.equal(dequantize(ours, kind, dtype), theirs)


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_in_8_bits(axis):
    """Closer than bitsandbytes' own second quantisation; a rank's share is stored as the whole is."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(600, 1024, generator=torch.Generator().manual_seed(6)) * 0.02
    exact = quantize(weight, "nf4")
    small = shrink_scales(exact.scales, axis)
    assert small.codes.dtype == torch.uint8 and small.codes.shape == exact.scales.shape
    again = whole_scales(small, axis)
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    error, their_error = ((found.view(600, 16) - exact.scales).abs().mean() for found in (again, theirs))
    assert 0 < error < their_error < 0.01 * exact.scales.mean()
    assert again.amax() == exact.scales.amax()
    half = shrink_scales(exact.scales.chunk(2, axis)[1].contiguous(), axis)
    assert torch.equal(half.codes, small.codes.chunk(2, axis)[1])
    assert torch.equal(half.ranges, small.ranges.chunk(2, axis)[1])
    bits = small.ranges.view(torch.int32)
    assert torch.equal(stored_scales([small.codes, bits], axis), again)
    zeros = shrink_scales(torch.zeros(3, 2), axis)
    assert torch.equal(whole_scales(zeros, axis), torch.zeros(3, 2))


@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.16), ("fp4", 0.17), ("int8", 0.0040)])
def test_error_bytes_and_zeros(kind, bound):
    """The error is at most half the widest gap between levels, by block; a block of zeros stays zero."""
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(4))
    weight[3, 64:128] = 0
    stored = quantize(weight, kind)
    again = dequantize(stored, kind, torch.float32)
    error = (again - weight).view(24, 4, 64).abs().amax(-1)
    assert (error <= bound * stored.scales).all() and not again[3, 64:128].any()
    assert bytes_of(weight.numel(), kind) == stored.codes.nbytes + stored.scales.nbytes
    half = quantize(weight[:, :128], kind)
    assert torch.equal(half.codes, stored.codes[:, : half.codes.shape[1]])  # a rank's columns are stored alike


def test_columns_that_are_no_whole_blocks():
    with pytest.raises(ValueError, match="found a weight of 96 columns; expected a multiple of 64"):
        quantize(torch.ones(2, 96), "nf4")


PAIRS = [("llama", "nf4"), ("qwen2", "nf4"), pytest.param(("llama", "int8"), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=PAIRS, ids=" ".join)
def pair(request, tmp_path_factory):
    """(family, model.json of an adapter beside stored weights, PEFT's model on the same values, its losses)."""
    (name, kind), folder = request.param, tmp_path_factory.mktemp("qlora")
    theirs = make(name, **SIZES)
    lora = {"r": 3, "alpha": 7, "target_modules": TARGETS, "load": str(folder / "adapter")}
    path = save(theirs, name, folder, lora=lora, quantize=kind)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".layers." in key and parameter.dim() == 2:
                parameter.copy_(dequantize(quantize(parameter, kind), kind, torch.float32))
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS))
    torch.manual_seed(11)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    losses = F.cross_entropy(model(input_ids=IDS).logits.transpose(1, 2), LABELS, reduction="none", ignore_index=-100)
    losses[LABELS != -100].mean().backward()
    return name, path, model, losses.detach()


@pytest.mark.parametrize("layout", SPREADS)
def test_losses_and_gradients(ranks, pair, layout):
    name, path, model, losses = pair
    wanted = gradients_of(model)
    check_spread(ranks, name, path, SPREADS[layout], losses, wanted)


def test_what_is_held(pair):
    """Codes and scales in place of the weights; half precision of the rest does not touch the scales."""
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    spec = load_model_spec(pair[1])
    vlm, _ = build_vlm(spec, Runtime(params_dtype=torch.bfloat16), torch.device("cpu"))
    layer = vlm.text_decoder.decoder.layers[1]
    for linear in (layer.self_attention.linear_qkv, layer.mlp.linear_fc1, layer.mlp.linear_fc2):
        columns = linear.input_size
        held = {name: parameter for name, parameter in linear.named_parameters() if "lora" not in name}
        assert set(held) <= {"codes", "scales", "bias"}
        assert held["scales"].dtype == torch.int32 and held["scales"].shape[1] == columns // 64
        width = columns // 2 if spec.text_decoder.quantize == "nf4" else columns
        assert held["codes"].shape == (linear.output_size, width) and held["codes"].element_size() == 1
        numbers = held["codes"].nbytes + held["scales"].nbytes
        assert numbers == bytes_of(linear.output_size * columns, spec.text_decoder.quantize)
        assert not any(parameter.requires_grad for parameter in held.values())
    assert vlm.text_decoder.embedding.word_embeddings.weight.dtype == torch.bfloat16


def test_what_cannot_be_stored(tmp_path):
    path = save(make("llama"), "llama", tmp_path, freeze=True, quantize="nf4")
    with pytest.raises(ConfigError, match="linear_proj has 48 columns on a rank; expected a multiple of 64"):
        take_step(str(path), Spread(), DecoderStep(IDS, LABELS))
    block = json.loads(path.read_text())
    block["text_decoder"]["freeze"] = False
    with pytest.raises(ConfigError, match='found quantize "nf4" in a part whose own weights are trained'):
        load_model_spec(block)
    block["text_decoder"] |= {"freeze": True, "quantize": None, "double_quant": True}
    with pytest.raises(ConfigError, match="found double_quant in a part without quantize"):
        load_model_spec(block)
    opened = {"quantize": "nf4", "parameters": [{"names": "decoder.layers.1.*", "freeze": False}]}
    block["text_decoder"] |= {"freeze": False, "double_quant": False, "lora": {"r": 2}} | opened
    with pytest.raises(ConfigError, match="found freeze false for .*linear_qkv.weight, which quantize nf4 stores and"):
        load_model_spec(block)


# --- Runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(golden, base_folder, tmp_path, request):  # noqa: F811
    """A model whose decoder of random weights is stored, with data.json."""
    made = json.loads((base_folder / "model.json").read_text())
    theirs = make("llama", **SIZES | {"vocab_size": 1000, "max_position_embeddings": 256})
    theirs.save_pretrained(tmp_path / "llama")
    text = describe_part(open_source(tmp_path / "llama").part("text_decoder"))
    lora = {"r": 3, "alpha": 7, "target_modules": TARGETS}
    block = text.model_dump(mode="json", exclude_defaults=True) | {"ckpt_path": str(tmp_path / "llama")}
    made["text_decoder"] = block | {"quantize": "nf4", "double_quant": request.param, "lora": lora}
    made["image_encoder"]["vision_projector"] |= {"hidden_size": 128, "ffn_hidden_size": 128}
    made["image_encoder"]["vision_projector"] |= {"ckpt_path": None, "fresh": True}
    (tmp_path / "model.json").write_text(json.dumps(made))
    describe_data(golden, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("run_folder", "flags"),
    [(True, "--tensor-model-parallel-size 2"), (False, "--use-distributed-optimizer --bf16")],
    indirect=["run_folder"],
)
def test_a_run_goes_on_at_another_layout_and_is_read_whole(ranks, golden, run_folder, flags):
    place, flags = str(run_folder), f"--train-iters 4 --lr 1e-2 {flags}"
    assert ranks(2).run(train, place, "whole", flags) == [0, 0]
    assert ranks(2).run(train, place, "cut", f"{flags} --exit-interval 2") == [0, 0]
    assert ranks(2).run(train, place, "cut", f"{flags} --load {place}/cut") == [0, 0]
    ours, theirs = full_tensors(run_folder / "cut"), full_tensors(run_folder / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    linear = "text_decoder.decoder.layers.1.mlp.linear_fc2"
    assert ours[f"{linear}.codes"].dtype == torch.uint8 and f"{linear}.weight" not in ours
    one = "--train-iters 6 --lr 1e-2" + (" --bf16" if "bf16" in flags else "")
    assert ranks(1).run(train, place, "cut", f"{one} --load {place}/cut") == [0]  # blocks are the same at every layout
    again, stored = (
        full_tensors(run_folder / "cut"),
        [name for name in theirs if name.endswith((".codes", ".scales", ".ranges"))],
    )
    double = f"{linear}.ranges" in theirs
    assert len(stored) == (36 if double else 24) and all(torch.equal(again[name], theirs[name]) for name in stored)
    vlm = mm.load(run_folder / "whole", device="cpu", dtype="fp32")
    lora = 7 / 3 * theirs[f"{linear}.lora.down_proj.b"].float() @ theirs[f"{linear}.lora.down_proj.a"].float()
    scales = stored_scales([theirs[f"{linear}.{key}"] for key in ("scales", "ranges")[: 1 + double]], axis=1)
    stored = Blocks(theirs[f"{linear}.codes"], scales)
    wanted = dequantize(stored, "nf4", torch.float32) + lora
    found = vlm.model.text_decoder.decoder.layers[1].mlp.linear_fc2.weight
    torch.testing.assert_close(found, wanted, atol=2e-2 if "bf16" in flags else 1e-6, rtol=0)


@pytest.mark.slow  # test_quantized_base.py begins with stored weights, too
@pytest.mark.parametrize("run_folder", [True], indirect=True)
def test_stage_2_begins_with_stage_1_in_4_bits(ranks, run_folder):
    """Stage 1 trains the projector beside the stored decoder; stage 2 adds adapters to both (XTuner's recipe)."""
    place, model = str(run_folder), json.loads((run_folder / "model.json").read_text())
    first = json.loads(json.dumps(model))
    del first["text_decoder"]["lora"]
    first["text_decoder"]["freeze"] = True
    (run_folder / "model.json").write_text(json.dumps(first))
    assert ranks(1).run(train, place, "one", "--train-iters 2 --lr 1e-2") == [0]
    vision = model["image_encoder"]["vision_encoder"]
    vision["freeze"], vision["lora"] = False, {"r": 2, "alpha": 1, "target_modules": "all-linear"}
    (run_folder / "model.json").write_text(json.dumps(model))
    flags = f"--train-iters 2 --lr 1e-2 --pretrained-checkpoint {place}/one"
    assert ranks(1).run(train, place, "two", flags) == [0]
    one, two = full_tensors(run_folder / "one"), full_tensors(run_folder / "two")
    added = two.keys() - one.keys()
    assert added and all(".lora." in name for name in added)
    kept = [name for name in one if "projector" not in name]
    assert all(torch.equal(one[name], two[name]) for name in kept)
    assert any(name.startswith("image_encoder.encoder") and two[name].any() for name in added if name.endswith(".b"))


def test_the_plan_counts_stored_bytes():
    from tests.planning.planned_run import model, planned
    from tests.planning.real_run import Work

    sizes = {"ffn_hidden_size": 256, "freeze": True}
    plain, stored = (model(("vision_projector",), **sizes, **extra) for extra in ({}, {"quantize": "nf4"}))
    from mindspeed_mm.planning.memory import rank_memory

    before, after = (rank_memory(planned(Work(made, "--bf16")), 0).parameters for made in (plain, stored))
    linears = 4 * (4 * 128 * 128 + 3 * 128 * 256)
    assert before - after == 2 * linears - bytes_of(linears, "nf4")
