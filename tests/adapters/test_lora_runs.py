"""`mindspeed-mm train` with LoRA: checkpoints, resuming, other layouts, what they become."""

import contextlib
import io
import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import mindspeed_mm as mm
from checkpoint_converters.checkpoint.adapters import export_adapter
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import WeightError
from tests.helpers.golden_training import full_tensors, records
from tests.parallel.test_command import describe_data, folder, train  # noqa: F401  folder is a fixture

LORA = "--lora-r 3 --lora-alpha 7 --lora-target-modules q_proj v_proj o_proj gate_proj down_proj"
SIZES = f"--train-iters 4 --lr 1e-2 {LORA}"


def frozen_files(save):
    return sorted(str(path.relative_to(save)) for path in (save / "frozen").rglob("*.distcp"))


def bytes_of(folder):  # noqa: F811
    return sum(path.stat().st_size for path in folder.rglob("*.distcp"))


def vision_too(folder):  # noqa: F811
    """Adapters on vision encoder and decoder, nothing else trained."""
    model = json.loads((folder / "model.json").read_text())
    block = {"r": 3, "alpha": 7, "target_modules": ["q_proj", "fc1", "out_proj"]}
    encoder = model["image_encoder"]["vision_encoder"]
    encoder["freeze"], encoder["lora"] = False, block
    model["image_encoder"]["vision_projector"]["freeze"] = True
    (folder / "model.json").write_text(json.dumps(model))


def test_a_run_is_resumed_exactly_and_keeps_the_base_once(ranks, golden, folder, capsys):  # noqa: F811
    describe_data(golden, folder)
    place = str(folder)
    assert ranks(1).run(train, place, "whole", SIZES) == [0]
    assert ranks(1).run(train, place, "cut", f"{SIZES} --exit-interval 2") == [0]
    assert ranks(1).run(train, place, "cut", f"{SIZES} --load {folder}/cut") == [0]
    found, wanted = records(folder / "cut"), records(folder / "whole")
    assert [row["loss"] for row in found] == [row["loss"] for row in wanted]
    ours, theirs = full_tensors(folder / "cut"), full_tensors(folder / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    first = full_tensors(folder / "cut" / "iter_0000002")
    changed = {key for key in first if not torch.equal(first[key], ours[key])}
    assert changed and all(".lora." in key or "projector" in key for key in changed)
    decoder_alone(folder, capsys)
    assert len(list((folder / "cut" / "frozen").iterdir())) == 1
    assert bytes_of(folder / "cut" / "iter_0000004") < bytes_of(folder / "cut" / "frozen")


def decoder_alone(folder, capsys):  # noqa: F811
    """The adapter of a run whose decoder alone has one, on the decoder's own class and on the whole model's."""
    words = ["convert", str(folder / "whole"), "--to", "peft"]
    assert main([*words, str(folder / "own"), "--part", "text_decoder"]) == 0
    assert main([*words, str(folder / "vlm")]) == 0
    assert "vision_projector was trained as well and is not in the adapter" in capsys.readouterr().err
    names = load_file(folder / "vlm" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)  # vLLM's, too
    base = mm.load(folder / "model.json", device="cpu").spec.text_decoder.ckpt_path
    hashes = {name: json.loads((folder / name / "base_weights.json").read_text()) for name in ("own", "vlm")}
    assert hashes["own"] == hashes["vlm"] and len(hashes["own"]["text_decoder"]) == 16
    stock = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(stock, folder / "own").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
    for vlm in (
        mm.load(folder / "whole", device="cpu"),
        mm.load(folder / "model.json", device="cpu", adapter=folder / "own"),
        mm.load(folder / "model.json", device="cpu", adapter=folder / "vlm"),
    ):
        torch.testing.assert_close(vlm.logits(ids), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "flags",
    [pytest.param("", marks=pytest.mark.slow), "--use-distributed-optimizer --bf16"],
    ids=["one rank", "DP2 bf16"],
)
def test_adapters_begin_beside_the_weights_of_a_run(ranks, golden, folder, flags):  # noqa: F811
    """A checkpoint without adapters gives its weights, and is no run that goes on with adapters."""
    describe_data(golden, folder)
    place, count = str(folder), 2 if flags else 1
    plain = "--train-iters 2 --lr 1e-2"
    assert ranks(count).run(train, place, "stage1", f"{plain} {flags}") == [0] * count
    begin = f"{SIZES} --pretrained-checkpoint {folder}/stage1 {flags}"
    assert ranks(count).run(train, place, "tuned", f"{begin} --exit-interval 2") == [0] * count
    assert ranks(count).run(train, place, "tuned", f"{begin} --load {folder}/tuned") == [0] * count
    before, after = full_tensors(folder / "stage1"), full_tensors(folder / "tuned")
    assert {name for name in after if ".lora." in name} == after.keys() - before.keys()
    decoder = [name for name in before if name.startswith("text_decoder")]
    assert decoder and all(torch.equal(before[name], after[name]) for name in decoder)
    assert any(after[name].any() for name in after if name.endswith(".b"))


def said(*arguments):
    """(exit code, what `train` says) on this rank."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        return train(*arguments), text.getvalue()


def test_a_run_without_adapters_does_not_go_on_with_some(ranks, golden, folder):  # noqa: F811
    describe_data(golden, folder)
    assert ranks(1).run(train, str(folder), "plain", "--train-iters 2 --lr 1e-2") == [0]
    ((code, text),) = ranks(1).run(said, str(folder), "plain", f"{SIZES} --load {folder}/plain")
    assert code == 1
    assert re.search(r"has no .*lora.*Give the folder as --pretrained-checkpoint", text, re.DOTALL)


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2",
        pytest.param("--use-distributed-optimizer", marks=pytest.mark.slow),
    ],
    ids=["TP2 SP", "PP2", "DP2"],
)
def test_other_layouts_train_alike_and_read_each_other(ranks, golden, folder, flags):  # noqa: F811
    describe_data(golden, folder)
    vision_too(folder)
    place = str(folder)
    assert ranks(1).run(train, place, "one", f"{SIZES} --adam-eps 1e-3") == [0]
    assert ranks(2).run(train, place, "two", f"{SIZES} --adam-eps 1e-3 {flags} --exit-interval 2") == [0, 0]
    assert ranks(1).run(train, place, "two", f"{SIZES} --adam-eps 1e-3 --load {folder}/two") == [0]
    found, wanted = records(folder / "two"), records(folder / "one")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in wanted], rel=1e-4), key
    ours, theirs = full_tensors(folder / "two"), full_tensors(folder / "one")
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=1e-3)


def test_export_merge_and_import(ranks, golden, folder):  # noqa: F811
    """Merged on reading, PEFT on transformers' model, and our model with the folder: the same logits."""
    describe_data(golden, folder)
    vision_too(folder)
    assert ranks(1).run(train, str(folder), "save", SIZES) == [0]
    export_adapter(folder / "save", folder / "adapter")
    with pytest.raises(WeightError, match="none but the text_decoder's"):
        export_adapter(folder / "save", folder / "other", decoder_only=True)
    with pytest.raises(WeightError, match="exists and is not empty"):
        export_adapter(folder / "save", folder / "adapter")
    merged = mm.load(folder / "save", device="cpu")
    side, count = merged.spec.vision_encoder.image_size, merged.tokens_per_image
    ids = torch.tensor([[1, 5, *[-200] * count, 7, 9, 11]])
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    wanted = merged.logits(ids, pixel_values=pixels)
    plain = json.loads((folder / "model.json").read_text())
    del plain["image_encoder"]["vision_encoder"]["lora"]
    (folder / "plain.json").write_text(json.dumps(plain))
    ours = mm.load(folder / "plain.json", device="cpu", adapter=folder / "adapter")
    torch.testing.assert_close(ours.logits(ids, pixel_values=pixels), wanted, atol=2e-5, rtol=0)
    bare = mm.load(folder / "plain.json", device="cpu").logits(ids, pixel_values=pixels)
    with ours.disable_adapter():
        assert torch.equal(ours.logits(ids, pixel_values=pixels), bare)
    assert (bare - wanted).abs().max() > 1e-3

    parts = {slot: ours.spec.part(slot).ckpt_path for slot in ("text_decoder", "vision_encoder", "vision_projector")}
    mm.convert(parts, folder / "hf", to="llava-hf")
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "hf")
    theirs = peft.PeftModel.from_pretrained(stock, folder / "adapter").eval()
    hf_ids = ids.masked_fill(ids == -200, stock.config.image_token_id)
    with torch.no_grad():
        found = theirs(input_ids=hf_ids, pixel_values=pixels).logits
    words = wanted.shape[-1]  # transformers' head has rows for the image token behind them
    torch.testing.assert_close(found[..., :words], wanted, atol=1e-4, rtol=0)
    again = mm.load(folder / "hf", device="cpu", adapter=folder / "adapter")
    torch.testing.assert_close(again.logits(hf_ids, pixel_values=pixels)[..., :words], wanted, atol=2e-5, rtol=0)
    mm.convert(folder / "save", folder / "merged", to="llava-hf")
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "merged")
    with torch.no_grad():
        found = stock(input_ids=hf_ids, pixel_values=pixels).logits
    torch.testing.assert_close(found[..., :words], wanted, atol=1e-4, rtol=0)
