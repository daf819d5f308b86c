"""MiniGPT-v2's sets in the datasets section of a YAML file: which annotation files and images they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_mm.config.lavis_yaml import Section
from mindspeed_mm.config.minigpt4_model import Mapped

LLAVA, GROUNDING = "llava", "grounding"
KINDS = {
    **dict.fromkeys(("coco_vqa", "ok_vqa", "aok_vqa", "gqa", "ocrvqa"), LLAVA),
    **dict.fromkeys(("coco_caption", "textcaps_caption"), LLAVA),
    **dict.fromkeys(("refcoco", "refcocop", "refcocog", "invrefcoco", "invrefcocop", "invrefcocog"), GROUNDING),
    "refvg": GROUNDING,
    **dict.fromkeys(("flickr_grounded_caption", "flickr_CaptionToPhrase", "flickr_ObjectToPhrase"), LLAVA),
    **dict.fromkeys(("llava_conversation", "llava_detail", "llava_reason", "multitask_conversation"), LLAVA),
    "unnatural_instruction": LLAVA,
}
"""Set, by the name of its builder -> dataset_type of its records (data/multitask.py)."""

DATA_YAMLS = {
    "coco_vqa": "coco/defaults_vqa.yaml",
    "ok_vqa": "okvqa/defaults.yaml",
    "aok_vqa": "aokvqa/defaults.yaml",
    "gqa": "gqa/balanced_val.yaml",
    "ocrvqa": "ocrvqa/ocrvqa.yaml",
    "coco_caption": "coco/caption.yaml",
    "textcaps_caption": "textcaps/caption.yaml",
    **{name: f"coco_bbox/{name}.yaml" for name in KINDS if "refcoco" in name},
    "refvg": "vg/ref.yaml",
    "flickr_grounded_caption": "flickr/default.yaml",
    "flickr_CaptionToPhrase": "flickr/caption_to_phrase.yaml",
    "flickr_ObjectToPhrase": "flickr/object_to_phrase.yaml",
    "llava_conversation": "llava/conversation.yaml",
    "llava_detail": "llava/detail.yaml",
    "llava_reason": "llava/reason.yaml",
    "multitask_conversation": "multitask_conversation/default.yaml",
    "unnatural_instruction": "nlp/unnatural_instruction.yaml",
}
"""The files of their defaults, in minigpt4/configs/datasets of the user's checkout."""


def map_set(build: Section, name: str, mapped: Mapped) -> dict[str, Any]:
    """The entry of basic_parameters of one set; what is to be converted for it is noted in `mapped.conversions`.

    Raises:
        ConfigError: no annotation file, a path without anything there, or a key that means nothing here.
    """
    files, images = _files(build, name, mapped)
    build.refuse_rest()
    mapped.conversions[name] = files
    mapped.note(build, "annotations", f"converted to records as `mindspeed-mm convert-data ... --to {name}` does")
    entry = {"data_path": name, "data_folder": images, "dataset_type": KINDS[name], "name": name}
    return entry | ({"grounding": {"notation": "minigpt_v2"}} if KINDS[name] == GROUNDING else {})


def _files(build: Section, name: str, mapped: Mapped) -> tuple[list[Path], str]:
    """(annotation files, the folder of the images) of a set."""
    if name == "refvg":
        folder = mapped.path(build, "data_dir", "Visual Genome's folder")
        return [folder / "region_descriptions.json", folder / "image_data.json"], str(folder)
    if KINDS[name] == GROUNDING:
        folder = mapped.path(build, "ann_path", "the folder of refcoco, refcoco+ and refcocog")
        usual = name.removeprefix("inv").replace("refcocop", "refcoco+")
        split, kind = build.take("splitBy", "unc"), str(build.take("dataset", usual)).removeprefix("inv")
        images = mapped.path(build, "image_path", "the folder of COCO's train2014")
        return [folder / kind / f"refs({split}).p", folder / kind / "instances.json"], str(images)
    if build.take("annotations") is not None:  # LAVIS's own form, of captions and questions
        splits, shown = build.section("annotations"), build.section("images")
        train = splits.section("train")
        train.take("url")
        train.take("md5")
        paths = _paths(train, mapped)
        train.refuse_rest()
        for split in ("val", "test"):  # nothing is evaluated in training
            splits.take(split)
        splits.refuse_rest()
        images = mapped.path(shown, "storage", "the folder of the images")
        shown.refuse_rest()
        return paths, str(images)
    images = build.take("image_path")
    folder = "" if images is None else str(mapped.path(build, "image_path", "the folder of the images"))
    return [mapped.path(build, "ann_path", "the annotations")], folder


def _paths(train: Section, mapped: Mapped) -> list[Path]:
    """The files of `storage`, a path or a list of them. Raises ConfigError where one is not there."""
    given = train.take("storage")
    files = given if isinstance(given, list) and given else [given]
    return [mapped.path(Section(train.name, {"storage": file}), "storage", "the annotations") for file in files]
