"""MiniGPT-4 against transformers' vision encoder, Q-Former and decoders; its public files; what is refused."""

import copy
import json

import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.complete import read_model
from mindspeed_mm.models.describe import describe_model, describe_part
from mindspeed_mm.models.families.blip2 import BLIP2
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import load_model_spec, model_block
from tests.helpers import tiny_minigpt4
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_blip import QUERIES, square_processor
from tests.helpers.tiny_llava import close, decoder_config, image, inputs, sample, their_loss
from tests.helpers.tiny_minigpt4 import bridge_tensors, decoder_folder, vit_tensors
from tests.helpers.vlm_ranks import ADAM, GRADIENT, STEP, compare, stored, train, trained


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(transformers' Blip2, the folder, our spec)."""
    theirs, folder = tiny_minigpt4.with_qformer(tmp_path_factory.mktemp("minigpt4"))
    return theirs, folder, describe_model(open_source(folder))


def rows_of(spec):
    media = spec.family.media_processor(spec, square_processor().to_dict())
    return [
        sample(media, [image(30, 50), image(90, 20)], (6, 9, 5), seed=1),
        sample(media, [image(1, 7)], (4, 12), seed=9),
    ]


def test_with_a_qformer(base):
    theirs, folder, spec = base
    ours = mm.load(folder, device="cpu")
    assert ours.tokens_per_image == QUERIES and ours.template == "minigpt4_vicuna"
    row = rows_of(spec)[0]
    given = inputs(spec.family, spec, row)
    found = ours.logits(torch.tensor([row.input_ids]), pixel_values=given["pixel_values"])
    with torch.no_grad():
        close(found, theirs(**given).logits)


def test_a_model_json_of_a_whole_folder_needs_no_sizes(base, tmp_path):
    _, folder, spec = base
    part = {"ckpt_path": str(folder), "freeze": True}
    images = {"vision_encoder": part, "vision_projector": part | {"freeze": False}}
    block = {"model_id": "minigpt4", "text_decoder": part, "image_encoder": images}
    found, wanted = read_model(block).vision_projector, spec.vision_projector
    assert found == wanted.model_copy(update={"ckpt_path": str(folder)})


@pytest.mark.parametrize("decoder, scale", [("llama", None), ("gemma", 48**0.5), ("gemma", 1.0)])
def test_without_a_qformer(decoder, scale, tmp_path):
    theirs, folder = tiny_minigpt4.concatenated(tmp_path / "model", decoder, feature_scale=scale)
    ours = mm.load(folder, device="cpu")
    assert ours.tokens_per_image == 4  # of 16 patches
    assert ours.template == ("minigpt4_gemma" if scale else "minigpt4_llama2")
    row = rows_of(ours.spec)[0]
    ids, pixels = torch.tensor([row.input_ids]), inputs(ours.spec.family, ours.spec, row)["pixel_values"]
    with torch.no_grad():
        close(ours.logits(ids, pixel_values=pixels), theirs(ids, pixels))
        following, wanted = ids, []
        for _ in range(5):
            wanted.append(int(theirs(following, pixels)[0, -1].argmax()))
            following = torch.cat((following, torch.tensor([[wanted[-1]]])), dim=1)
    shown = [image(30, 50), image(90, 20)]
    found = ours.generate(input_ids=[row.input_ids, row.input_ids], images=shown * 2, max_new_tokens=5, eos_token_id=-1)
    assert found == [wanted] * 2
    mm.convert(folder, tmp_path / "ours", to="mindspeed-mm")
    mm.convert(tmp_path / "ours", tmp_path / "again", to="minigpt4")
    close(mm.load(tmp_path / "again", device="cpu").logits(ids, pixel_values=pixels), ours.logits(ids, None, pixels), 0)


@pytest.mark.parametrize("name, layout", [("TP2", GoldenLayout(tensor=2)), ("PP2", GoldenLayout(pipeline=2))])
def test_gradients_without_a_qformer(name, layout, ranks, tmp_path):
    theirs, folder = tiny_minigpt4.concatenated(tmp_path / "model", "gemma", feature_scale=48**0.5)
    spec = describe_model(open_source(folder))
    row = rows_of(spec)[0]
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    logits = theirs(ids, inputs(spec.family, spec, row)["pixel_values"])
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    ranks(2).run(train, str(folder), layout, [row], str(tmp_path / "run"), 1, GRADIENT)
    after = trained(tmp_path / "run", spec, spec.family.layouts[0])
    for kind, parameter in theirs.linear.named_parameters():
        change = (parameter.detach() - after[f"llama_proj.{kind}"]) / STEP
        assert (change - parameter.grad).norm() / parameter.grad.norm() < 1e-4


@pytest.mark.parametrize(
    "layout",
    [GoldenLayout(), pytest.param(GoldenLayout(tensor=2, pipeline=2), marks=pytest.mark.slow)],
    ids=["one rank", "TP2 PP2"],
)
def test_five_steps(base, ranks, layout, tmp_path):
    _, folder, spec = base
    theirs, samples = copy.deepcopy(base[0]), rows_of(spec)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        their_loss(theirs, spec.family, spec, samples).backward()
        optimizer.step()
    ranks(layout.ranks).run(train, str(folder), layout, samples, str(tmp_path), 5, ADAM)
    compare(trained(tmp_path, spec, BLIP2), stored(theirs, BLIP2))


# --- The public files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(base, tmp_path_factory):
    """A folder with the files as they are published, and what else they hold."""
    folder, state = tmp_path_factory.mktemp("public"), base[0].state_dict()
    vit = vit_tensors(state)
    last = {name.replace("blocks.2.", "blocks.3."): tensor for name, tensor in vit.items() if "blocks.2." in name}
    surplus = {"norm.weight": torch.ones(32), "head.weight": torch.ones(3, 32), "head.bias": torch.ones(3)}
    torch.save(vit | last | surplus, folder / "eva_vit_g.pth")
    bridge = bridge_tensors(state)
    linear = {name: bridge.pop(name) for name in list(bridge) if name.startswith("llama_proj.")}
    text = {"embeddings.word_embeddings.weight": torch.ones(7, 24), "embeddings.position_ids": torch.arange(4)[None]}
    text |= {f"encoder.layer.1.intermediate.dense.{kind}": torch.ones(3) for kind in ("weight", "bias")}
    bridge |= {"Qformer.bert." + name: tensor for name, tensor in text.items()}
    bridge |= {"t5_proj.weight": torch.ones(2, 2), "Qformer.cls.predictions.bias": torch.ones(2)}
    (folder / "bridge").mkdir()
    torch.save({"model": bridge}, folder / "bridge" / "blip2_pretrained_flant5xxl.pth")
    beside = {"optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}}
    beside |= {"config": {"run": {"task": "image_text_pretrain"}}, "scaler": {"scale": 65536.0}, "epoch": 3}
    torch.save({"model": linear, **beside}, folder / "bridge" / "checkpoint_3.pth")
    decoder_folder(base[0], folder / "vicuna")
    square_processor().save_pretrained(folder)
    return folder


def model_json(public, vision=None, **projector):
    """A model.json of the public files. Heads of 12 and 6 channels are not those of the releases."""
    bridge = {"model_id": "qformer", "ckpt_path": str(public / "bridge"), "vision_norm_epsilon": 1e-6, "width": 24}
    bridge |= {"num_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 40, "num_query_tokens": QUERIES}
    encoder = {"ckpt_path": str(public / "eva_vit_g.pth"), "num_attention_heads": 2, "freeze": True}
    return {
        "model_id": "minigpt4",
        "text_decoder": {"ckpt_path": str(public / "vicuna"), "freeze": True},
        "image_encoder": {"vision_encoder": encoder | (vision or {}), "vision_projector": bridge | projector},
    }


def test_public_files(base, public, tmp_path):
    theirs, _, spec = base
    (tmp_path / "model.json").write_text(json.dumps(model_json(public)))
    ours = mm.load(tmp_path / "model.json", device="cpu", image_processor=public)
    assert ours.spec.vision_encoder.num_layers == 3  # the file's last layer is not built
    row = rows_of(spec)[0]
    given = inputs(spec.family, spec, row)
    with torch.no_grad():
        found = ours.logits(torch.tensor([row.input_ids]), pixel_values=given["pixel_values"])
        close(found, theirs(**given).logits)


def test_positions_of_another_size(base, public, tmp_path):
    """What transformers interpolates as it runs."""
    theirs = base[0]
    (tmp_path / "model.json").write_text(json.dumps(model_json(public, {"image_size": 49})))
    square_processor(49).save_pretrained(tmp_path)
    ours = mm.load(tmp_path / "model.json", device="cpu", image_processor=tmp_path)
    pixels = torch.randn(2, 3, 49, 49, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[3, *[130] * QUERIES, 4, *[130] * QUERIES, 5]])
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=pixels, interpolate_pos_encoding=True).logits
        close(ours.logits(ids.masked_fill(ids == 130, -200), pixel_values=pixels), wanted)


def test_first_stage_begins_with_a_random_linear_and_trains_it_alone(public, golden, tmp_path, single_process):
    only = tmp_path / "qformer"
    only.mkdir()
    (only / "q.pth").symlink_to(public / "bridge" / "blip2_pretrained_flant5xxl.pth")
    block = model_json(public, fresh_linear=True, train_linear_only=True) | {}
    block["image_encoder"]["vision_projector"]["ckpt_path"] = str(only)
    words = load_tokenizer(golden / "tokenizer")
    text = decoder_config("llama", vocab_size=words.vocab_size)
    transformers.LlamaForCausalLM(text).save_pretrained(tmp_path / "decoder")
    block["text_decoder"]["ckpt_path"] = str(tmp_path / "decoder")
    (tmp_path / "model.json").write_text(json.dumps(block))
    for number in range(4):
        image(20, 30, seed=number).save(tmp_path / f"{number}.png")
    records = [{"image": f"{number}.png", "caption": "A cat."} for number in range(4)]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    data = {
        "dataset_type": "minigpt4",
        "template_name": "minigpt4_caption",
        "basic_parameters": {"data_path": str(tmp_path / "captions.json"), "data_folder": str(tmp_path)},
        "preprocess_parameters": {"image_processer_path": str(public)},
        "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
    }
    (tmp_path / "data.json").write_text(json.dumps({"dataset_param": data}))
    flags = "--lr 1e-2 --train-iters 3 --micro-batch-size 2 --global-batch-size 2 --seq-length 64 --num-workers 0"
    files = ["--mm-model", str(tmp_path / "model.json"), "--mm-data", str(tmp_path / "data.json")]
    assert main(["train", *files, *flags.split(), "--device", "cpu", "--save", str(tmp_path / "save")]) == 0
    trained_model = open_source_of_checkpoint(tmp_path / "save")
    state = trained_model.part("vision_projector")
    before = open_source(public / "bridge").part("vision_projector")
    assert torch.equal(state.get("query_tokens"), before.get("query_tokens"))
    assert not torch.equal(state.get("linear_projection.weight"), before.get("llama_proj.weight"))


def open_source_of_checkpoint(folder):
    from checkpoint_converters.checkpoint import register_checkpoints

    register_checkpoints()
    return open_source(folder)


# --- Bad input -----------------------------------------------------------------------------------------------------


def test_files_that_do_not_fit_are_refused(public, tmp_path):
    def refused(message, error=WeightError, vision=None, **projector):
        with pytest.raises(error, match=message):
            (tmp_path / "model.json").write_text(json.dumps(model_json(public, vision, **projector)))
            mm.load(tmp_path / "model.json", device="cpu")

    refused(r"query_tokens gives query_tokens the shape \[1, 5, 24\]; expected \[1, 5, 28\]", width=28)
    refused("the spec describes|gives|expected", num_query_tokens=6)
    refused("missing .*: llama_proj", ckpt_path=str(public / "bridge" / "blip2_pretrained_flant5xxl.pth"))
    refused("missing .*Qformer.bert", ckpt_path=str(public / "bridge" / "checkpoint_3.pth"))
    refused("unknown .*llama_proj", fresh_linear=True)
    refused("input_size: found 40, expected 32", ConfigError, input_size=40)


def test_has_qformer_that_contradicts_the_weights_is_refused(base, tmp_path):
    theirs, linear = base[0], {f"llama_proj.{name}": torch.ones(3) for name in ("weight", "bias")}
    with_, without = bridge_tensors(theirs.state_dict()), linear
    for number, (tensors, said, message) in enumerate(
        [(with_, False, "has_qformer false, and the weights hold a Q-Former"), (without, True, "hold no Q-Former")]
    ):
        folder = tiny_minigpt4.save(tmp_path / str(number), theirs, tensors, has_qformer=said, qformer_config={})
        with pytest.raises(WeightError, match=message):
            mm.load(folder, device="cpu")
    folder = tiny_minigpt4.save(tmp_path / "2", theirs, with_, qformer_config={})
    with pytest.raises(ConfigError, match="found has_qformer None; expected true or false"):
        mm.load(folder, device="cpu")


def test_parts_that_do_not_fit_are_refused(base, tmp_path):
    _, folder = tiny_minigpt4.concatenated(tmp_path / "gemma", "gemma", feature_scale=1.0)
    spec = describe_model(open_source(folder))

    def refused(message, spec, encoder=None, **projector):
        block = model_block(spec.part_specs(), "minigpt4")
        block["image_encoder"]["vision_encoder"] |= encoder or {}
        block["image_encoder"]["vision_projector"] |= projector
        with pytest.raises(ConfigError, match=message):
            load_model_spec(block)

    refused(r"feature_scale: found none, expected 6\.928", spec, feature_scale=None)
    refused("patches: found 5, expected a divisor of the 16", spec, patches=5)
    refused("found a text branch", base[2], text_vocab_size=9, text_positions=4)
    block = model_block(base[2].part_specs(), "minigpt4")
    block["image_encoder"]["vision_projector"] = {"model_id": "mlp", "input_size": 32, "hidden_size": 48}
    with pytest.raises(
        ConfigError, match='vision_projector.model_id: found "mlp", expected "qformer" or "patch_concat"'
    ):
        load_model_spec(block)
    block = model_block(base[2].part_specs(), "minigpt4")
    block["image_encoder"]["vision_encoder"] = {"model_id": "siglip", "num_layers": 1, "hidden_size": 32}
    block["image_encoder"]["vision_encoder"] |= {"ffn_hidden_size": 8, "num_attention_heads": 2, "patch_size": 7}
    block["image_encoder"]["vision_encoder"] |= {"image_size": 28}
    with pytest.raises(ConfigError, match='found "siglip", expected "eva_vit"'):
        load_model_spec(block)


def test_pickles_of_classes_are_refused(base, tmp_path):
    torch.save({"model": {"llama_proj.weight": torch.ones(2, 2)}, "config": GoldenLayout()}, tmp_path / "c.pth")
    with pytest.raises(WeightError, match="refused, because reading it would call tests.helpers.golden_training"):
        describe_part(open_source(tmp_path / "c.pth").part("vision_projector"))
