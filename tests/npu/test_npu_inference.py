"""Logits, answers and scores of the golden model on the stand-in for an NPU."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mindspeed_mm as mm
from tests.evaluation.evaluation_helpers import choice_rows, write_table
from tests.helpers.golden_model import load_expected
from tests.npu import runs

IMAGE_ID = 1000
LAYERS = 4


def loaded(golden: Path, dtype: str = "fp32"):
    """The golden model on the platform of this rank."""
    from mindspeed_mm.platform import current_platform

    return mm.load(golden / "models" / "llava_hf", device=current_platform().name, dtype=dtype)


def logits(golden: Path, cases: tuple[str, ...]) -> tuple[list[float], dict[str, int]]:
    """Largest difference of each case from transformers, and the operators that were called."""
    vlm, found = loaded(golden), []
    runs.calls()
    for case in cases:
        expected = load_expected(golden, case)
        ids = expected["expanded_input_ids"]
        mask = expected["expanded_attention_mask"]
        own = vlm.logits(ids.where(ids != IMAGE_ID, torch.tensor(-200)), mask, expected.get("pixel_values"))
        found.append((own[..., :1000] - expected["logits"])[mask.bool()].abs().max().item())
    return found, runs.calls()


def test_logits_equal_transformers(npu_ranks, golden):
    ((differences, called),) = npu_ranks(1).run(logits, golden, ("text_only", "one_image", "batch_two", "two_images"))
    assert max(differences) < 3e-4
    assert {"npu_fusion_attention", "npu_rms_norm", "npu_swiglu", "npu_rotary_mul"} <= called.keys()


def answers(golden: Path, dtype: str, prompts: list, images: list[str]) -> tuple[list, dict[str, int]]:
    """Greedy tokens of all prompts together, and the operators that were called."""
    vlm = loaded(golden, dtype)
    shown = load_file(golden / "images" / "preprocessed.safetensors")
    runs.calls()
    tokens = vlm.generate(input_ids=prompts, images=[shown[f"{name}.pad"] for name in images], max_new_tokens=24)
    return tokens, runs.calls()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_greedy_tokens_equal_transformers(npu_ranks, golden, dtype):
    cases = list(json.loads((golden / "expected" / "meta.json").read_text())["generation"].values())
    prompts = [case["input_ids"] for case in cases]
    images = [image for case in cases for image in case["images"]]
    ((tokens, called),) = npu_ranks(1).run(answers, golden, dtype, prompts, images)
    if dtype == "fp32":
        assert tokens == [case["new_tokens_eos_stop"] for case in cases]
    assert ("npu_fused_infer_attention_score" in called) == (dtype == "bf16")
    steps = max(len(answer) for answer in tokens) - 1
    for name in ("npu_rms_norm", "npu_add_rms_norm", "npu_swiglu", "npu_rotary_mul"):
        assert called[name] > LAYERS * steps, name  # in every layer of every step, and for the prompts


def evaluated(golden: Path, table: str, out: str) -> int:
    """`mindspeed-mm evaluate` on the platform of this rank; its exit code."""
    from mindspeed_mm.cli.main import main
    from mindspeed_mm.platform import current_platform

    torch.distributed.destroy_process_group()
    return main(
        [
            *("evaluate", "--model", str(golden / "models" / "llava_hf"), "--dataset-path", table),
            *("--evaluation-dataset", "toy", "--result-output-path", out, "--max-new-tokens", "3"),
            *("--device", current_platform().name, "--dtype", "fp32"),
        ]
    )


def test_scores_equal_the_cpus(ranks, npu_ranks, golden, tmp_path):
    table = tmp_path / "toy.tsv"
    write_table(table, choice_rows(4))
    assert ranks(1).run(evaluated, golden, str(table), str(tmp_path / "cpu")) == [0]
    assert npu_ranks(1).run(evaluated, golden, str(table), str(tmp_path / "npu")) == [0]
    names = {path.name for path in (tmp_path / "cpu").iterdir() if path.suffix == ".csv"}
    assert names
    for name in names:
        assert (tmp_path / "npu" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()
