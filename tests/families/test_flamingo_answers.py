"""Answers of Flamingo models through the cache, and what is refused."""

import json
import shutil

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError, DataError, WeightError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.parallel import layout_problems
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import load_model_spec, model_block
from tests.helpers.flamingo_reference import FlamingoReference, save
from tests.helpers.tiny_flamingo import golden_folder, trained_folder
from tests.helpers.tiny_llava import IMAGE_ID, close, image, text

SHOWN = [image(30, 50, seed) for seed in range(3)]


def vivid(theirs):
    """So that every image has answers of its own."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("gated_cross_attn_layer.attn.to_out.weight"):
                parameter.mul_(20)
    return theirs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(the reference, its folder, ours)."""
    theirs = vivid(FlamingoReference().eval())
    folder = save(theirs, tmp_path_factory.mktemp("otter"))
    return theirs, folder, mm.load(folder, device="cpu")


def prompts() -> list[list[int]]:
    """With two images, none, and one behind some text."""
    return [[IMAGE_ID, *text(4, 1), IMAGE_ID, *text(3, 2)], text(5, 3), [*text(20, 4), IMAGE_ID, *text(2, 5)]]


def greedy(theirs, ours, ids, shown, steps=5) -> list[int]:
    """What the reference says, computed from the whole text each time."""
    pixels = torch.cat([ours.media.item(each).pixels for each in shown]) if shown else None
    ids, prompt = list(ids), len(ids)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(theirs(torch.tensor([ids]), pixels, prompt=prompt).logits[0, -1].argmax()))
    return ids[-steps:]


def test_logits(base):
    theirs, _, ours = base
    ids = torch.tensor([prompts()[0]])
    pixels = torch.cat([ours.media.item(each).pixels for each in SHOWN[:2]])
    with torch.no_grad():
        close(ours.logits(ids, pixel_values=pixels), theirs(ids, pixels).logits)
        video = pixels[None, :, None]  # Otter's [rows, images, frames, 3, side, side]
        close(ours.logits(ids, pixel_values=video), theirs(ids, pixels).logits)
        close(ours.logits(ids[:, 1:5]), theirs(ids[:, 1:5]).logits)
        frames = torch.cat([pixels, pixels.flip(0) + 0.1])
        wanted = theirs(ids, frames, frames=2).logits
        close(ours.logits(ids, pixel_values=frames.view(1, 2, 2, *frames.shape[1:])), wanted)
        assert (wanted - theirs(ids, pixels).logits).abs().max() > 1e-3


def answers_of_a_rank(path: str, tensor: int, pipeline: int) -> tuple:
    """What a rank answers: rows of one batch, beams, and requests that begin alike."""
    vlm = mm.load(path, device="cpu", tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    options = {"max_new_tokens": 5, "eos_token_id": -1}
    rows = vlm.generate(input_ids=prompts(), images=SHOWN, **options)
    beams = vlm.generate(input_ids=prompts()[:1], images=SHOWN[:2], num_beams=3, **options)
    again = vlm.generate(input_ids=[prompts()[2]] * 2, images=SHOWN[:2], **options)
    return rows, beams, again


@pytest.mark.parametrize("every", [2, 4])
def test_ranks_answer_as_one_process_does(ranks, base, every, tmp_path):
    """With a block in front of every 4th layer, the first of two pipeline stages has none."""
    theirs, folder, ours = base
    if every == 4:
        theirs = vivid(FlamingoReference(every).eval())
        folder = save(theirs, tmp_path / "every4")
        ours = mm.load(folder, device="cpu")
        assert ours.spec.text_decoder.cross_attention.every == 4
        assert sum(name.endswith("mlp_gate") for name, _ in ours.model.named_parameters()) == 1
        pixels = torch.cat([ours.media.item(each).pixels for each in SHOWN[:2]])
        with torch.no_grad():
            ids = torch.tensor([prompts()[0]])
            close(ours.logits(ids, pixel_values=pixels), theirs(ids, pixels).logits)
    shown = [SHOWN[:2], [], SHOWN[2:]]
    wanted = [greedy(theirs, ours, row, own) for row, own in zip(prompts(), shown, strict=True)]
    found = [each for sizes in ((2, 1), (1, 2)) for each in ranks(2).run(answers_of_a_rank, str(folder), *sizes)]
    assert all(each == found[0] for each in found) and found[0][0] == wanted


def test_cached_answers_are_those_of_the_whole_text(base):
    theirs, _, ours = base
    rows = prompts()
    wanted = [
        greedy(theirs, ours, rows[0], SHOWN[:2]),
        greedy(theirs, ours, rows[1], []),
        greedy(theirs, ours, rows[2], SHOWN[2:]),
    ]
    found = ours.generate(input_ids=rows, images=SHOWN, max_new_tokens=5, eos_token_id=-1)
    assert found == wanted
    blind = greedy(theirs, ours, rows[2], SHOWN[:1])
    assert blind != wanted[2]  # the image matters


def test_equal_texts_about_other_images(base):
    """What one row remembers of its prompt is no other one's."""
    theirs, _, ours = base
    row = prompts()[2]
    wanted = [greedy(theirs, ours, row, [each]) for each in SHOWN]
    assert len({tuple(ids) for ids in wanted}) > 1
    options = {"max_new_tokens": 5, "eos_token_id": -1}
    assert ours.generate(input_ids=[row] * 3, images=SHOWN, **options) == wanted


def test_beams_see_the_image(base):
    """Beams move rows of the cache, and with them what they see."""
    _, _, ours = base
    row = prompts()[0]
    found = ours.generate(input_ids=[row], images=SHOWN[:2], max_new_tokens=4, num_beams=3, eos_token_id=-1)
    pixels = torch.cat([ours.media.item(each).pixels for each in SHOWN[:2]])

    beams = [(0.0, [])]
    for _ in range(4):
        grown = []
        for score, own in beams:
            logs = ours.logits(torch.tensor([row + own]), pixel_values=pixels)[0, -1].log_softmax(-1)
            grown += [(score + float(logs[token]), [*own, int(token)]) for token in logs.topk(6).indices]
        beams = sorted(grown, reverse=True)[:3]
    assert found == [beams[0][1]]


# --- What is refused ----------------------------------------------------------------------------------------------


def block(base) -> dict:
    return model_block(describe_model(open_source(base[1])).part_specs(), "flamingo")


@pytest.mark.parametrize("shown, ids", [(1, [5, 6]), (0, [5, IMAGE_ID, 6]), (3, [IMAGE_ID, 5])])
def test_another_number_of_images_than_of_places(base, shown, ids):
    _, _, ours = base
    pixels = torch.cat([ours.media.item(each).pixels for each in SHOWN[:shown]]) if shown else None
    with pytest.raises(DataError, match="give one <image> for each image, where it belongs"):
        ours.logits(torch.tensor([ids]), pixel_values=pixels)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"every": 5}, "every is 5 and there are 4 layers"),
        ({"media_token_id": 131}, "media_token_id is 131; expected an id below language_vocab_size 131"),
        ({"memory_size": 40}, "memory_size: found 40, expected 32, the vision_projector's hidden_size"),
        ({"evry": 2}, "unknown key"),
    ],
)
def test_cross_attention_that_does_not_fit(base, changes, message):
    model = block(base)
    model["text_decoder"]["cross_attention"] |= changes
    with pytest.raises(ConfigError, match=message):
        load_model_spec(model)


def test_parts_that_do_not_fit(base):
    model = block(base)
    del model["text_decoder"]["cross_attention"]
    with pytest.raises(ConfigError, match="text_decoder.cross_attention: found none"):
        load_model_spec(model)
    model = block(base)
    del model["text_decoder"]["cross_attention"]
    model["text_decoder"] |= {"model_id": "qwen2", "add_qkv_bias": True}
    with pytest.raises(ConfigError, match='found "qwen2", a decoder without gated cross-attention'):
        load_model_spec(model)
    model = block(base)
    model["image_encoder"]["vision_encoder"] |= {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4}
    with pytest.raises(ConfigError, match="vision_projector.input_size: found 32, expected 64"):
        load_model_spec(model)
    model = block(base)
    model["image_encoder"]["vision_projector"] = {"input_size": 32, "hidden_size": 48, "ffn_hidden_size": 48}
    with pytest.raises(ConfigError, match='vision_projector.model_id: found "mlp", expected "perceiver"'):
        load_model_spec(model)
    model["model_id"] = "llava"
    with pytest.raises(ConfigError, match="text_decoder.cross_attention: found one, and model_id llava puts"):
        load_model_spec(model)


@pytest.mark.parametrize("key, value", [("select_layer", -2), ("select_feature", "cls_patch")])
def test_features_that_the_perceiver_does_not_look_at(base, key, value):
    model = block(base)
    model["image_encoder"]["vision_encoder"][key] = value
    with pytest.raises(ConfigError, match=f"vision_encoder.{key}: found .* the perceiver looks at the patches behind"):
        load_model_spec(model)


def test_heads_that_public_layouts_cannot_say(base):
    spec = load_model_spec(block(base))
    parts = spec.part_specs()
    parts["vision_projector"] = parts["vision_projector"].model_copy(update={"kv_channels": 16})
    with pytest.raises(
        ConfigError, match="vision_projector.kv_channels: found 16, expected 64: layout otter has no key"
    ):
        spec.family.join_config("otter", parts, "float32", {})


def test_another_id_of_the_image(base, tmp_path):
    """In config.json, or in a model.json beside the model's tokenizer."""
    shutil.copytree(base[1], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"media_token_id": 7}))
    with pytest.raises(ConfigError, match="media_token_id: found 7, expected 130, the id of <image> in the tokenizer"):
        mm.load(tmp_path / "model", device="cpu")


def test_layouts_that_it_cannot_have(base):
    from mindspeed_mm.models.runtime import Runtime

    spec = describe_model(open_source(base[1]))
    found = layout_problems(spec, Runtime(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2))
    assert any("virtual pipeline stages want messages of one length" in problem for problem in found)
    found = layout_problems(spec, Runtime(tensor_model_parallel_size=3))
    assert any("cross_attention.num_attention_heads 8 cannot be split over" in problem for problem in found)


def test_images_of_other_sizes(base):
    _, _, ours = base
    with pytest.raises(ConfigError, match=r"pixel_values have shape \[1, 3, 5, 5\]; expected"):
        ours.logits(torch.tensor([[IMAGE_ID]]), pixel_values=torch.zeros(1, 3, 5, 5))
    config = ours.media.config
    with pytest.raises(ConfigError, match="does not pad images to squares"):
        ours.spec.family.media_processor(ours.spec, config, pad=True)
    config = config | {"crop_size": {"height": 14, "width": 14}}
    with pytest.raises(ConfigError, match="gives 14 x 14 pixels, the vision encoder takes 28 x 28"):
        ours.spec.family.media_processor(ours.spec, config)


def test_weights_of_another_decoder(base, tmp_path):
    """A decoder alone where a Flamingo is wanted, and the other way round."""
    theirs, folder, _ = base
    model = block(base)
    theirs_only = tmp_path / "decoder"
    import transformers

    from tests.helpers.tiny_llava import decoder_config

    transformers.LlamaForCausalLM(decoder_config("llama", num_hidden_layers=4)).save_pretrained(theirs_only)
    for kind, place in (("text_decoder", theirs_only), ("vision_encoder", folder), ("vision_projector", folder)):
        holder = model if kind == "text_decoder" else model["image_encoder"]
        holder[kind]["ckpt_path"] = str(place)
    file = tmp_path / "model.json"
    file.write_text(json.dumps(model))
    with pytest.raises(WeightError, match="those of a decoder without gated cross-attention; set .*fresh true"):
        mm.load(file, device="cpu")
    model["text_decoder"]["cross_attention"]["fresh"] = True
    file.write_text(json.dumps(model))
    new = mm.load(file, device="cpu")
    gates = [parameter for name, parameter in new.model.named_parameters() if name.endswith("_gate")]
    assert gates and not any(gate.any() for gate in gates)
    model["text_decoder"]["ckpt_path"] = str(folder)
    file.write_text(json.dumps(model))
    with pytest.raises(WeightError, match="fresh true would leave unused"):
        mm.load(file, device="cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return trained_folder("mpt_every1_latest", tmp_path_factory.mktemp("published") / "model")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"cross_attn_every_n_layers": 2}, WeightError, "says cross_attn_every_n_layers 2, .* expected 1"),
        ({"lang_encoder_path": "nowhere"}, WeightError, "found lang_encoder_path 'nowhere', and there is nothing"),
        ({"model_type": "idefics"}, ConfigError, 'found model_type "idefics"'),
        ({"vision_encoder_path": ""}, WeightError, "vision_encoder_path is the path of the vision_encoder"),
    ],
)
def test_folders_that_say_something_else(published, changes, error, message, tmp_path):
    shutil.copytree(published, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | changes))
    with pytest.raises(error, match=message):
        mm.load(tmp_path / "model", device="cpu")


def test_a_checkpoint_of_another_decoder(published, tmp_path):
    import transformers

    from tests.helpers.tiny_llava import decoder_config

    shutil.copytree(published, tmp_path / "model")
    for name, message in (("llama", "tensors such as transformer.*does not have"), ("qwen2", 'found a "qwen2", a dec')):
        shutil.rmtree(tmp_path / "model/decoder")
        config = decoder_config(name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model/decoder")
        with pytest.raises(WeightError, match=message):
            open_source(tmp_path / "model")


def test_a_tokenizer_without_its_tokens(tmp_path):

    folder = golden_folder("mpt_every1_latest", tmp_path / "model")
    text_file = (folder / "tokenizer.json").read_text()
    for name in folder.glob("*token*"):
        name.write_text(name.read_text().replace("<image>", "<other>"))
    assert text_file != (folder / "tokenizer.json").read_text()
    with pytest.raises(ConfigError, match="the tokenizer does not know <image>"):
        open_source(folder)
    for name in folder.glob("*token*"):
        name.unlink()
    with pytest.raises(ConfigError, match="there is no tokenizer; expected the tokenizer of the model with <image>"):
        open_source(folder)
