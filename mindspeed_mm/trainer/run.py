"""One training run: joins specs, weights and data with the driver."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

import mindspeed_mm
from checkpoint_converters.checkpoint import register_checkpoints
from megatron.driver import initialize, loop, setup
from megatron.driver.arguments import DriverArguments, with_virtual_stages
from megatron.driver.checkpoint.reading import find_checkpoint
from megatron.driver.state import BatchFacts, Hooks, TrainState
from mindspeed_mm.data.build import DataCounts, build_dataset, build_loader, check_user_tokens
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.dataset import Positions
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.data.template_check import describe_sample
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.inference.locate import TOKENIZER_FOLDER
from mindspeed_mm.models.build import build_vlm
from mindspeed_mm.models.family import media_of_data
from mindspeed_mm.models.parallel import layout_problems
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.spec import ModelSpec, load_model_spec
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.platform import Platform
from mindspeed_mm.trainer.feature_cache import CacheOptions, forward_steps
from mindspeed_mm.trainer.flops import step_flops
from mindspeed_mm.trainer.start_checks import check_images
from mindspeed_mm.trainer.step import level
from mindspeed_mm.trainer.stopped import stopped
from mindspeed_mm.trainer.validation import Validation, gather_counts
from mindspeed_mm.weights.loading import table

logger = logging.getLogger(__name__)

NOT_ARCHITECTURE = {"freeze", "ckpt_path", "fresh", "params_dtype", "bf16", "fp16", "pipeline_num_layers"}
"""Spec keys that may differ between a checkpoint and the run that loads it (besides recompute_*)."""

MODEL_KEYS_OF_FLAGS = {
    "vocab_size": ("text_decoder", "language_vocab_size"),
    "img_h": ("vision_encoder", "image_size"),
    "img_w": ("vision_encoder", "image_size"),
    "patch_dim": ("vision_encoder", "patch_size"),
}
"""What a flag repeats, where its name is not that of a text_decoder key."""


class TrainingRun:
    """Everything of a run that can be checked before processes meet is checked in the constructor."""

    allow_nonfinite = False
    """Start from weights with NaN or Inf, which are else refused."""
    feature_cache: CacheOptions | None = None
    """Where features of a frozen vision encoder are kept."""

    def __init__(self, args: DriverArguments, platform: Platform, model_path: str, data_path: str) -> None:
        register_checkpoints()
        self.spec = load_model_spec(model_path)
        self.args, self.platform = with_virtual_stages(args, self.spec.text_decoder.num_layers), platform
        self.data_config = DataConfig.load(data_path)
        self.runtime = runtime_of(self.args)
        check_flags(args, self.spec, self.runtime)
        self.tokenizer_path = _tokenizer_path(self.data_config, self.spec)
        self.tokenizer = load_tokenizer(self.tokenizer_path)
        self.media = media_of_data(self.spec, self.data_config)
        check_user_tokens(self.tokenizer, self.spec.text_decoder.language_vocab_size, str(self.tokenizer_path))
        self.dataset = build_dataset(
            self.data_config,
            self.tokenizer,
            self.media,
            args.seq_length or self.spec.text_decoder.language_max_sequence_length,
            positions=self.positions,
        )
        _tell_precision(self.spec, self.runtime)
        self.validation = Validation(self)
        self.counts, self._saved_counts = DataCounts(), {}

    def run(self) -> dict[str, Any]:
        """Train to the end and say where the result is."""
        check_images(self.dataset)
        hooks = self._hooks()
        state = setup.setup(self.args, self._model_provider, self.platform, hooks)
        if state.iteration:
            self.counts.go_on(self._saved_counts)
        if self.args.save and initialize.is_rank_0():
            self.tokenizer.save(Path(self.args.save) / TOKENIZER_FOLDER)
        first = self.dataset[0]
        logger.info(
            "first sample, supervised tokens in [[ ]]:\n%s",
            describe_sample(first.input_ids, first.labels, self.tokenizer),
        )
        with forward_steps(self, state, self.feature_cache) as forward_step:
            report = loop.train(state, self.args, forward_step, self._batches(state), hooks)
        checkpoint = report.checkpoint or (find_checkpoint(self.args.save) if self.args.save else None)
        result = {
            "iteration": report.iteration,
            "loss": report.loss,
            "checkpoint": str(checkpoint) if checkpoint else None,
        }
        if report.stopped_by is not None:
            raise stopped(report, self.args, result)
        return result

    @property
    def positions(self) -> Positions | None:
        """Positions of a sample from its expanded ids and the grids of its images; None where they count up."""
        family = self.spec.family
        if not family.multimodal_positions:
            return None
        return lambda ids, grids: family.positions(
            self.spec, torch.tensor(ids), torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
        )

    def _hooks(self) -> Hooks:
        return Hooks(self._describe, self._extra, self._compare, self.level, self._after_step)

    def level(self, batches: list[Batch]) -> list[Batch]:
        """Micro-batches of one step, padded to one length."""
        return level(batches, self.pad_token_id)

    def _after_step(self, state: TrainState) -> None:
        gather_counts(self.counts, state, self.args)
        self.validation.after_step(state)

    def _model_provider(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> VLM:
        # --ckpt-step is about --load alone.
        places = ((self.args.load, self.args.ckpt_step), (self.args.pretrained_checkpoint, None))
        in_checkpoint = any(find_checkpoint(folder, step) for folder, step in places if folder)
        vlm, reports = build_vlm(
            self.spec,
            self.runtime,
            self.platform.device(),
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
        return build_loader(
            self.dataset,
            consumed_samples=state.consumed_samples,
            micro_batch_size=self.args.micro_batch_size,
            dp_rank=state.data_parallel_rank,
            dp_size=state.data_parallel_size,
            seed=self.args.seed,
            num_workers=self.args.num_workers,
            pad_token_id=self.pad_token_id,
            pad_multiple=self.runtime.sequence_multiple,
            options=self.data_config.dataloader_param,
            weights=self.data_config.dataset_param.weights,
            global_batch_size=self.args.global_batch_size,
            counts=self.counts,
        )

    @property
    def pad_token_id(self) -> int:
        """What fills rows behind the last sample; never seen by the loss."""
        given = self.data_config.dataloader_param.collate_param.pad_token_id
        return self.tokenizer.pad_token_id if given is None else given

    def _describe(self, batch: Batch) -> BatchFacts:
        self._check_ids(batch)
        flops = step_flops(
            self.spec,
            lengths=batch.lengths,
            images=batch.num_images,
            supervised=batch.supervised,
            encoded=batch.num_encoded,
        )
        trained = not self.spec.text_decoder.freeze or batch.num_images > 0
        return BatchFacts(
            batch.sample_ids, batch.tokens, batch.supervised, batch.input_ids.numel(), flops, gradient_expected=trained
        )

    def _check_ids(self, batch: Batch) -> None:
        """An id beyond the embedding would end in a device-side assertion that names nothing."""
        highest, size = int(batch.input_ids.max()), self.spec.text_decoder.language_vocab_size
        if highest >= size:
            raise DataError(
                f"the tokenizer {self.tokenizer_path} gives id {highest} (samples {', '.join(batch.sample_ids)}), but "
                f"text_decoder.language_vocab_size is {size}: use the tokenizer of the text decoder's weights"
            )

    def _order(self) -> dict[str, Any]:
        """What the position in the data depends on."""
        return {
            "--seed": self.args.seed,
            "--global-batch-size": self.args.global_batch_size,
            "samples": len(self.dataset),
            "data config": self.data_config.model_dump(mode="json"),
        }

    def _warn_about_order(self, saved: dict[str, Any]) -> None:
        changed = [name for name, value in self._order().items() if name in saved and saved[name] != value]
        if changed and not self.args.finetune:
            logger.warning(
                "%s changed since the checkpoint was written: training goes on in another order of samples, some of "
                "which it has seen already",
                ", ".join(changed),
            )

    def _extra(self) -> dict[str, Any]:
        return {
            "order": self._order(),
            "model": self.spec.model_dump(mode="json"),
            "data": {
                "tokenizer": str(Path(self.tokenizer_path).resolve()),
                "image_processor": self.media.config,
                "template": self.data_config.dataset_param.template_name,
                "pad": self.data_config.dataset_param.preprocess_parameters.pad,
            },
            "data_counts": self.counts.as_saved(self.dataset.sets),
            "versions": {"mindspeed_mm": mindspeed_mm.__version__, "torch": torch.__version__},
        }

    def _compare(self, saved: dict[str, Any]) -> list[str]:
        self._saved_counts = saved.get("data_counts", {})
        self._warn_about_order(saved.get("order", {}))
        return compare_architectures(saved.get("model", {}), self.spec.model_dump(mode="json"))


def compare_architectures(saved: dict[str, Any], current: dict[str, Any], path: str = "") -> list[str]:
    """One line for each field in which two model specs (as JSON) differ, settings of the run left out."""
    lines = []
    for key in sorted(set(saved) | set(current)):
        if key in NOT_ARCHITECTURE or key.startswith("recompute_"):
            continue
        ours, theirs = current.get(key), saved.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            lines += compare_architectures(theirs, ours, f"{path}{key}.")
        elif ours != theirs:
            lines.append(f"{path}{key}: the checkpoint has {theirs!r}, the model config {ours!r}")
    return lines


def runtime_of(args: DriverArguments) -> Runtime:
    """Layout and precision that the flags ask for."""
    return Runtime(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
    )


def _tell_precision(spec: ModelSpec, runtime: Runtime) -> None:
    """The precision of a run comes from the flags; say so where a model.json names another one."""
    for kind, part in spec.part_specs().items():
        if part.dtype not in (None, runtime.params_dtype):
            logger.warning(
                "%s says %s, the run computes in %s: the flags --bf16 and --fp16 decide",
                kind,
                str(part.dtype).removeprefix("torch."),
                str(runtime.params_dtype).removeprefix("torch."),
            )


def check_flags(args: DriverArguments, spec: ModelSpec, runtime: Runtime) -> None:
    """Flags that repeat the model.json must agree with it; all disagreements at once."""
    problems = []
    for flag, value in args.model_flags().items():
        if flag == "seq_length":
            limit = spec.text_decoder.max_position_embeddings
            if value > limit:
                problems.append(f"--seq-length {value} exceeds text_decoder.max_position_embeddings {limit}")
            continue
        kind, key = MODEL_KEYS_OF_FLAGS.get(flag, ("text_decoder", flag))
        found = getattr(spec.part_specs()[kind], key)
        if found != value:
            problems.append(f"--{flag.replace('_', '-')} is {value}, but {kind}.{key} is {found}: make them equal")
    problems += layout_problems(spec, runtime)
    if problems:
        raise ConfigError("the command line does not fit the model:\n  " + "\n  ".join(problems))


def _tokenizer_path(config: DataConfig, spec: ModelSpec) -> str:
    """The data config's tokenizer, else the one beside the text decoder's weights."""
    if config.dataset_param.tokenizer_config is not None:
        return config.dataset_param.tokenizer_config.from_pretrained
    if spec.text_decoder.ckpt_path is None:
        raise ConfigError("no tokenizer: give dataset_param.tokenizer_config.from_pretrained in the data config")
    return spec.text_decoder.ckpt_path
