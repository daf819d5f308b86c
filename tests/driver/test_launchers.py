"""The training launchers, with a torchrun that only tells what it was asked to do."""

import argparse
import json
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from megatron.driver.arguments import add_arguments, from_namespace
from mindspeed_mm.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("pretrain", "finetune", "finetune_lora", "finetune_qlora", "finetune_task")
SCRIPTS = {name: ROOT / "examples" / "llava1.5" / f"{name}_llava1_5.sh" for name in NAMES}
SCRIPTS["dpo"] = ROOT / "examples" / "hallucination" / "dpo_llava1_5.sh"
TORCHRUN = """#!/usr/bin/env python3
import json, os, signal, sys
told = {"arguments": sys.argv[1:], "folder": os.getcwd(), "process": os.getpid()}
told |= {"deaf": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN}
told |= {"ascend": os.environ.get("FROM_ASCEND"), "patience": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")}
print(json.dumps(told))
"""


@pytest.fixture
def launch(tmp_path):
    """launch(script, *flags, NAME=value) -> what torchrun was given."""
    stub = tmp_path / "bin" / "torchrun"
    stub.parent.mkdir()
    stub.write_text(TORCHRUN)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)

    def run(name, *flags, **variables):
        environment = {"PATH": f"{stub.parent}:{os.environ['PATH']}", **variables}
        command = ["bash", str(SCRIPTS[name]), *flags]
        with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
            told = json.loads(process.communicate()[0])
        assert process.returncode == 0
        return told | {"launcher": process.pid}

    return run


def train_flags(told, world_size):
    """The flags after `train`, as the driver reads them."""
    arguments = told["arguments"]
    assert arguments[arguments.index("-m") :][:3] == ["-m", "mindspeed_mm", "train"]
    parser = argparse.ArgumentParser()
    for name in ("--mm-model", "--mm-data", "--mm-tool"):
        parser.add_argument(name, required=True)
    add_arguments(parser)
    namespace = parser.parse_args(arguments[arguments.index("train") + 1 :])
    return namespace, from_namespace(namespace, world_size=world_size)


def test_pretraining_of_the_guide(launch):
    told = launch("pretrain")
    assert told["arguments"][:10] == [
        *("--nproc_per_node", "8", "--nnodes", "1", "--node_rank", "0"),
        *("--master_addr", "localhost", "--master_port", told["arguments"][9]),
    ]
    assert int(told["arguments"][9]) >= 29501  # the first that is free
    namespace, args = train_flags(told, 8)
    assert Path(told["folder"]) == ROOT
    assert namespace.mm_model == "examples/llava1.5/model.json"
    assert (args.micro_batch_size, args.global_batch_size, args.lr) == (8, 64, 1e-3)
    assert (args.train_iters, args.warmup_steps, args.weight_decay, args.clip_grad) == (8720, 262, 0.0, 0.0)
    assert args.bf16 and args.lr_decay_style == "cosine" and args.load == args.save == "save_dir"


def test_fine_tuning_of_llava_1_5(launch):
    namespace, args = train_flags(launch("finetune"), 8)
    assert namespace.mm_model == "examples/llava1.5/model_finetune.json"
    assert (args.lr, args.global_batch_size, args.weight_decay, args.clip_grad) == (2e-5, 128, 0.0, 1.0)
    assert (args.train_iters, args.warmup_steps) == (5197, 156)
    assert args.pretrained_checkpoint is None
    _, args = train_flags(launch("finetune", PRETRAINED_PATH="stage 1"), 8)
    assert args.pretrained_checkpoint == "stage 1"


def test_preference_training_of_ha_dpo(launch):
    """Hyper-parameters of its log: 39 steps of 128 pairs, half the rate in the first."""
    from mindspeed_mm.data.config import DataConfig
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.objectives import find_objective

    namespace, args = train_flags(launch("dpo"), 8)
    assert (args.lr, args.global_batch_size, args.weight_decay, args.clip_grad) == (2e-6, 128, 0.0, 1.0)
    assert (args.train_iters, args.warmup_steps, args.lr_decay_style) == (39, 2, "cosine")
    spec, data = load_model_spec(ROOT / namespace.mm_model), DataConfig.load(ROOT / namespace.mm_data)
    lora = spec.text_decoder.lora
    assert (lora.r, lora.alpha, lora.target_modules, spec.vision_projector.freeze) == (128, 256, "all-linear", False)
    options = dict(data.objective)
    objective = find_objective(options.pop("name")).configured(options)
    objective.check(spec)
    assert objective.reference and objective.options.beta == 0.1
    assert [basic.repeat_time for basic in data.dataset_param.basic_parameters] == [1, 2]


def test_lora_of_llava_1_5(launch):
    told = launch("finetune_lora", PRETRAINED_PATH="stage 1")
    namespace, args = train_flags(told, 8)
    model = json.loads((ROOT / namespace.mm_model).read_text())
    assert model["text_decoder"]["lora"] == {"r": 128, "alpha": 256, "dropout": 0.05, "target_modules": "all-linear"}
    assert (args.lr, model["image_encoder"]["vision_projector"]["lr"]) == (2e-4, 2e-5)
    assert (args.pretrained_checkpoint, args.save, args.global_batch_size) == ("stage 1", "save_dir_lora", 128)
    assert told["process"] == told["launcher"]


def test_a_task_of_ones_own(launch):
    """LLaVA's finetune_task begins with a whole LLaVA-1.5; its LoRA form is told by flags."""
    from mindspeed_mm.config.inherit import read_config
    from mindspeed_mm.models.spec import load_model_spec

    namespace, args = train_flags(launch("finetune_task"), 8)
    assert (args.lr, args.global_batch_size, args.save, args.pretrained_checkpoint) == (
        2e-5,
        128,
        "save_dir_task",
        None,
    )
    spec = load_model_spec(read_config(ROOT / namespace.mm_model))
    assert [part.trains for part in spec.part_specs().values()] == [True, False, True]
    assert spec.text_decoder.ckpt_path == spec.vision_projector.ckpt_path == "llava-v1.5-7b"
    script = SCRIPTS["finetune_task"].read_text()
    (flags,) = [line.partition(" with ")[2].rstrip(".").split() for line in script.splitlines() if "--lora-r" in line]
    told = launch("finetune_task", *flags)["arguments"]
    assert told[-len(flags) :] == flags and flags[:4] == ["--lora-r", "128", "--lora-alpha", "256"]


def test_what_stage_2_begins_with(launch, tmp_path):
    """Stage 1's save folder, or any projector file; QLoRA takes the projector alone from either."""
    file = tmp_path / "mm_projector.bin"
    file.write_bytes(b"")

    def begun(name, path):
        words = launch(name, PRETRAINED_PATH=str(path))["arguments"]
        flags = ("--pretrained-checkpoint", "--pretrain-mm-mlp-adapter")
        return {flag: words[words.index(flag) + 1] for flag in flags if flag in words}

    assert begun("finetune", "stage1") == {"--pretrained-checkpoint": "stage1"}
    assert begun("finetune_lora", file) == {"--pretrain-mm-mlp-adapter": str(file)}
    for path in ("stage1", file):
        assert begun("finetune_qlora", path) == {"--pretrain-mm-mlp-adapter": str(path)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_variable_comes_from_the_environment(launch, name):
    told = launch(
        name,
        *("--train-iters", "7", "--lr", "0.5"),
        **{"NPUS_PER_NODE": "2", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6000"},
        **{"TP": "2", "PP": "1", "CP": "1", "MBS": "3", "GBS": "12", "LOAD_PATH": "in", "SAVE_PATH": "out dir"},
        **{"MM_DATA": "a.json", "MM_MODEL": "b.json", "MM_TOOL": "c.json"},
    )
    assert told["arguments"][:10] == [
        *("--nproc_per_node", "2", "--nnodes", "2", "--node_rank", "1"),
        *("--master_addr", "10.0.0.1", "--master_port", "6000"),
    ]
    namespace, args = train_flags(told, 4)
    assert (namespace.mm_data, namespace.mm_model, namespace.mm_tool) == ("a.json", "b.json", "c.json")
    assert (args.tensor_model_parallel_size, args.micro_batch_size, args.global_batch_size) == (2, 3, 12)
    assert (args.load, args.save) == ("in", "out dir")
    assert (args.train_iters, args.lr) == (7, 0.5)


def test_the_ascend_toolkit_is_sourced_where_it_exists(launch, tmp_path):
    assert launch("pretrain")["ascend"] is None
    toolkit = tmp_path / "set_env.sh"
    toolkit.write_text('export FROM_ASCEND="yes$NOT_SET"\n')
    assert launch("pretrain", ASCEND_ENV=str(toolkit))["ascend"] == "yes"


@pytest.mark.parametrize("name", SCRIPTS)
def test_signals_that_stop_a_run_reach_the_ranks(launch, name):
    """torchrun takes the launcher's place, so that none is left behind; SIGUSR1 must not end it before its ranks."""
    told = launch(name)
    assert told["process"] == told["launcher"]
    assert told["deaf"] and told["patience"] == "600"


@pytest.mark.parametrize("name", SCRIPTS)
def test_launchers_are_strict_and_executable(name):
    assert "set -euo pipefail" in SCRIPTS[name].read_text()
    assert os.access(SCRIPTS[name], os.X_OK)


def test_tools_switch_nothing_on():
    tools = json.loads((ROOT / "examples" / "llava1.5" / "tools.json").read_text())
    assert [block["enable"] for block in tools.values()] == [False, False]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_port_in_use_is_passed_over_on_one_host(launch, name):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 29501))
            taken.listen(8)
        except OSError:
            pass  # somebody else has it: as good
        port = launch(name)["arguments"][9]
        assert int(port) > 29501
        assert launch(name, MASTER_PORT="29501")["arguments"][9] == "29501"
        assert launch(name, NNODES="2")["arguments"][9] == "29501"  # the hosts have to agree


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_report_of_torchrun_goes_to_a_file(launch, name):
    arguments = launch(name)["arguments"]
    assert arguments[10:12] == ["--logs-specs", "mindspeed_mm"]


MODELS = [
    ("pretrain", "model.json"),
    ("pretrain", "model_13b.json"),
    ("finetune", "model_finetune.json"),
    ("finetune", "model_13b_finetune.json"),
    ("finetune_lora", "model_finetune_lora.json"),
    ("finetune_qlora", "model_finetune_qlora.json"),
    ("finetune_task", "model_finetune_task.json"),
]


def test_letter_n_every_shipped_model_is_planned():
    shipped = {path.name for path in (ROOT / "examples" / "llava1.5").glob("model*.json")}
    assert shipped == {model for _, model in MODELS}


@pytest.mark.parametrize(("name", "model"), MODELS)
def test_letter_n_launchers_fit_eight_devices_of_64_gb(launch, capsys, name, model):
    told = launch(name, MM_MODEL=f"examples/llava1.5/{model}")
    flags = told["arguments"][told["arguments"].index("train") + 1 :]
    for flag in ("--mm-model", "--mm-data", "--mm-tool"):
        place = flags.index(flag)
        del flags[place : place + 2]
    machine = ["--devices", "8", "--memory", "64GB", "--device", "npu", "--json"]
    assert main(["plan", "--mm-model", str(ROOT / "examples" / "llava1.5" / model), *machine, *flags]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [layout["fits"] for layout in report["layouts"]] == [True]
    assert report["layouts"][0]["peak"] < 57.6e9
    assert report["layouts"][0]["host"]["checkpoint"] < 30e9  # of a rank; it was 95 for 7B


@pytest.mark.parametrize("name", SCRIPTS)
def test_letter_o_launchers_repeat_no_fact_of_the_model(launch, name):
    _, args = train_flags(launch(name), 8)
    assert args.model_flags() == {}
    _, args = train_flags(launch(name, "--vocab-size", "32000", "--seq-length", "2048"), 8)
    assert args.model_flags() == {"vocab_size": 32000, "seq_length": 2048}  # as the ancestor's say; they are compared
