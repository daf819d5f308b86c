"""Every launcher under examples/ that trains, with its own files and values, fits 8 devices of 64 GB by `plan`."""

import json

import pytest

from mindspeed_mm.cli.main import main
from mindspeed_mm.config.inherit import read_config
from tests.driver import test_launchers
from tests.driver.test_launchers import ROOT, launch  # noqa: F401  a fixture

EXAMPLES = ROOT / "examples"
LLAMA_7B = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32}
LLAMA_7B |= {"language_vocab_size": 32000, "max_position_embeddings": 2048}
VICUNA_13B = LLAMA_7B | {"num_layers": 40, "hidden_size": 5120, "ffn_hidden_size": 13824, "num_attention_heads": 40}
GEMMA_2B = {"model_id": "gemma", "num_layers": 18, "hidden_size": 2048, "ffn_hidden_size": 16384}
GEMMA_2B |= {"num_attention_heads": 8, "num_query_groups": 1, "kv_channels": 256}
GEMMA_2B |= {"language_vocab_size": 256000, "max_position_embeddings": 8192}
EVA_G = {"model_id": "eva_vit", "num_layers": 39, "hidden_size": 1408, "ffn_hidden_size": 6144}
EVA_G |= {"num_attention_heads": 16, "patch_size": 14, "image_size": 224}
TEXT_BRANCH = {"text_vocab_size": 30523, "text_positions": 512}

MINIGPT4 = [
    ("minigpt4/train_minigpt4.sh", {"STAGE": stage, "LLM": name}, decoder)
    for stage in "12"
    for name, decoder in (("vicuna", LLAMA_7B), ("llama2", LLAMA_7B), ("gemma", GEMMA_2B))
]
CASES = [
    ("grounding/rec_llava1_5.sh", {"TRAIN_ITERS": "10"}, None),
    ("hallucination/dpo_llava1_5.sh", {}, None),
    ("hallucination/post_block.sh", {"STAGE": "1"}, None),
    ("hallucination/post_block.sh", {"STAGE": "2"}, None),
    ("hallucination/dpo_qformer.sh", {}, LLAMA_7B),
    ("hallucination/dpo_qformer.sh", {"MODEL": "instructblip", "TRAIN_ITERS": "10"}, VICUNA_13B),
    *MINIGPT4,
]
"""Launcher, its variables, and the decoder of models whose shapes are in their weights' config."""

PLANNED_ELSEWHERE = {"internlm2", "otter", "qwen2_5_vl"}  # tests/driver/test_recipes.py
NO_LAUNCH = {"ascend.sh", "chat_minigpt4.sh", "digits.sh", "evaluate_llava1_5.sh", "inference_llava1_5.sh", "run.sh"}


def test_letter_n_every_launcher_is_planned():
    found = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.sh") if path.name not in NO_LAUNCH}
    known = {name for name, *_ in CASES} | {f"llava1.5/{path.name}" for path in test_launchers.SCRIPTS.values()}
    assert {name for name in found if name.split("/")[0] not in PLANNED_ELSEWHERE} == known & found


@pytest.mark.parametrize(
    ("script", "variables", "decoder"), CASES, ids=[f"{name} {' '.join(given.values())}" for name, given, _ in CASES]
)
def test_letter_n_every_launcher_fits(launch, monkeypatch, tmp_path, capsys, script, variables, decoder):  # noqa: F811
    monkeypatch.setitem(test_launchers.SCRIPTS, "this", EXAMPLES / script)
    arguments = launch("this", **variables)["arguments"]
    flags = arguments[arguments.index("train") + 1 :]
    if "--context-parallel-size" not in flags:
        flags += ["--context-parallel-size", "1"]
    given = {}
    for flag in [flag for flag in flags if flag.startswith(("--mm-", "--objective", "--freeze_", "--tune_"))]:
        place = flags.index(flag)
        given[flag] = flags[place + 1]
        del flags[place : place + 2]
    model = read_config(ROOT / given["--mm-model"])
    model.get("interaction", {}).pop("ckpt_path", None)  # what stage 1 has saved
    if decoder is not None:
        blocks = {"text_decoder": decoder, "vision_encoder": EVA_G}
        blocks["vision_projector"] = {"input_size": 1408, "hidden_size": decoder["hidden_size"]}
        blocks["vision_projector"] |= TEXT_BRANCH if model["model_id"] == "instructblip" else {}
        for name, shape in blocks.items():
            block = model["text_decoder"] if name == "text_decoder" else model["image_encoder"][name]
            block |= {**shape, "ckpt_path": None}
    (tmp_path / "model.json").write_text(json.dumps(model))
    line = ["plan", "--mm-model", str(tmp_path / "model.json"), "--devices", "8", "--memory", "64GB", "--device", "npu"]
    assert main([*line, "--json", *flags]) == 0
    (layout,) = json.loads(capsys.readouterr().out.splitlines()[-1])["layouts"]
    assert layout["fits"] and layout["peak"] < 57.6e9
