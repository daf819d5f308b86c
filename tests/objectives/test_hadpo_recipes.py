"""HA-DPO's recipes of MiniGPT-4 and InstructBLIP: the launcher, and the examples' files on tiny models, planned,
trained at several layouts, asked POPE's questions and for SHR's descriptions."""

import json
import math
import os
import shutil

import pytest
import torch
import transformers
from PIL import Image

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.data.tokenizer import load_tokenizer
from tests.driver import test_launchers
from tests.driver.test_launchers import ROOT, launch, train_flags  # noqa: F401  a fixture
from tests.evaluation.evaluation_helpers import image_cell, write_table
from tests.helpers.golden_training import records
from tests.helpers.tiny_blip import QFORMER, QUERIES, question_words, square_processor
from tests.helpers.tiny_llava import VISION, decoder_config
from tests.helpers.tiny_minigpt4 import eva_tensors
from tests.objectives.test_dpo_runs import compare
from tests.parallel.test_command import LAYOUTS

FOLDER = ROOT / "examples" / "hallucination"
STEPS = ["--train-iters", "2", "--lr", "1e-2", "--micro-batch-size", "1", "--global-batch-size", "2"]
FLAGS = ["--num-workers", "0", "--device", "cpu", "--lr-decay-style", "constant", "--adam-eps", "1e-3"]


def test_launcher(launch, monkeypatch):  # noqa: F811
    monkeypatch.setitem(test_launchers.SCRIPTS, "qformer", FOLDER / "dpo_qformer.sh")
    namespace, args = train_flags(launch("qformer", "--mm-tool", "none"), 8)
    assert namespace.mm_model == "examples/hallucination/minigpt4/model.json"
    assert (args.lr, args.warmup_steps, args.train_iters, args.global_batch_size) == (1e-4, 100, 1000, 32)
    assert (args.micro_batch_size, args.weight_decay, args.clip_grad, args.seed) == (1, 0.0, 1.0, 42)
    told = launch("qformer", "--mm-tool", "none", MODEL="instructblip", TRAIN_ITERS="140")
    namespace, args = train_flags(told, 8)
    assert namespace.mm_data == "examples/hallucination/instructblip/data.json"
    assert (args.lr, args.warmup_steps, args.train_iters, args.num_micro_batches) == (4e-6, 0, 140, 4)


@pytest.fixture
def place(golden, tmp_path, monkeypatch):
    """A folder with the files that the recipes name, small, and the examples' JSON files."""
    torch.manual_seed(0)
    words = load_tokenizer(golden / "tokenizer")
    text = decoder_config("llama", vocab_size=words.vocab_size, max_position_embeddings=512)
    llama = tmp_path / "Llama-2-7b-chat-hf"
    shutil.copytree(golden / "tokenizer", llama)
    transformers.LlamaForCausalLM(text).save_pretrained(llama)
    torch.save(eva_tensors(176, 16, 14), tmp_path / "eva_vit_g.pth")
    linear = {"llama_proj.weight": torch.randn(48, 4 * 176) * 0.1, "llama_proj.bias": torch.zeros(48)}
    torch.save({"model": linear}, tmp_path / "pretrained_minigpt4_llama2_7b.pth")
    folder = tmp_path / "instructblip-vicuna-13b"
    shutil.copytree(golden / "tokenizer", folder)
    parts = {"vision_config": VISION, "qformer_config": QFORMER, "num_query_tokens": QUERIES}
    config = transformers.InstructBlipConfig(text_config=text, **parts)
    transformers.InstructBlipForConditionalGeneration(config).save_pretrained(folder)
    square_processor().save_pretrained(folder)
    question_words().save_pretrained(folder / "qformer_tokenizer")
    (tmp_path / "VG" / "VG_100K").mkdir(parents=True)
    urls = [{"image_id": number, "url": f"https://x/VG_100K/{number}.jpg"} for number in range(4)]
    (tmp_path / "VG" / "image_data.json").write_text(json.dumps(urls))
    for number in range(4):
        Image.new("RGB", (30, 20), (80 * number, 10, 200)).save(tmp_path / "VG" / "VG_100K" / f"{number}.jpg")
    for model, key in (("minigpt4", "reject"), ("instructblip", "rejected")):
        (tmp_path / "HA-DPO" / model).mkdir(parents=True)
        rows = [
            {"image_id": number, "question": "Is there a cat?", "answer": "no", "chosen": "No.", key: "Yes, a cat."}
            for number in range(4)
        ]
        rows = [row | {"correct": row["image_id"] == 0} for row in rows]
        (tmp_path / "HA-DPO" / model / "pope_data.json").write_text(json.dumps(rows))
        told = {"chosen": ["A sky.\nBlue."], "rejected": ["A dog.\n", "A cat."]}
        described = [{"image_id": number} | told for number in range(4)]
        (tmp_path / "HA-DPO" / model / "desc_data.json").write_text(json.dumps(described))
    (tmp_path / "cc_sbu_align" / "image").mkdir(parents=True)
    captions = [{"image_id": str(number), "caption": "A cat. " * (number + 1)} for number in range(3)]
    (tmp_path / "cc_sbu_align" / "filter_cap.json").write_text(json.dumps({"annotations": captions}))
    for number in range(3):
        Image.new("RGB", (20, 20), (9, 90 * number, 9)).save(tmp_path / "cc_sbu_align" / "image" / f"{number}.jpg")
    for path in FOLDER.glob("*/*.json"):
        shutil.copyfile(path, tmp_path / f"{path.parent.name}_{path.name}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shr(place):
    """SHR's files about two of the images."""
    (place / "shr").mkdir()
    (place / "shr" / "val_images_final.json").write_text(json.dumps([{"image_id": 1}, {"image_id": 2}]))
    facts = [{str(number): ["Blue."]} for number in (1, 2)]
    for part, fact in enumerate(facts, 1):
        (place / "shr" / f"shr_factual_part{part}.jsonl").write_text(json.dumps(fact) + "\n")
    urls = json.loads((place / "VG" / "image_data.json").read_text())
    (place / "VG" / "image_data.json").write_text(json.dumps([url | {"width": 30, "height": 20} for url in urls]))
    region = {"x": 0, "y": 0, "width": 30, "height": 20, "phrase": "blue"}
    regions = [{"regions": [region | {"image_id": number}]} for number in range(4)]
    (place / "VG" / "region_descriptions.json").write_text(json.dumps(regions))


@pytest.mark.parametrize("name, number", [("minigpt4", 4 + 4 + 3), ("instructblip", 3 + 4)])
def test_recipe(name, number, place, capsys, single_process):
    files = ["--mm-model", f"{name}_model.json", "--mm-data", f"{name}_data.json"]
    assert main(["check-data", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == number
    plan = ["--devices", "1", "--memory", "4GB", *STEPS, "--tensor-model-parallel-size", "1"]
    assert main(["plan", *files, *plan, "--pipeline-model-parallel-size", "1", "--context-parallel-size", "1"]) == 0
    assert main(["train", *files, *STEPS, "--num-workers", "0", "--device", "cpu", "--save", "run"]) == 0
    first, second = (json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines())
    beside = 0.5 * first["auxiliary loss"] if name == "minigpt4" else 0
    assert first["loss"] == pytest.approx(math.log(2) + beside, abs=1e-5) and ("auxiliary loss" in first) == bool(
        beside
    )
    assert second["rewards/margins"] != 0  # the policy has moved away from its reference
    cells = {"image": image_cell(), "question": "Is there a dog?"}
    rows = [cells | {"index": str(n), "answer": ("No", "Yes")[n % 2], "category": "random"} for n in range(4)]
    write_table(place / "POPE.tsv", rows)
    command = ["evaluate", "--load", "run", "--dataset-path", "POPE.tsv", "--evaluation-dataset", "pope"]
    options = ["--accept-table", "--device", "cpu", "--max-new-tokens", "3", "--result-output-path", "answers"]
    assert main([*command, *options]) == 0
    shr(place)
    folders = ["--dataset-path", "shr", "--image-root", "VG", "--result-output-path", "descriptions"]
    assert main(["evaluate", "--load", "run", "--evaluation-dataset", "shr", *folders, *options[1:5]]) == 0
    (report,) = (place / "descriptions").rglob("*_report.json")
    assert "sents_per_image" in report.read_text()  # nobody judges
    answers = mm.load("run", device="cpu")
    assert answers.spec.model_id == name and answers.template == ("minigpt4_llama2", "instructblip")[name != "minigpt4"]


def train_recipe(folder, name, save, flags):
    """The recipe on this rank; its exit code."""
    before = os.getcwd()
    os.chdir(folder)
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())  # as torchrun sets it
    files = ["--mm-model", f"{name}_model.json", "--mm-data", f"{name}_data.json", "--save", save]
    try:
        return main(["train", *files, *STEPS, *FLAGS, *flags.split()])
    finally:
        del os.environ["WORLD_SIZE"]
        os.chdir(before)


@pytest.mark.parametrize("name", [pytest.param("minigpt4", marks=pytest.mark.slow), "instructblip"])
def test_layouts(name, place, ranks):
    """The adapters' training at TP2 and PP2 is that of one process."""
    assert ranks(1).run(train_recipe, str(place), name, "one", "") == [0]
    wanted = records(place / "one")
    for layout in ("TP2 SP", "PP2"):
        assert ranks(2).run(train_recipe, str(place), name, layout, LAYOUTS[layout]) == [0, 0]
        compare(records(place / layout), wanted, layout)
