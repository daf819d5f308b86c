"""MiniGPT-v2: adapters in checkpoint_N.pth, read as the peft library computes them, merged, trained and written."""

import copy
import json
import pickle

import peft
import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.cli.flags.cfg_path import write_model
from mindspeed_mm.cli.main import main
from mindspeed_mm.config.minigpt4_yaml import map_chat, map_run
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.adapters.peft_format import read_peft
from mindspeed_mm.models.adapters.targets import sites
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.part import find_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import load_model_spec, model_block
from tests.cli.test_cfg_path import RUN, repository, second_stage, weights, written  # noqa: F401  fixtures
from tests.helpers import tiny_minigpt4
from tests.helpers.golden_training import GoldenLayout, full_tensors
from tests.helpers.tiny_blip import square_processor
from tests.helpers.tiny_llava import close, image, inputs, sample
from tests.helpers.tiny_minigpt4 import decoder_folder, vit_tensors
from tests.helpers.vlm_ranks import ADAM, train

LORA = {"r": 3, "alpha": 5.0, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.tensor([[3, *[-200] * 4, 7, 11, 5]])


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """(the original as transformers and peft compute it, a folder with its files)."""
    folder = tmp_path_factory.mktemp("v2")
    theirs, _ = tiny_minigpt4.concatenated(folder / "whole")
    vit = vit_tensors(theirs.blip.state_dict())
    last = {name.replace("blocks.2.", "blocks.3."): tensor for name, tensor in vit.items() if "blocks.2." in name}
    torch.save(vit | last, folder / "eva_vit_g.pth")  # the file's last layer is not built
    decoder_folder(theirs.blip, folder / "llama")
    square_processor().save_pretrained(folder)
    config = peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=LORA["target_modules"])
    adapted = peft.get_peft_model(theirs.blip.language_model, config)
    state = {f"llama_proj.{name}": value.detach() for name, value in theirs.linear.named_parameters()}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
            state[f"llama_model.{name}"] = parameter.detach()
    torch.save({"model": state, "epoch": 1}, folder / "checkpoint_1.pth")
    theirs.blip.language_model = adapted
    return theirs.eval(), folder


def model_json(folder, target, lora=None, **projector):
    """A model.json of the public files with this lora block (None: the one they were made with)."""
    file = str(folder / "checkpoint_1.pth")
    text = {"ckpt_path": str(folder / "llama")}
    if lora != {}:
        text["lora"] = lora or LORA | {"load": file}
    bridge = {"model_id": "patch_concat", "ckpt_path": file} | projector
    encoder = {"ckpt_path": str(folder / "eva_vit_g.pth"), "num_attention_heads": 2, "freeze": True}
    images = {"vision_encoder": encoder, "vision_projector": bridge}
    target.write_text(json.dumps({"model_id": "minigpt4", "text_decoder": text, "image_encoder": images}))
    return target


def pixels():
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))


def test_logits_and_merged_export(public, tmp_path, capsys):
    theirs, folder = public
    path = model_json(folder, tmp_path / "model.json")
    ours = mm.load(path, device="cpu", image_processor=folder)
    with torch.no_grad():
        wanted = theirs(IDS, pixels())
    close(ours.logits(IDS, None, pixels()), wanted)
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "minigpt4"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    whole = mm.load(tmp_path / "out", device="cpu")
    assert whole.template == "minigpt4_llama2"  # MiniGPT-v2's images are larger
    close(whole.logits(IDS, None, pixels()), wanted)


LAYOUTS = {
    "one rank": GoldenLayout(),
    "TP2 SP packed": GoldenLayout(tensor=2, flags="--sequence-parallel", packed=True),
    "PP2": GoldenLayout(pipeline=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_five_steps(public, ranks, name, tmp_path):
    """The loaded adapters and the linear, trained on: what peft and torch make of them, at every layout."""
    theirs, folder = copy.deepcopy(public[0]), public[1]
    spec = describe_model(open_source(folder / "whole"))
    media = spec.family.media_processor(spec, square_processor().to_dict())
    samples = [sample(media, [image(30, 50), image(90, 20)], (6, 9, 5), seed=1)]
    samples.append(sample(media, [image(1, 7)], (4, 12), seed=9))
    moving = {name: value for name, value in theirs.named_parameters() if "lora_" in name or name.startswith("linear.")}
    optimizer = torch.optim.AdamW(moving.values(), lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        total, count = 0, 0
        for row in samples:
            labels = torch.tensor(row.labels[1:])
            given = inputs(spec.family, spec, row)["pixel_values"]
            logits = theirs(torch.tensor([row.input_ids]), given)[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            count += int((labels != -100).sum())
        (total / count).backward()
        optimizer.step()
    block = model_block(spec.part_specs(), "minigpt4")
    block["text_decoder"]["lora"] = LORA | {"load": str(folder / "checkpoint_1.pth")}
    block["image_encoder"]["vision_encoder"]["freeze"] = True
    layout = LAYOUTS[name]
    ranks(layout.ranks).run(train, str(folder / "whole"), layout, samples, str(tmp_path), 5, ADAM, block)
    found = full_tensors(tmp_path)
    linear = "image_encoder.projector.linear_projection."
    wanted = {linear + kind: moving[f"linear.{kind}"] for kind in ("weight", "bias")}
    adapted = load_model_spec(block).text_decoder
    for site in sites(find_part("text_decoder", "llama"), adapted):
        for which in "ab":
            module = f"blip.language_model.base_model.model.{site.module}.lora_{which.upper()}.default.weight"
            wanted[f"text_decoder.{site.owner}.lora.{site.short}.{which}"] = moving[module]
    assert len(wanted) == len(moving) == 2 + 2 * 2 * 2
    for key, value in wanted.items():
        error = (found[key] - value).norm() / value.norm()
        assert error < 1e-5, (key, float(error))


def test_the_guides_repository_says_llm_model(public, tmp_path):
    _, folder = public
    state = torch.load(folder / "checkpoint_1.pth", weights_only=True)["model"]
    torch.save({"model": {n.replace("llama_model.", "llm_model."): t for n, t in state.items()}}, tmp_path / "c.pth")
    found, wanted = read_peft(tmp_path / "c.pth"), read_peft(folder / "checkpoint_1.pth")
    assert found.names == wanted.names and found.r == 3
    for name in found.names:
        assert all(torch.equal(*both) for both in zip(found.pair(name)[:2], wanted.pair(name)[:2], strict=True))


def test_trained_file(repository, single_process):  # noqa: F811
    """Train from the YAML of MiniGPT-v2, write what was trained, and begin with that file again."""
    path = second_stage(repository, arch="minigpt_v2", model_type="pretrain", image_size=28, ckpt=None, lora_r=2)
    options = ["model.end_sym=</s>", "model.prompt_template='[INST] {} [/INST]'", "model.chat_template=true"]
    options += ["model.llama_model=decoder", "model.use_grad_checkpoint=true", "model.use_grad_checkpoint_llm=true"]
    steps = ["run.max_epoch=1", "run.iters_per_epoch=2", "run.warmup_steps=0", "run.init_lr=0.01"]
    heads = "model.image_encoder.vision_encoder.num_attention_heads=2"
    line = ["train", "--cfg-path", path, "--options", *options, *steps, "--cfg-options", heads, "--device", "cpu"]
    assert main(line) == 0
    file = repository / "checkpoint_0.pth"
    assert main(["convert", str(repository / "out"), str(file), "--to", "minigpt4-trained"]) == 0
    state = torch.load(file, weights_only=True)["model"]
    layer = "llama_model.base_model.model.model.layers.1.self_attn."
    ends = [f"{module}.lora_{which}.default.weight" for module in ("q_proj", "v_proj") for which in "AB"]
    assert {"llama_proj.weight", "llama_proj.bias", *(layer + end for end in ends)} < set(state)
    assert all(name.startswith(("llama_proj.", "llama_model.base_model.")) for name in state)
    assert state[layer + "v_proj.lora_B.default.weight"].abs().max() > 0
    mapped = map_run(path, [*options, "model.ckpt=checkpoint_0.pth"]).mapped
    assert mapped.template == "minigpt4_v2"
    chat = map_chat(path, [*options, "model.ckpt=checkpoint_0.pth"])
    assert chat.options["max_new_tokens"] == 500 and chat.mapped.template == "minigpt4_v2_chat"
    decoder, encoder = mapped.model["text_decoder"], mapped.model["image_encoder"]["vision_encoder"]
    assert decoder["lora"]["load"].endswith("checkpoint_0.pth") and decoder["lora"]["alpha"] == 16
    assert decoder["recompute_granularity"] == "full" and "recompute_granularity" not in encoder
    encoder["num_attention_heads"] = 2
    again = mm.load(write_model(mapped, repository / "again"), device="cpu")
    close(again.logits(IDS, None, pixels()), mm.load(repository / "out", device="cpu").logits(IDS, None, pixels()))


def v2_sets(folder):
    """MiniGPT-v2's YAML with three of its sets, their annotations and images."""
    image(100, 50).save(folder / "COCO_train2014_000000000009.jpg")
    asked = {"image": "val/COCO_train2014_000000000009.jpg", "question_id": 1, "question": "What?", "answer": ["A cat"]}
    (folder / "vqa.json").write_text(json.dumps([asked] * 3))
    told = {"instruction_with_input": "Say no.", "constraints": None, "output": "No."}
    (folder / "texts.json").write_text(json.dumps([{"instances": [told]}] * 3))
    (folder / "refs" / "refcoco+").mkdir(parents=True)
    ref = {"ref_id": 7, "ann_id": 3, "image_id": 9, "split": "train", "sentences": [{"raw": "cat"}]}
    (folder / "refs" / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps([ref] * 3))
    boxes = {"annotations": [{"id": 3, "bbox": [12, 10, 30, 25]}], "images": [{"id": 9, "width": 100, "height": 50}]}
    (folder / "refs" / "refcoco+" / "instances.json").write_text(json.dumps(boxes))
    (folder / "more.json").write_text(json.dumps([asked]))
    train = {"url": ["x", "y"], "md5": "0", "storage": ["vqa.json", "more.json"]}
    stored = {"annotations": {"train": train}, "images": {"storage": "."}}
    return {
        "coco_vqa": {"batch_size": 4, "sample_ratio": 3, "build_info": stored},
        "refcocop": {"batch_size": 2, "sample_ratio": 1, "build_info": {"image_path": ".", "ann_path": "refs"}},
        "unnatural_instruction": {
            "batch_size": 2,
            "sample_ratio": 1,
            "data_type": "text",
            "build_info": {"ann_path": "texts.json"},
        },
    }


def test_its_sets_train_from_its_yaml(repository, single_process):  # noqa: F811
    own = {"arch": "minigpt_v2", "model_type": "pretrain", "image_size": 28, "ckpt": None, "lora_r": 2}
    own |= {"end_sym": "</s>", "prompt_template": "[INST] {} [/INST]", "chat_template": True, "llama_model": "decoder"}
    steps = {"max_epoch": 1, "iters_per_epoch": 2, "warmup_steps": 0, "batch_size_train": None}
    path = written(
        repository / "train_configs" / "v2.yaml",
        {"model": own | {"max_txt_len": 90}, "datasets": v2_sets(repository), "run": RUN | steps},
    )
    run = map_run(path)
    sets = run.data["dataset_param"]["basic_parameters"]
    assert [entry["weight"] for entry in sets] == [12, 2, 2] and run.flags["micro_batch_size"] == 3  # 16 / 5
    heads = "model.image_encoder.vision_encoder.num_attention_heads=2"
    assert main(["train", "--cfg-path", path, "--cfg-options", heads, "--device", "cpu"]) == 0
    made = repository / "out" / "from_yaml"
    (asked,), (located,) = (list(made.glob(f"{name}-*.jsonl")) for name in ("coco_vqa", "refcocop"))
    assert len(asked.read_text().splitlines()) == 3 + 1  # of both files
    record = json.loads(located.read_text().splitlines()[0])
    assert record["conversations"][0]["value"] == "<image>\n[refer] where is cat ?"
    (repository / "more.json").write_text("[]")  # other annotations are converted anew
    assert main(["train", "--cfg-path", path, "--cfg-options", heads, "--device", "cpu", "--train-iters", "2"]) == 0
    sizes = [len(file.read_text().splitlines()) for file in made.glob("coco_vqa-*.jsonl")]
    assert sorted(sizes) == [3, 4] and len(list(made.glob("refcocop-*.jsonl"))) == 1
    for option, message in {
        "datasets.coco_vqa.batch_size=null": r"coco_vqa\.batch_size: found nothing, expected a number",
        "datasets.coco_vqa.build_info.annotations.train.storage=[vqa.json, b]": r"train\.storage: found 'b', expected",
        "datasets.refcocop.build_info.ann_path=none": r"ann_path: found 'none', expected the path of the folder of ref",
        "datasets.laion.build_info.storage=x": "expected laion, cc_sbu or both, or cc_sbu_align alone, or MiniGPT-v2's",
        "datasets.refcocop.build_info.anns=1": r"refcocop\.build_info\.anns: has no meaning here",
    }.items():
        with pytest.raises(ConfigError, match=message):
            map_run(path, [option])


def test_refused_files(public, tmp_path):
    _, folder = public
    state = torch.load(folder / "checkpoint_1.pth", weights_only=True)["model"]
    name = next(name for name in state if "lora_B" in name)

    def refused(message, lora=None, **projector):
        with pytest.raises(WeightError, match=message):
            mm.load(model_json(folder, tmp_path / "model.json", lora, **projector), device="cpu")

    file = str(folder / "checkpoint_1.pth")
    refused('found 8 LoRA adapters .* such as llama_model.*Add "lora"', {})
    refused("found adapters without their alpha", {"r": 3, "load": file, "target_modules": ["q_proj", "v_proj"]})
    refused(r"the adapter of .*q_proj has \{'r': 3.*lora says \{'r': 4", LORA | {"load": file, "r": 4})
    refused(
        r"A and B of .*v_proj, which text_decoder.lora.target_modules",
        LORA | {"load": file, "target_modules": ["q_proj"]},
    )
    torch.save({"model": {key: value for key, value in state.items() if key != name}}, tmp_path / "half.pth")
    with pytest.raises(WeightError, match="found 7 tensors of adapters behind llama_model.; expected A and B"):
        read_peft(tmp_path / "half.pth")
    torch.save({"model": {"llama_proj.bias": torch.ones(2)}}, tmp_path / "none.pth")
    with pytest.raises(WeightError, match="found 0 tensors of adapters; expected"):
        read_peft(tmp_path / "none.pth")
    torch.save({"model": {name: state[name] for name in state if "lora" in name}}, tmp_path / "alone.pth")
    with pytest.raises(WeightError, match="found 8 LoRA adapters"):
        open_source(tmp_path / "alone.pth")


def test_refused_conversions(public, tmp_path, capsys):
    _, folder = public
    line = ["convert", str(folder / "whole"), str(tmp_path / "c.pth"), "--to", "minigpt4-trained", "--verify"]
    assert main(line) == 1
    assert "--verify compares whole models, and --to minigpt4-trained writes" in capsys.readouterr().err
    with pytest.raises(WeightError, match="found no training checkpoint; expected a training checkpoint of model_id"):
        mm.convert(folder / "whole", tmp_path / "c.pth", to="minigpt4-trained")
    with pytest.raises(WeightError, match="minigpt4-trained: found parts; expected the checkpoint of a run"):
        mm.convert(folder / "whole", tmp_path / "c.pth", to="minigpt4-trained", parts=["text_decoder"])
    path = model_json(folder, tmp_path / "model.json", ckpt_path=None)
    with pytest.raises(WeightError, match="the vision_projector has no ckpt_path; expected weights of the whole model"):
        mm.convert(path, tmp_path / "out", to="minigpt4")
