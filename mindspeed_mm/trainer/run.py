"""One training run: joins specs, weights and data with the driver."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import mindspeed_mm
from megatron.driver import initialize, loop, setup
from megatron.driver.arguments import DriverArguments
from megatron.driver.checkpoint.reading import find_checkpoint
from megatron.driver.state import BatchFacts, Hooks, TrainState
from mindspeed_mm.config.options import ConfigFile
from mindspeed_mm.config.trained_parts import ModelFlags
from mindspeed_mm.data.build import DataCounts
from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.data.set_config import READ_BY
from mindspeed_mm.data.template_check import describe_sample
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.inference.locate import TOKENIZER_FOLDER
from mindspeed_mm.models.adapters.targets import ADAPTER
from mindspeed_mm.models.build import build_vlm
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.platform import Platform
from mindspeed_mm.trainer.architecture import compare_architectures, starting_checkpoint
from mindspeed_mm.trainer.base_weights import base_hashes
from mindspeed_mm.trainer.curves import leave_loss_curve
from mindspeed_mm.trainer.feature_cache import CacheOptions, forward_steps
from mindspeed_mm.trainer.flops import batch_flops
from mindspeed_mm.trainer.inputs import RunInputs
from mindspeed_mm.trainer.reference import ReferenceModel
from mindspeed_mm.trainer.reference_pass import visit_all
from mindspeed_mm.trainer.start_checks import check_images
from mindspeed_mm.trainer.stopped import stopped
from mindspeed_mm.trainer.validation import Validation, gather_counts
from mindspeed_mm.weights.loading import table

logger = logging.getLogger(__name__)


class TrainingRun:
    """Everything of a run that can be checked before processes meet is checked in the constructor."""

    allow_nonfinite = False
    """Start from weights with NaN or Inf, which are else refused."""
    feature_cache: CacheOptions | None = None
    """Where features of a frozen vision encoder are kept."""

    def __init__(
        self,
        args: DriverArguments,
        platform: Platform,
        model_path: str | ConfigFile,
        data_path: str | ConfigFile,
        objective: str | None = None,
        flags: ModelFlags | None = None,
        objective_options: dict[str, Any] | None = None,
    ) -> None:
        self.inputs = RunInputs(args, platform, model_path, data_path, objective, flags, objective_options)
        self.reference = ReferenceModel(self.inputs) if self.inputs.objective.reference else None
        self.validation = Validation(self.inputs, self._prepare)
        self.counts, self._saved = DataCounts(), {}
        self.base: dict[str, str] = {}

    def keep_reference(self, folder: str) -> None:
        """Keep the reference's log-probabilities in a folder, which is made. Raises ConfigError without a reference, or
        where there can be none."""
        if self.reference is None:
            raise ConfigError(
                f"--pref-cache is given, but the objective {self.inputs.objective.name} with these options has no "
                "reference model: leave it out"
            )
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ConfigError(f"--pref-cache {folder} is not a folder: name one, or a path that does not exist yet")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--pref-cache {folder} cannot be made: {error.strerror}; name another folder") from error
        self.reference.folder = Path(folder)
        self.inputs.dataset.names_pairs = True

    def run(self) -> dict[str, Any]:
        """Train to the end and say where the result is."""
        check_images(self.inputs.dataset)
        if self.inputs.companions is not None:
            check_images(self.inputs.companions)
        hooks = self._hooks()
        state = setup.setup(self.inputs.args, self._model_provider, self.inputs.platform, hooks)
        if state.iteration:
            self.counts.resume_from(self._saved.get("data_counts", {}))
            self.validation.early_stop.resume_from(self._saved.get("early_stop", {}))
        if self.inputs.args.save and initialize.is_rank_0():
            self.base = base_hashes(self.inputs.args, self.inputs.spec, self._saved)
            self.inputs.tokenizer.save(Path(self.inputs.args.save) / TOKENIZER_FOLDER)
        first = self.inputs.dataset[0]
        logger.info(
            "first sample, supervised tokens in [[ ]]:\n%s",
            describe_sample(first.input_ids, first.labels, self.inputs.tokenizer),
        )
        with self._leaving_a_curve(), forward_steps(self.inputs, state, self.feature_cache) as forward_step:
            report = loop.train(state, self.inputs.args, forward_step, self._batches(state), hooks)
        checkpoint = report.checkpoint or (find_checkpoint(self.inputs.args.save) if self.inputs.args.save else None)
        if self.validation.early_stop.is_due() and report.iteration < self.inputs.args.train_iters:
            self.validation.early_stop.tell(report.iteration, checkpoint)
        result = {
            "iteration": report.iteration,
            "loss": report.loss,
            "checkpoint": str(checkpoint) if checkpoint else None,
        }
        if report.stopped_by is not None:
            raise stopped(report, self.inputs.args, result)
        return result

    def write_reference(self) -> dict[str, Any]:
        """Compute what the reference's folder (`keep_reference`) lacks of the training set, train nothing and save
        nothing. What was there when a run was cut short is not computed again. Collective; says what is there now.
        """
        assert self.reference is not None and self.reference.folder is not None
        check_images(self.inputs.dataset)
        self.inputs.args = dataclasses.replace(self.inputs.args, save=None)
        hooks = self._hooks()
        state = setup.setup(self.inputs.args, self._model_provider, self.inputs.platform, hooks)
        samples = visit_all(self.inputs, state, hooks, self.counts)
        torch.distributed.barrier()  # all ranks have written
        result = {**self.reference.on_disk(), "samples": samples}
        if initialize.is_rank_0():
            logger.info("%(folder)s: %(pairs)d pairs, %(computed)d of them new, of %(samples)d samples", result)
        return result

    @contextlib.contextmanager
    def _leaving_a_curve(self) -> Iterator[None]:
        """However training ends, what there is of it is drawn into the save folder."""
        try:
            yield
        finally:
            if self.inputs.args.save and initialize.is_rank_0():
                leave_loss_curve(self.inputs.args.save)

    def _hooks(self) -> Hooks:
        return Hooks(
            describe=self._describe,
            extra=self._extra,
            compare=self._compare,
            added=lambda name: ADAPTER in name,
            pad_to_one_length=self.inputs.pad_to_one_length,
            prepare=self._prepare,
            loss_name=self.inputs.objective.loss_name,
            metrics=self.inputs.objective.metrics,
            after_step=self._after_step,
            finished=self.validation.early_stop.is_due,
        )

    def _prepare(self, state: TrainState, batches: list[Batch]) -> list[Batch]:
        return batches if self.reference is None else self.reference.prepare(state, batches)

    def _after_step(self, state: TrainState) -> None:
        gather_counts(self.counts, state, self.inputs.args)
        self.validation.after_step(state)

    def _model_provider(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> VLM:
        in_checkpoint = starting_checkpoint(self.inputs.args) is not None
        vlm, reports = build_vlm(
            self.inputs.spec,
            self.inputs.runtime,
            self.inputs.platform.device(),
            load_weights=not in_checkpoint,
            allow_nonfinite=self.allow_nonfinite,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if in_checkpoint:
            logger.info("weights come from the checkpoint; ckpt_path in the model config is not read")
        else:
            logger.info("weights:\n%s", table(reports))
        return vlm

    def _batches(self, state: TrainState):
        return self.inputs.loader(
            self.inputs.dataset,
            state,
            consumed_samples=state.consumed_samples,
            options=self.inputs.data_config.dataloader_param,
            weights=self.inputs.data_config.dataset_param.weights,
            epoch=self.inputs.dataset.epoch,
            global_batch_size=self.inputs.args.global_batch_size,
            counts=self.counts,
            companions=self.inputs.companions,
        )

    def _describe(self, batch: Batch) -> BatchFacts:
        self._check_ids(batch)
        flops = batch_flops(self.inputs.spec, batch)
        trained = self.inputs.spec.text_decoder.trains or batch.num_images > 0
        return BatchFacts(
            batch.sample_ids, batch.tokens, batch.supervised, batch.input_ids.numel(), flops, gradient_expected=trained
        )

    def _check_ids(self, batch: Batch) -> None:
        """An id beyond the embedding would end in a device-side assertion that names nothing."""
        highest, size = int(batch.input_ids.max()), self.inputs.spec.text_decoder.language_vocab_size
        if highest >= size:
            raise DataError(
                f"the tokenizer {self.inputs.tokenizer_path} gives id {highest} "
                f"(samples {', '.join(batch.sample_ids)}), but "
                f"text_decoder.language_vocab_size is {size}: use the tokenizer of the text decoder's weights"
            )

    def _order(self) -> dict[str, Any]:
        """What the position in the data depends on."""
        return order_facts(self.inputs)

    def _warn_about_order(self, saved: dict[str, Any]) -> None:
        args = self.inputs.args
        if args.finetune or args.load is None or find_checkpoint(args.load, args.ckpt_step) is None:
            return  # only weights are taken: the run begins with its first sample
        changed = [name for name, value in self._order().items() if name in saved and saved[name] != value]
        if changed:
            logger.warning(
                "%s changed since the checkpoint was written: training goes on in another order of samples, some of "
                "which it has seen already",
                ", ".join(changed),
            )

    def _extra(self) -> dict[str, Any]:
        return {
            "order": self._order(),
            "model": self.inputs.spec.model_dump(mode="json"),
            "data": {
                "tokenizer": str(Path(self.inputs.tokenizer_path).resolve()),
                "image_processor": self.inputs.media.config,
                "template": self.inputs.data_config.dataset_param.template_name,
                "pad": self.inputs.data_config.dataset_param.preprocess_parameters.pad,
            },
            "data_counts": self.counts.as_saved(self.inputs.dataset.sets),
            "early_stop": self.validation.early_stop.as_saved(),
            "base": self.base,
            "objective": self.inputs.objective.name,
            "reference": None if self.reference is None else self.reference.kind,
            "versions": {"mindspeed_mm": mindspeed_mm.__version__, "torch": torch.__version__},
        }

    def _compare(self, saved: dict[str, Any]) -> list[str]:
        self._saved = saved
        self._warn_about_order(saved.get("order", {}))
        if self.reference is not None:
            self.reference.resume_from(saved.get("reference"))
        return compare_architectures(saved.get("model", {}), self.inputs.spec.model_dump(mode="json"))


def order_facts(inputs: RunInputs) -> dict[str, Any]:
    """Everything that the order of samples is made of; each is named as the user changes it."""
    args, config, dataset = inputs.args, inputs.data_config, inputs.dataset
    loading, mixing = config.dataloader_param, config.dataset_param.mixing
    facts = {
        "--seed": args.seed,
        "samples": len(dataset),
        "basic_parameters of the data config": _set_facts(config.dataset_param.basic_parameters),
        "auxiliary_parameters of the data config": _set_facts(config.dataset_param.auxiliary_parameters),
        "mixing of the data config": mixing and mixing.model_dump(mode="json", exclude_none=True),
        "shuffle, packing or group_by_modality_length of the data config": [
            *(loading.shuffle, loading.packing, loading.group_by_modality_length),
            *((loading.packing_length, loading.packing_window) if loading.packing else ()),
        ],
    }
    if loading.packing or loading.group_by_modality_length:
        facts["lengths of the samples"] = sum(int(length) for length in dataset.lengths)
    if loading.group_by_modality_length:  # batches are formed by length; else the order is that of single samples
        facts["--global-batch-size"] = args.global_batch_size
    return facts


def _set_facts(sets: Iterable[BasicParameters]) -> list[dict[str, Any]]:
    """What of the sets decides which samples they give."""
    facts = []
    for basic in sets:
        unset = {name for name in READ_BY if getattr(basic, name) is None}
        facts.append(basic.model_dump(mode="json", exclude={"data_folder", "name", *unset}))
    return facts
