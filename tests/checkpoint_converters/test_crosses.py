"""Every layout into every other and back, bit-equal; exports in stock transformers."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mindspeed_mm as mm
from checkpoint_converters.convert import convert
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.weights.sources import open_source
from tests.checkpoint_converters.converter_helpers import KINDS, assert_equal, our_tensors, tensors, write_llava

WHOLE = ("mindspeed-mm", "llava-hf", "llava")
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"


def shown(spec):
    """What a spec says of the weights alone."""
    return {kind: part.model_dump(exclude={"params_dtype"}) for kind, part in spec.part_specs().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("middle", WHOLE)
def test_whole_models_go_through_every_layout_and_back(golden, tmp_path, middle, tied, dtype):
    """Grouped queries, an odd vocabulary, tied or not."""
    source = write_llava(tmp_path / "source", golden, text={"tie_word_embeddings": tied}, dtype=dtype)
    convert(source, tmp_path / "middle", to=middle)
    convert(tmp_path / "middle", tmp_path / "back", to="llava")
    back, original = tensors(tmp_path / "back"), tensors(source)
    if middle == "mindspeed-mm":  # which has no place for the vision encoder's final norm
        original = {name: tensor for name, tensor in original.items() if "post_layernorm" not in name[1]}
        filled = {name: back.pop(name) for name in list(back) if "post_layernorm" in name[1]}
        assert {tuple(tensor.unique().tolist()) for tensor in filled.values()} == {(0.0,), (1.0,)}
    assert_equal(back, original)
    assert shown(describe_model(open_source(tmp_path / "back"))) == shown(describe_model(open_source(source)))


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("to", WHOLE)
def test_golden_models_cross_bit_equal_at_any_number_of_shards(golden, tmp_path, to, shards):
    source = golden / "models" / "llava_original"
    total = sum(tensor.nbytes for tensor in tensors(source).values())
    convert(source, tmp_path / "out", to=to, shard_size=int(total / shards * 1.15))
    if to != "mindspeed-mm":
        assert (
            len(list((tmp_path / "out").glob("*model*.safetensors")))
            + len(list((tmp_path / "out").glob("*model*.bin")))
            == shards
        )
    convert(tmp_path / "out", tmp_path / "back", to="llava", shard_size=total // 2)
    spec = describe_model(open_source(source))
    assert_equal(our_tensors(tmp_path / "back", spec), our_tensors(source, spec))


@pytest.mark.parametrize("to", WHOLE)
@pytest.mark.parametrize("source", ["llava_hf", "llava_original"])
def test_logits_stay_equal_to_the_last_bit(golden, tmp_path, source, to):
    convert(golden / "models" / source, tmp_path / "out", to=to)
    ids = load_file(golden / "expected" / "one_image.safetensors")
    results = []
    for path in (golden / "models" / source, tmp_path / "out"):
        vlm = mm.load(path, device="cpu", dtype="fp32")
        shown_ids = ids["expanded_input_ids"].masked_fill(ids["expanded_input_ids"] == 1000, -200)
        results.append(vlm.logits(shown_ids, None, ids["pixel_values"])[..., :1000])
    assert torch.equal(*results)


def generated(folder, image):
    """(text, logits) of greedy decoding with stock transformers, which is given nothing but a folder."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    inputs = processor(images=image, text=QUESTION, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        return processor.decode(ids[0]), model(**inputs).logits


@pytest.mark.parametrize("source", ["llava_hf", "llava_original", "mindspeed-mm"])
def test_stock_transformers_gives_equal_logits_and_text(golden, tmp_path, source):
    from PIL import Image

    if source == "mindspeed-mm":
        convert(golden / "models" / "llava_original", tmp_path / source, to=source)
    folder = tmp_path / source if source == "mindspeed-mm" else golden / "models" / source
    convert(folder, tmp_path / "out", to="llava-hf", dtype="fp32")
    image = Image.open(golden / "images" / "src" / "landscape.png").convert("RGB")
    reference = tmp_path / "reference"  # the hub's folders without a processor_config.json leave out its two keys
    shutil.copytree(golden / "models" / "llava_hf", reference)
    shutil.copyfile(tmp_path / "out" / "processor_config.json", reference / "processor_config.json")
    text, logits = generated(tmp_path / "out", image)
    expected_text, expected = generated(reference, image)
    assert text == expected_text
    assert torch.equal(logits[..., :1000], expected[..., :1000])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"], config["text_config"]["vocab_size"]) == (
        1000,
        1001,
        1024,
    )


def test_rows_behind_the_vocabulary_never_win(golden, tmp_path):
    convert(golden / "models" / "llava_original", tmp_path / "out", to="llava-hf", dtype="fp32")
    part = open_source(tmp_path / "out").part("text_decoder")
    head, embedding = part.get("lm_head.weight"), part.get("model.embed_tokens.weight")
    assert torch.allclose(head[1000:], head[:1000].mean(0).expand(24, -1), atol=1e-3)
    assert torch.allclose(embedding[1001], embedding[:1000].mean(0), atol=1e-3)  # stored in fp16


def test_the_liuhaotian_layout_carries_what_its_loader_reads(golden, tmp_path):
    written = convert(golden / "models" / "llava_hf", tmp_path / "out", to="llava", dtype="fp16")
    assert tmp_path / "out" / "pytorch_model.bin.index.json" in written
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((golden / "models" / "llava_original" / "config.json").read_text())
    own = {"mm_vision_tower", "transformers_version", "bos_token_id", "eos_token_id"}  # or what LlamaConfig defaults to
    own |= {"attention_dropout", "pretraining_tp"}
    assert {key: config.get(key) for key in original if key not in own} == {
        key: value for key, value in original.items() if key not in own
    }
    assert config["mm_vision_tower"] == "vision_tower"
    assert not (tmp_path / "out" / "added_tokens.json").exists()
    assert_equal(tensors(tmp_path / "out"), tensors(golden / "models" / "llava_original"))


def test_a_vision_encoder_that_the_hub_has_keeps_its_name(golden, tmp_path):
    source = write_llava(tmp_path / "source", golden)
    config = json.loads((source / "config.json").read_text())
    name = "openai/clip-vit-large-patch14-336"
    (source / "config.json").write_text(json.dumps(config | {"mm_vision_tower": name}))
    convert(source, tmp_path / "out", to="llava", num_attention_heads=2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_vision_tower"] == name
    assert not (tmp_path / "out" / "vision_tower").exists()


PARTS = {"hf": "text_decoder", "clip": "vision_encoder", "projector": "vision_projector"}


@pytest.mark.parametrize("to", PARTS)
@pytest.mark.parametrize("source", ["llava_hf", "llava_original", "mindspeed-mm"])
def test_parts_leave_alone_and_return(golden, tmp_path, source, to):
    model = golden / "models" / source
    if source == "mindspeed-mm":
        model = tmp_path / "ours"
        convert(golden / "models" / "llava_hf", model, to=source)
    convert(model, tmp_path / "part", to=to)
    found, original = open_source(tmp_path / "part"), open_source(model)
    assert found.parts == (PARTS[to],)
    convert(tmp_path / "part", tmp_path / "a", to="mindspeed-mm")
    convert(model, tmp_path / "b", to="mindspeed-mm", parts=[PARTS[to]])
    assert_equal(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert original.layout != found.layout


def test_the_vision_encoder_loads_in_stock_transformers(golden, tmp_path):
    import transformers

    convert(golden / "models" / "llava_original", tmp_path / "out", to="clip", dtype="fp32")
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = [
            transformers.CLIPVisionModel.from_pretrained(path)(pixels).pooler_output
            for path in (tmp_path / "out", golden / "models" / "clip_hf")
        ]
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["p.bin", "p.safetensors"])
def test_a_projector_is_also_one_file(golden, tmp_path, name):
    assert convert(golden / "models" / "llava_hf", tmp_path / name, to="projector", dtype="fp16") == [tmp_path / name]
    assert_equal(tensors(tmp_path / name), tensors(golden / "models" / "mm_projector.bin"))


def test_a_model_is_put_together_of_several_sources(golden, tmp_path):
    models = golden / "models"
    sources = dict(
        zip(KINDS, (models / "vicuna_bin", models / "clip_openai.pt", models / "mm_projector.bin"), strict=True)
    )
    convert(sources, tmp_path / "out", to="llava", num_attention_heads=4)
    spec = describe_model(open_source(models / "llava_original"))
    found, expected = our_tensors(tmp_path / "out", spec), our_tensors(models / "llava_original", spec)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
    assert shown(describe_model(open_source(tmp_path / "out"))) == shown(spec)
    with pytest.raises(WeightError, match="found sources for .'sight'.; expected some of text_decoder"):
        convert({"sight": models / "clip_hf"}, tmp_path / "no", to="clip")
    with pytest.raises(WeightError, match="found sources for nothing"):
        convert({}, tmp_path / "no", to="clip")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    channels=st.sampled_from([2, 4]),
    layers=st.integers(1, 2),
    vocabulary=st.integers(1000, 1100),
    tied=st.booleans(),
    vision_encoder=st.tuples(st.integers(1, 3), st.integers(2, 3), st.integers(1, 3)),
    to=st.sampled_from(WHOLE),
)
def test_random_geometries_round_trip(
    golden, tmp_path_factory, groups, per_group, channels, layers, vocabulary, tied, vision_encoder, to
):
    folder = tmp_path_factory.mktemp("geometry")
    heads = groups * per_group
    text = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": channels}
    text |= {"num_hidden_layers": layers, "vocab_size": vocabulary, "tie_word_embeddings": tied, "hidden_size": 10}
    vision = {
        "num_attention_heads": vision_encoder[0],
        "hidden_size": 4 * vision_encoder[0],
        "num_hidden_layers": vision_encoder[1],
    }
    source = write_llava(folder / "source", golden, text=text, vision=vision | {"image_size": 4 * vision_encoder[2]})
    spec = describe_model(open_source(source))
    convert(source, folder / "middle", to=to)
    convert(folder / "middle", folder / "back", to="llava")
    assert_equal(our_tensors(folder / "back", spec), our_tensors(source, spec))
