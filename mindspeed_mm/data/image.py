"""Images: safe decoding and CLIP preprocessing, equal to LLaVA's process_images with transformers' CLIPImageProcessor.

The steps, in float32 and channel order R, G, B: convert to RGB (alpha dropped, EXIF orientation ignored), pad to a
square with the mean colour (LLaVA's expand2square) where wanted, resize, centre crop, rescale, normalise.
"""

import json
import math
import os
import struct
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from mindspeed_mm.config.load import StrictModel, load_config, read_json
from mindspeed_mm.data.image_source import ImageError, is_empty, opened
from mindspeed_mm.data.sample import EncodedImage
from mindspeed_mm.errors import ConfigError, DataError

MAX_PIXELS = 2 * 89_478_485
"""Largest image that is decoded, padded or resized to: Pillow's own limit for a decompression bomb (3 bytes each)."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Raster formats only: Pillow would start other programs for some of the rest (EPS)."""

FAST_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's filters that torch has, too."""

SUFFIXES = (".jpg", ".png", ".gif", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".JPG", ".PNG", ".JPEG")
"""Suffixes tried for a missing file."""

CONFIG_NAMES = ("preprocessor_config.json", "processor_config.json")

PROCESSOR_TYPES = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
    "BlipImageProcessor",
    "BlipImageProcessorFast",
    "BlipImageProcessorPil",
    "LlavaImageProcessor",
    "LlavaImageProcessorFast",
    "LlavaImageProcessorPil",
    "SiglipImageProcessor",
    "SiglipImageProcessorFast",
    "SiglipImageProcessorPil",
    "ViTImageProcessor",
    "ViTImageProcessorFast",
    "ViTImageProcessorPil",
    "ViTFeatureExtractor",
)
"""Names under which transformers of any age saves an image processor of this way; LLaVA's own adds do_pad."""

_STRETCHED = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}

TYPE_DEFAULTS = {
    "BlipImageProcessor": {"size": {"height": 384, "width": 384}, "do_center_crop": False},
    "SiglipImageProcessor": _STRETCHED,
    "ViTImageProcessor": {**_STRETCHED, "resample": 2},
    "ViTFeatureExtractor": {**_STRETCHED, "resample": 2},
}
"""What a kind leaves out and means, where it is not CLIP's; by its name without Fast or Pil."""

SQUARES = ("BlipImageProcessor", "ViTImageProcessor", "ViTFeatureExtractor")
"""Kinds of which one number as the size is a square, and not the shortest edge."""

TYPE_KEYS = ("image_processor_type", "feature_extractor_type")

UNUSED_KEYS = ("processor_class", "image_seq_length", "_valid_processor_keys")
"""Keys of preprocessor_config.json that say nothing about pixels."""

FIXED_KEYS = {"data_format": "channels_first", "default_to_square": False}
"""Keys that fast processors save, with the only value that means what is done here."""


class ImageProcessor(StrictModel):
    """The fields of a CLIP preprocessor_config.json, with transformers' defaults for those that are left out."""

    do_convert_rgb: bool = True
    do_resize: bool = True
    size: dict[str, pydantic.PositiveInt] = {"shortest_edge": 224}
    resample: Literal[0, 1, 2, 3, 4, 5] = 3
    """Pillow's number of the filter; 3 is bicubic."""

    do_center_crop: bool = True
    crop_size: dict[str, pydantic.PositiveInt] = {"height": 224, "width": 224}
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    do_pad: bool = False
    """Of LlavaImageProcessor: pad to a square with the mean colour, whatever `preprocess` is asked for."""

    @pydantic.field_validator("size", "crop_size", mode="before")
    @classmethod
    def _from_int(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Old configs give one number: the shortest edge, or the side of a square crop."""
        if isinstance(value, int) and not isinstance(value, bool):
            return {"shortest_edge": value} if info.field_name == "size" else {"height": value, "width": value}
        return value

    @pydantic.model_validator(mode="after")
    def _check(self) -> "ImageProcessor":
        if set(self.size) not in ({"shortest_edge"}, {"height", "width"}):
            raise ValueError(
                f'size has the keys {sorted(self.size)}; expected "shortest_edge", or "height" and "width"'
            )
        if set(self.crop_size) != {"height", "width"}:
            raise ValueError(f'crop_size has the keys {sorted(self.crop_size)}; expected "height" and "width"')
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std is {self.image_std}; expected positive numbers")
        return self

    @classmethod
    def from_config(cls, source: str | Path | dict[str, Any]) -> "ImageProcessor":
        """From a preprocessor_config.json, the folder that holds one, or its parsed content.

        Raises ConfigError for a missing file, another kind of processor, and unknown or wrong fields.
        """
        context = None
        if not isinstance(source, dict):
            path = config_file(Path(source))
            source, context = read_json(path), str(path)
            source = source.get("image_processor", source) if path.name == CONFIG_NAMES[1] else source
        fields, defaults = dict(source), {}
        kinds = [fields.pop(key, None) for key in TYPE_KEYS]
        for key, kind in zip(TYPE_KEYS, kinds, strict=True):
            defaults |= TYPE_DEFAULTS.get(str(kind).removesuffix("Fast").removesuffix("Pil"), {})
            if kind is not None and kind not in PROCESSOR_TYPES:
                raise ConfigError(
                    f'image processor ({context or "given fields"}): {key} is "{kind}"; expected one of '
                    f"{', '.join(PROCESSOR_TYPES)}. Only CLIP's, SigLIP's and ViT's ways are known."
                )
        if type(fields.get("size")) is int and any(str(kind).startswith(SQUARES) for kind in kinds):
            fields["size"] = {"height": fields["size"], "width": fields["size"]}
        if isinstance(fields.get("size"), dict):  # it says what a single number would mean
            fields.pop("default_to_square", None)
        for key, value in FIXED_KEYS.items():
            if fields.pop(key, value) not in (value, None):
                raise ConfigError(f"image processor: {key} is {source[key]!r}; expected {value!r}, or leave it out.")
        for key in [key for key, value in fields.items() if key in UNUSED_KEYS or value is None]:
            del fields[key]
        return load_config(cls, defaults | fields, what="image processor", context=context)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every preprocessed image, or None where it depends on the image."""
        if self.do_center_crop:
            return self.crop_size["height"], self.crop_size["width"]
        if self.do_resize and "height" in self.size:
            return self.size["height"], self.size["width"]
        return None

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json as transformers reads it."""
        fields = self.model_dump(mode="json")
        if self.do_pad:
            fields["image_processor_type"] = "LlavaImageProcessor"
        else:
            fields["image_processor_type"] = "CLIPImageProcessor"
            del fields["do_pad"]
        (Path(folder) / CONFIG_NAMES[0]).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def config_file(path: Path) -> Path:
    """The processor's config of a folder, or the file itself. Raises ConfigError for a folder without one."""
    if not path.is_dir():
        return path
    for name in CONFIG_NAMES:
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"{path} holds no {CONFIG_NAMES[0]}; expected the folder of an image processor.")


def load_image(path: str | Path | EncodedImage) -> Image.Image:
    """Decode an image to RGB; its content decides the format, whatever the file's suffix says.

    Raises ImageError naming the path when it is missing, empty, truncated, too large or not an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on sizes and palettes; the size is checked below
            with Image.open(opened(path), formats=FORMATS) as image:
                _bound(image.width * image.height, f"is {image.width} x {image.height} pixels", path)
                return _to_rgb(image, path)
    except FileNotFoundError as error:
        other = other_suffix(path)
        hint = f"; {other.name} is there: `check-data --fix-suffix` writes records that name it" if other else ""
        raise ImageError(
            f"image {path} is missing; expected a file there. Correct the path (of a record: its image or the "
            f"data_folder), or add the file{hint}."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):  # ours, or the object store's
            raise
        if is_empty(path):
            raise ImageError(
                f"image {path} is empty (0 bytes); expected a whole {', '.join(FORMATS[:3])} or similar file. Fetch it "
                "again, or leave it out."
            ) from error
        unknown = isinstance(error, UnidentifiedImageError) and not isinstance(path, str | Path)
        reason = "its bytes begin as no known format does" if unknown else error  # Pillow's words name our buffer
        raise ImageError(
            f"image {path} cannot be decoded ({reason}); expected a whole {', '.join(FORMATS[:3])} or similar file. "
            "Replace it, or leave it out."
        ) from error


def image_size(image: str | Path | EncodedImage | Image.Image) -> tuple[int, int]:
    """(height, width) of an image, of which the header alone is read.

    Raises ImageError naming the path when it is missing, no image, or too large.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in load_image
            with Image.open(opened(image), formats=FORMATS) as header:
                _bound(header.width * header.height, f"is {header.width} x {header.height} pixels", image)
                return header.height, header.width
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        load_image(image)  # says what is wrong with it
        raise ImageError(
            f"image {image}: its size cannot be read ({error}); replace it or remove the record."
        ) from error


def other_suffix(path: str | Path | EncodedImage) -> Path | None:
    """A file of the same name with another suffix of an image, where there is one."""
    if not isinstance(path, str | Path) or not Path(path).name:
        return None
    candidates = (Path(path).with_suffix(suffix) for suffix in SUFFIXES)
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def _to_rgb(image: Image.Image, path: Any) -> Image.Image:
    """RGB of any mode; 16-bit greys are scaled to 8 bits, where Pillow alone would cut them off at 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"image {path} has 32-bit pixels, whose range no file tells; expected 8 or 16 bits. Convert it, or remove "
            "the record."
        )
    return image.convert("RGB")


def as_rgb(image: str | Path | EncodedImage | Image.Image) -> Image.Image:
    """RGB of an image, which may be in memory already, where its file may not have been read yet. Raises ImageError."""
    if not isinstance(image, Image.Image):
        return load_image(image)
    _bound(image.width * image.height, f"is {image.width} x {image.height} pixels", "(in memory)")
    try:
        return _to_rgb(image, "(in memory)")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise ImageError(f"an image in memory cannot be decoded ({error}); expected a whole one") from error


def preprocess(
    image: str | Path | EncodedImage | Image.Image,
    image_processor: ImageProcessor | str | Path | dict[str, Any],
    pad: bool = True,
    *,
    fast: bool = False,
) -> torch.Tensor:
    """An image as the vision encoder sees it: [3, H, W] float32.

    `image_processor` may also be a config that ImageProcessor.from_config takes.
    `pad` adds borders in the mean colour to make it square first (LLaVA's image_aspect_ratio "pad"); otherwise the
    centre crop cuts the longer side. `fast` resizes with torch's kernel instead of Pillow's (bicubic and bilinear
    only): a level of 255 may differ by one (about 0.4% of them do). Raises ImageError for an image that cannot be
    used.
    """
    if not isinstance(image_processor, ImageProcessor):
        image_processor = ImageProcessor.from_config(image_processor)
    path = image if not isinstance(image, Image.Image) else "(in memory)"
    pil_image = as_rgb(image)
    check_pixels(pil_image, path)
    if pad or image_processor.do_pad:
        pil_image = _expand_to_square(pil_image, image_processor, path)
    if image_processor.do_resize:
        size = _target_size(pil_image, image_processor, path)
        resample = image_processor.resample
        pixels = _fast_resized(pil_image, size, resample) if fast else np.asarray(pil_image.resize(size, resample))
    else:
        pixels = np.asarray(pil_image)
    if image_processor.do_center_crop:
        pixels = _center_crop(pixels, image_processor.crop_size["height"], image_processor.crop_size["width"])
    # A channel has 256 values, so what becomes of each is computed once and looked up: the same bits, much faster.
    table = _value_table(
        image_processor.rescale_factor if image_processor.do_rescale else None,
        image_processor.image_mean if image_processor.do_normalize else None,
        image_processor.image_std,
    )
    values = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel in range(3):
        # "clip" spares a check of bounds that 8 bits cannot leave.
        np.take(table[channel], pixels[..., channel], out=values[channel], mode="clip")
    return torch.from_numpy(values)


def check_pixels(image: Image.Image, path: Any) -> None:
    """Raise ImageError for an image without pixels."""
    if min(image.size) == 0:
        raise ImageError(f"image {path} has no pixels; replace it.")


def resized(image: Image.Image, size: tuple[int, int], resample: int, *, fast: bool = False) -> Image.Image:
    """An image at (width, height) pixels, by Pillow or with `fast` by torch's kernel (see `preprocess`)."""
    return Image.fromarray(_fast_resized(image, size, resample)) if fast else image.resize(size, resample)


@lru_cache(maxsize=8)
def _value_table(rescale_factor: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...]) -> np.ndarray:
    """[3, 256] float32: the value of each 8-bit level of each channel; None leaves a step out."""
    levels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    values = levels.astype(np.float32)
    if rescale_factor is not None:
        # The product is formed in float64 and rounded once, as transformers does.
        values = (levels * np.float64(rescale_factor)).astype(np.float32)
    if mean is not None:
        values = (values - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(values.T)


def _bound(pixels: int, found: str, path: Any) -> None:
    if pixels > MAX_PIXELS:
        raise ImageError(f"image {path} {found}; at most {MAX_PIXELS} are decoded. Scale it down or remove the record.")


def _expand_to_square(pil_image: Image.Image, image_processor: ImageProcessor, path: Any) -> Image.Image:
    """LLaVA's expand2square: the mean colour cut to integers, the image in the middle (offset rounded down)."""
    width, height = pil_image.size
    if width == height:
        return pil_image
    side = max(width, height)
    _bound(side * side, f"is {width} x {height}, {side * side} pixels when padded to a square", path)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in image_processor.image_mean))
    square.paste(pil_image, ((side - width) // 2, (side - height) // 2))
    return square


def _fast_resized(pil_image: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    """[height, width, 3] uint8 by torch's antialiased kernel, whose filters are Pillow's up to rounding."""
    pixels = torch.from_numpy(np.array(pil_image)).permute(2, 0, 1)[None]
    resized = interpolate(pixels, (size[1], size[0]), mode=FAST_FILTERS[resample], antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _target_size(pil_image: Image.Image, image_processor: ImageProcessor, path: Any) -> tuple[int, int]:
    """(width, height): a fixed size, or the shortest edge to its length and the other in proportion (rounded down)."""
    size = image_processor.size
    width, height = pil_image.size
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        longer = int(edge * max(width, height) / min(width, height))
        target = (edge, longer) if width <= height else (longer, edge)
    else:
        target = (size["width"], size["height"])
    _bound(target[0] * target[1], f"is {width} x {height}, {target[0] * target[1]} pixels when resized", path)
    return target


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, 3] -> [height, width, 3]; the offset is rounded down. An image that is smaller gets black borders."""
    missing_h, missing_w = max(height - pixels.shape[0], 0), max(width - pixels.shape[1], 0)
    if missing_h or missing_w:
        # transformers rounds the border up, then places the crop by its (negative, rounded down) offset
        before_h, before_w = math.ceil(missing_h / 2), math.ceil(missing_w / 2)
        borders = ((before_h, missing_h - before_h), (before_w, missing_w - before_w), (0, 0))
        pixels = np.pad(pixels, borders)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
