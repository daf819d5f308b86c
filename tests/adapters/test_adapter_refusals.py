"""Adapters of PEFT that cannot be read, each with the reason; and configs that change nothing."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from checkpoint_converters.checkpoint.adapters import export_adapter
from checkpoint_converters.merge import merge
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.adapters.peft_config import _MUST_BE, _NO_MATTER, PeftConfig
from mindspeed_mm.models.spec import load_model_spec
from tests.adapters.test_peft_folders import adapted, block, changed
from tests.helpers.tiny_decoders import make, rows, save
from tests.helpers.tiny_llava import close
from tests.parallel.test_command import describe_data, folder, train  # noqa: F401  folder is a fixture

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """(the decoder's folder, model.json around it)."""
    made = tmp_path_factory.mktemp("decoder")
    return made / "hf", save(make("llama"), "llama", made)


def test_every_key_of_peft_is_known():
    """A new version of PEFT may have keys that change what an adapter computes."""
    keys = set(peft.LoraConfig().to_dict())
    assert keys <= {"peft_type", "init_lora_weights", *_MUST_BE, *_NO_MATTER, *PeftConfig.model_fields}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "ADALORA"}, "found peft_type 'ADALORA'; expected 'LORA'"),
        ({"peft_type": None}, "found no peft_type"),
        ({"lora_bias": True}, "found lora_bias True"),
        ({"fan_in_fan_out": True}, "found fan_in_fan_out True"),
        ({"layer_replication": [[0, 3]]}, "found layer_replication"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "found target_parameters"),
        ({"trainable_token_indices": [1]}, "found trainable_token_indices"),
        ({"alora_invocation_tokens": [5]}, "found alora_invocation_tokens"),
        ({"use_qalora": True}, "found use_qalora"),
        ({"kasa_config": {"beta": 1.0}}, "found kasa_config"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights before the training"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "found init_lora_weights 'loftq'"),
        ({"init_lora_weights": "olora"}, "found init_lora_weights 'olora'"),
        ({"new_key": 3}, "found keys that are not known: new_key 3; expected those of peft.LoraConfig"),
        ({"r": "3"}, 'r: found "3" .string.; input should be a valid integer'),
        ({"r": 0}, "greater than 0"),
        ({"lora_alpha": None}, "lora_alpha: found null"),
    ],
    ids=str,
)
def test_configs(decoder, tmp_path, values, message):
    """The same for switching on and for merging."""
    base, path = decoder
    adapted(make("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    changed(tmp_path / "adapter", **values)
    with pytest.raises((WeightError, ConfigError), match=message):
        mm.load(path, device="cpu", adapter=tmp_path / "adapter")
    with pytest.raises((WeightError, ConfigError), match=message):
        merge(base, [tmp_path / "adapter"], tmp_path / "merged")


@pytest.mark.parametrize("first", ["gaussian", "orthogonal", "mica"])
def test_what_changes_nothing(decoder, tmp_path, first):
    _, path = decoder
    limits = {"layers_to_transform": [0, 2], "exclude_modules": ["layers.2.self_attn.v_proj"], "r": 4}
    limits["rank_pattern"], limits["alpha_pattern"] = {"q_proj": 2}, {"^model.layers.0.self_attn.q_proj": 32}
    targets = ["q_proj", "v_proj"]
    wrapped = adapted(make("llama"), tmp_path / "a", target_modules=targets, init_lora_weights=first, **limits)
    changed(tmp_path / "a", key_of_a_later_version=None)
    with torch.no_grad():
        wanted = wrapped(input_ids=rows(1, 9)).logits
    close(mm.load(path, device="cpu", adapter=tmp_path / "a").logits(rows(1, 9)), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: each.to(torch.int32), "has type torch.int32 and shape .*; expected floating point"),
        (lambda each: each.to(torch.float8_e4m3fn), "has type torch.float8_e4m3fn"),
        (lambda each: each.flatten(), "2 axes. Save the adapter again"),
        (lambda each: each * float("nan"), "NaN or Inf of .* expected finite weights"),
    ],
    ids=["int32", "float8", "one axis", "nan"],
)
def test_tensors(decoder, tmp_path, change, message):
    base, path = decoder
    adapted(make("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter" / FILE)
    save_file({name: change(each) for name, each in tensors.items()}, tmp_path / "adapter" / FILE)
    with pytest.raises(WeightError, match=message):
        mm.load(path, device="cpu", adapter=tmp_path / "adapter")
    with pytest.raises(WeightError, match=message):
        merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    if "NaN" in message:
        assert mm.load(path, device="cpu", adapter=tmp_path / "adapter", allow_nonfinite=True)


def test_files(decoder, tmp_path):
    _, path = decoder
    made = tmp_path / "adapter"
    adapted(make("llama"), made, target_modules=["q_proj"])
    whole = (made / FILE).read_bytes()
    with pytest.raises(WeightError, match="found one file of an adapter; expected its folder. Give .*adapter"):
        mm.load(path, device="cpu", adapter=made / FILE)
    torch.save(load_file(made / FILE), tmp_path / "pickle")
    for content, message in (
        (whole[: len(whole) // 2], "is cut off or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found a git-lfs pointer"),
        ((tmp_path / "pickle").read_bytes(), "found a pickle, which is not read; expected safetensors"),
    ):
        (made / FILE).write_bytes(content)
        with pytest.raises(WeightError, match=message):
            mm.load(path, device="cpu", adapter=made)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_beside_the_layers(decoder, tmp_path, target):
    _, path = decoder
    adapted(make("llama"), tmp_path / "adapter", target_modules=["q_proj", target])
    with pytest.raises(WeightError, match="Of adapters on an embedding or a head: merge them with PEFT"):
        mm.load(path, device="cpu", adapter=tmp_path / "adapter")


def test_a_module_that_is_adapted_and_whole(decoder):
    model = block(decoder[1], r=2, modules_to_save=["o_proj"])
    with pytest.raises(ConfigError, match="o_proj is .*layers.0.self_attn.o_proj, which target_modules adapts, too"):
        load_model_spec(model)
    model["text_decoder"]["lora"] |= {"target_modules": ["q_proj"]}
    assert load_model_spec(model).text_decoder.lora.modules_to_save == ["o_proj"]


def test_an_adapter_of_two_parts_that_one_part_loads(golden, tmp_path, folder):  # noqa: F811
    """What the other part does not load would be lost."""
    model = json.loads((folder / "model.json").read_text())
    names = ["model.language_model.layers.0.mlp.up_proj", "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"]
    decoder, vision = model["text_decoder"], model["image_encoder"]["vision_encoder"]
    sizes = [(decoder["hidden_size"], decoder["ffn_hidden_size"]), (vision["hidden_size"], vision["ffn_hidden_size"])]
    tensors = {}
    for name, (inputs, outputs) in zip(names, sizes, strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.full((2, inputs), 0.05)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.full((outputs, 2), 0.05)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / FILE)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    lora = {"r": 2, "alpha": 4, "load": str(tmp_path / "adapter")}
    decoder["lora"] = lora | {"target_modules": "model.layers.0.mlp.up_proj"}
    (folder / "model.json").write_text(json.dumps(model))
    with pytest.raises(WeightError, match="has A and B of the vision_encoder, too, and vision_encoder.lora does not"):
        mm.load(folder / "model.json", device="cpu")
    vision |= {"freeze": False, "lora": lora | {"target_modules": ".*encoder.layers.0.mlp.fc1"}}
    (folder / "model.json").write_text(json.dumps(model))
    wanted = mm.load(folder / "model.json", device="cpu").logits(rows(1, 9))
    mm.convert(folder / "model.json", tmp_path / "out", to="mindspeed-mm", dtype="fp32")
    torch.testing.assert_close(mm.load(tmp_path / "out", device="cpu").logits(rows(1, 9)), wanted, atol=1e-4, rtol=0)


def test_a_tied_head_that_is_trained(ranks, golden, folder):  # noqa: F811
    """It is named by its embedding, and goes into PEFT's folder as both, since PEFT unties them."""
    describe_data(golden, folder)
    model = json.loads((folder / "model.json").read_text())
    model["text_decoder"] |= {"share_embeddings_and_output_weights": True, "ckpt_path": None, "fresh": True}
    lora = model["text_decoder"]["lora"] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    with pytest.raises(ConfigError, match="found 'lm_head', which is the embedding here .* expected embed_tokens"):
        load_model_spec(model)
    lora["modules_to_save"] = ["embed_tokens"]
    (folder / "model.json").write_text(json.dumps(model))
    assert ranks(1).run(train, str(folder), "run", "--train-iters 1") == [0]
    export_adapter(folder / "run", folder / "adapter", decoder_only=True)
    tensors = load_file(folder / "adapter" / FILE)
    head, embedding = (tensors[f"base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(head, embedding)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.embed_tokens", "lm_head"]
