"""YAML files of MiniGPT-4 for `mindspeed-mm train` and `chat`: mapped to our files, or refused by key."""

import argparse
import json
import shutil
import tarfile

import pytest
import torch
import transformers
import yaml

from mindspeed_mm.cli import train as train_command
from mindspeed_mm.cli.flags.cfg_path import apply_cfg_path, chat_of_cfg_path
from mindspeed_mm.cli.main import main
from mindspeed_mm.config.minigpt4_model import QUESTIONS
from mindspeed_mm.config.minigpt4_yaml import map_chat, map_run
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import ConfigError
from tests.helpers import tiny_minigpt4
from tests.helpers.tiny_llava import decoder_config, image
from tests.helpers.tiny_minigpt4 import bridge_tensors, vit_tensors

PROJECTOR = {"num_attention_heads": 4, "width": 24, "num_layers": 3, "ffn_hidden_size": 40}
SIZES = [
    "model.image_encoder.vision_encoder.num_attention_heads=2",
    *(f"model.image_encoder.vision_projector.{key}={value}" for key, value in PROJECTOR.items()),
]
"""What the releases have, and the small files do not."""

RUN = {
    "task": "image_text_pretrain",
    "lr_sched": "linear_warmup_cosine_lr",
    "init_lr": "1e-4",  # what YAML makes of 1e-4
    "min_lr": "8e-5",
    "warmup_lr": "1e-6",
    "weight_decay": 0.05,
    "max_epoch": 4,
    "iters_per_epoch": 5,
    "batch_size_train": 2,
    "batch_size_eval": 2,
    "num_workers": 0,
    "warmup_steps": 3,
    "seed": 42,
    "output_dir": "out",
    "amp": False,
    "resume_ckpt_path": None,
    "evaluate": False,
    "train_splits": ["train"],
    "device": "cuda",
    "world_size": 1,
    "dist_url": "env://",
    "distributed": True,
    "wandb_log": True,
    "job_name": "first",
}


def processors():
    vis = {"name": "blip2_image_train", "image_size": 28}
    return {"vis_processor": {"train": vis}, "text_processor": {"train": {"name": "blip_caption"}}}


@pytest.fixture(scope="module")
def weights(golden, tmp_path_factory):
    """The public files of a tiny model: with a Q-Former, and the linear on four patches of another."""
    folder = tmp_path_factory.mktemp("weights")
    theirs, _ = tiny_minigpt4.with_qformer(folder / "whole")
    state = theirs.state_dict()
    (folder / "weight").mkdir()
    torch.save(vit_tensors(state), folder / "weight" / "eva_vit_g.pth")
    bridge = bridge_tensors(state)
    linear = {name: bridge.pop(name) for name in list(bridge) if name.startswith("llama_proj.")}
    torch.save({"model": bridge}, folder / "weight" / "q.pth")
    torch.save({"model": linear, "epoch": 3}, folder / "checkpoint_3.pth")
    shutil.copytree(golden / "tokenizer", folder / "decoder")
    text = decoder_config("llama", vocab_size=load_tokenizer(golden / "tokenizer").vocab_size)
    transformers.LlamaForCausalLM(text).save_pretrained(folder / "decoder")
    return folder


@pytest.fixture
def repository(weights, tmp_path, monkeypatch):
    """A checkout with its YAML files, made smaller."""
    for name in ("weight", "decoder", "checkpoint_3.pth"):
        (tmp_path / name).symlink_to(weights / name)
    configs = tmp_path / "minigpt4" / "configs"
    files = {
        "models/minigpt4_vicuna0.yaml": {
            "model": {
                "arch": "minigpt4",
                "image_size": 28,
                "drop_path_rate": 0,
                "use_grad_checkpoint": False,
                "vit_precision": "fp16",
                "freeze_vit": True,
                "freeze_qformer": True,
                "q_former_model": "https://example.org/LAVIS/q.pth",
                "num_query_token": 5,
                "prompt": "",
                "llama_model": "decoder",
            },
            "preprocess": processors(),
        },
        "datasets/laion/defaults.yaml": shards("laion", "{00000..00002}"),
        "datasets/cc_sbu/defaults.yaml": shards("cc_sbu", "{00000..00000}"),
        "datasets/cc_sbu/align.yaml": {
            "datasets": {"cc_sbu_align": {"data_type": "images", "build_info": {"storage": "align"}}}
        },
    }
    for name, values in files.items():
        (configs / name).parent.mkdir(parents=True, exist_ok=True)
        (configs / name).write_text(yaml.safe_dump(values, sort_keys=False))
    (configs / "models" / "minigpt4_llama2.yaml").write_text(
        "model: {image_size: 28, has_qformer: false, llama_model: decoder}"
    )
    for name, number in (("laion", 0), ("laion", 2), ("cc_sbu", 0)):
        make_shard(tmp_path / name / f"{number:05d}.tar")
    make_aligned(tmp_path / "align")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shards(name, numbers):
    return {"datasets": {name: {"data_type": "images", "build_info": {"storage": f"{name}/{numbers}.tar"}}}}


def make_shard(path):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in range(3):
            member = path.with_name("member")
            image(20, 30, seed=number).save(member, format="PNG")
            archive.add(member, f"{number}.png")
            member.write_text(json.dumps({"caption": "A cat."}))
            archive.add(member, f"{number}.json")
            member.unlink()


def make_aligned(folder):
    (folder / "image").mkdir(parents=True)
    rows = [{"image_id": str(number), "caption": "A cat on a mat."} for number in range(4)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    for number in range(4):
        image(20, 30, seed=number).save(folder / "image" / f"{number}.jpg")


def first_stage(folder, **run):
    values = {
        "model": {"arch": "minigpt4", "model_type": "pretrain_vicuna0"},
        "datasets": {"laion": processors() | {"sample_ratio": 115}, "cc_sbu": processors() | {"sample_ratio": 14}},
        "run": RUN | run,
    }
    return written(folder / "train_configs" / "first.yaml", values)


def second_stage(folder, **model):
    own = {"max_txt_len": 160, "end_sym": "###", "prompt_path": "prompts/alignment.txt", "ckpt": "checkpoint_3.pth"}
    own |= {"prompt_template": "###Human: {} ###Assistant: ", "arch": "minigpt4", "model_type": "pretrain_vicuna0"}
    (folder / "prompts").mkdir(exist_ok=True)
    text = "".join(f"<Img><ImageHere></Img> {question}\n" for question in QUESTIONS)
    (folder / "prompts" / "alignment.txt").write_text(text)
    values = {"model": own | model, "datasets": {"cc_sbu_align": processors()}, "run": RUN}
    return written(folder / "train_configs" / "second.yaml", values)


def written(path, values):
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def flags_of(*given):
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    namespace = parser.parse_args([str(word) for word in given])
    namespace.words = [str(word) for word in given]
    apply_cfg_path(namespace)
    return namespace


def test_first_stage(repository, caplog):
    caplog.set_level("INFO", "mindspeed_mm")
    options = ["run.init_lr=2e-4", "model.num_query_token=7"]
    namespace = flags_of("--cfg-path", first_stage(repository), "--seed", 7, "--options", *options)
    assert (namespace.lr, namespace.min_lr, namespace.train_iters, namespace.save_interval) == (2e-4, 8e-5, 20, 5)
    assert (namespace.seq_length, namespace.seed, namespace.clip_grad) == (1 + 7 + 32, 7, 0)
    assert (namespace.lr_decay_style, namespace.iters_per_epoch) == ("linear_warmup_cosine_lr", 5)
    assert (namespace.lr_warmup_init, namespace.lr_warmup_iters) == (1e-6, 3)
    model, data = (json.loads(open(path).read()) for path in (namespace.mm_model, namespace.mm_data))
    projector = model["image_encoder"]["vision_projector"]
    assert (
        projector["num_query_tokens"] == 7
        and projector["fresh_linear"]
        and projector["train_linear_only"]
        and model["text_decoder"]["freeze"]
    )
    sets = data["dataset_param"]["basic_parameters"]
    assert [basic["weight"] for basic in sets] == [115, 14] and sets[1]["caption_processor"] == "blip_caption"
    assert data["dataset_param"]["image_error"] == "skip"
    assert sets[0]["data_path"].endswith("laion/[0-9][0-9][0-9][0-9][0-9].tar")
    for part in (
        "1 of 3 shards are missing: 00001.tar",
        "command line decides on --seed",
        "lr_sched, lr_decay_rate: --lr-decay-style linear_warmup_cosine_lr",
    ):
        assert part in caplog.text


def test_a_batch_size_of_each_set(repository):
    """As the public files have it; run.batch_size_train is the older key."""
    path = first_stage(repository)
    options = ["datasets.laion.batch_size=64", "datasets.cc_sbu.batch_size=64"]
    run = map_run(path, [*options, "run.batch_size_train=null"])
    assert run.flags["micro_batch_size"] == 64 and "batch_size_train" not in run.flags
    weights = [basic["weight"] for basic in run.data["dataset_param"]["basic_parameters"]]
    assert weights[0] / weights[1] == 115 / 14
    with pytest.raises(ConfigError, match=r"batch_size_train: found 2, expected 64, as datasets\.\*\.batch_size say"):
        map_run(path, options)
    pairs = ["datasets.laion.batch_size", "4", "datasets.cc_sbu.batch_size", "2", "run.batch_size_train", "null"]
    assert map_run(path, pairs).flags["micro_batch_size"] == 4  # 3.8 on average; LAVIS's other form of --options
    alone = second_stage(repository)
    found = map_run(alone, ["datasets.cc_sbu_align.batch_size=12", "run.batch_size_train=12"])
    assert found.flags["micro_batch_size"] == 12 and "weight" not in str(found.data)


def test_earlier_names_and_empty_paths(repository):
    own = {"arch": "mini_gpt4", "model_type": "pretrain_vicuna0", "ckpt": "checkpoint_3.pth"}
    path = written(repository / "eval_configs" / "old.yaml", {"model": own, "run": {"task": "image_text_pretrain"}})
    assert map_chat(path)[0].template == "minigpt4_vicuna_chat"
    with pytest.raises(ConfigError, match=r"model\.ckpt: found '', expected the path of a checkpoint"):
        map_chat(path, ["model.ckpt=''"])
    with pytest.raises(ConfigError, match=r"q_former_model: found 'blip2_pretrained_flant5xxl\.pth', expected a file"):
        map_chat(path, ["model.q_former_model=null"])
    (repository / "blip2_pretrained_flant5xxl.pth").symlink_to((repository / "weight" / "q.pth").resolve())
    found = map_chat(path, ["model.q_former_model=null"])[0]
    assert [file.name for file in found.files] == ["blip2_pretrained_flant5xxl.pth", "checkpoint_3.pth"]


def test_another_schedule_of_the_command_line(repository):
    namespace = flags_of("--cfg-path", first_stage(repository), "--lr-decay-style", "cosine")
    assert namespace.iters_per_epoch is None and namespace.save_interval == 5


@pytest.mark.parametrize(("words", "load"), [((), "out"), (("--save", "mine"), "mine")])
def test_a_run_saved_elsewhere_goes_on_there(repository, words, load):
    assert vars(flags_of("--cfg-path", first_stage(repository), *words)).items() >= {"load": load, "save": load}.items()


def test_second_stage_trains(repository, single_process):
    path = second_stage(repository)
    options = ["run.max_epoch=2", "run.iters_per_epoch=1", "run.warmup_steps=0"]
    line = ["train", "--cfg-path", path, "--options", *options, "--cfg-options", *SIZES, "--device", "cpu"]
    assert main(line) == 0
    assert (repository / "out" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert len(list((repository / "out").glob("iter_*"))) == 2  # one of each epoch
    assert sorted(path.name for path in (repository / "out" / "from_yaml" / "bridge").iterdir()) == [
        "checkpoint_3.pth",
        "q.pth",
    ]
    assert main(["convert", "out", "checkpoint_4.pth", "--to", "minigpt4-trained"]) == 0
    before, after = (torch.load(f"checkpoint_{number}.pth", weights_only=True)["model"] for number in (3, 4))
    assert set(after) == {"llama_proj.weight", "llama_proj.bias"} == set(before)
    assert not torch.equal(after["llama_proj.weight"], before["llama_proj.weight"])
    assert main([*line, "--options", "model.ckpt=checkpoint_4.pth", "run.output_dir=next", "run.max_epoch=1"]) == 0


def test_chat(repository, monkeypatch):
    values = {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "low_resource": True, "ckpt": "checkpoint_3.pth"}
    path = written(repository / "eval_configs" / "eval.yaml", {"model": values, "datasets": {}, "run": {"task": "x"}})
    namespace = argparse.Namespace(
        cfg_path=path, options=[], gpu_id=0, model=None, load=None, quantize=None, template=None, max_context_len=None
    )
    with chat_of_cfg_path(namespace) as options:
        assert options["top_p"] == 0.9 and namespace.quantize == "int8" and namespace.max_context_len == 2000
        assert namespace.template == "minigpt4_vicuna_chat"
        folder = json.loads(open(namespace.model).read())["image_encoder"]["vision_projector"]["ckpt_path"]
        assert folder.endswith("bridge")
    with pytest.raises(ConfigError, match=r"run\.output_dir: found nothing, expected a folder|model\.low_resource"):
        map_run(path)
    for changes, message in (
        ({"gpu_id": 1}, "--gpu-id: found 1, expected 0"),
        ({"model": "x"}, "--cfg-path is given beside --model or --load"),
        ({"cfg_path": None}, "go with --cfg-path, which is not given"),
    ):
        with (
            pytest.raises(ConfigError, match=message),
            chat_of_cfg_path(argparse.Namespace(**{**vars(namespace), "model": None, "gpu_id": 0, **changes})),
        ):
            pass
    with pytest.raises(ConfigError, match=r"model\.ckpt: found nothing, expected the trained linear"):
        map_chat(path, ["model.ckpt=null"])


def test_without_a_qformer(repository):
    run = map_run(
        second_stage(repository, model_type="pretrain_llama2", end_sym="</s>", prompt_template="[INST] {} [/INST] ")
    )
    projector = run.mapped.model["image_encoder"]["vision_projector"]
    assert projector["model_id"] == "patch_concat" and projector["ckpt_path"].endswith("checkpoint_3.pth")
    assert run.data["dataset_param"]["template_name"] == "minigpt4_llama2" and run.mapped.image_tokens == 1
    options = [
        "model.model_type=pretrain_gemma",
        "model.image_size=28",
        "model.llm_model=decoder",
        "model.has_qformer=false",
    ]
    width = json.loads((repository / "decoder" / "config.json").read_text())["hidden_size"]
    run = map_run(second_stage(repository, end_sym="</s>", prompt_template="[INST] {} [/INST] "), options)
    assert run.mapped.model["image_encoder"]["vision_projector"]["feature_scale"] == width**0.5
    assert run.mapped.template == "minigpt4_gemma_guide"
    turns = {"end_sym": "<end_of_turn>"}
    turns["prompt_template"] = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    own = second_stage(repository, **turns)
    assert map_run(own, options).mapped.template == "minigpt4_gemma" == map_chat(own, options).mapped.template
    with pytest.raises(ConfigError, match="prompt_template: .*the one of model_type pretrain_llama2"):
        map_run(own, ["model.model_type=pretrain_llama2"])


REFUSED = {
    "model.arch=minigpt_v3": r"model\.arch: found 'minigpt_v3', expected 'minigpt4' or 'minigpt_v2'",
    "model.arch=minigpt_v2": r"model\.model_type: found 'pretrain_vicuna0', expected 'pretrain' \(model_types of",
    "model.chat_template=true": r"model\.chat_template: found True, expected False",
    "model.model_type=pretrain": r"model\.model_type: found 'pretrain', expected 'pretrain_vicuna0' or",
    "model.llama_model=none": r"model\.llama_model: found 'none', expected the path of the decoder",
    "model.q_former_model=none.pth": r"model\.q_former_model: found 'none\.pth', expected a file that is there",
    "model.vit_weights=none": r"model\.vit_weights: found 'none'",
    "model.has_qformer=false": r"model\.has_qformer: found False, expected true",
    "model.prompt_template=x": r"model\.prompt_template: found \"?'?x with end_sym",
    "model.lora_r=64": r"model\.lora_r: found 64, expected 0 .*--lora-r",
    "model.ckpts=1": r"model\.ckpts: has no meaning here; did you mean \"ckpt\"",
    "model.image_size=x": r"model\.image_size: found 'x', expected a number",
    "model.num_query_token=1.5": r"model\.num_query_token: found 1\.5, expected a whole number",
    "model.freeze_vit=1": r"model\.freeze_vit: found 1, expected true or false",
    "datasets.gqa.x=1": r"datasets: found laion, cc_sbu, gqa; expected laion, cc_sbu or both, or cc_sbu_align alone",
    "datasets.laion=1": r"datasets\.laion: found 1; expected keys and values",
    "datasets.laion.batch_size=2": r"datasets\.cc_sbu\.batch_size: found nothing, expected a number, as the other sets",
    "datasets.laion.batchsize=2": r"datasets\.laion\.batchsize: has no meaning here; did you mean \"batch_size\"",
    "datasets.laion.sample_ratio=0": r"datasets\.laion\.sample_ratio: found 0\.0, expected a number above 0",
    "datasets.laion.build_info.storage=null": r"datasets\.laion\.build_info\.storage: found nothing, expected tar",
    "datasets.laion.build_info.storage=laion/{0..9}0.tar": r"none of the range is in",
    "datasets.laion.build_info.storage=laion/{00000..00001}.tar": r"00002\.tar is beyond it",
    "datasets.laion.build_info.storage=laion/{0..10}.tar": r"numbers of one length",
    "datasets.laion.vis_processor.train.image_size=48": r"vis_processor\.train\.image_size: found 48, expected 28",
    "run.lr_sched=constant_lr": r"run\.lr_sched: found 'constant_lr', expected 'linear_warmup_cosine_lr' or",
    "run.accum_grad_iters=2": r"run\.accum_grad_iters: found 2, expected 1",
    "run.iters_per_epoch=0": r"run\.iters_per_epoch: found 0, expected at least 1",
    "run.max_epochs=3": r"run\.max_epochs: has no meaning here; did you mean \"max_epoch\"",
    "run.min_lr=1": r"run\.min_lr: found 1\.0, expected at most init_lr, 0\.0001",
    "run.output_dir=null": r"run\.output_dir: found nothing, expected a folder",
    "run": r"--options: found 'run'; expected NAME=VALUE",
    "runs.x=1": r"expected a name that begins with model",
    "run.seed=[": r"the value is not plain YAML",
}


def test_minigpt_v2_has_no_qformer(repository):
    own = {"arch": "minigpt_v2", "model_type": "pretrain", "llama_model": "decoder", "has_qformer": True}
    with pytest.raises(ConfigError, match=r"model\.has_qformer: found True, expected false with arch minigpt_v2"):
        map_run(second_stage(repository, **own))


def test_steps_of_epochs(repository):
    own = {"lr_sched": "linear_warmup_step_lr", "lr_decay_rate": 0.9, "warmup_lr": None, "warmup_steps": 9}
    run = map_run(first_stage(repository, **own))
    assert (run.flags["lr_decay_style"], run.flags["lr_decay_rate"]) == ("linear_warmup_step_lr", 0.9)
    assert run.flags["lr_warmup_init"] == run.flags["lr"]  # without warmup_lr there is nothing to warm up from
    assert any("--lr-warmup-in-epoch begins it anew" in line for line in run.mapped.report)


@pytest.mark.parametrize("option", REFUSED)
def test_refused_keys(repository, option):
    with pytest.raises(ConfigError, match=REFUSED[option]):
        map_run(first_stage(repository), [option])


def test_refused_files_and_flags(repository):
    path = second_stage(repository)
    with pytest.raises(ConfigError, match=r"model\.prompt_path: .*'What\?' differs|model\.prompt_path: .* differs"):
        (repository / "prompts" / "alignment.txt").write_text("<Img><ImageHere></Img> What?\n")
        map_run(path)
    for text, message in {
        "a: 1": "a: unknown section; expected one of model",
        "- 1": "expected sections such as model",
        "model: 1": "model: found 1; expected keys",
        "model:\n  arch: a\n  ckpt: b\n  arch: c": "is not plain YAML: the key 'arch' stands twice; .*line 4",
        "model: !!python/object/apply:os.getcwd []": "is not plain YAML: could not determine a constructor",
    }.items():
        (repository / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            map_run(repository / "bad.yaml")
    with pytest.raises(ConfigError, match="cannot read .*none.yaml"):
        map_run(repository / "none.yaml")
    for words, message in (
        ([], "--mm-model and --mm-data: found none; expected both files, or --cfg-path"),
        (["--options", "run.a=1"], "--options is given without --cfg-path"),
        (["--cfg-path", path, "--mm-data", "x"], "--cfg-path is given beside --mm-data"),
    ):
        with pytest.raises(ConfigError, match=message):
            flags_of(*words)
