"""LLaVA with every decoder and vision encoder against transformers' class: logits, text, both layouts, training."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.families.llava import LLAVA_HF
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import find_family
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_decoders import FAMILIES, as_internlm2
from tests.helpers.tiny_llava import (
    FULL,
    IMAGE_ID,
    clip,
    close,
    fixed_processor,
    image,
    inputs,
    llava,
    sample,
    save,
    siglip,
    their_greedy,
    their_loss,
)
from tests.helpers.vlm_ranks import ADAM, GRADIENT, STEP, compare, stored, train, trained
from tests.parallel.comparison import names

FAMILY = find_family("llava")
ODD = {"hidden_size": 36, "intermediate_size": 46, "num_attention_heads": 6, "image_size": 39, "patch_size": 13}
"""An encoder of other sizes."""

ENCODERS = {
    "clip": (clip, {}, {}),
    "clip layer 1": (clip, ODD, {"vision_feature_layer": 1}),
    "clip last layer": (clip, {"image_size": 30}, {"vision_feature_layer": -1}),
    "clip class token": (clip, ODD, {"vision_feature_select_strategy": "full", "vision_feature_layer": -3}),
    "siglip": (siglip, {}, FULL),
    "siglip odd": (siglip, ODD, FULL),
    "siglip layer": (siglip, {"image_size": 30}, FULL | {"vision_feature_layer": -2}),
}
CLIPS = [name for name in ENCODERS if name.startswith("clip")]
SIGLIPS = [name for name in ENCODERS if name.startswith("siglip")]
DECODERS = [name for name in FAMILIES if name != "mpt"]
"""transformers' LLaVA asks its decoder for embed_tokens, which MPT has under another name."""
PAIRS = [(decoder, kinds[number % len(kinds)]) for number, decoder in enumerate(DECODERS) for kinds in (CLIPS, SIGLIPS)]
"""Every other decoder with each kind of encoder; the layers and sizes take turns."""

UNREAD = "internlm2"
"""transformers has no class for it, so no LLaVA of transformers holds it either."""


def make(decoder: str, encoder: str, folder):
    """(transformers' model, its folder)."""
    vision, sizes, changes = ENCODERS[encoder]
    theirs = llava(vision(**sizes), decoder, **changes)
    side = theirs.config.vision_config.image_size
    save(theirs, folder, fixed_processor(encoder.split()[0], side))
    if decoder == UNREAD:
        as_internlm2(folder, "language_model.")
    return theirs, folder


@pytest.fixture(scope="module", params=PAIRS, ids=" + ".join)
def pair(request, tmp_path_factory):
    """(name of the decoder, transformers' model, ours, the folder)."""
    theirs, folder = make(*request.param, tmp_path_factory.mktemp("llava"))
    return request.param[0], theirs, mm.load(folder, device="cpu"), folder


def logits(model, **given) -> torch.Tensor:
    """transformers' logits. Its LLaVA has a head of its own, which leaves out Gemma 2's final cap (docs/decoders.md);
    here it is put on."""
    with torch.no_grad():
        found = model(**given).logits
    cap = getattr(model.config.text_config, "final_logit_softcapping", None)
    return found if cap is None else cap * torch.tanh(found / cap)


def test_logits(pair):
    name, theirs, ours, _ = pair
    assert ours.spec.text_decoder.model_id == name
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(30, 50), image(90, 20)], (7, 3, 9)))
    asked = {"mm_token_type_ids": (own["input_ids"] == IMAGE_ID).int()}  # what the processor can return as well
    close(ours.logits(**own, **asked), logits(theirs, **own))


def test_greedy_text(pair):
    _, theirs, ours, _ = pair
    shown = [image(30, 50), image(90, 20)]
    rows = [sample(ours.media, shown[:count], (5,) * (count + 1), seed=count) for count in (2, 1, 0)]
    wanted = [their_greedy(theirs, inputs(FAMILY, ours.spec, row)) for row in rows]
    first = ours.generate(input_ids=rows[0].input_ids, images=shown, max_new_tokens=9, eos_token_id=-1)
    assert first == wanted[:1]
    ragged = [row.input_ids for row in rows]
    assert ours.generate(input_ids=ragged, images=[*shown, shown[0]], max_new_tokens=9, eos_token_id=-1) == wanted


def test_export_is_read_by_transformers(pair, tmp_path):
    name, theirs, ours, folder = pair
    mm.convert(folder, tmp_path / "out", to="llava-hf")
    if name == UNREAD:  # it must be what we read
        found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
        assert {_bare(key) for key in found} == {_bare(key) for key in wanted}
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items() if key in found)
        return
    again, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(30, 50)], (5, 6)))
    close(logits(again.eval(), **own), logits(theirs, **own), 0)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    answer = processor(text="w5 <image> w6", images=image(30, 50), return_tensors="pt")
    assert (answer["input_ids"] == IMAGE_ID).sum() == ours.media.fixed.count


def _bare(name: str) -> str:
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def test_original_layout_both_ways(pair, tmp_path, caplog):
    """The original code's folder, whose rows end before `<image>`."""
    name, _, ours, folder = pair
    mm.convert(folder, tmp_path / "original", to="llava")
    config = json.loads((tmp_path / "original/config.json").read_text())
    kinds = {"llama": "llava_llama", "qwen2": "llava_qwen"}
    assert config["model_type"] == kinds.get(name, f"llava_{name}")
    caplog.clear()
    again = mm.load(tmp_path / "original", device="cpu")
    assert "keys that are not known" not in caplog.text
    kept = {"select_layer", "select_feature", "image_size", "patch_size", "model_id"}
    assert again.spec.vision_encoder.model_dump(include=kept) == ours.spec.vision_encoder.model_dump(include=kept)
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(30, 50)], (5, 6)))
    ids = own["input_ids"].masked_fill(own["input_ids"] == IMAGE_ID, -200)
    found = again.logits(ids, pixel_values=own["pixel_values"])[..., :IMAGE_ID]
    close(found, ours.logits(**own)[..., :IMAGE_ID], 1e-6)
    mm.convert(tmp_path / "original", tmp_path / "back", to="llava-hf")
    back, wanted = open_source(tmp_path / "back"), open_source(folder)
    for slot in ("text_decoder", "vision_encoder", "vision_projector"):
        found, expected = back.part(slot), wanted.part(slot)
        assert set(found.names) == set(expected.names)
        assert all(torch.equal(found.get(key)[:IMAGE_ID], expected.get(key)[:IMAGE_ID]) for key in found.names)


def test_names_of_every_transformers_are_read(pair, tmp_path):
    """Those inside the class since 4.52, and those of the hub, which every version writes or reads."""
    name, theirs, ours, folder = pair
    if name == UNREAD:  # saved under InternLM2's names, not under those of the class
        return
    tensors = {key: tensor.clone().contiguous() for key, tensor in theirs.state_dict().items()}
    hub = {re.sub(r"^model\.(language_model|lm_head)\.", r"\1.model.", key): tensor for key, tensor in tensors.items()}
    hub = {re.sub(r"^lm_head\.", "language_model.lm_head.", key): tensor for key, tensor in hub.items()}
    hub = {re.sub(r"^model\.vision_tower\.", "vision_tower.vision_model.", key): tensor for key, tensor in hub.items()}
    hub = {re.sub(r"^model\.multi", "multi", key): tensor for key, tensor in hub.items()}
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(30, 50)], (5, 6)))
    wanted = ours.logits(**own)
    for number, held in enumerate((tensors, hub)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file(held, tmp_path / str(number) / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(mm.load(tmp_path / str(number), device="cpu").logits(**own), wanted)


@pytest.mark.parametrize("outer", [False, None])
def test_a_head_that_the_decoder_alone_calls_tied(tmp_path, outer):
    """transformers 4 wrote it so; the LlavaConfig of 5 ties then, too."""
    theirs, ids = llava(clip(), "qwen2"), torch.tensor([[5, 9, 3, 77, 20]])
    save(theirs, tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": outer}
    config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    close(mm.load(tmp_path, device="cpu").logits(ids), logits(theirs, input_ids=ids))


# --- Training ------------------------------------------------------------------------------------------------------

TRAINED = [("gemma", "siglip odd"), ("mistral", "clip layer 1"), ("phi3", "clip class token")]
"""Tied and scaled embeddings; a window and heads of a size of their own; fused weights."""

LAYOUTS = {
    "one rank": GoldenLayout(),
    "packed": GoldenLayout(packed=True),
    "TP2": GoldenLayout(tensor=2),
    "PP2": GoldenLayout(pipeline=2),
    "CP2 packed": GoldenLayout(context=2, packed=True),
    "TP2 PP2": GoldenLayout(tensor=2, pipeline=2),
}


@pytest.fixture(scope="module", params=TRAINED, ids=" + ".join)
def base(request, tmp_path_factory):
    """(transformers' model, its folder, our spec, three samples: two images, none, one)."""
    theirs, folder = make(*request.param, tmp_path_factory.mktemp("trained"))
    spec = describe_model(open_source(folder))
    media = FAMILY.media_processor(spec, folder)
    samples = [
        sample(media, [image(30, 50), image(90, 20)], (6, 9, 5), seed=1),
        sample(media, [], (23,), seed=5),
        sample(media, [image(1, 7)], (4, 12), seed=9),
    ]
    return theirs, folder, spec, samples


@pytest.mark.parametrize("name", names(LAYOUTS, slow=("TP2",)))
def test_gradients(base, ranks, name, tmp_path):
    theirs, folder, spec, samples = base
    theirs.zero_grad()
    their_loss(theirs, FAMILY, spec, samples).backward()
    before = {key: tensor.detach() for key, tensor in stored(theirs, LLAVA_HF).items()}
    wanted = {key: tensor.grad for key, tensor in stored(theirs, LLAVA_HF).items() if tensor.grad is not None}
    layout = LAYOUTS[name]
    ranks(layout.ranks).run(train, str(folder), layout, samples, str(tmp_path), 1, GRADIENT)
    after = trained(tmp_path, spec, LLAVA_HF)
    compare({key: (before[key] - tensor[: len(before[key])]) / STEP for key, tensor in after.items()}, wanted)


@pytest.mark.parametrize("name", ["one rank", pytest.param("TP2 PP2", marks=pytest.mark.slow)])
def test_five_steps(base, ranks, name, tmp_path):
    _, folder, spec, samples = base
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        their_loss(theirs, FAMILY, spec, samples).backward()
        optimizer.step()
    layout = LAYOUTS[name]
    ranks(layout.ranks).run(train, str(folder), layout, samples, str(tmp_path), 5, ADAM)
    compare(trained(tmp_path, spec, LLAVA_HF), stored(theirs, LLAVA_HF))
