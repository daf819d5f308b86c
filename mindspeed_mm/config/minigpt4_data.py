"""The datasets section of MiniGPT-4's YAML files, as a data.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mindspeed_mm.config.lavis_yaml import Section
from mindspeed_mm.config.load import read_json
from mindspeed_mm.config.minigpt4_model import Mapped
from mindspeed_mm.errors import ConfigError

SHARDS, ALIGNED = ("laion", "cc_sbu"), "cc_sbu_align"
DATA_YAMLS = {"laion": "laion/defaults.yaml", "cc_sbu": "cc_sbu/defaults.yaml", ALIGNED: "cc_sbu_align/align.yaml"}
"""Data set -> the file of its defaults, in minigpt4/configs/datasets of the user's checkout."""

PROCESSOR = {
    "image_processor_type": "BlipImageProcessor",
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""blip2_image_train and blip2_image_eval, which are one: a bicubic resize to a square, CLIP's mean and deviation."""

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def map_data(section: Section, mapped: Mapped) -> dict[str, Any]:
    """The data.json of the datasets section.

    Raises:
        ConfigError: no data set, one that is not known, both kinds at once, or a key that means nothing here.
    """
    names = section.given()
    known = [*SHARDS, ALIGNED]
    if not names or not set(names) <= set(known) or (ALIGNED in names and len(names) > 1):
        raise ConfigError(
            f"datasets: found {', '.join(names) or 'none'}; expected laion, cc_sbu or both, or {ALIGNED} alone. Data "
            "of other kinds are named in a data.json (docs/data.md)."
        )
    sets = [_one(section.section(name), name, mapped) for name in names]
    aligned = names == [ALIGNED]
    if len(sets) == 1:
        del sets[0]["weight"]
    return {
        "dataset_param": {
            "dataset_type": "minigpt4" if aligned else "tar",
            "template_name": mapped.template if aligned else "minigpt4_caption",
            "basic_parameters": sets,
            "preprocess_parameters": {"train_pipeline": image_processor(mapped)},
            "tokenizer_config": {"from_pretrained": mapped.model["text_decoder"]["ckpt_path"]},
            "overlong": "truncate",
        },
        "dataloader_param": {"shuffle": True},
    }


def image_processor(mapped: Mapped) -> dict[str, Any]:
    """The image processor of a model, as transformers writes it."""
    return PROCESSOR | {"size": {"height": mapped.image_size, "width": mapped.image_size}}


def _one(section: Section, name: str, mapped: Mapped) -> dict[str, Any]:
    section.only("data_type", ("images",), "the data hold images")
    build = section.section("build_info")
    storage = build.take("storage")
    if not isinstance(storage, str):
        raise build.wrong("storage", storage, "the folder of the data" if name == ALIGNED else "tar files")
    build.refuse_rest()
    _processors(section, mapped)
    weight = section.number("sample_ratio", 1)
    if weight <= 0:
        raise section.wrong("sample_ratio", weight, "a number above 0")
    section.refuse_rest()
    if name == ALIGNED:
        folder = mapped.path(build, "storage", "the folder with filter_cap.json and image")
        mapped.note(build, "storage", f"data_path and data_folder in {folder}")
        return {"data_path": str(folder / "filter_cap.json"), "data_folder": str(folder / "image"), "weight": weight}
    shards = tar_files(build, storage, mapped)
    mapped.note(section, "build_info.storage, sample_ratio", f"data_path {shards}, weight {weight:g}")
    return {"data_path": shards, "data_folder": str(Path(shards).parent), "weight": weight}


def tar_files(build: Section, storage: str, mapped: Mapped) -> str:
    """A storage such as laion/{00000..10488}.tar as the pattern that our reader takes. Missing shards are counted.

    Raises:
        ConfigError: no shard is there, or the pattern would take more shards than the range.
    """
    folder = mapped.path(
        Section(build.name, {"storage": str(Path(storage).parent)}), "storage", "a folder of tar files"
    )
    name = Path(storage).name
    match = RANGE.search(name)
    if match is None:
        return str(folder / name)
    first, last = match.groups()
    if len(first) != len(last):
        raise build.wrong("storage", storage, "a range of numbers of one length such as {00000..01255}")
    before, behind = name[: match.start()], name[match.end() :]
    pattern = before + "[0-9]" * len(first) + behind
    wanted = {f"{before}{number:0{len(first)}d}{behind}" for number in range(int(first), int(last) + 1)}
    found = {path.name for path in folder.glob(pattern)}
    if not found & wanted:
        raise build.wrong("storage", storage, f"tar files; none of the range is in {folder}")
    if found - wanted:
        raise build.wrong(
            "storage", storage, f"the range of all shards of {folder}; {min(found - wanted)} is beyond it"
        )
    if wanted - found:
        mapped.note(
            build, "storage", f"{len(wanted - found)} of {len(wanted)} shards are missing: {min(wanted - found)}"
        )
    return str(folder / pattern)


def _processors(section: Section, mapped: Mapped) -> None:
    for name, allowed in {
        "vis_processor": ("blip2_image_train", "blip2_image_eval"),
        "text_processor": ("blip_caption",),
    }.items():
        kinds = section.section(name)
        for split in ("train", "eval"):
            block = kinds.section(split)
            block.only("name", allowed, "processors that are known")
            if name == "vis_processor" and block.count("image_size", mapped.image_size) != mapped.image_size:
                raise block.wrong("image_size", block.take("image_size"), f"{mapped.image_size}, as model.image_size")
            block.refuse_rest()
        kinds.refuse_rest()
    mapped.note(section, "vis_processor", f"train_pipeline of data.json, {mapped.image_size} pixels")
    meaning = "differs: captions stay as written, and blip_caption makes them lower case without marks"
    if section.name.endswith(ALIGNED):
        meaning = "no effect: captions stay as written, as in the original"
    mapped.note(section, "text_processor", meaning)


def annotations(path: Path) -> list[Any]:
    """The records of filter_cap.json, which holds them in a list inside an object. Raises ConfigError without one."""
    found = read_json(path).get("annotations")
    if not isinstance(found, list):
        raise ConfigError(f'{path}: found no list "annotations"; expected the one of cc_sbu_align')
    return found
