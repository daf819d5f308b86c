"""Open SHR (Zhao et al., 2023, HA-DPO): images of Visual Genome to describe, and what is known to be on them.

The benchmark's folder holds val_images_final.json, a list of {"image_id"}, and shr_factual_part1.jsonl and
shr_factual_part2.jsonl, one {image_id: [facts]} a line. Visual Genome's folder holds image_data.json,
region_descriptions.json and the images.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.errors import DataError

IMAGES = "val_images_final.json"
FACTS = ("shr_factual_part1.jsonl", "shr_factual_part2.jsonl")
IMAGE_DATA = "image_data.json"
REGIONS = "region_descriptions.json"
GENOME_FOLDERS = ("", "../VG", "../vg")
"""Where Visual Genome is looked for when no folder is given, from the benchmark's folder."""
QUESTION = "Describe this image in detail."
"""HA-DPO's request."""


def is_shr(folder: Path) -> bool:
    """Whether this folder is SHR's."""
    return (folder / IMAGES).is_file()


def genome_folder(folder: Path, image_root: str | Path | None) -> Path:
    """Visual Genome's folder: the one given, or one that is known to stand beside the benchmark's."""
    if image_root is not None:
        return Path(image_root)
    return next((one for name in GENOME_FOLDERS if ((one := folder / name) / IMAGE_DATA).is_file()), folder)


def read_shr(folder: Path, genome: Path) -> tuple[list[dict[str, str]], str]:
    """Cells of each image: index, image_path, question, regions and facts (a line each); and a SHA-256 of them all.

    A region is "[left, top, right, bottom]: phrase" with fractions of the image's size, rounded to two digits.
    Regions are a file of 0.7 GB: one image's are in memory at a time.

    Raises DataError for a file that is missing or damaged, and names all images that a file does not know.
    """
    ids = [_image_id(record, folder / IMAGES) for record in _records(folder / IMAGES)]
    wanted = set(ids)
    if len(wanted) < len(ids):
        repeated = next(one for number, one in enumerate(ids) if one in ids[:number])
        raise DataError(f"{folder / IMAGES} names image {repeated} twice; keep one.")
    facts = _facts(folder)
    sizes = {own: record for record in _records(genome / IMAGE_DATA) if (own := str(record.get("image_id"))) in wanted}
    _refuse_missing(ids, sizes, genome / IMAGE_DATA)
    regions: dict[str, str] = {}
    for record in _records(genome / REGIONS):
        own = _region_image(record)
        if own in wanted:
            regions[own] = _region_lines(record["regions"], sizes[own], genome / REGIONS)
    _refuse_missing(ids, regions, genome / REGIONS)
    cells = [
        {
            "index": own,
            "image_path": _file_name(sizes[own], genome / IMAGE_DATA),
            "question": QUESTION,
            "regions": regions[own],
            "facts": "\n".join(facts.get(own, ())),
        }
        for own in ids
    ]
    return cells, hashlib.sha256(json.dumps(cells).encode("ascii")).hexdigest()


def _records(path: Path) -> Iterable[dict[str, Any]]:
    records = RecordFile(path)
    return (records.verified(number) for number in range(len(records)))


def _image_id(record: Mapping[str, Any], path: Path) -> str:
    found = record.get("image_id")
    if not isinstance(found, int | str) or isinstance(found, bool):
        raise DataError(f'{path} has {record!r:.80}; expected {{"image_id": 2316462}}.')
    return str(found)


def _facts(folder: Path) -> dict[str, list[str]]:
    """What people wrote of each image, a later file's after an earlier one's for the same image: HA-DPO keeps those of
    the later file."""
    found: dict[str, list[str]] = {}
    for name in FACTS:
        for record in _records(folder / name):
            for image, texts in record.items():
                if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                    raise DataError(f"{folder / name}, image {image}: found {texts!r:.80}; expected a list of texts.")
                found[image] = texts
    return found


def _region_image(record: Mapping[str, Any]) -> str:
    """The image of some regions; "" for a record without any."""
    regions = record.get("regions")
    first = regions[0] if isinstance(regions, list) and regions else {}
    return str(first.get("image_id", "")) if isinstance(first, Mapping) else ""


def _region_lines(regions: list[Any], image: Mapping[str, Any], path: Path) -> str:
    own = image.get("image_id")
    width, height = image.get("width"), image.get("height")
    if not all(isinstance(side, int | float) and side > 0 for side in (width, height)):
        raise DataError(f"{path.with_name(IMAGE_DATA)}, image {own}: found width {width!r} and height {height!r}.")
    lines = []
    for region in regions:
        try:
            x, y, wide, high = (float(region[key]) for key in ("x", "y", "width", "height"))
            phrase = str(region["phrase"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, image {own}: a region is {region!r:.120}; expected x, y, width, height and phrase."
            ) from error
        box = [round(one, 2) for one in (x / width, y / height, (x + wide) / width, (y + high) / height)]
        if phrase:
            lines.append(f"{box}: {phrase}")
    return "\n".join(lines)


def _file_name(image: Mapping[str, Any], path: Path) -> str:
    """VG_100K/1.jpg or VG_100K_2/1.jpg: the end of the image's address."""
    url = image.get("url")
    if not isinstance(url, str) or url.count("/") < 1:
        raise DataError(f'{path} has {image!r:.120}; expected a "url" such as ".../VG_100K_2/1.jpg".')
    return "/".join(url.split("/")[-2:])


def _refuse_missing(ids: list[str], known: Mapping[str, Any], path: Path) -> None:
    missing = [one for one in ids if one not in known]
    if missing:
        raise DataError(
            f"{path} does not know {len(missing)} of SHR's {len(ids)} images, for example {missing[0]}; give the file "
            "of Visual Genome 1.2 or later (--image-root is its folder)."
        )
