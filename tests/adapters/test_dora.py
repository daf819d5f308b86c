"""DoRA: forward and backward pass against PEFT at every layout, runs, merged weights, and PEFT's folders both ways."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import mindspeed_mm as mm
from checkpoint_converters.checkpoint.adapters import export_adapter
from checkpoint_converters.merge import merge
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.planning.parameters import _adapter_sizes
from tests.adapters.test_lora_runs import said
from tests.adapters.test_lora_training import (
    PACKED,
    SPREADS,
    TARGETS,
    check_spread,
    gradients_of,
    wrapped,
)
from tests.adapters.test_peft_folders import written_alike
from tests.helpers.decoder_ranks import labels_of
from tests.helpers.golden_training import full_tensors, records
from tests.helpers.tiny_decoders import rows
from tests.helpers.tiny_llava import close
from tests.parallel.test_command import describe_data, folder, train  # noqa: F401  folder is a fixture

IDS = rows(length=24)
LABELS = labels_of(IDS)
SIZES = "--train-iters 4 --lr 1e-2 --adam-eps 1e-3"


@pytest.fixture(scope="module", params=["qwen2", "phi3"])
def pair(request, tmp_path_factory):
    """(name, PEFT's model with its gradients, model.json, its losses). Qwen2's q, k and v have biases; Phi-3's gate and
    up are one matrix."""
    targets = PACKED.get(request.param, TARGETS)
    model, path = wrapped(request.param, tmp_path_factory.mktemp("dora"), use_dora=True, target_modules=targets)
    losses = F.cross_entropy(model(input_ids=IDS).logits.transpose(1, 2), LABELS, reduction="none", ignore_index=-100)
    losses[LABELS != -100].mean().backward()
    return request.param, model, path, losses.detach()


@pytest.mark.parametrize("layout", SPREADS)
def test_losses_and_gradients(ranks, pair, layout):
    name, model, path, losses = pair
    wanted = gradients_of(model)
    assert any("magnitude" in key for key in wanted)
    check_spread(ranks, name, path, SPREADS[layout], losses, wanted)


def test_the_plan_counts_lengths(pair):
    _, model, path, _ = pair
    job = SimpleNamespace(spec=load_model_spec(path), tensor=1, pipeline=1, runtime=SimpleNamespace(stages=1))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(size for size, _ in _adapter_sizes(job, "text_decoder", 0)) == trained


def test_folders_of_peft(pair, tmp_path):
    """On, off, merged; and what we write is what PEFT wrote."""
    _, model, path, _ = pair
    base = json.loads(path.read_text())
    del base["text_decoder"]["lora"]
    (tmp_path / "model.json").write_text(json.dumps(base))
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        with model.disable_adapter():
            plain = model(input_ids=IDS).logits
    ours = mm.load(tmp_path / "model.json", device="cpu", adapter=path.parent / "adapter")
    close(ours.logits(IDS), wanted)
    with ours.disable_adapter():
        close(ours.logits(IDS), plain)
    (tmp_path / "adapter").symlink_to(path.parent / "adapter")
    written_alike(ours, tmp_path, decoder_only=True)
    merge(path.parent / "hf", [path.parent / "adapter"], tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        close(again(input_ids=IDS).logits, wanted)


def with_dora(folder, **changes):  # noqa: F811
    model = json.loads((folder / "model.json").read_text())
    block = {"r": 3, "alpha": 7, "use_dora": True, "target_modules": ["q_proj", "o_proj", "gate_proj"]}
    model["text_decoder"]["lora"] = block | changes
    (folder / "model.json").write_text(json.dumps(model))


def test_a_run_at_two_layouts_and_what_it_becomes(ranks, golden, folder):  # noqa: F811
    """m begins as the lengths of W, so that the first loss is the base's; a run goes on at another layout; merged on
    reading, exported to PEFT and read again: the same logits."""
    describe_data(golden, folder)
    plain = folder / "plain.json"
    plain.write_text((folder / "model.json").read_text())
    with_dora(folder)
    split = "--tensor-model-parallel-size 2 --sequence-parallel --exit-interval 2"
    assert ranks(1).run(train, str(folder), "one", SIZES) == [0]
    assert ranks(2).run(train, str(folder), "two", f"{SIZES} {split}") == [0, 0]
    assert ranks(1).run(train, str(folder), "two", f"{SIZES} --load {folder}/two") == [0]
    for key in ("loss", "grad_norm"):
        found, wanted = ([row[key] for row in records(folder / name)] for name in ("two", "one"))
        assert found == pytest.approx(wanted, rel=1e-4), key
    ours, theirs = full_tensors(folder / "two"), full_tensors(folder / "one")
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=1e-3)
    export_adapter(folder / "one", folder / "adapter", decoder_only=True)
    lengths = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith("lora_magnitude_vector") for name in lengths) == len(lengths) / 3
    ids = torch.arange(3, 20)[None]
    wanted = mm.load(folder / "one", device="cpu").logits(ids)
    again = mm.load(plain, device="cpu", adapter=folder / "adapter")
    assert (mm.load(plain, device="cpu").logits(ids) - wanted).abs().max() > 1e-3
    torch.testing.assert_close(again.logits(ids), wanted, atol=1e-4, rtol=0)
    stock = transformers.AutoModelForCausalLM.from_pretrained(again.spec.text_decoder.ckpt_path, dtype=torch.float32)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(stock, folder / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_new_adapter_changes_nothing(golden, folder):  # noqa: F811
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime

    ids = torch.arange(3, 20)[None]
    wanted = mm.load(folder / "model.json", device="cpu").logits(ids)
    with_dora(folder)
    vlm, _ = build_vlm(load_model_spec(folder / "model.json"), Runtime(), torch.device("cpu"))
    with torch.no_grad():
        found = vlm.eval()(ids, torch.arange(17)[None])
    close(found if found.shape == wanted.shape else found.transpose(0, 1), wanted)


# --- What is refused -----------------------------------------------------------------------------------------------


def test_what_does_not_go_with_dora(folder):  # noqa: F811
    with_dora(folder, dropout=0.1)
    with pytest.raises(ConfigError, match="found dropout 0.1 with use_dora; expected 0"):
        load_model_spec(folder / "model.json")
    with_dora(folder)
    model = json.loads((folder / "model.json").read_text())
    model["text_decoder"]["quantize"] = "nf4"
    with pytest.raises(ConfigError, match='found quantize "nf4" with lora.use_dora'):
        load_model_spec(model)


def test_a_checkpoint_without_adapters(ranks, golden, folder):  # noqa: F811
    describe_data(golden, folder)
    assert ranks(1).run(train, str(folder), "plain", "--train-iters 2 --lr 1e-2") == [0]
    with_dora(folder)
    ((code, text),) = ranks(1).run(said, str(folder), "new", f"{SIZES} --pretrained-checkpoint {folder}/plain")
    assert code == 1 and "text_decoder.lora.use_dora begins with the lengths" in text.replace("\n", " ")
