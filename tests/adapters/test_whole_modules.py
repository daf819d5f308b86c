"""Adapters with PEFT's modules_to_save, switched on over a base: logits are those of PEFT's own model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from checkpoint_converters.merge import merge
from mindspeed_mm.cli.main import main
from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.errors import ConfigError, WeightError
from tests.adapters.test_peft_folders import adapted, block, drawn, logits_of
from tests.helpers.tiny_decoders import make, rows, save
from tests.helpers.tiny_llava import IMAGE_ID, clip, close, llava
from tests.helpers.tiny_llava import save as save_llava

LANGUAGE = r".*language_model.*\.(q_proj|up_proj)"


def with_whole(model, folder, seed=3, **changes):
    """PEFT's model with random adapters, and whole modules that are not the base's."""
    wrapped = adapted(model, folder, seed, **changes)
    with torch.no_grad():
        for parameter, values in drawn(wrapped, seed, "modules_to_save"):
            parameter.add_(values)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(LLaVA's base, its adapter with a head and a projector, inputs, logits with and without it)."""
    folder = tmp_path_factory.mktemp("whole")
    model = llava(clip())
    base = save_llava(model, folder / "base")
    ids = rows(1, 30)
    ids[ids == IMAGE_ID] = 5
    ids[:, 2:18] = IMAGE_ID
    inputs = {"pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        plain = model(input_ids=ids, **inputs).logits
        kept = ["lm_head", "multi_modal_projector"]
        wrapped = with_whole(model, folder / "adapter", target_modules=LANGUAGE, modules_to_save=kept)
        wanted = wrapped(input_ids=ids, **inputs).logits
        wrapped.unload()
    ids = ids.masked_fill(ids == IMAGE_ID, IMAGE_TOKEN_INDEX)  # which every layout of ours takes
    return base, folder / "adapter", (ids, inputs), wanted, plain


def test_on_and_off(whole):
    base, adapter, (ids, inputs), wanted, plain = whole
    ours = mm.load(base, device="cpu", adapter=adapter)
    close(ours.logits(ids, **inputs), wanted)
    with ours.disable_adapter():
        close(ours.logits(ids, **inputs), plain)
        with ours.disable_adapter():
            close(ours.logits(ids, **inputs), plain)
        close(ours.logits(ids, **inputs), plain)
    close(ours.logits(ids, **inputs), wanted)


def test_converted_with_the_adapter(whole, tmp_path):
    base, adapter, (ids, inputs), wanted, _ = whole
    flags = ["--to", "mindspeed-mm", "--adapter", str(adapter)]
    assert main(["convert", str(base), str(tmp_path / "out"), *flags]) == 0
    close(mm.load(tmp_path / "out", device="cpu").logits(ids, **inputs), wanted)


def test_a_model_json_that_loads_it(whole, tmp_path):
    """As the start of a training and as the source of a conversion. All whole modules of a part must be named."""
    base, adapter, (ids, inputs), wanted, _ = whole
    lora = {"r": 3, "alpha": 7, "target_modules": ["q_proj", "up_proj"], "load": str(adapter)}
    parts = {"vision_encoder": {"ckpt_path": str(base)}, "vision_projector": {"ckpt_path": str(base)}}
    model = {"image_encoder": parts, "text_decoder": {"ckpt_path": str(base), "lora": lora}}
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model))
    with pytest.raises(WeightError, match="comes with lm_head as a whole, which text_decoder.lora.modules_to_save"):
        mm.load(path, device="cpu")
    lora["modules_to_save"] = ["lm_head"]
    path.write_text(json.dumps(model))
    close(mm.load(path, device="cpu").logits(ids, **inputs), wanted)
    mm.convert(path, tmp_path / "out", to="mindspeed-mm")
    close(mm.load(tmp_path / "out", device="cpu").logits(ids, **inputs), wanted)


def test_a_run_begins_with_them(whole):
    """They are trained from the adapter's values on; the base's are not kept."""
    from mindspeed_mm.models.adapters.saved_values import values_in
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.complete import read_model
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    base, adapter, *_ = whole
    init_single_process(get_platform("cpu"))
    lora = {"r": 3, "alpha": 7, "target_modules": ["q_proj", "up_proj"], "load": str(adapter)}
    parts = {"vision_encoder": {"ckpt_path": str(base)}, "vision_projector": {"ckpt_path": str(base)}}
    decoder = {"ckpt_path": str(base), "lora": lora | {"modules_to_save": ["lm_head"]}}
    vlm, _ = build_vlm(read_model({"image_encoder": parts, "text_decoder": decoder}), Runtime(), torch.device("cpu"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = vlm.text_decoder.output_layer.weight
    assert head.requires_grad and torch.equal(head, tensors["base_model.model.lm_head.weight"])
    first = next(name for name in tensors if name.endswith("multi_modal_projector.linear_1.bias"))
    assert any(torch.equal(tensors[first], tensor) for tensor in vlm.parameters())
    assert not values_in(vlm)


def test_switched_adapters_with_heads_of_their_own(whole, tmp_path):
    from mindspeed_mm.inference.adapters import AdapterSwitch

    base, adapter, (ids, inputs), wanted, plain = whole
    with_whole(llava(clip()), tmp_path / "other", 7, target_modules=LANGUAGE, modules_to_save=["lm_head", "norm"])
    other = mm.load(base, device="cpu", adapter=tmp_path / "other").logits(ids, **inputs)
    vlm = mm.load(base, device="cpu")
    switch = AdapterSwitch(vlm)
    expected = [plain, wanted, other]
    attached = [None, switch.attach(adapter), switch.attach(tmp_path / "other")]
    for number in (0, 1, 2, 1, 0, 2, 2, 0):
        switch.use(attached[number])
        close(vlm.logits(ids, **inputs), expected[number])
    switch.use(attached[1])
    bad = tmp_path / "other" / "adapter_model.safetensors"
    tensors = load_file(bad)
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    save_file(tensors | {name: tensors[name][1:].clone()}, bad)
    with pytest.raises(WeightError, match=r"lm_head.weight makes a tensor of shape .* Give an adapter of this base"):
        switch.attach(tmp_path / "other")
    close(vlm.logits(ids, **inputs), wanted)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_two_tensor_parallel_ranks(ranks, tmp_path, name):
    """A vocabulary of odd size, and one matrix of the three (Llama), or of the only one (Phi-3), that ours holds."""
    theirs = make(name)
    path = save(theirs, name, tmp_path)
    linear = {"llama": "k_proj", "phi3": "qkv_proj"}[name]
    kept = ["lm_head", "embed_tokens", "norm", linear]
    wrapped = with_whole(theirs, tmp_path / "adapter", target_modules=["o_proj"], modules_to_save=kept)
    ids = rows(1, 9)
    with torch.no_grad():
        wanted = wrapped(input_ids=ids).logits
    close(mm.load(path, device="cpu", adapter=tmp_path / "adapter").logits(ids), wanted)
    for logits, _ in ranks(2).run(logits_of, str(path), str(tmp_path / "adapter"), 2, ids):
        close(logits, wanted)


def test_tied_embeddings(tmp_path):
    """PEFT unties them: with one of both, or with two that differ, ours would be another model."""
    theirs = make("qwen2")
    path, ids = save(theirs, "qwen2", tmp_path), rows(1, 9)
    base, folder = tmp_path / "hf", tmp_path / "adapter"
    one = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    wrapped = with_whole(theirs, folder, **one, ensure_weight_tying=True)
    with torch.no_grad():
        wanted = wrapped(input_ids=ids).logits
    close(mm.load(path, device="cpu", adapter=folder).logits(ids), wanted)
    merge(base, [folder], tmp_path / "merged")
    path.write_text(path.read_text().replace(str(base), str(tmp_path / "merged")))
    close(mm.load(path, device="cpu").logits(ids), wanted)
    for number, kept in enumerate((["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])):
        with_whole(make("qwen2"), tmp_path / str(number), target_modules=["q_proj"], modules_to_save=kept)
        for attempt in (
            lambda: mm.load(path, device="cpu", adapter=tmp_path / str(number)),  # noqa: B023  called at once
            lambda: merge(base, [tmp_path / str(number)], tmp_path / "never"),  # noqa: B023
        ):
            with pytest.raises(WeightError, match="apart from each other .* this model ties lm_head.weight and"):
                attempt()


def test_beside_a_stored_base(tmp_path):
    """Weights in 4 bits stay; a head that is whole is replaced, a linear of the layers is not."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    path, ids = save(make("llama", **sizes), "llama", tmp_path), rows(1, 9)
    for name in ("lm_head", "k_proj"):
        with_whole(make("llama", **sizes), tmp_path / name, target_modules=["q_proj"], modules_to_save=[name])
    stored, whole = ({"quantize": kind} if kind else {} for kind in ("nf4", None))
    found = mm.load(path, device="cpu", adapter=tmp_path / "lm_head", **stored)
    with found.disable_adapter():
        assert torch.equal(found.logits(ids), mm.load(path, device="cpu", **stored).logits(ids))
    wanted = mm.load(path, device="cpu", adapter=tmp_path / "lm_head", **whole).logits(ids)
    assert (found.logits(ids) - wanted).abs().max() < 0.5 * wanted.abs().max()
    with pytest.raises(ConfigError, match="which quantize nf4 stores in fewer bits"):
        mm.load(path, device="cpu", adapter=tmp_path / "k_proj", **stored)


def test_a_piece_of_a_matrix_without_the_rest(tmp_path):
    theirs = make("llama")
    path = save(theirs, "llama", tmp_path)
    with_whole(theirs, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["k_proj"])
    given = {"r": 3, "alpha": 7, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}
    model = block(path, **given, load=str(tmp_path / "adapter"))
    model["text_decoder"] |= {"ckpt_path": None, "fresh": True}
    path.write_text(json.dumps(model))
    with pytest.raises((ConfigError, WeightError), match="comes with .*k_proj"):
        mm.load(path, device="cpu")
