"""Small things under the names that the documentation uses: weights, data, tables, requests, the examples' JSONs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import openpyxl
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.docs.pages import ROOT
from tests.evaluation.evaluation_helpers import choice_rows, image_cell, write_table
from tests.helpers.golden_model import PROJECTOR, TEXT, VISION
from tests.helpers.tiny_families import MAKERS
from tests.helpers.tiny_minigpt4 import checkout
from tests.interaction.post_block_helpers import tensors

WEIGHTS = {
    "llava_hf": ("llava-1.5-7b-hf",),
    "llava_original": ("llava-v1.5-7b",),
    "vicuna": ("vicuna-7b-v1.5", "vicuna-7b", "vicuna-13b-v1.5", "internlm2-chat-7b"),
    "clip_hf": ("clip-vit-large-patch14-336", "clip_hf"),  # llava_original names it ../clip_hf
    "clip_openai.pt": ("ViT-L-14-336px.pt",),
    "mm_projector.bin": ("mm_projector.bin", "llava-v1.5-7b/mm_projector.bin", "non_lora_trainables.bin"),
}
"""A model of tests/data/golden, and the public names it stands in for."""

TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$ASKED_OF_TORCHRUN"
"""
"""A torchrun that only notes what it was asked to do."""


def make_stand_ins(golden: Path, folder: Path) -> Path:
    """A folder in which the commands of the documentation find what they name."""
    for name, aliases in WEIGHTS.items():
        for alias in aliases:
            copy(golden / "models" / name, folder / alias)
    copy(folder / "llava-1.5-7b-hf", folder / "path/to/llava-1.5-7b-hf")
    (folder / "path/to/blip2-opt-2.7b").mkdir()
    MAKERS["blip2"](folder / "path/to/blip2-opt-2.7b")
    copy(golden / "models" / "vicuna", folder / "gemma-2b-it")
    checkout(folder, folder / "gemma-2b-it")
    Image.new("RGB", (60, 40), "red").save(folder / "view.jpg")
    make_data(folder)
    make_examples(folder)
    make_tables(folder)
    lines = [{"prompt": "What is it?", "image": "view.jpg"}, {"prompt": "Hi"}]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    block = {f"post_interaction_block.{name}": tensor for name, tensor in tensors().items()}
    for stage, held in {"stage_1": block, "stage_2": block | {"lm_head.weight": torch.zeros(1000, 96)}}.items():
        (folder / stage).mkdir()
        torch.save(held, folder / stage / "non_lora_trainables.bin")
    (folder / "other_dir").mkdir()
    steps = [{"iteration": step, "loss": 1 / step} for step in range(1, 9)]
    (folder / "other_dir/metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    make_adapters(folder)
    (folder / "your_run.log").write_text("step 1/2 | loss 0.5\n")
    (folder / "bin").mkdir()
    (folder / "bin/torchrun").write_text(TORCHRUN)
    (folder / "bin/torchrun").chmod(0o755)
    return folder


def copy(source: Path, target: Path) -> None:
    """A file or a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


def make_adapters(folder: Path) -> None:
    """Adapters of the decoder's queries in PEFT's format."""
    width, places = TEXT["hidden_size"], range(TEXT["num_layers"])
    names = [f"base_model.model.model.layers.{place}.self_attn.q_proj" for place in places]
    values = {f"{name}.lora_A.weight": torch.ones(2, width) for name in names}
    values |= {f"{name}.lora_B.weight": torch.full((width, 2), 0.01) for name in names}
    for name in ("medical", "charts"):
        target = folder / "runs" / name
        target.mkdir(parents=True)
        save_file(values, target / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (target / "adapter_config.json").write_text(json.dumps(config))


def make_data(folder: Path) -> None:
    """Captions and conversations where the examples' data.json look for them, and a data.json of their kind."""
    (folder / "rec_llava_v1_7b_fsdp.py").write_text(GUIDE_CONFIG)
    for name, images in {
        "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": "LLaVA-Pretrain/images",
        "LLaVA-Instruct/llava_v1_5_mix665k.json": "LLaVA-Instruct",
    }.items():
        (folder / images).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 60), "red").save(folder / images / "red.jpg")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is red."}]
        records = [{"id": str(number), "image": "red.jpg", "conversations": turns} for number in range(8)]
        (folder / name).write_text(json.dumps(records))
    make_pairs(folder)
    make_items(folder)
    index = [{"url": f"https://example.org/{number}.jpg", "caption": "A cat."} for number in range(8)]
    (folder / "ccs_synthetic_filtered_large.json").write_text(json.dumps(index))
    asked = {"image": "red.jpg", "question_id": 1, "question": "Which color?", "answer": ["red", "red"]}
    (folder / "vqa_train.json").write_text(json.dumps([asked]))


GUIDE_CONFIG = """_base_ = []
training_args = dict(output_dir='exp', per_device_train_batch_size=8, bf16=True)
model_args = dict(type='llava_v1', model_name_or_path='llava-1.5-7b-hf', vision_tower='clip')
data_args = dict(train=dict(type='RECDataset', filename='REC_ref3_train.jsonl', template_string='<image> <expr>?'))
"""


def make_items(folder: Path) -> None:
    """Grounding items: where is the red image?"""
    (folder / "grounding").mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "grounding/red.jpg")
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "<boxes>", "boxes_seq": [[0]]}]
    item = {"image": "red.jpg", "target": {"boxes": [[0, 0, 30, 40]]}, "conversations": turns}
    (folder / "grounding/items.jsonl").write_text("".join(json.dumps(item | {"id": n}) + "\n" for n in range(8)))
    row = {"img_path": "red.jpg", "expression": "the red one", "bbox": [0, 0, 30, 40]}
    for name in ("shikra", "coco2014"):
        (folder / name).mkdir()
    shutil.copyfile(folder / "grounding/red.jpg", folder / "coco2014/red.jpg")
    for name in ("REC_ref3_train", "REC_refcoco_unc_val"):
        (folder / f"shikra/{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)


def make_pairs(folder: Path) -> None:
    """Preference records, HA-DPO's two files with two of Visual Genome's images, and SHR's files about these."""
    for place in ("pairs", "HA-DPO", "VG/VG_100K", "shr"):
        (folder / place).mkdir(parents=True)
    for place in ("pairs/red.jpg", "VG/VG_100K/1.jpg", "VG/VG_100K/2.jpg"):
        Image.new("RGB", (60, 60), "red").save(folder / place)
    pair = {"prompt": "What is it?", "chosen": "It is red.", "rejected": "It is a dog.", "images": ["red.jpg"]}
    images = [{"image_id": n, "url": f"VG_100K/{n}.jpg", "width": 60, "height": 60} for n in (1, 2)]
    region = {"x": 0, "y": 0, "width": 60, "height": 60, "phrase": "red"}
    verdict = {"raw_judgement": "Judgement:\n1. correct: red.", "model_response": "It is red."}
    question = {"question": "Is there a dog?", "chosen": "No.", "reject": "Yes.", "correct": False}
    described = {"1": {"chosen": ["It is red."], "rejected": ["A dog runs."]}}
    for name, content in {
        "pairs/pairs.json": [pair | {"id": str(number)} for number in range(8)],
        "VG/image_data.json": images,
        "HA-DPO/pope_data.json": [question | {"image_id": number} for number in (1, 2, 1)],
        "HA-DPO/desc_data.json": described,
        "VG/region_descriptions.json": [{"regions": [region | {"image_id": n}]} for n in (1, 2)],
        "shr/val_images_final.json": [{"image_id": 1}, {"image_id": 2}],
        "shr/shr_factual_part1.jsonl": {"1": ["All is red."]},
        "shr/shr_factual_part2.jsonl": {"2": []},
        "responses.json": {"1": "It is red.", "2": "It is red."},
        "judgement.json": {"run1": {"1": verdict, "2": verdict}},
    }.items():
        (folder / name).write_text(json.dumps(content))


def make_examples(folder: Path) -> None:
    """The examples' scripts as they are, their JSONs with the sizes of the small model."""
    for name in ("hallucination", "grounding", "llava1.5"):
        target = folder / "examples" / name
        shutil.copytree(ROOT / "examples" / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        for path in target.glob("*.json"):
            path.write_text(json.dumps(smaller(json.loads(path.read_text())), indent=1))
    for name, own in {"model_finetune.json": "model.json", "data_finetune.json": "data.json"}.items():
        shutil.copyfile(target / name, folder / own)


def smaller(values: dict) -> dict:
    """A model's or data set's JSON at the small model's sizes; everything else stays."""
    if "text_decoder" in values:
        encoder = values["image_encoder"]
        values["text_decoder"] |= TEXT | {"num_query_groups": TEXT["num_attention_heads"]}
        values["text_decoder"] |= {"language_max_sequence_length": TEXT["max_position_embeddings"]}
        if "recompute_num_layers" in values["text_decoder"]:
            values["text_decoder"]["recompute_num_layers"] = TEXT["num_layers"]
        heads = {"num_query_groups": VISION["num_attention_heads"], "kv_channels": 16}
        encoder["vision_encoder"] |= VISION | heads
        encoder["vision_projector"] |= PROJECTOR | {"ffn_hidden_size": PROJECTOR["hidden_size"]}
    if "dataset_param" in values:
        pipeline = values["dataset_param"]["preprocess_parameters"]["train_pipeline"]
        pipeline |= {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    return values


def _few_shot_tables() -> dict[str, list[dict[str, str]]]:
    """Questions with the answers of ten people, and captions of which all but the first are examples."""
    people = repr(["yes"] * 9 + ["no"])
    images = [image_cell(size=(4 + number, 3)) for number in range(4)]
    questions = [
        {"index": str(number), "image": image, "question": "Is it red?", "answer": people}
        for number, image in enumerate(images)
    ]
    captions = [
        {"index": str(number), "image": image, "answer": repr(["A red box.", "A box"]), "split": split}
        for number, (image, split) in enumerate(zip(images, ("val", "train", "train", "train"), strict=True))
    ]
    return {"TextVQA_VAL.tsv": questions[:2], "TextVQA_TRAIN.tsv": questions, "COCO_VAL.tsv": captions}


def make_tables(folder: Path) -> None:
    """Benchmarks of a few questions, and a sheet of answers as VLMEvalKit writes it."""
    write_table(folder / "AI2D_TEST.tsv", choice_rows(4))
    write_table(folder / "my_questions.tsv", choice_rows(4))
    for name, rows in _few_shot_tables().items():
        write_table(folder / name, rows)
    rows = [
        {
            "index": str(number),
            "image": image_cell(),
            "question": "Is there a dog?",
            "answer": "Yes" if number % 2 else "No",
            "category": ("random", "popular", "adversarial")[number // 2],
        }
        for number in range(6)
    ]
    write_table(folder / "POPE.tsv", rows)
    sheet = openpyxl.Workbook()
    sheet.active.append(["index", "question", "answer", "category", "prediction"])
    for row in rows:
        sheet.active.append([int(row["index"]), row["question"], row["answer"], row["category"], "Yes"])
    sheet.save(folder / "llava_v1.5_7b_POPE.xlsx")
