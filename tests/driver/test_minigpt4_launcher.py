"""The launcher and the files of examples/minigpt4."""

import json

import pytest

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
    namespace, args = train_flags(run(STAGE="2", LLM="gemma", PRETRAINED_PATH="one", NPUS_PER_NODE="1"), 1)
    assert namespace.mm_data == "examples/minigpt4/data_stage2.json" and args.pretrained_checkpoint == "one"
    assert (args.seq_length, args.global_batch_size, args.lr) == (265, 12, 3e-5)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("data_*.json")), ids=lambda path: path.stem)
def test_data(path):
    config = load_config(DataConfig, path, what="data config")
    get_template(config.dataset_param.template_name)


WIDTHS = {"vicuna": (4096, "llama", 32), "llama2": (4096, "llama", 64), "gemma": (2048, "gemma", 64)}


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
