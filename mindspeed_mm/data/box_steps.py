"""How an image processor moves what lies in an image: its padding, resizing and cropping as steps of geometry."""

from __future__ import annotations

from pathlib import Path

from mindspeed_mm.config.load import read_json
from mindspeed_mm.data.config import PreprocessParameters
from mindspeed_mm.data.grounding.geometry import BoxStep, CentreCrop, ExpandToSquare, Resize, ResizeShortest
from mindspeed_mm.data.image import PROCESSOR_TYPES, ImageProcessor, config_file
from mindspeed_mm.data.media import MediaProcessor


def is_whole(media: MediaProcessor | None) -> bool:
    """Whether a model sees one image of a fixed size. Tiles, and images of any size, cover all of the stored one: they
    leave fractions of it as they are, also where a tile's own processor would crop."""
    return media is None or media.fixed is not None


def image_steps(parameters: PreprocessParameters) -> tuple[BoxStep, ...]:
    """Steps from a stored image to what the vision encoder sees.

    Processors of other families only resize the whole image, or cut it into tiles that cover it, which leaves fractions
    of the image as they are: no steps.
    """
    source = parameters.processor_source
    content = source if isinstance(source, dict) else _content(source)
    kind = content.get("image_processor_type", content.get("feature_extractor_type", PROCESSOR_TYPES[0]))
    if kind not in PROCESSOR_TYPES:
        return ()
    processor = ImageProcessor.from_config(source)
    steps: list[BoxStep] = [ExpandToSquare()] if parameters.pad or processor.do_pad else []
    if processor.do_resize:
        size = processor.size
        steps.append(ResizeShortest(size["shortest_edge"]) if len(size) == 1 else Resize(size["width"], size["height"]))
    if processor.do_center_crop:
        steps.append(CentreCrop(processor.crop_size["width"], processor.crop_size["height"]))
    return tuple(steps)


def _content(folder: str) -> dict[str, object]:
    found = read_json(config_file(Path(folder)))
    inner = found.get("image_processor", found)
    return inner if isinstance(inner, dict) else found
