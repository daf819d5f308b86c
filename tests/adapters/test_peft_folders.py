"""Folders of the peft library: read, merged, and what is refused."""

import dataclasses
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from checkpoint_converters.merge import merge
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.adapters.base_hash import base_hash, write_base
from mindspeed_mm.models.adapters.peft_format import read_peft
from mindspeed_mm.models.adapters.peft_writing import write_peft
from mindspeed_mm.models.adapters.targets import sites
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import load_model_spec
from tests.helpers import tiny_qwen
from tests.helpers.tiny_decoders import make, rows, save
from tests.helpers.tiny_llava import IMAGE_ID, clip, close, llava, llava_next, siglip
from tests.helpers.tiny_llava import save as save_llava

ALL = {"target_modules": "all-linear"}
DECODER = {"target_modules": r".*language_model.*\.(q_proj|down_proj|gate_proj)", "use_rslora": True}


def drawn(model, seed, word):
    """(parameter, random values) of those whose names hold a word."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if word in name:
            yield parameter, 0.2 * torch.randn(parameter.shape, generator=generator)


def adapted(model, folder, seed=3, **changes):
    """PEFT's model with random A and B, saved in `folder`."""
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 7} | changes))
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter, values in drawn(wrapped, seed, "lora_"):
            parameter.copy_(values)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.fixture
def decoder(tmp_path):
    """(transformers' model, its folder, model.json around it)."""
    theirs = make("llama")
    path = save(theirs, "llama", tmp_path)
    return theirs, tmp_path / "hf", path


def written_alike(vlm, folder, **options):
    """What we write is what PEFT wrote, without the adapters of layers that are never built."""
    specs = {slot: part for slot, part in vlm.spec.part_specs().items() if part.lora}
    adapter = read_peft(folder / "adapter")
    names = adapter.sites(vlm.spec.parts(), vlm.spec.part_specs(), vlm.spec.family.layouts)
    modules = {slot: [site.module for site in sites(vlm.spec.parts()[slot], part)] for slot, part in specs.items()}
    write_peft(folder / "written", vlm.spec, lambda slot, module: adapter.pair(names[slot][module]), modules, **options)
    found, wanted = (load_file(folder / name / "adapter_model.safetensors") for name in ("written", "adapter"))
    assert found and found.keys() <= wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_qwen_vl(tmp_path):
    """All linears of windows, merger and decoder."""
    model = tiny_qwen.qwen()
    base = tiny_qwen.save(model, tmp_path / "base")
    image = tiny_qwen.TAGS["image_token_id"]
    ids = torch.tensor([[5, 130, *[image] * 6, 131, 7, 9, 11]])
    pixels = torch.randn(24, 3 * 2 * tiny_qwen.PATCH**2, generator=torch.Generator().manual_seed(1))
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]])}
    wrapped = adapted(model, tmp_path / "adapter", **ALL)
    with torch.no_grad():
        wanted = wrapped(input_ids=ids, mm_token_type_ids=(ids == image).int(), **inputs).logits
    ours = mm.load(base, device="cpu", adapter=tmp_path / "adapter")
    written_alike(ours, tmp_path)
    close(ours.logits(ids, **inputs), wanted)
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    close(mm.load(tmp_path / "merged", device="cpu").logits(ids, **inputs), wanted)


@pytest.mark.parametrize("targets", [ALL, DECODER], ids=["all-linear", "decoder"])
@pytest.mark.parametrize("kind", ["llava", "llava_next", "siglip"])
def test_whole_models(tmp_path, kind, targets):
    """The adapter of PEFT on transformers' class, switched on, off and merged."""
    if kind == "siglip":
        model = llava(siglip(), vision_feature_select_strategy="full", vision_feature_layer=-1)
    else:
        model = {"llava": llava, "llava_next": llava_next}[kind](clip())
    base = save_llava(model, tmp_path / "base")
    ids = rows(1, 30)
    ids[ids == IMAGE_ID] = 5
    inputs = {}
    if kind != "llava_next":
        count = 16
        ids[:, 2 : 2 + count] = IMAGE_ID
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(input_ids=ids, **inputs).logits
        wanted = adapted(model, tmp_path / "adapter", **targets)(input_ids=ids, **inputs).logits
    ours = mm.load(base, device="cpu", adapter=tmp_path / "adapter")
    written_alike(ours, tmp_path)
    close(ours.logits(ids, **inputs), wanted)
    with ours.disable_adapter():
        close(ours.logits(ids, **inputs), plain)
    close(ours.logits(ids, **inputs), wanted)
    assert main(["merge", str(base), str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    close(mm.load(tmp_path / "merged", device="cpu").logits(ids, **inputs), wanted)
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        close(again(input_ids=ids, **inputs).logits, wanted)


def test_generation_and_several_adapters(decoder, tmp_path):
    theirs, base, path = decoder
    first = adapted(theirs, tmp_path / "first", target_modules=["q_proj", "up_proj"])
    prompt = rows(1, 9)
    with torch.no_grad():
        logits = first(input_ids=prompt).logits
    ours = mm.load(path, device="cpu", adapter=tmp_path / "first")
    close(ours.logits(prompt), logits)
    options = transformers.GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=[10**6])
    wanted = first.generate(input_ids=prompt, generation_config=options)[0, 9:].tolist()
    assert ours.generate(input_ids=prompt[0].tolist(), max_new_tokens=7, eos_token_id=-1) == [wanted]
    second = adapted(first.merge_and_unload(), tmp_path / "second", seed=5, target_modules=["q_proj", "o_proj"])
    merge(base, [tmp_path / "first", tmp_path / "second"], tmp_path / "both")
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
        close(again(input_ids=prompt).logits, second(input_ids=prompt).logits)
    with pytest.raises(WeightError, match="comes twice"):
        merge(base, [tmp_path / "first", tmp_path / "first"], tmp_path / "more")


def logits_of(path, adapter, tensor, ids):
    """On this rank."""
    vlm = mm.load(path, device="cpu", adapter=adapter, tensor_model_parallel_size=tensor)
    generated = vlm.generate(input_ids=ids[0].tolist(), max_new_tokens=5, eos_token_id=-1)
    return vlm.logits(ids), generated


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_two_tensor_parallel_ranks(ranks, tmp_path, name):
    theirs = make(name)
    path = save(theirs, name, tmp_path)
    wrapped = adapted(theirs, tmp_path / "adapter", **ALL)
    ids = rows(1, 9)
    with torch.no_grad():
        wanted = wrapped(input_ids=ids).logits
    options = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=[10**6])
    text = wrapped.generate(input_ids=ids, generation_config=options)[0, 9:].tolist()
    for logits, generated in ranks(2).run(logits_of, str(path), str(tmp_path / "adapter"), 2, ids):
        close(logits, wanted)
        assert generated == [text]


def test_a_folder_of_llava_lora(tmp_path):
    """The original code's LoRA folder: the adapter, and the projector beside it."""
    model = llava(clip())
    base = save_llava(model, tmp_path / "base")
    folder = tmp_path / "lora"
    ids = rows(1, 30)
    ids[ids == IMAGE_ID] = 5
    ids[:, 2:18] = IMAGE_ID
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    wrapped = adapted(model, folder, target_modules=r".*language_model.*\.(q_proj|up_proj)")
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("model.model.language_model.", "model.model."): each for name, each in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")  # the names of a LlavaLlamaForCausalLM
    other = {}
    with torch.no_grad():
        for number, linear in enumerate(("linear_1", "linear_2")):
            for kind, tensor in getattr(model.model.multi_modal_projector, linear).named_parameters():
                tensor.add_(0.1)
                other[f"base_model.model.model.mm_projector.{2 * number}.{kind}"] = tensor.clone()
        wanted = wrapped(input_ids=ids, pixel_values=pixels).logits
    torch.save(other, folder / "non_lora_trainables.bin")
    with pytest.raises(WeightError, match="found non_lora_trainables.bin beside the adapter"):
        mm.load(base, device="cpu", adapter=folder)
    merged = merge(base, [folder], tmp_path / "merged")
    assert len(merged.replaced) == 4 + 4
    close(mm.load(tmp_path / "merged", device="cpu").logits(ids, pixel_values=pixels), wanted)


def test_the_flag(decoder, tmp_path, capsys):
    """Without an image processor and a tokenizer the command cannot answer; what it loads first is the adapter."""
    assert main(["infer", "--model", str(decoder[2]), "--adapter", str(tmp_path / "no"), "--prompt", "Hi"]) == 1
    assert "found no adapter_config.json" in capsys.readouterr().err


# --- What is refused -----------------------------------------------------------------------------------------------


def block(path, **lora):
    model = json.loads(path.read_text())
    model["text_decoder"]["lora"] = lora
    return model


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"q_prj fits no linear of this part \(did you mean q_proj\?\)"),
        ({"target_modules": ["lm_head"]}, "lm_head fits no linear.*expected some of q_proj"),
        ({"target_modules": "nothing.*"}, "fits no linear"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": []}, "fits no linear"),
        ({"r": 0}, "lora.r"),
        ({"alpha": 0}, "lora.alpha"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"rank": 8}, "rank"),
    ],
)
def test_blocks_that_cannot_be(decoder, lora, message):
    with pytest.raises(ConfigError, match=message):
        load_model_spec(block(decoder[2], **lora))


def test_lora_on_a_frozen_part(decoder):
    model = block(decoder[2], r=2)
    model["text_decoder"]["freeze"] = True
    with pytest.raises(ConfigError, match="found lora in a part with freeze true.*leave out the --lora flags"):
        load_model_spec(model)


def changed(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, r"expected base_model.model.<module>.lora_A.weight and .*lora_magnitude_vector"),
        ({"bias": "all"}, "found bias 'all'; expected 'none'"),
        ({"peft_type": "IA3"}, "found peft_type 'IA3'"),
        ({"rank_pattern": {"q_proj": 4}}, "A and B of .*q_proj have shapes .* another r"),
        ({"rank_pattern": {"q_(": 4}}, "which is no regular expression"),
        ({"r": 5}, "A and B of .* have shapes .* another r"),
    ],
)
def test_adapters_of_another_kind(decoder, tmp_path, values, message):
    adapted(decoder[0], tmp_path / "adapter", **ALL)
    changed(tmp_path / "adapter", **values)
    with pytest.raises((WeightError, ConfigError), match=message):
        mm.load(decoder[2], device="cpu", adapter=tmp_path / "adapter")


def test_whole_modules_beside_an_adapter(tmp_path):
    """PEFT's modules_to_save, merged; tests/adapters/test_whole_modules.py switches them on."""
    model = llava(clip())
    base = save_llava(model, tmp_path / "base")
    kept = ["lm_head", "multi_modal_projector"]
    targets = r".*language_model.*\.(q_proj|up_proj)"
    wrapped = adapted(model, tmp_path / "adapter", target_modules=targets, modules_to_save=kept)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = rows(1, 30)
    ids[ids == IMAGE_ID] = 5
    ids[:, 2:18] = IMAGE_ID
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = wrapped(input_ids=ids, pixel_values=pixels).logits
    merged = merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert len(merged.replaced) == 4 + 4 + 1
    close(mm.load(tmp_path / "merged", device="cpu").logits(ids, pixel_values=pixels), wanted)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    save_file(tensors | {name: tensors[name][1:]}, file)
    with pytest.raises(WeightError, match=r"lm_head.weight has shape .* Give an adapter of this base model"):
        merge(base, [tmp_path / "adapter"], tmp_path / "other")


def test_damaged_and_foreign_folders(decoder, tmp_path):
    theirs, base, path = decoder
    folder = tmp_path / "adapter"
    adapted(make("llama", hidden_size=60, num_hidden_layers=4), folder, **ALL)
    with pytest.raises(WeightError, match="adapts 7 modules that this model does not have"):
        mm.load(path, device="cpu", adapter=folder)
    other = tmp_path / "other"
    adapted(make("llama", hidden_size=60), other, **ALL)
    with pytest.raises(ConfigError, match="belongs to another base model"):
        mm.load(path, device="cpu", adapter=other)
    with pytest.raises(WeightError, match="Give an adapter of this base model"):
        merge(base, [other], tmp_path / "merged")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(WeightError, match="without its partner"):
        mm.load(path, device="cpu", adapter=folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(WeightError, match="is a pickle, which is not read"):
        mm.load(path, device="cpu", adapter=folder)
    with pytest.raises(WeightError, match="found no adapter_config.json"):
        mm.load(path, device="cpu", adapter=tmp_path / "hf")


def recorded_base(path, folder):
    """Write the hash of a decoder's weights into an adapter's folder."""
    spec = load_model_spec(path)
    part, block = spec.parts()["text_decoder"], spec.text_decoder
    write_base(folder, {"text_decoder": base_hash(part, block, open_source(block.ckpt_path))})


def test_an_adapter_of_other_weights(decoder, tmp_path):
    theirs, base, path = decoder
    theirs.to(torch.bfloat16).float().save_pretrained(base)  # as releases are: every precision holds the same
    adapted(make("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    recorded_base(path, tmp_path / "adapter")
    assert mm.load(path, device="cpu", adapter=tmp_path / "adapter").spec.text_decoder.lora is not None
    for name, dtype in (("half", torch.float16), ("bf16", torch.bfloat16)):
        theirs.to(dtype).save_pretrained(tmp_path / name)
        path.write_text(path.read_text().replace(str(base), str(tmp_path / name)))
        mm.load(path, device="cpu", adapter=tmp_path / "adapter")
        path.write_text(path.read_text().replace(str(tmp_path / name), str(base)))
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    (tmp_path / "merged" / "merged_adapters.json").unlink()
    with pytest.raises(WeightError, match="was trained on other weights of the text_decoder: base_weights.json says"):
        merge(tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "twice")
    path.write_text(path.read_text().replace(str(base), str(tmp_path / "merged")))
    with pytest.raises(WeightError, match="was trained on other weights"):
        mm.load(path, device="cpu", adapter=tmp_path / "adapter")


def test_what_does_not_go_together(decoder, tmp_path):
    theirs, _, path = decoder
    adapted(theirs, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ConfigError, match="quantize nf4 found a DoRA adapter"):
        mm.load(path, device="cpu", adapter=tmp_path / "dora", quantize="nf4")
    adapted(make("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="was loaded without an adapter"):
        mm.load(path, device="cpu").disable_adapter()
    given = {"r": 3, "alpha": 7, "load": str(tmp_path / "adapter")}
    for lora, message in (
        (given | {"target_modules": ["q_proj", "v_proj"]}, r"no A and B of model.layers.0.self_attn.v_proj"),
        (given | {"r": 4, "target_modules": ["q_proj"]}, "Make them equal"),
    ):
        path.write_text(json.dumps(block(path, **lora)))
        with pytest.raises((ConfigError, WeightError), match=message):
            mm.load(path, device="cpu")
    path.write_text(json.dumps(block(path, **given, target_modules=["q_proj"])))
    assert mm.load(path, device="cpu").spec.text_decoder.lora is not None
    with pytest.raises(ConfigError, match="whose lora block loads"):
        mm.load(path, device="cpu", adapter=tmp_path / "adapter")


def test_only_runs_with_adapters_are_written_as_peft(decoder, tmp_path):
    with pytest.raises(WeightError, match="is no training checkpoint"):
        mm.convert(decoder[1], tmp_path / "out", to="peft")
    with pytest.raises(WeightError, match="found dtype; expected the checkpoint of a LoRA run"):
        mm.convert(decoder[1], tmp_path / "out", to="peft", dtype="fp16")


def test_other_refusals_of_export(decoder, tmp_path, monkeypatch):
    with pytest.raises(WeightError, match="names no modules of a transformers class"):
        spec = load_model_spec(block(decoder[2], r=2))
        bare = dataclasses.replace(spec.family.layouts[0], modules={})
        monkeypatch.setattr(spec.family, "layouts", (bare,))
        write_peft(tmp_path / "out", spec, None, {"text_decoder": ["model.layers.0.mlp.up_proj"]})
    monkeypatch.undo()
    mm.convert(save_llava(llava(clip()), tmp_path / "base"), tmp_path / "run", to="checkpoint")
    with pytest.raises(WeightError, match="holds no adapters"):
        mm.convert(tmp_path / "run", tmp_path / "out", to="peft")


def test_modules_that_take_no_adapter(decoder, tmp_path):
    theirs, _, path = decoder
    folder = tmp_path / "adapter"
    adapted(theirs, folder, target_modules=["q_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("0.self_attn.q_proj", "0.input_layernorm"): each for name, each in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(WeightError, match="input_layernorm, which takes no adapter here"):
        mm.load(path, device="cpu", adapter=folder)
    vlm = mm.load(path, device="cpu")
    from mindspeed_mm.models.adapters.lora import attach_lora

    module, spec = vlm.model.text_decoder, load_model_spec(block(path, r=2))
    module.decoder.layers[1].mlp.linear_fc2 = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="layers.1.mlp.linear_fc2 is a Linear; expected a parallel linear"):
        attach_lora(module, spec.parts()["text_decoder"], spec.text_decoder, tp_rank=0, tp_size=1)
