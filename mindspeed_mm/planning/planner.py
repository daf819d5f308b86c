"""From the flags of `mindspeed-mm plan` to layouts: each is checked by what `train` checks, then predicted."""

from __future__ import annotations

import argparse
import copy
import logging
from dataclasses import dataclass, field, replace

from megatron.driver import arguments
from megatron.driver.arguments import DriverArguments, with_virtual_stages
from megatron.driver.optimizer_flags import MUON
from mindspeed_mm.config.trained_parts import ModelFlags
from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.dataset import MultimodalDataset
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.operations import EncoderWork
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.planning.flags import STRATEGY_FLAGS
from mindspeed_mm.planning.hardware import Hardware, find_hardware, from_records
from mindspeed_mm.planning.job import PlannedRow, TrainingJob
from mindspeed_mm.planning.search import ParallelStrategy, Plan, evaluate, ranked, strategies, with_recompute
from mindspeed_mm.platform import Platform
from mindspeed_mm.trainer.architecture import check_trains
from mindspeed_mm.trainer.inputs import RunInputs, check_flags, model_spec, runtime_of

logger = logging.getLogger(__name__)

SAMPLED = 64
"""Samples of --mm-data that are looked at for their lengths."""


@dataclass(frozen=True)
class PlanResult:
    """What a search found."""

    hardware: Hardware
    limit: float
    """Bytes of a device that may be used."""
    fitting: list[Plan]
    others: list[Plan]
    refused: list[str] = field(default_factory=list)
    """Why layouts are impossible, each reason once."""
    samples: int | None = None


class Planner:
    """One call of the command."""

    def __init__(self, namespace: argparse.Namespace, platform: Platform, flags: ModelFlags | None = None) -> None:
        """`flags`: what the command line changes of the model config."""
        self.namespace, self.platform, self.flags = namespace, platform, flags or ModelFlags()
        _check_numbers(namespace)
        self.spec = model_spec(namespace.mm_model, self.flags)
        check_trains(self.spec)
        self.samples = namespace.samples
        self.hardware = self._hardware()
        self.row = self._row()
        self.limit = self.hardware.memory * (1 - namespace.reserve / 100)

    def search(self) -> PlanResult:
        """Predict every layout that the flags leave open. Raises ConfigError where none is possible."""
        given = self._given()
        candidates = list(strategies(self.namespace.devices, given, devices_per_host=self.hardware.devices_per_host))
        plans, refused = [], {}
        with progress_bar("layouts", len(candidates)) as advance:
            for strategy in candidates:
                try:
                    plans.append(evaluate(self.job(strategy), strategy, self.hardware))
                except ConfigError as error:
                    refused.setdefault(str(error), strategy)
                advance(1)
        if not plans:
            raise ConfigError("no layout is possible:\n  " + "\n  ".join(refused))
        fitting, others = ranked(plans, self.limit)
        return PlanResult(self.hardware, self.limit, fitting, others, list(refused), self.samples)

    def job(self, strategy: ParallelStrategy) -> TrainingJob:
        """The run of one strategy. Raises ConfigError where train would refuse it."""
        args = self._arguments(strategy)
        spec = with_recompute(self.spec, strategy.recompute)
        args = with_virtual_stages(args, spec.text_decoder.num_layers)
        runtime = runtime_of(args)
        check_flags(args, spec, runtime)
        return job_of(args, spec, self.row, self.hardware.device)

    def _arguments(self, strategy: ParallelStrategy) -> DriverArguments:
        """Train's arguments for a layout, checked. What a plan does not depend on gets a value."""
        namespace, given = copy.copy(self.namespace), self.namespace
        for flag, name in STRATEGY_FLAGS.items():
            setattr(namespace, flag, getattr(strategy, name))
        namespace.lr = 1e-4 if given.lr is None else given.lr
        namespace.train_iters = 10**6 if given.train_iters is None else given.train_iters
        namespace.seq_length = given.seq_length or self.spec.text_decoder.language_max_sequence_length
        if self._given() != strategy or given.sequence_parallel:
            namespace.sequence_parallel = strategy.tensor > 1
        if not self._given().decided and given.optimizer != MUON:  # sharing optimizer state costs nothing
            shared = given.devices // (strategy.tensor * strategy.pipeline)
            namespace.use_distributed_optimizer = given.use_distributed_optimizer or shared > 1
        return arguments.from_namespace(namespace, world_size=given.devices)

    def _given(self) -> ParallelStrategy:
        given = ParallelStrategy(**{name: getattr(self.namespace, flag) for flag, name in STRATEGY_FLAGS.items()})
        recompute = self.namespace.recompute
        if recompute is None and None not in given[:4]:
            recompute = "model"
        return given._replace(recompute=recompute)

    def _hardware(self) -> Hardware:
        given = self.namespace
        if given.hardware is not None:
            hardware = find_hardware(given.hardware)
        else:
            # Of a device that is not named, the larger figures are assumed: those of the kernels that an NPU has.
            hardware = Hardware(name="the given device", device="npu", source="given")
            if given.memory is None:
                hardware = Hardware(
                    name="this machine",
                    device=self.platform.name,
                    memory=self.platform.memory().total * 2**20,
                    source="this process's device",
                )
        scaled = {
            "peak_flops": (given.peak_tflops, 1e12),
            "memory_bandwidth": (given.memory_bandwidth, 1e9),
            "interconnect": (given.interconnect, 1e9),
            "network": (given.network, 1e9),
        }
        figures = {name: None if value is None else value * unit for name, (value, unit) in scaled.items()}
        hardware = hardware.given(
            **figures,
            device=given.device,
            memory=given.memory,
            efficiency=given.efficiency,
            devices_per_host=given.devices_per_host,
        )
        if given.measured is not None:
            rate = from_records(given.measured, given.measured_devices)
            hardware = replace(hardware, peak_flops=rate, efficiency=1.0, measured=True, source=given.measured)
        if given.calibrate:
            from mindspeed_mm.planning.calibration import calibrate

            hardware = calibrate(hardware, self.platform, self.spec)
        return hardware

    def _row(self) -> PlannedRow:
        """The rows of a micro-batch, from the data or from the flags."""
        given, text = self.namespace, self.spec.text_decoder
        length = given.seq_length or text.language_max_sequence_length
        if given.mm_data is not None:
            self.samples, row = _look_at_data(given, self.platform, self.flags, self.samples)
            return row
        images = 1.0 if given.sample_images is None else given.sample_images
        tokens = float(length) if given.sample_tokens is None else given.sample_tokens
        if tokens > length:
            raise ConfigError(f"--sample-tokens {tokens:g} exceeds --seq-length {length}: lower it")
        return PlannedRow(positions=length, lengths=(tokens,), images=images, supervised=given.sample_supervised)


def job_of(args: DriverArguments, spec: ModelSpec, row: PlannedRow, device: str) -> TrainingJob:
    """The planner's view of a run's arguments."""
    return TrainingJob(
        spec=spec,
        runtime=runtime_of(args),
        data_parallel_size=args.data_parallel_size,
        micro_batch_size=args.micro_batch_size,
        num_micro_batches=args.num_micro_batches,
        use_distributed_optimizer=args.use_distributed_optimizer,
        muon=args.optimizer == MUON,
        averaged=args.ema_decay is not None,
        row=row,
        device=device,
        num_workers=args.num_workers,
    )


def _check_numbers(namespace: argparse.Namespace) -> None:
    """Raises ConfigError for numbers out of range, all at once."""
    problems = []
    for name in ("devices", "devices_per_host", "measured_devices", "top", "samples"):
        value = getattr(namespace, name)
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} is {value}: expected at least 1")
    for name in ("memory", "peak_tflops", "memory_bandwidth", "interconnect", "network", "efficiency", "sample_tokens"):
        value = getattr(namespace, name)
        if value is not None and not value > 0:
            problems.append(f"--{name.replace('_', '-')} is {value:g}: expected above 0")
    if namespace.efficiency is not None and namespace.efficiency > 1:
        problems.append(f"--efficiency is {namespace.efficiency:g}: expected at most 1, a share of the peak")
    if not 0 <= namespace.reserve < 100:
        problems.append(f"--reserve is {namespace.reserve:g}: expected 0 to below 100 percent")
    for name in ("sample_images", "sample_supervised"):
        value = getattr(namespace, name)
        if value is not None and value < 0:
            problems.append(f"--{name.replace('_', '-')} is {value:g}: expected at least 0")
    given = [
        name for name in ("sample_tokens", "sample_images", "sample_supervised") if getattr(namespace, name) is not None
    ]
    if namespace.mm_data is not None and given:
        problems.append(f"--mm-data says how long samples are: leave out --{given[0].replace('_', '-')}")
    if problems:
        raise ConfigError("the command line cannot be used:\n  " + "\n  ".join(problems))


def _look_at_data(
    namespace: argparse.Namespace, platform: Platform, flags: ModelFlags, samples: int | None
) -> tuple[int, PlannedRow]:
    """(samples of an epoch, the mean row) of a data config; the data is checked as `train` checks it."""
    single = copy.copy(namespace)
    for flag in STRATEGY_FLAGS:
        setattr(single, flag, 1)
    single.sequence_parallel, single.global_batch_size = False, 1
    single.lr, single.train_iters = 1e-4, 10**6
    args = arguments.from_namespace(single, world_size=1)
    inputs = RunInputs(args, platform, namespace.mm_model, namespace.mm_data, flags=flags, weights=False)
    dataset = inputs.dataset
    longest, mean, supervised, work = _mean_sample(inputs.spec, dataset)
    if inputs.companions is not None:  # a pair shares its row with a conversation
        other, length, more, images = _mean_sample(inputs.spec, inputs.companions)
        return samples or dataset.epoch_samples, PlannedRow(
            positions=longest + other, lengths=(mean, length), work=work + images, supervised=supervised + more
        )
    loading = inputs.data_config.dataloader_param
    if not loading.packing:
        return samples or dataset.epoch_samples, PlannedRow(
            positions=longest, lengths=(mean,), work=work, supervised=supervised
        )
    length = loading.packing_length or dataset.max_length
    together = max(1, int(length / mean))
    rows = (samples or dataset.epoch_samples) // together
    logger.info("packing: about %d samples share a row; an epoch has %d rows", together, rows)
    return rows, PlannedRow(
        positions=length, lengths=(mean,) * together, work=work.times(together), supervised=together * supervised
    )


def _mean_sample(spec: ModelSpec, dataset: MultimodalDataset) -> tuple[int, float, float, EncoderWork]:
    """(longest, mean length, supervised positions, work on the images) of some samples of a data set."""
    chosen = sorted({round(number * (len(dataset) - 1) / (SAMPLED - 1)) for number in range(SAMPLED)})
    found = []
    with progress_bar("samples", len(chosen)) as advance:
        for number in chosen:
            found.append(dataset[number])
            advance(1)
    lengths = [len(sample.input_ids) for sample in found]
    supervised = sum(sum(label != IGNORE_INDEX for label in sample.labels[1:]) for sample in found) / len(found)
    return max(lengths), sum(lengths) / len(lengths), supervised, _mean_work(spec, found)


def _mean_work(spec: ModelSpec, samples: list[Encoded]) -> EncoderWork:
    """The work on the images of a sample, on average."""
    total = EncoderWork()
    for sample in samples:
        for item in sample.media:
            total += spec.vision_encoder.encoder_work(sum(item.rows), item.grid.tolist())
    tokens = sum(sample.input_ids.count(IMAGE_TOKEN_INDEX) for sample in samples)
    return replace(total, tokens=tokens).times(1 / len(samples))
