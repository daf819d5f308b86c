"""The launcher and the files of examples/minigpt4."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from mindspeed_mm.cli import chat as chat_command
from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.load import load_config
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.template import get_template
from mindspeed_mm.models.spec import load_model_spec
from tests.driver import test_launchers
from tests.driver.test_launchers import ROOT, launch, train_flags  # noqa: F401  a fixture

FOLDER = ROOT / "examples" / "minigpt4"


@pytest.fixture
def run(launch, monkeypatch):  # noqa: F811
    monkeypatch.setitem(test_launchers.SCRIPTS, "minigpt4", FOLDER / "train_minigpt4.sh")
    return lambda **variables: launch("minigpt4", "--mm-tool", "none", **variables)


def test_stages(run):
    namespace, args = train_flags(run(), 8)
    assert namespace.mm_model == "examples/minigpt4/model_vicuna.json"
    assert (args.seq_length, args.global_batch_size, args.lr, args.min_lr) == (65, 512, 1e-4, 8e-5)
    assert (args.train_iters, args.warmup_steps, args.weight_decay) == (20000, 5000, 0.05)
    assert (args.lr_decay_style, args.lr_warmup_init) == ("linear_warmup_cosine_lr", 1e-6)
    assert args.iters_per_epoch == args.save_interval == 5000
    namespace, args = train_flags(run(STAGE="2", LLM="gemma", PRETRAINED_PATH="one", NPUS_PER_NODE="1"), 1)
    assert namespace.mm_data == "examples/minigpt4/data_stage2_gemma.json" and args.pretrained_checkpoint == "one"
    assert (args.seq_length, args.global_batch_size, args.lr) == (265, 12, 3e-5)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("data_*.json")), ids=lambda path: path.stem)
def test_data(path):
    config = load_config(DataConfig, read_config(path), what="data config")
    get_template(config.dataset_param.template_name)
    assert ("gemma" in config.dataset_param.tokenizer_config.from_pretrained) == ("gemma" in path.stem)


@pytest.mark.parametrize(
    "model, template",
    [("vicuna", "vicuna"), ("llama2", "llama2"), ("v2", "v2"), ("gemma", "gemma_guide")],
)
def test_chat(model, template, tmp_path):
    """The launcher's flags, as `mindspeed-mm chat` reads them."""
    stub = tmp_path / "python"
    stub.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LLM": model}
    command = ["bash", str(FOLDER / "chat_minigpt4.sh"), "--image", "cat.jpg"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    assert told[:3] == ["-m", "mindspeed_mm", "chat"]
    parser = argparse.ArgumentParser()
    chat_command.add_arguments(parser)
    namespace = parser.parse_args(told[3:])
    assert namespace.model == "save_dir_stage2" and namespace.image == ["cat.jpg"]
    assert namespace.template == f"minigpt4_{template}_chat" and get_template(namespace.template)
    assert (namespace.max_context_len, namespace.max_new_tokens, namespace.top_p) == (2000, 300, 0.9)


@pytest.mark.slow
def test_digits(tmp_path):
    """The small run of the example from end to end, too short to learn."""
    command = [sys.executable, "-m", "examples.minigpt4.digits", "--fast", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["n"] == 20 and 0 <= found["before"] <= 1 and 0 <= found["after"] <= 1


WIDTHS = {"vicuna": (4096, "llama", 32), "llama2": (4096, "llama", 64), "gemma": (2048, "gemma", 64)}
WIDTHS |= {"v2": (4096, "llama", 256)}


@pytest.mark.parametrize("name", WIDTHS)
def test_models(name):
    """The blocks, completed as the public weights would complete them."""
    width, decoder, tokens = WIDTHS[name]
    model = json.loads((FOLDER / f"model_{name}.json").read_text())
    heads = {"num_attention_heads": 8, "kv_channels": 256}
    model["text_decoder"] |= {"model_id": decoder, "num_layers": 2, "hidden_size": width, "ffn_hidden_size": width}
    model["text_decoder"] |= heads | {"language_vocab_size": 32000}
    images = model["image_encoder"]
    images["vision_encoder"] |= {"model_id": "eva_vit", "num_layers": 39, "hidden_size": 1408}
    images["vision_encoder"] |= {"ffn_hidden_size": 6144, "num_attention_heads": 16}
    images["vision_projector"] |= {"input_size": 1408, "hidden_size": width}
    spec = load_model_spec(model)
    assert spec.family.fixed_plan(spec).count == tokens
