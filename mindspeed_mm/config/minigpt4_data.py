"""The datasets section of MiniGPT-4's YAML files, as a data.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mindspeed_mm.config.lavis_yaml import Section
from mindspeed_mm.config.minigpt4_model import Mapped
from mindspeed_mm.config.minigpt4_tasks import DATA_YAMLS as TASK_YAMLS
from mindspeed_mm.config.minigpt4_tasks import KINDS, map_set
from mindspeed_mm.errors import ConfigError

SHARDS, ALIGNED = ("laion", "cc_sbu"), "cc_sbu_align"
DATA_YAMLS = {"laion": "laion/defaults.yaml", "cc_sbu": "cc_sbu/defaults.yaml", ALIGNED: "cc_sbu/align.yaml"}
DATA_YAMLS |= TASK_YAMLS
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
    if names and set(names) <= set(KINDS):
        return _tasks(section, names, mapped)
    known = [*SHARDS, ALIGNED]
    if not names or not set(names) <= set(known) or (ALIGNED in names and len(names) > 1):
        raise ConfigError(
            f"datasets: found {', '.join(names) or 'none'}; expected laion, cc_sbu or both, or {ALIGNED} alone, "
            f"or MiniGPT-v2's sets: {', '.join(KINDS)}. Data of other kinds are named in a data.json (docs/data.md)."
        )
    found = [section.section(name) for name in names]
    sets = _mixed(section, found, [_one(one, name, mapped) for one, name in zip(found, names, strict=True)], mapped)
    if names == [ALIGNED]:
        return _data("minigpt4", mapped.template, sets, mapped)
    mapped.note(section, "*", "broken images are left out and told, as the original does (image_error of data.json)")
    data = _data("tar", "minigpt4_caption", sets, mapped)
    data["dataset_param"]["image_error"] = "skip"
    return data


def _tasks(section: Section, names: list[str], mapped: Mapped) -> dict[str, Any]:
    """MiniGPT-v2's sets."""
    sets, found = [], [section.section(name) for name in names]
    for one, name in zip(found, names, strict=True):
        one.only("data_type", ("images", "text"), "the data hold images and texts")
        sets.append(map_set(one.section("build_info"), name, mapped))
        _processors(one, mapped)
    return _data("llava", mapped.template, _mixed(section, found, sets, mapped), mapped)


def _data(kind: str, template: str, sets: list[dict[str, Any]], mapped: Mapped) -> dict[str, Any]:
    return {
        "dataset_param": {
            "dataset_type": kind,
            "template_name": template,
            "basic_parameters": sets,
            "preprocess_parameters": {"train_pipeline": image_processor(mapped)},
            "tokenizer_config": {"from_pretrained": mapped.model["text_decoder"]["ckpt_path"]},
            "overlong": "truncate",
        },
        "dataloader_param": {"shuffle": True},
    }


def _mixed(section: Section, found: list[Section], sets: list[dict[str, Any]], mapped: Mapped) -> list[dict[str, Any]]:
    """The sets with their weights, where there are several. Raises ConfigError for keys that nothing has asked for."""
    weights = _weights(section, found, mapped)
    for one in found:
        one.refuse_rest()
    if len(sets) == 1:
        return sets
    return [entry | {"weight": weight} for entry, weight in zip(sets, weights, strict=True)]


def _weights(section: Section, sets: list[Section], mapped: Mapped) -> list[float]:
    """Shares of the samples of the sets; `mapped.batch` is set where they have a batch size. A batch of the original is
    of one set, drawn by its sample_ratio; here each sample is drawn, as often on average."""
    ratios, sizes = [_ratio(one) for one in sets], [one.count("batch_size", 0) for one in sets]
    if 0 in sizes and any(sizes):
        raise sets[sizes.index(0)].wrong("batch_size", None, "a number, as the other sets have one")
    if len(sets) > 1:
        mapped.note(
            section, "*.sample_ratio, *.batch_size", "differs: a batch holds samples of all sets, as often on average"
        )
    if not sizes[0]:
        return ratios
    mapped.batch = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(ratios)
    return [ratio * size for ratio, size in zip(ratios, sizes, strict=True)]


def _ratio(section: Section) -> float:
    found = section.number("sample_ratio", 1)
    if found <= 0:
        raise section.wrong("sample_ratio", found, "a number above 0")
    return found


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
    if name == ALIGNED:
        folder = mapped.path(build, "storage", "the folder with filter_cap.json and image")
        mapped.note(build, "storage", f"data_path and data_folder in {folder}")
        return {"data_path": str(folder / "filter_cap.json"), "data_folder": str(folder / "image")}
    shards = tar_files(build, storage, mapped)
    mapped.note(section, "build_info.storage", f"data_path {shards}")
    return {"caption_processor": "blip_caption", "data_path": shards, "data_folder": str(Path(shards).parent)}


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
    meaning = "caption_processor of data.json"
    if section.name.rpartition(".")[2] in KINDS:
        meaning = "captions, questions and short answers, when the records are made"
    if section.name.endswith(ALIGNED):
        meaning = "no effect: captions stay as written, as in the original"
    mapped.note(section, "text_processor", meaning)
