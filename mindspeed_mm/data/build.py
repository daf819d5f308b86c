"""From a data config to an endless stream of batches."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mindspeed_mm import ending, registry
from mindspeed_mm.data import loader_workers
from mindspeed_mm.data.auxiliary import accompanied
from mindspeed_mm.data.box_steps import image_steps, is_whole
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.config import DataConfig, DataloaderParam, DatasetParam
from mindspeed_mm.data.dataset import LEAST_JUDGED, DataSet, MultimodalDataset, Policies, Positions
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.expand import Encoding
from mindspeed_mm.data.grounding.notation import BinNotation
from mindspeed_mm.data.index import default_folder
from mindspeed_mm.data.media import MediaProcessor
from mindspeed_mm.data.mixing import mixed_indices
from mindspeed_mm.data.packing import PackedOrder
from mindspeed_mm.data.sample import Batch, Encoded
from mindspeed_mm.data.sampler import EndlessBatchSampler, EpochOrder, GroupedOrder, MixedOrder, Order, WeightedOrder
from mindspeed_mm.data.set_config import DATASETS, READ_BY
from mindspeed_mm.data.template_check import check_template
from mindspeed_mm.data.template_choice import template_of
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

WELL_FILLED = 0.97
"""Share of the positions of packed rows; below it, longer rows are suggested."""


@dataclass
class DataCounts:
    """What one rank has read so far."""

    samples: int = 0
    skipped: int = 0
    run_samples: int = 0
    """Of all ranks and of the whole run, as of the last time that ranks were asked (see trainer/validation.py)."""
    run_skipped: int = 0
    before: tuple[int, int] = (0, 0)
    """Samples and skips of the run before it was resumed."""

    def as_saved(self, sets: Sequence[DataSet]) -> dict[str, int]:
        """What a checkpoint says about the data read so far."""
        dropped, truncated = sum(part.dropped for part in sets), sum(part.truncated for part in sets)
        read = {"samples": self.run_samples, "skipped": self.run_skipped}
        return read | {"dropped_overlong": dropped, "truncated_overlong": truncated}

    def resume_from(self, saved: dict[str, int]) -> None:
        """Count on from a checkpoint."""
        self.before = (saved.get("samples", 0), saved.get("skipped", 0))
        self.run_samples, self.run_skipped = self.before


def build_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    media: MediaProcessor,
    max_length: int,
    *,
    positions: Positions | None = None,
    validation: bool = False,
    auxiliary: bool = False,
    preferences: bool = False,
) -> MultimodalDataset:
    """Map-style dataset of Encoded from a data config; with `validation` of its validation sets, with `auxiliary` of
    those beside pairs.

    `max_length` counts expanded tokens; `positions` gives the positions of a family that has multimodal ones;
    `preferences` asks for pairs of answers instead of conversations. Every record and its length are checked here
    (images are opened later, or their headers where sizes decide). Raises DataError for bad records, TemplateError when
    the tokenizer does not round-trip the template, ConfigError for settings that do not fit.
    """
    parameters = config.dataset_param
    template = template_of(config, tokenizer)
    check_template(template, tokenizer)
    check_box_words(config, tokenizer)
    options = read_options(config, template, media)
    trained = not (validation or auxiliary)
    chosen = parameters.basic_parameters if trained else parameters.validation_parameters
    chosen = parameters.auxiliary_parameters if auxiliary else chosen
    sets = []
    for basic in chosen:
        kind = parameters.kind_of(basic)
        source = registry.find(DATASETS, kind, "DATASET", what="dataset_type")(basic, options)
        sets.append(DataSet(source, basic.repeat_time, basic.data_path))
        check_set(basic.data_path, source, kind, media, preferences)
    loading = config.dataloader_param
    dataset = MultimodalDataset(
        sets,
        encoding=Encoding(tokenizer, template, media, parameters.special_text),
        positions=positions,
        max_length=config.max_length(max_length),
        policies=policies_of(parameters),
        measured=(loading.packing or loading.group_by_modality_length) and trained,
    )
    if trained and loading.packing:
        row_length(loading, dataset.max_length, dataset.longest)
    if parameters.mixing is not None and trained:
        sizes = [len(data_set) for data_set in sets]
        dataset.epoch = mixed_indices(parameters.mixing, sizes, parameters.set_names)
        logger.info("mixing: an epoch has %d samples, of sets of %s", len(dataset.epoch), sizes)
    return dataset


def policies_of(parameters: DatasetParam) -> Policies:
    """What the data config says of samples that cannot be used."""
    return Policies(
        image_error=parameters.image_error,
        overlong=parameters.overlong,
        empty_answer=parameters.empty_answer,
        max_skip_percent=parameters.max_skip_percent,
    )


def check_set(name: str, source: Any, kind: str, media: MediaProcessor, preferences: bool) -> None:
    """Raise ConfigError where a set has pairs and the objective wants conversations, or the other way round, and for
    videos that the model does not take."""
    pairs = bool(getattr(source, "pairs", False))
    if pairs and not preferences:
        raise ConfigError(
            f"{name} holds preference records (dataset_type {kind}), which this objective does not train on; "
            'give --objective dpo, or the "dataset_type" of conversations'
        )
    if preferences and not pairs:
        raise ConfigError(
            f"{name} holds conversations (dataset_type {kind}), but the objective trains on preference "
            'records, each with a chosen and a rejected answer; give "dataset_type": "preference", or --objective sft'
        )
    if getattr(source, "videos", False) and not media.takes_videos:
        raise ConfigError(
            f'{name}: found "frames", which puts the images of a record under one <image>; expected a model that takes '
            'videos so (model_id flamingo). Remove "frames": each image then has its own.'
        )


def check_user_tokens(tokenizer: Tokenizer, rows: int, where: str) -> None:
    """Raise DataError where a token that was added for use in texts has no row in an embedding of `rows` rows."""
    beyond = sorted((number, content) for content, number in tokenizer.user_tokens.items() if number >= rows)
    if beyond:
        shown = ", ".join(f"{content} = {number}" for number, content in beyond)
        raise DataError(
            f"the tokenizer {where} has added tokens beyond the {rows} rows of the text decoder's embedding: "
            f"{shown:.400}; expected ids below {rows} (text_decoder.language_vocab_size). Enlarge the checkpoint's "
            "embedding and language_vocab_size, or take the tokens out of added_tokens_decoder."
        )


def check_box_words(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where boxes become words and the tokenizer would take these to pieces."""
    given = [basic.grounding for basic in config.all_sets if basic.grounding is not None]
    if not any(isinstance(grounding.style, BinNotation) for grounding in given):
        return
    missing = [word for word in BinNotation().words if word not in tokenizer.user_tokens]
    if missing:
        raise ConfigError(
            f'the notation "bins" writes boxes as tokens, and the tokenizer lacks {len(missing)} of them, such as '
            f"{missing[0]}; `mindspeed-mm convert SRC DST --to llava --box-tokens` (or another layout) gives them to "
            "model and tokenizer, take both from there"
        )


def read_options(config: DataConfig, template: Template, media: MediaProcessor | None = None) -> ReadOptions:
    """How the config's data files are read; `media` None: images become pixels as the config alone says."""
    parameters = config.dataset_param
    folder = Path(parameters.index_folder) if parameters.index_folder else default_folder()
    has_boxes = any(parameters.kind_of(basic) in READ_BY["grounding"] for basic in config.all_sets)
    steps = image_steps(parameters.preprocess_parameters) if has_boxes and is_whole(media) else ()
    return ReadOptions(template, folder, parameters.images_first, parameters.unknown_keys, image_steps=steps)


def build_order(
    dataset: MultimodalDataset,
    options: DataloaderParam,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    epoch: np.ndarray | None = None,
    global_batch_size: int = 1,
) -> Order:
    """The endless sequence of samples (or packed rows) that a run trains on; equal on every rank.

    `epoch` [n] int64 are the samples of an epoch where they are not all, each once; it goes without `weights`.
    Raises ConfigError for what does not go together.
    """
    if options.group_by_modality_length:
        assert weights is None, "DataConfig refuses both"
        lengths = dataset.lengths if epoch is None else dataset.lengths[epoch]
        grouped = GroupedOrder(lengths, batch=global_batch_size, seed=seed)
        return grouped if epoch is None else MixedOrder(grouped, epoch)
    if weights is not None:
        sizes = [len(data_set) for data_set in dataset.sets]
        order: Order = WeightedOrder(sizes, weights, seed=seed, shuffle=options.shuffle)
    else:
        order = EpochOrder(len(dataset) if epoch is None else len(epoch), seed=seed, shuffle=options.shuffle)
        order = order if epoch is None else MixedOrder(order, epoch)
    if not options.packing:
        return order
    length = row_length(options, dataset.max_length, dataset.longest)
    packed = PackedOrder(order, dataset.lengths, capacity=length, window=options.packing_window, seed=seed)
    fill = packed.fill()
    logger.info("packing: %.1f%% of the positions of the first rows are used", 100 * fill)
    if fill < WELL_FILLED:
        longer = PackedOrder(order, dataset.lengths, capacity=2 * length, window=options.packing_window, seed=seed)
        logger.info('"packing_length": %d would use %.1f%% of them', 2 * length, 100 * longer.fill())
    return packed


def row_length(options: DataloaderParam, max_length: int, longest: int | None = None) -> int:
    """Positions of a packed row, for samples of at most `max_length` (`longest` with both sides of a pair). Raises
    ConfigError where packing_length is less."""
    length = options.packing_length or longest or max_length
    if length < max_length:
        raise ConfigError(
            f"data config: packing_length is {length}, less than the maximum length of a sample, {max_length}; "
            "raise it, or lower --seq-length."
        )
    return length


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
    weights: Sequence[float] | None = None,
    epoch: np.ndarray | None = None,
    global_batch_size: int | None = None,
    counts: DataCounts | None = None,
    companions: MultimodalDataset | None = None,
) -> Iterator[Batch]:
    """Endless iterator of the micro-batches of one data-parallel rank, from `consumed_samples` on.

    The order depends on `seed` and the data alone (see sampler.py). `options` are shuffle, packing, pinning and
    prefetching of data.json, `weights` its weights, `epoch` the dataset's mixed epoch, `global_batch_size` (default:
    micro_batch_size * dp_size) is for grouping, `companions` go beside pairs (auxiliary.py). `counts` is kept up to
    date. Errors of workers come out as themselves: DataError naming record and cause. Close the iterator, or leave
    `ending.closing`, to end the workers.
    """
    options = options or DataloaderParam()
    size = global_batch_size or micro_batch_size * dp_size
    order = build_order(dataset, options, seed=seed, weights=weights, epoch=epoch, global_batch_size=size)
    if companions is not None:
        order = accompanied(order, companions, seed=seed, shuffle=options.shuffle)
    sampler = EndlessBatchSampler(
        order,
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    several = {"persistent_workers": True, "prefetch_factor": options.prefetch_factor or 2} if num_workers else {}
    row = row_length(options, dataset.max_length, dataset.longest) if options.packing else None
    loader = DataLoader(
        _ErrorsAsValues(dataset, companions),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_CollateErrors(Collator(pad_token_id, pad_multiple, row)),
        worker_init_fn=loader_workers.settle,
        pin_memory=options.pin_memory and torch.cuda.is_available(),
        # An own generator seeds the workers, apart for every rank, and leaves the global one alone: drawing from that
        # would make a resumed run differ from a continued one.
        generator=torch.Generator().manual_seed(seed * 1_000_003 + dp_rank),
        **several,
    )
    batches = _batches(loader, counts or DataCounts(), dataset.policies.max_skip_percent)
    if num_workers:
        ending.at_end(batches.close)
    return batches


def _batches(loader: DataLoader, counts: DataCounts, max_skip_percent: float) -> Iterator[Batch]:
    logged: set[str] = set()
    with contextlib.closing(loader_workers.batches(loader)) as batches:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            counts.samples += len(batch.sample_ids)
            counts.skipped += len(batch.skipped)
            for reason in batch.skipped:
                if reason not in logged:
                    logged.add(reason)
                    logger.warning("record left out: %s", reason)
            if counts.skipped > max_skip_percent / 100 * max(counts.samples, LEAST_JUDGED):
                raise DataError(
                    f"{counts.skipped} records had no usable image while {counts.samples} samples were read, more than "
                    f"max_skip_percent {max_skip_percent:g} allows; the last one: {batch.skipped[-1]} Run check-data."
                )
            yield batch


class _ErrorsAsValues(Dataset[Any]):
    """Hands a DataError on as a value: a DataLoader would bury its message in the trace of a worker."""

    def __init__(self, dataset: MultimodalDataset, companions: MultimodalDataset | None = None):
        self._dataset, self._companions = dataset, companions

    def __getitem__(self, index: int | tuple[int, ...]) -> Encoded | list[Encoded] | DataError:
        try:
            if self._companions is not None:
                pair, companion = index
                return [self._dataset[pair], self._companions[companion]]
            return self._dataset.row(index) if isinstance(index, tuple) else self._dataset[index]
        except DataError as error:
            error.__cause__ = error.__context__ = None  # an image's error may not survive pickling
            return error


class _CollateErrors:
    """Collates, or returns the first error among the samples."""

    def __init__(self, collator: Collator):
        self._collator = collator

    def __call__(self, samples: list[Encoded | list[Encoded] | DataError]) -> Batch | DataError:
        errors = [sample for sample in samples if isinstance(sample, DataError)]
        return errors[0] if errors else self._collator(samples)
