"""TRL's DPOTrainer with PEFT on the golden LLaVA, fed the tokens and pixels that our data code makes."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl
from PIL import Image

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.sample import Encoded
from tests.helpers.golden_model import model_json

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
LORA = {"r": 3, "alpha": 7, "target_modules": TARGETS}


def describe(golden: Path, folder: Path) -> None:
    """model.json of the golden LLaVA in the hub's layout, with an adapter that TRL's run begins with."""
    parts = dict.fromkeys(("text_decoder", "vision_encoder", "vision_projector"), "llava_hf")
    model = model_json(golden, trained=("text_decoder",), **parts)
    block = LORA | {"load": str(folder / "adapter")}
    model["text_decoder"] |= {"language_vocab_size": 1024, "lora": block}
    (folder / "model.json").write_text(json.dumps(model))


def adapted(golden: Path, folder: Path) -> peft.PeftModel:
    """The golden LLaVA with a fresh adapter on its decoder, which is saved in `folder`."""
    base = transformers.LlavaForConditionalGeneration.from_pretrained(
        golden / "models" / "llava_hf", dtype=torch.float32
    )
    names = rf".*language_model.*({'|'.join(TARGETS)})"
    torch.manual_seed(5)
    model = peft.get_peft_model(base, peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=names))
    model.save_pretrained(folder / "adapter")
    return model


class TheirTrainer(trl.DPOTrainer):
    """With samples of ours in the order of the file."""

    def __init__(self, golden: Path, model: peft.PeftModel, samples: list[Encoded], folder: Path, **options) -> None:
        image_id = model.config.image_token_id
        processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil.from_pretrained(golden / "models" / "clip_hf"),
            transformers.AutoTokenizer.from_pretrained(golden / "models" / "llava_hf"),
            patch_size=14,
            vision_feature_select_strategy="default",
        )
        blank = Image.new("RGB", (2, 2))
        rows = [
            {"prompt": str(number), "chosen": "a", "rejected": "b", "images": [blank]} for number in range(len(samples))
        ]
        settings = {
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "optim": "adamw_torch",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "max_length": None,
        }
        super().__init__(
            model=model,
            args=trl.DPOConfig(**settings | options),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=processor,
            data_collator=lambda rows: collated([samples[int(row["prompt"])] for row in rows], image_id),
        )


def sides(sample: Encoded) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of both conversations of a pair."""
    shared, first, _ = sample.branches
    ends = slice(shared, shared + first), slice(shared + first, None)
    ids, labels = sample.input_ids, sample.labels
    return [(ids[:shared] + ids[end], labels[:shared] + labels[end]) for end in ends]


def collated(samples: list[Encoded], image_id: int) -> dict[str, torch.Tensor]:
    """A batch as TRL's collator makes it: chosen conversations, then rejected ones, images for both."""
    rows = [sides(sample)[side] for side in (0, 1) for sample in samples]
    longest = max(len(ids) for ids, _ in rows)
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["completion_mask"] = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, (ids, labels) in enumerate(rows):
        row = slice(0, len(ids))
        batch["input_ids"][number, row] = torch.tensor([image_id if x == IMAGE_TOKEN_INDEX else x for x in ids])
        batch["attention_mask"][number, row] = 1
        batch["completion_mask"][number, row] = torch.tensor([label != IGNORE_INDEX for label in labels]).long()
    pixels = [item.pixels for sample in samples for item in sample.media]
    return batch | ({"pixel_values": torch.cat(pixels * 2)} if pixels else {})
