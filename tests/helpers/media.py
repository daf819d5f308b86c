"""Media for tests: images of one size, each with a given number of features."""

import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.build import build_dataset
from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.data.media import FixedSizeImages, ItemPlan
from mindspeed_mm.models.media import Media


def media_of(config, count):
    """The processor of a data config, with `count` features an image."""
    parameters = config.dataset_param.preprocess_parameters
    processor = ImageProcessor.from_config(parameters.processor_source)
    return FixedSizeImages(processor, count, pad=parameters.pad, fast_resize=parameters.fast_resize)


def dataset_of(config, tokenizer, count, max_length, **options):
    """build_dataset with `count` features an image."""
    return build_dataset(config, tokenizer, media_of(config, count), max_length, **options)


def items(images):
    """Preprocessed images [3, h, w] as media of one item each."""
    return tuple(Media.of_images(torch.as_tensor(image)[None]) for image in images)


def fixed_plan(count):
    """The plan of an image with `count` features and nothing around them."""
    return ItemPlan((1, 1, 1), (IMAGE_TOKEN_INDEX,) * count)
