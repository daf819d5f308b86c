"""BLIP-2 with OPT and Llama against transformers' classes: logits, text, export, training; and what is refused."""

import copy
import json

import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.describe import describe_model, describe_part
from mindspeed_mm.models.families.blip2 import BLIP2
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import find_family, load_model_spec, model_block
from mindspeed_mm.models.vision_encoder import eva_vit
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_blip import QUERIES, blip2, save, square_processor
from tests.helpers.tiny_llava import SIZES, close, image, inputs, sample, their_loss
from tests.helpers.vlm_ranks import ADAM, GRADIENT, STEP, compare, stored, train, trained

FAMILY = find_family("blip2")


@pytest.fixture(scope="module", params=["opt", "llama"])
def pair(request, tmp_path_factory):
    """(transformers' model, ours, the folder)."""
    theirs = blip2(request.param)
    folder = save(theirs, tmp_path_factory.mktemp("blip2"))
    return theirs, mm.load(folder, device="cpu"), folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(transformers' model, its folder, our spec)."""
    theirs = blip2()
    folder = save(theirs, tmp_path_factory.mktemp("base"))
    return theirs, folder, describe_model(open_source(folder))


def test_logits(pair):
    theirs, ours, _ = pair
    shown = [image(*size) for size in SIZES]
    own = inputs(FAMILY, ours.spec, sample(ours.media, shown, (7, 3, 1, 4, 5)))
    assert own["input_ids"].shape[1] == 20 + QUERIES * len(shown)
    pixels = square_processor()(shown, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(own["pixel_values"], pixels, atol=0, rtol=0)
    with torch.no_grad():
        close(ours.logits(**own), theirs(**own).logits)


def test_padding_as_the_processor_has_it(pair):
    """It puts an image before the padding on the left, so that zeros stand inside a row; OPT counts what is real."""
    theirs, ours, folder = pair
    words = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    processor = transformers.Blip2Processor(square_processor(), words, num_query_tokens=QUERIES)
    texts, images = ["w3 w4 w5 w6", "w7", "w8 w9"], [image(30, 50), image(9, 4), image(41, 40)]
    given = processor(text=texts, images=images, return_tensors="pt", padding=True)
    assert given["attention_mask"][1].tolist() == [1] * QUERIES + [0, 0, 0, 1]
    with torch.no_grad():
        kept = given["attention_mask"].bool()
        close(ours.logits(**given)[kept], theirs(**given).logits[kept])


def test_greedy_text(pair):
    theirs, ours, _ = pair
    shown = [image(30, 50), image(90, 20)]
    rows = [sample(ours.media, shown[:count], (5,) * (count + 1), seed=count) for count in (2, 1)]
    wanted = [_greedy(theirs, inputs(FAMILY, ours.spec, row)) for row in rows]
    first = ours.generate(input_ids=rows[0].input_ids, images=shown, max_new_tokens=9, eos_token_id=-1)
    assert first == wanted[:1]
    ragged = [row.input_ids for row in rows]
    assert ours.generate(input_ids=ragged, images=[*shown, shown[0]], max_new_tokens=9, eos_token_id=-1) == wanted


def _greedy(theirs, given):
    """generate of this class gives new tokens alone, or all of them, by the version."""
    ids = theirs.generate(
        **given,
        attention_mask=torch.ones_like(given["input_ids"]),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ids[0, -9:].tolist()


def test_export_is_read_by_transformers(pair, tmp_path):
    theirs, ours, folder = pair
    mm.convert(folder, tmp_path / "ours", to="mindspeed-mm")
    mm.convert(tmp_path / "ours", tmp_path / "out", to="blip2")
    again, report = transformers.Blip2ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(30, 50)], (5, 6)))
    with torch.no_grad():
        close(again.eval()(**own).logits, theirs(**own).logits, 0)
        close(mm.load(tmp_path / "out", device="cpu").logits(**own), theirs(**own).logits)


def test_decoder_alone(pair, tmp_path):
    theirs, ours, _ = pair
    theirs.language_model.save_pretrained(tmp_path / "decoder")
    source = open_source(tmp_path / "decoder")
    assert source.layout == "hf"
    found, wanted = describe_part(source.part("text_decoder")), ours.spec.text_decoder
    assert found == wanted.model_copy(update={"params_dtype": "float32"})


# --- Training ------------------------------------------------------------------------------------------------------


def samples_of(spec):
    """Three samples: two images, none, one. transformers' class wants an image: the text one is left to the others."""
    media = FAMILY.media_processor(spec, square_processor().to_dict())
    return [
        sample(media, [image(30, 50), image(90, 20)], (6, 9, 5), seed=1),
        sample(media, [image(1, 7)], (4, 12), seed=9),
    ]


LAYOUTS = {
    "one rank": GoldenLayout(),
    "packed": GoldenLayout(packed=True),
    "TP2 SP packed": GoldenLayout(tensor=2, flags="--sequence-parallel", packed=True),
    "PP2": GoldenLayout(pipeline=2),
    "CP2 packed": GoldenLayout(context=2, packed=True),
    "TP2 PP2": GoldenLayout(tensor=2, pipeline=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients(base, ranks, name, tmp_path):
    theirs, folder, spec = base
    samples = samples_of(spec)
    theirs.zero_grad()
    their_loss(theirs, FAMILY, spec, samples).backward()
    names = stored(theirs, BLIP2)
    wanted = {key: tensor.grad for key, tensor in names.items() if tensor.grad is not None}
    ranks(LAYOUTS[name].ranks).run(train, str(folder), LAYOUTS[name], samples, str(tmp_path), 1, GRADIENT)
    after = trained(tmp_path, spec, BLIP2)
    changes = {key: (names[key].detach() - tensor[: len(names[key])]) / STEP for key, tensor in after.items()}
    compare(changes, wanted)


@pytest.mark.parametrize("name", ["one rank", pytest.param("TP2 PP2", marks=pytest.mark.slow)])
def test_five_steps(base, ranks, name, tmp_path):
    _, folder, spec = base
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folder).float().eval()
    samples = samples_of(spec)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        their_loss(theirs, FAMILY, spec, samples).backward()
        optimizer.step()
    ranks(LAYOUTS[name].ranks).run(train, str(folder), LAYOUTS[name], samples, str(tmp_path), 5, ADAM)
    compare(trained(tmp_path, spec, BLIP2), stored(theirs, BLIP2))


# --- Bad input -----------------------------------------------------------------------------------------------------


def edited(folder, target, **changes):
    """A copy of a folder with another config.json."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path) if path.name != "config.json" else None
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_other_models_are_refused(base, tmp_path):
    folder = base[1]

    def refused(number, message, error=ConfigError, **changes):
        with pytest.raises(error, match=message):
            mm.load(edited(folder, tmp_path / str(number), **changes), device="cpu")

    refused(1, r'found the text model "t5" \(Flan-T5\)', text_config={"model_type": "t5"})
    refused(2, "qformer_config is missing", qformer_config=None)
    refused(3, "found use_qformer_text_input true", qformer_config={"use_qformer_text_input": True})
    refused(4, "expected width|is not divisible", qformer_config={"num_attention_heads": 5})
    refused(5, 'found model_type "blip-3"', model_type="blip-3")
    refused(6, "found do_layer_norm_before False", text_config={"do_layer_norm_before": False})
    refused(7, "found qkv_bias false", vision_config={"qkv_bias": False})
    refused(8, r"qformer\.layernorm|gives|expected", WeightError, qformer_config={"hidden_size": 28})
    refused(9, "only 2 is supported", qformer_config={"cross_attention_frequency": 3})


def test_parts_that_do_not_fit_are_refused(base):
    spec = base[2]

    def refused(message, encoder=None, projector=None):
        block = model_block(spec.part_specs(), "blip2")
        block["image_encoder"]["vision_encoder"] |= encoder or {}
        block["image_encoder"]["vision_projector"] |= projector or {}
        with pytest.raises(ConfigError, match=message):
            load_model_spec(block)

    refused("found a text branch; expected none", projector={"text_vocab_size": 9, "text_positions": 4})
    refused('vision_encoder.model_id: found "siglip", expected "eva_vit"', encoder={"model_id": "siglip"})
    refused("needs both", projector={"text_vocab_size": 9})
    refused("input_size: found 40, expected 32", projector={"input_size": 40})
    refused("one number in transformers' config", encoder={"layernorm_epsilon": 1e-5})
    refused("more than the 600 tokens of one image", projector={"num_query_tokens": 600})
    refused("is no multiple of patch_size", encoder={"image_size": 30})
    refused("is not divisible by num_attention_heads 5", projector={"num_attention_heads": 5})


def test_images_that_do_not_fit_are_refused(base):
    spec = base[2]
    with pytest.raises(ConfigError, match="stretches images to squares"):
        FAMILY.media_processor(spec, square_processor().to_dict(), pad=True)
    with pytest.raises(ConfigError, match="gives 35 x 35 pixels, the vision encoder takes 28 x 28"):
        FAMILY.media_processor(spec, square_processor(35).to_dict())
    with pytest.raises(ConfigError, match="pixel_values have shape"):
        FAMILY.media_of_inputs(spec, {"pixel_values": torch.zeros(1, 3, 7, 7)})
    with pytest.raises(ConfigError, match="found qformer_input_ids"):
        FAMILY.media_of_inputs(spec, {"qformer_input_ids": torch.zeros(1, 3)})


def test_configs_of_other_encoders_are_refused():
    with pytest.raises(ConfigError, match='found model_type "clip"; expected blip_2_vision_model'):
        eva_vit.from_hf({"model_type": "clip"})


def test_positions_that_are_no_square_are_refused(base):
    rule = next(rule for rule in eva_vit.HF_RULES.rules if rule.target == "position_embeddings.weight")
    with pytest.raises(WeightError, match="has 12 positions; expected a class token and a square of patches"):
        rule.to_ours([torch.zeros(1, 12, 32)], base[2].vision_encoder.geometry)


def test_adapters(base, tmp_path):
    """PEFT's adapters on decoder, encoder and Q-Former: what peft computes with the same folder."""
    theirs, folder, _ = base
    import peft

    torch.manual_seed(3)
    names = ["q_proj", "fc2", "projection", "query", "dense"]
    adapted = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(r=3, lora_alpha=5, target_modules=names))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path)
    ours = mm.load(folder, device="cpu", adapter=tmp_path)
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(30, 50)], (5, 6)))
    with torch.no_grad():
        close(ours.logits(**own), adapted.eval()(**own).logits)
        with ours.disable_adapter():
            close(ours.logits(**own), theirs(**own).logits)
