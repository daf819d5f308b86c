"""From a data config to an endless stream of batches."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mindspeed_mm import registry
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.config import DATASETS, DataConfig, DataloaderParam
from mindspeed_mm.data.dataset import MultimodalDataset
from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.data.sample import Batch, Encoded
from mindspeed_mm.data.sampler import EndlessBatchSampler
from mindspeed_mm.data.template import check_template, get_template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def build_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    image_processor: ImageProcessor | None,
    tokens_per_image: int,
    max_length: int,
) -> MultimodalDataset:
    """Map-style dataset of Encoded from a data config.

    `image_processor=None` takes the one of the config; `max_length` counts expanded tokens. Every record is checked
    here (images are opened later). Raises DataError for bad records, TemplateError when the tokenizer does not
    round-trip the template, ConfigError for settings that do not fit.
    """
    parameters = config.dataset_param
    template = get_template(parameters.template_name)
    check_template(template, tokenizer)
    image_processor = image_processor or parameters.preprocess_parameters.image_processor()
    if image_processor.output_size is None:
        raise ConfigError(
            "the image processor gives images of different sizes (no centre crop); a batch needs one size. Set "
            "do_center_crop, or a size with height and width."
        )
    kind = registry.find(DATASETS, parameters.dataset_kind, "DATASET", what="dataset_type")
    sources = [kind(basic, template) for basic in parameters.basic_parameters]
    return MultimodalDataset(
        sources,
        tokenizer=tokenizer,
        template=template,
        image_processor=image_processor,
        pad=parameters.preprocess_parameters.pad,
        tokens_per_image=tokens_per_image,
        max_length=config.max_length(max_length),
        image_error=parameters.image_error,
        overlong=parameters.overlong,
    )


def build_loader(
    dataset: MultimodalDataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
    num_workers: int,
    pad_token_id: int,
    pad_multiple: int = 1,
    options: DataloaderParam | None = None,
) -> Iterator[Batch]:
    """Endless iterator of the micro-batches of one data-parallel rank, from `consumed_samples` on.

    The order depends on `seed` alone (see EndlessBatchSampler). `options` are shuffle, pinning and prefetching of
    data.json. Errors of workers come out as themselves: DataError naming record and cause.
    """
    options = options or DataloaderParam()
    sampler = EndlessBatchSampler(
        len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=seed,
        shuffle=options.shuffle,
    )
    worker_options: dict[str, Any] = {}
    if num_workers:
        worker_options = {"persistent_workers": True, "prefetch_factor": options.prefetch_factor or 2}
    loader = DataLoader(
        _ErrorsAsValues(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_CollateErrors(Collator(pad_token_id, dataset.image_processor.output_size, pad_multiple)),
        pin_memory=options.pin_memory and torch.cuda.is_available(),
        # An own generator seeds the workers, apart for every rank, and leaves the global one alone: drawing from that
        # would make a resumed run differ from a continued one.
        generator=torch.Generator().manual_seed(seed * 1_000_003 + dp_rank),
        **worker_options,
    )
    return _batches(loader)


def _batches(loader: DataLoader) -> Iterator[Batch]:
    logged: set[str] = set()
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        for reason in batch.skipped:
            if reason not in logged:
                logged.add(reason)
                logger.warning("record left out: %s", reason)
        yield batch


class _ErrorsAsValues(Dataset[Any]):
    """Hands a DataError on as a value: a DataLoader would bury its message in the trace of a worker."""

    def __init__(self, dataset: Dataset[Encoded]):
        self._dataset = dataset

    def __getitem__(self, index: int) -> Encoded | DataError:
        try:
            return self._dataset[index]
        except DataError as error:
            error.__cause__ = error.__context__ = None  # a picture's error may not survive pickling
            return error


class _CollateErrors:
    """Collates, or returns the first error among the samples."""

    def __init__(self, collator: Collator):
        self._collator = collator

    def __call__(self, samples: list[Encoded | DataError]) -> Batch | DataError:
        errors = [sample for sample in samples if isinstance(sample, DataError)]
        return errors[0] if errors else self._collator(samples)
