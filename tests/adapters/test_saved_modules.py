"""Modules that are trained as a whole beside adapters (PEFT's modules_to_save): runs, folders, merges."""

import json

import peft
import pytest
import torch
import transformers

import mindspeed_mm as mm
from checkpoint_converters.merge import merge
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.models.trainable import setting
from tests.adapters.test_peft_folders import adapted
from tests.helpers.golden_training import full_tensors
from tests.helpers.tiny_decoders import make, save
from tests.parallel.test_command import describe_data, folder, train  # noqa: F401  folder is a fixture

LORA = "--train-iters 2 --lr 1e-2 --lora-r 3 --lora-target-modules q_proj down_proj"


def test_a_head_and_a_norm(ranks, golden, folder):  # noqa: F811
    """At TP2, where the vocabulary is split; stock PEFT loads them, and a merge puts them in their places."""
    describe_data(golden, folder)
    flags = f"{LORA} --lora-modules-to-save lm_head norm --tensor-model-parallel-size 2"
    assert ranks(2).run(train, str(folder), "run", flags) == [0, 0]
    base = load_model_spec(folder / "model.json").text_decoder.ckpt_path
    mm.convert(folder / "run", folder / "adapter", to="peft", parts=["text_decoder"])
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm", "lm_head"]
    ids = torch.arange(3, 20)[None]
    wanted, plain = (mm.load(folder / name, device="cpu").logits(ids) for name in ("run", "model.json"))
    assert (wanted - plain).abs().max() > 1e-3
    stock = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(stock, folder / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    done = merge(base, [folder / "adapter"], folder / "merged", dtype="fp32")
    assert {"lm_head.weight", "model.norm.weight"} <= set(done.replaced)
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    switched = mm.load(folder / "model.json", device="cpu", adapter=folder / "adapter")
    torch.testing.assert_close(switched.logits(ids), wanted, atol=1e-4, rtol=0)
    with switched.disable_adapter():
        assert torch.equal(switched.logits(ids), plain)
    mm.convert(folder / "run", folder / "whole", to="peft")
    names = json.loads((folder / "whole" / "adapter_config.json").read_text())["modules_to_save"]
    assert names == ["model.language_model.norm", "lm_head"]
    changed = full_tensors(folder / "run")["text_decoder.output_layer.weight"]
    assert len(changed) >= 1000 and torch.isfinite(changed).all()


def test_what_trains(folder):  # noqa: F811
    model = json.loads((folder / "model.json").read_text())
    model["text_decoder"]["lora"] = {"r": 2, "modules_to_save": ["embed_tokens", "input_layernorm"]}
    spec = load_model_spec(model)
    again = load_model_spec(json.loads(spec.model_dump_json()))  # as a checkpoint keeps it
    assert again.text_decoder.parameters == spec.text_decoder.parameters
    for name, opened in {
        "embedding.word_embeddings.weight": True,
        "decoder.layers.1.input_layernorm.weight": True,
        "decoder.layers.1.pre_mlp_layernorm.weight": False,
        "output_layer.weight": False,
    }.items():
        assert setting(again.text_decoder, name).trained == opened
    for module, message in (("head", "found 'head', which is no module of its own here; expected some of"), (3, "'?3")):
        model["text_decoder"]["lora"]["modules_to_save"] = [module]
        with pytest.raises(ConfigError, match=message):
            load_model_spec(model)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_norms_that_peft_names_by_their_end(tmp_path, dtype):
    """All norms are "norm" to PEFT. Adapters on a half-precision base are rounded once, to the type asked for."""
    theirs = make("llama")
    save(theirs.half(), "llama", tmp_path)
    first = adapted(theirs.float(), tmp_path / "first", target_modules=["q_proj"], modules_to_save=["norm"])
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    first.save_pretrained(tmp_path / "first")
    second = adapted(first.merge_and_unload(), tmp_path / "second", seed=5, target_modules=["q_proj", "up_proj"])
    wanted = second.merge_and_unload().to(torch.float32 if dtype == "fp32" else torch.float16).state_dict()
    merge(tmp_path / "hf", [tmp_path / "first", tmp_path / "second"], tmp_path / "merged", dtype=dtype)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    changed = [name for name in wanted if name.endswith(("q_proj.weight", "up_proj.weight", "norm.weight"))]
    for name in changed:
        step = torch.finfo(found[name].dtype).eps
        torch.testing.assert_close(found[name].float(), wanted[name].float(), rtol=2 * step, atol=1e-6)
