"""The guide's Python configurations and Hugging Face's flags become files of ours; nothing of them is run."""

import json
import math

import pytest

from mindspeed_mm.cli.main import main
from mindspeed_mm.config.guide_config import migrate
from mindspeed_mm.config.hf_training import Migrated, migrate_training, parse_flags
from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.python_literals import read_python
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.errors import ConfigError

BASE = """
training_args = dict(output_dir=None, do_train=True, do_eval=False, do_predict=False, do_multi_predict=False,
    per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=2e-5, lr_scheduler_type='cosine',
    warmup_ratio=0.03, weight_decay=0., bf16=True, fp16=False, tf32=True, fsdp='full_shard auto_wrap',
    fsdp_config=dict(transformer_layer_cls_to_wrap=['LlamaDecoderLayer']), gradient_checkpointing=True,
    logging_steps=10, save_steps=1000, save_total_limit=1, seed=42, remove_unused_columns=False, num_train_epochs=5,
    predict_with_generate=True, max_steps=-1, dataloader_num_workers=4, report_to='none', mystery=3)
"""
CONFIG = """
'''REC.'''
_base_ = ['train.py']
FOLDER = '/coco/train2014'
REC = dict(type='RECDataset', filename=r'{{fileDirname}}/REC.jsonl', image_folder=FOLDER,
    template_file='REC.json', max_dynamic_size=1)
training_args = dict(output_dir='exp/{{fileBasenameNoExtension}}')
model_args = dict(type='llava_v1', model_name_or_path='llava 7b', vision_tower='clip', pretrain_mm_mlp_adapter=None,
    freeze_backbone=True, tune_mm_mlp_adapter=False, model_max_length=2048, cache_dir='x',
    target_processor=dict(boxes=dict(type='PlainBoxFormatter', precision=2, use_small_brackets=True)),
    conv_args=dict(conv_template='vicuna_v1.1', transforms=dict(type='Expand2square'), tokenize_kwargs={'a': 1}, b=2))
data_args = dict(
    train=dict(type='InterleaveDateset', cfgs=[REC, dict(type='ConcatDatasetWithShuffle', portion=1/1 if False else 2,
        cfgs=[dict(type='InstructDataset', filename='a.jsonl', image_folder='b', c=None, add_coco_prefix=True)])],
        probabilities=[0.5, 0.5], seed=-1),
    validation=dict(**REC), test=REC, compute_metric=dict(type='RECComputeMetrics'), collator_kwargs=dict(padding=True),
    gen_kwargs=dict(max_new_tokens=1024, num_beams=1))
"""
PLAIN = CONFIG.replace("1/1 if False else 2", "2").replace("seed=-1", "seed=7")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "train.py").write_text(BASE)
    path = tmp_path / "rec.py"
    path.write_text(PLAIN)
    return path


def test_a_configuration_becomes_files_and_a_report(config, tmp_path, capsys):
    line = ["config", "migrate", str(config), "--output", str(tmp_path / "o"), "--processes", "4", "--json"]
    assert main([*line, "--hf-flags", "--num_train_epochs 1 --learning_rate 4e-5 --do_eval True"]) == 0
    *told, last = capsys.readouterr().out.splitlines()
    flags = (tmp_path / "o" / "train_flags.txt").read_text().split()
    pairs = dict(zip(flags[::1], flags[1::1], strict=False))
    assert (pairs["--lr"], pairs["--save"], pairs["--global-batch-size"]) == ("4e-05", "exp/rec", "64")
    assert (pairs["--micro-batch-size"], pairs["--lr-warmup-fraction"], pairs["--lr-decay-style"]) == (
        "8",
        "0.03",
        "cosine",
    )
    assert "--bf16" in flags and "--fp16" not in flags and "--train-iters" not in flags
    data = json.loads((tmp_path / "o" / "data.json").read_text())["dataset_param"]
    rec = {
        **{"dataset_type": "rec", "data_path": f"{tmp_path}/REC.jsonl", "data_folder": "/coco/train2014"},
        "grounding": {"notation": "round", "precision": 2, "template_file": "REC.json", "max_dynamic_size": 1},
    }
    assert data["basic_parameters"] == [rec, {"dataset_type": "llava", "data_path": "a.jsonl", "data_folder": "b"}]
    inner = {"shuffled_concat": [1], "portion": 2}
    assert data["mixing"] == {"interleave": [0, inner], "probabilities": [0.5, 0.5], "seed": 7}
    assert data["validation_parameters"] == [rec] and data["template_name"] == "v1"
    assert data["preprocess_parameters"] == {"image_processer_path": "clip", "pad2square": True}
    assert data["tokenizer_config"] == {"from_pretrained": "llava 7b"}
    written = json.loads((tmp_path / "o" / "data.json").read_text())
    generation = {"max_new_tokens": 1024, "num_beams": 1}
    asked = rec | {"metric": "rec"}
    assert written["prediction"] == {"eval": asked, "test": asked, "generation": generation}
    DataConfig.load(written)
    report = json.loads(last)
    assert "mindspeed-mm config init 'llava 7b' clip" in report["by_hand"]["model.json"]
    assert "COCO_train2014_" in report["by_hand"]["data_args.train.cfgs[1].cfgs[0].add_coco_prefix"]
    assert report["mapped"]["training_args.do_train"] == "mindspeed-mm train"
    assert "--do-eval" in flags and "--do-predict" not in flags and "--do-train" not in flags
    assert (
        "training_args.do_predict" in report["needless"]
        and "epochs x" in report["by_hand"]["training_args.num_train_epochs"]
    )
    assert set(report["unread"]) >= {
        "training_args.mystery",
        "model_args.cache_dir",
        "model_args.conv_args.b",
        "FOLDER",
    }
    assert "mapped: training_args.learning_rate -> --lr" in told and "not read here: training_args.mystery -> 3" in told
    assert main(line) == 1 and "is there already; nothing is overwritten" in capsys.readouterr().err


def test_every_value_is_in_the_report(config):
    values = read_config(str(config), read=read_python)
    _, result = migrate(values, {}, 1)
    told = {*result.mapped, *result.by_hand, *result.needless, *result.unread}
    for section in ("training_args", "model_args", "data_args"):
        for name in values[section]:
            assert any(key == f"{section}.{name}" or key.startswith(f"{section}.{name}.") for key in told), name


def test_nothing_is_run(tmp_path, config):
    marker = tmp_path / "ran"
    config.write_text(
        f"import os\nx = open({str(marker)!r}, 'w')\ny = [1, -2, None, {{'a': 'b'}}]\nz = 3 if y else 4\nx.y = 1\n"
    )
    with pytest.raises(ConfigError) as error:
        read_python(config)
    for line, found in ((1, "import os"), (2, "open("), (4, "3 if y else 4"), (5, "x.y = 1")):
        assert f"rec.py, line {line}: found `{found}" in str(error.value)
    assert "never run" in str(error.value) and not marker.exists()
    config.write_text(CONFIG)
    with pytest.raises(ConfigError, match="found `1 / 1 if False else 2`; expected a literal"):
        read_config(str(config), read=read_python)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "is not Python"),
        ("x = 3\ny = dict(**x)", "line 2: found `\\*\\*x`, no object"),
        ("x = {1: 2}", "found the key 1, no text"),
        ("x = y", "found `y`; expected a literal"),
    ],
)
def test_files_that_are_not_read(tmp_path, text, message):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_python(tmp_path / "c.py")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_args": 3}, "model_args is 3; expected an object"),
        (
            {"model_args": {"target_processor": {"boxes": {"type": "X"}}}},
            "expected boxes=dict.type='PlainBoxFormatter'",
        ),
        ({"data_args": {"train": {"type": "X"}}}, "data_args.train is .*; expected a type of RECDataset"),
        ({"data_args": {"train": {"type": "RECDataset"}}}, "data_args.train has no filename"),
        ({"data_args": {"train": {"type": "ConcatDataset"}}}, "data_args.train.cfgs is None; expected a list"),
        ({"training_args": {"lr_scheduler_type": "x"}}, "lr_scheduler_type is 'x'; expected one of cosine"),
        (
            {"training_args": {"per_device_train_batch_size": 0}},
            "batch size 0, accumulation 1 and 1 processes; expected",
        ),
    ],
)
def test_values_of_another_form(values, message):
    with pytest.raises(ConfigError, match=message):
        migrate(values, {}, 1)


def test_kinds_and_notations():
    sets = [
        {"type": "VQAEXDataset", "filename": "a", "is_e_dataset": True},
        {"type": "VQAEXDataset", "filename": "a", "is_e_dataset": False},
        {"type": "GQADataset", "filename": "g", "scene_graph_file": "s", "version": "q-a"},
    ]
    values = {
        "model_args": {"target_processor": {"boxes": {"type": "TokenFormatter"}}},
        "data_args": {
            "train": {
                "type": "SubSet",
                "portion": 0.5,
                "do_shuffle": True,
                "cfg": {"type": "ConcatDataset", "cfgs": sets},
            }
        },
    }
    data, _ = migrate(values, {}, 1)
    found = data["dataset_param"]
    assert [own["dataset_type"] for own in found["basic_parameters"]] == ["vqa_e", "vqa_x", "gqa"]
    assert found["basic_parameters"][2]["grounding"] == {"notation": "bins", "scene_graphs": "s", "version": "q-a"}
    assert found["mixing"] == {"subset": {"concat": [0, 1, 2]}, "portion": 0.5, "shuffle": True}


def test_epochs_become_steps_where_the_files_are(config, tmp_path, capsys):
    (tmp_path / "REC.jsonl").write_text('{"a": 1}\n' * 100)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 30)
    config.write_text(PLAIN.replace("filename='a.jsonl'", f"filename='{tmp_path}/a.jsonl'"))
    line = ["config", "migrate", str(config), "--processes", "2", "--json", "--output"]
    assert main([*line, str(tmp_path / "o")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Half of each until one is through, 2 processes x 8 x 2 accumulated: 5 epochs.
    steps, told = report["flags"][-1], report["mapped"]["training_args.num_train_epochs"]
    samples = int(told.split(" of ")[1].split()[0])
    assert 60 <= samples <= 200 and int(steps) == 5 * math.ceil(math.ceil(samples / 16) / 2)
    assert "training_args.num_train_epochs" not in report["by_hand"]
    assert main([*line, str(tmp_path / "s"), "--hf-flags", "--max_steps 7"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["flags"].count("--train-iters") == 1


def test_a_configuration_that_only_evaluates():
    rec = {"type": "RECDataset", "filename": "a.jsonl"}
    values = {
        "training_args": {"do_train": False, "do_multi_predict": True, "per_device_eval_batch_size": 16},
        "model_args": {"vision_tower": "clip"},
        "data_args": {
            "multitest": {
                "testA": {"cfg": rec, "compute_metric": {"type": "RECComputeMetrics"}},
                "testB": rec,
                "mix": {"cfg": {"type": "ConcatDataset", "cfgs": [rec]}},
                "other": {"cfg": rec, "compute_metric": {"type": "MyMetrics"}},
            },
        },
    }
    data, result = migrate(values, {}, 1)
    assert result.flags == ["--do-train", "false", "--do-multi-predict", "--predict-batch-size", "16"]
    sets = data["prediction"]["multitest"]
    assert {name: own.get("metric") for name, own in sets.items()} == {"testA": "rec", "testB": None, "other": None}
    assert "one by one under prediction.multitest" in result.by_hand["data_args.multitest.mix"]
    assert "'MyMetrics' is not known" in result.by_hand["data_args.multitest.other.compute_metric"]
    assert list(DataConfig.load(data).predicted_sets) == ["multitest_testA", "multitest_testB", "multitest_other"]


def test_flags_alone(tmp_path, capsys):
    assert parse_flags("--bf16 --lr_scheduler_type=linear --max-steps 3 --do_train true") == {
        **{"bf16": True, "lr_scheduler_type": "linear", "max_steps": 3, "do_train": True},
    }
    result = Migrated()
    migrate_training({"bf16": True, "max_steps": 3}, 1, result)
    assert result.flags == ["--bf16", "--train-iters", "3"]
    for text, message in (("a --b", "found 'a' without a flag before it"), ("'", "cannot be split into words")):
        with pytest.raises(ConfigError, match=message):
            parse_flags(text)
    for line, message in (
        (["-"], "nothing is given; expected a Python file, or --hf-flags"),
        (["-", "--hf-flags", "--seed 1"], "give --output DIR"),
        (
            ["-", "--output", "x", "--hf-flags", "--learning_rat 1"],
            'has no learning_rat; did you mean "learning_rate"?',
        ),
        (["a.py", "b.py"], "reads one file, found 2"),
        (["a.py", "--num-attention-heads", "2"], "takes no --num-attention-heads"),
        (["--output", "/dev/null/x", "-", "--hf-flags", "--seed 1"], "cannot write into /dev/null/x"),
    ):
        assert main(["config", "migrate", *line]) == 1
        assert message in capsys.readouterr().err
    assert main(["config", "init", "--output", "x", "w"]) == 1
    assert "config init takes no --output" in capsys.readouterr().err
    assert main(["config", "migrate", "-", "--output", str(tmp_path / "o"), "--hf-flags", "--seed 1"]) == 0
    assert (
        not (tmp_path / "o" / "data.json").exists() and "--seed 1" in (tmp_path / "o" / "train_flags.txt").read_text()
    )
