"""The launchers and files of examples/internlm2 (XTuner's recipes), examples/otter and examples/qwen2_5_vl."""

import json
import os

import pytest

from mindspeed_mm.cli.main import main
from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.load import load_config
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.template import get_template
from mindspeed_mm.models.spec import load_model_spec
from tests.driver import test_launchers
from tests.driver.test_launchers import ROOT, launch, train_flags  # noqa: F401  a fixture

SCRIPTS = {
    "internlm2": ROOT / "examples" / "internlm2" / "pretrain_internlm2.sh",
    "internlm2 qlora": ROOT / "examples" / "internlm2" / "finetune_qlora_internlm2.sh",
    "otter": ROOT / "examples" / "otter" / "train_otter.sh",
    "qwen2.5-vl lora": ROOT / "examples" / "qwen2_5_vl" / "finetune_lora_qwen2_5_vl.sh",
}
GIVEN = {
    "internlm2": (1e-3, 32, 256, 2181, 1.0, None),
    "internlm2 qlora": (2e-4, 16, 128, 5198, 1.0, "save_dir_internlm2"),
    "otter": (1e-5, 2, 128, 5197, 1.0, None),
    "qwen2.5-vl lora": (1e-4, 1, 128, 5197, 1.0, None),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe(launch, monkeypatch, capsys, name):  # noqa: F811
    """Its numbers, its files, and that eight devices of 64 GB hold it."""
    monkeypatch.setitem(test_launchers.SCRIPTS, name, SCRIPTS[name])
    assert os.access(SCRIPTS[name], os.X_OK) and "set -euo pipefail" in SCRIPTS[name].read_text()
    told = launch(name)
    namespace, args = train_flags(told, 8)
    found = (args.lr, args.micro_batch_size, args.global_batch_size, args.train_iters, args.clip_grad)
    assert (*found, args.pretrained_checkpoint) == GIVEN[name]
    assert args.model_flags() == {} and (args.weight_decay, args.lr_decay_style) == (
        0.1 if name == "otter" else 0.0,
        "cosine",
    )
    data = load_config(DataConfig, read_config(ROOT / namespace.mm_data), what="data config")
    if name.startswith("internlm2"):
        assert get_template(data.dataset_param.template_name) == get_template("internlm2_chat")
    flags = told["arguments"][told["arguments"].index("train") + 1 :]
    for flag in ("--mm-model", "--mm-data", "--mm-tool"):
        del flags[flags.index(flag) : flags.index(flag) + 2]
    machine = ["--devices", "8", "--memory", "64GB", "--device", "npu", "--json"]
    assert main(["plan", "--mm-model", str(ROOT / namespace.mm_model), *machine, *flags]) == 0
    (layout,) = json.loads(capsys.readouterr().out.splitlines()[-1])["layouts"]
    assert layout["fits"]


def test_what_trains():
    """XTuner: the language model in 4 bits with rank 512, the vision encoder with rank 64, the projector whole."""
    spec = load_model_spec(read_config(ROOT / "examples" / "internlm2" / "model_finetune_qlora.json"))
    decoder, vision = spec.text_decoder, spec.vision_encoder
    assert (decoder.quantize, decoder.double_quant, decoder.lora.r, decoder.lora.alpha) == ("nf4", True, 512, 256)
    assert (vision.quantize, vision.lora.r, vision.lora.alpha, spec.vision_projector.trains) == (None, 64, 16, True)
    assert decoder.lora.dropout == vision.lora.dropout == 0.05
    first = load_model_spec(read_config(ROOT / "examples" / "internlm2" / "model_pretrain.json"))
    assert [part.trains for part in first.part_specs().values()] == [False, False, True]
    spec = load_model_spec(read_config(ROOT / "examples" / "qwen2_5_vl" / "model_lora.json"))
    assert [part.trains for part in spec.part_specs().values()] == [True, False, False]
    assert spec.text_decoder.mrope_section == (16, 24, 24)
