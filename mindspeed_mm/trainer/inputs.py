"""What a training run is made of, read and checked before processes meet."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch

from checkpoint_converters.checkpoint import register_checkpoints
from megatron.driver.arguments import DriverArguments, with_virtual_stages
from megatron.driver.state import TrainState
from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.options import ConfigFile
from mindspeed_mm.config.trained_parts import ModelFlags
from mindspeed_mm.data.auxiliary import check_auxiliary
from mindspeed_mm.data.build import build_dataset, build_loader, check_user_tokens
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.dataset import MultimodalDataset, Positions
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.data.template_choice import with_template
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.complete import read_model
from mindspeed_mm.models.family import media_of_data
from mindspeed_mm.models.parallel import layout_problems
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.objectives import chosen_objective
from mindspeed_mm.objectives._batches import pad_to_one_length
from mindspeed_mm.platform import Platform
from mindspeed_mm.trainer.architecture import check_start

logger = logging.getLogger(__name__)

MODEL_KEYS_OF_FLAGS = {
    "vocab_size": ("text_decoder", "language_vocab_size"),
    "img_h": ("vision_encoder", "image_size"),
    "img_w": ("vision_encoder", "image_size"),
    "patch_dim": ("vision_encoder", "patch_size"),
}
"""What a flag repeats, where its name is not that of a text_decoder key."""


class RunInputs:
    """Flags, specs, tokenizer, image processor and data set of a run, which fit together."""

    def __init__(
        self,
        args: DriverArguments,
        platform: Platform,
        model_path: str | ConfigFile,
        data_path: str | ConfigFile,
        objective: str | None = None,
        flags: ModelFlags | None = None,
        objective_options: dict[str, Any] | None = None,
        *,
        weights: bool = True,
    ) -> None:
        """Reads the files. `flags`: what the command line changes of the model config; `objective` and its options win
        over data.json's. `weights`: compare what the run begins with with the model
        config; False for a plan, which needs none.

        Raises:
            ConfigError: a file is wrong, or flags, model and data do not fit together.
            WeightError, CheckpointError: the weights or the checkpoint are not there, or those of another model.
            DataError: the data cannot be read.
        """
        register_checkpoints()
        self.spec = model_spec(model_path, flags or ModelFlags())
        self.args, self.platform = with_facts_of(self.spec, args), platform
        self.data_config = DataConfig.load(data_path)
        self.objective = chosen_objective(self.data_config.objective, objective, objective_options or {})
        self.objective.check(self.spec)
        self.runtime = runtime_of(self.args)
        check_flags(args, self.spec, self.runtime)
        if weights:
            check_start(self.args, self.spec)
        self.tokenizer_path = _tokenizer_path(self.data_config, self.spec)
        self.tokenizer = load_tokenizer(self.tokenizer_path)
        check_user_tokens(self.tokenizer, self.spec.text_decoder.language_vocab_size, str(self.tokenizer_path))
        self.spec.family.check_tokens(self.spec, self.tokenizer.token_to_id)
        self.data_config = with_template(self.data_config, self.tokenizer, *self.spec.family.usual_template(self.spec))
        self.media = media_of_data(self.spec, self.data_config)
        check_auxiliary(self.data_config, self.objective.auxiliary)
        self.dataset = self.build_dataset()
        self.companions = self.build_dataset(companions=True) if self.objective.auxiliary else None
        """Conversations that go beside preference pairs."""
        _tell_precision(self.spec, self.runtime)

    def build_dataset(self, *, validation: bool = False, companions: bool = False):
        """The training set, the validation set, or the conversations beside preference pairs."""
        return build_dataset(
            self.data_config,
            self.tokenizer,
            self.media,
            self.args.seq_length,
            positions=self.positions,
            validation=validation,
            preferences=self.objective.preferences and not companions,
            auxiliary=companions,
        )

    def loader(self, dataset: MultimodalDataset, state: TrainState, **more: Any) -> Iterator[Batch]:
        """This rank's micro-batches of a dataset; `more` goes to `build_loader` beside what the run says, which is
        consumed_samples 0 unless it is there."""
        given = {"consumed_samples": 0, "num_workers": self.args.num_workers, **more}
        return build_loader(
            dataset,
            micro_batch_size=self.args.micro_batch_size,
            dp_rank=state.data_parallel_rank,
            dp_size=state.data_parallel_size,
            seed=self.args.seed,
            pad_token_id=self.pad_token_id,
            pad_multiple=self.runtime.sequence_multiple,
            **given,
        )

    @property
    def positions(self) -> Positions | None:
        """Positions of a sample from its expanded ids and the grids of its images; None where they count up."""
        family = self.spec.family
        if not family.multimodal_positions:
            return None
        return lambda ids, grids: family.positions(
            self.spec, torch.tensor(ids), torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
        )

    @property
    def pad_token_id(self) -> int:
        """What fills rows behind the last sample; never seen by the loss."""
        given = self.data_config.dataloader_param.collate_param.pad_token_id
        return self.tokenizer.pad_token_id if given is None else given

    def pad_to_one_length(self, batches: list[Batch]) -> list[Batch]:
        """Micro-batches of one step, padded to one length."""
        return pad_to_one_length(batches, self.pad_token_id)


def model_spec(path: str | ConfigFile, flags: ModelFlags) -> ModelSpec:
    """The spec of a model.json with what flags change of it. Raises as `read_model` does."""
    return read_model(flags.applied(read_config(path)), context=str(path) + (" with the flags" if flags.given else ""))


def with_facts_of(spec: ModelSpec, args: DriverArguments) -> DriverArguments:
    """The flags with what the model config says where they leave it open: length of samples, layers of stages."""
    length = args.seq_length or spec.text_decoder.language_max_sequence_length
    return with_virtual_stages(dataclasses.replace(args, seq_length=length), spec.text_decoder.num_layers)


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
            limit = spec.text_decoder.language_max_sequence_length
            if value > limit:
                problems.append(
                    f"--seq-length {value} exceeds text_decoder.language_max_sequence_length {limit}: make them equal, "
                    "or leave the flag out"
                )
            continue
        kind, key = MODEL_KEYS_OF_FLAGS.get(flag, ("text_decoder", flag))
        found = getattr(spec.part_specs()[kind], key)
        if found != value:
            problems.append(
                f"--{flag.replace('_', '-')} is {value}, but {kind}.{key} is {found}: make them equal, or leave the "
                "flag out"
            )
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
