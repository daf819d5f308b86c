"""data.json: the shape of MindSpeed-MM's LLaVA data config, checked strictly.

Every key of that config is known here. A key that has nothing to decide any more accepts the values that agree with
what is done and refuses the others with the reason. docs/data.md lists the keys that were added. Relative paths start
at the current directory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.load import StrictModel, load_config
from mindspeed_mm.config.options import ConfigFile
from mindspeed_mm.data.image import FAST_FILTERS, PROCESSOR_TYPES, ImageProcessor
from mindspeed_mm.data.mixing import Mix, check_mix
from mindspeed_mm.data.prediction import PredictedSet, Prediction
from mindspeed_mm.data.set_config import DATASET_TYPES, READ_BY, BasicParameters, known_dataset, only
from mindspeed_mm.data.template import OWN_TEMPLATE, get_template


class PreprocessParameters(StrictModel):
    """How images become pixels. Either `train_pipeline` (fields of a CLIP image processor and pad2square) or the folder
    `image_processer_path` with a preprocessor_config.json."""

    image_reader_type: Annotated[
        str, only("CLIPImageProcessor", "torchvision", "Image", reason="images are decoded by Pillow to RGB")
    ] = "CLIPImageProcessor"
    image_processer_type: Annotated[str, only("image2pixel", reason="no other processing exists")] = "image2pixel"
    train_pipeline: dict[str, Any] | None = None
    image_processer_path: str | None = None
    pad2square: bool | None = None
    fast_resize: bool = False
    """Resize with torch's kernel, about four times as fast as Pillow's; some levels of 255 differ by one. The default
    gives the original's pixels bit by bit."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "PreprocessParameters":
        if (self.train_pipeline is None) == (self.image_processer_path is None):
            raise ValueError('give exactly one of "train_pipeline" and "image_processer_path"')
        inner = (self.train_pipeline or {}).get("pad2square")
        if inner is not None and not isinstance(inner, bool):
            raise ValueError(f"train_pipeline.pad2square is {inner!r}; expected true or false")
        if inner is not None and self.pad2square is not None and inner != self.pad2square:
            raise ValueError("pad2square is given twice with different values; keep the one in train_pipeline")
        kind = (self.train_pipeline or {}).get("image_processor_type", PROCESSOR_TYPES[0])
        own = self.train_pipeline is not None and kind in PROCESSOR_TYPES  # others are checked by their family
        processor = ImageProcessor.from_config(self.processor_source) if own else None
        if self.fast_resize and processor is not None and processor.resample not in FAST_FILTERS:
            raise ValueError(f"fast_resize knows bicubic (resample 3) and bilinear (2), found {processor.resample}")
        return self

    @property
    def pad(self) -> bool:
        """Whether images are padded to a square; false (LLaVA's own default, "square") when not given."""
        inner = (self.train_pipeline or {}).get("pad2square")
        return bool(self.pad2square if inner is None else inner)

    @property
    def processor_source(self) -> dict[str, Any] | str:
        """What Family.media_processor takes: the fields that are given here, or `image_processer_path`."""
        if self.image_processer_path is not None:
            return self.image_processer_path
        return {key: value for key, value in (self.train_pipeline or {}).items() if key != "pad2square"}


class TokenizerConfig(StrictModel):
    """Where the tokenizer comes from."""

    from_pretrained: str
    hub_backend: Annotated[str, only("hf", reason="tokenizers are local folders in Hugging Face form")] = "hf"
    autotokenizer_name: str = "AutoTokenizer"
    """Accepted as information: the files of the folder decide which tokenizer it is."""

    cache_dir: Annotated[str | None, only(None, reason="nothing is downloaded, so nothing is cached")] = None
    model_max_length: pydantic.PositiveInt | None = None
    """A further upper limit of the length of a sample, beside --seq-length; the smaller one counts."""

    padding_side: Annotated[str, only("right", reason="batches are padded on the right")] = "right"
    use_fast: bool = False
    """Accepted as information: both give the same ids here."""

    trust_remote_code: Annotated[bool, only(False, reason="code from a checkpoint folder is never run")] = False


class DatasetParam(StrictModel):
    """What is trained on and how it is turned into tokens and pixels."""

    dataset_type: str
    basic_parameters: tuple[BasicParameters, ...]
    preprocess_parameters: PreprocessParameters
    tokenizer_config: TokenizerConfig | None = None
    template_name: str | None = None
    """None: as data/template_choice.py chooses: the tokenizer's own chat template, else that of the model's family."""

    use_text_processer: Annotated[bool, only(True, reason="text is always tokenised")] = True
    mm_use_im_start_end: bool | None = None
    """Whether <im_start> and <im_end> stand around each image: as the model has it, which it must agree with."""
    image_error: Literal["error", "skip"] = "error"
    """A missing or broken image stops the run, or the next good record takes its place (counted and logged)."""

    max_skip_percent: Annotated[float, pydantic.Field(ge=0, le=100)] = 5
    """Under "skip": more bad images than this share of the samples seen (of the first 1,000 at least) stop the run."""

    overlong: Literal["error", "drop", "truncate"] = "error"
    """A sample over the maximum length stops the run at its start, is left out, or its text is cut at the end. Cutting
    never touches an image and never takes all supervised tokens: where it would, the sample is left out."""

    empty_answer: Literal["mask", "drop", "error"] = "mask"
    """A record with an answer that has no text, or without any answer, is kept as in the original (nothing is learned
    from that turn; the log counts them), left out, or stops the run at its start. Always an error for check-data."""

    images_first: bool = True
    """LLaVA's clean-up moves every `<image>` to the front of its turn; false leaves it where it was written."""

    special_text: Literal["text", "tokens"] = "text"
    """What "</s>" and the like become that a user or an answer holds: plain text, which cannot end a turn, or the
    control token itself, as in the original LLaVA. Tokens that were added for use in texts are tokens either way."""

    unknown_keys: Literal["error", "warn"] = "error"
    """What a key of a record, turn or message becomes that nothing reads: "error" refuses one that is a typing error
    away from a known key or changes training in other suites, and tells the rest once; "warn" tells all of them."""

    index_folder: str | None = None
    """Where indexes of data files over 16 MiB are stored; default: ~/.cache/mindspeed-mm/index."""

    validation_parameters: tuple[BasicParameters, ...] = ()
    """Sets whose loss is measured at --eval-interval and never trained on."""

    auxiliary_parameters: tuple[BasicParameters, ...] = ()
    """Sets of conversations that go beside preference pairs, one for each (data/auxiliary.py)."""

    mixing: Mix | None = None
    """How the sets of basic_parameters make an epoch (data/mixing.py); None: one behind the other, or by weights."""

    @pydantic.field_validator("basic_parameters", "validation_parameters", "auxiliary_parameters", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        """A single set may be given without the list around it."""
        return (value,) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value

    @pydantic.field_validator("basic_parameters")
    @classmethod
    def _not_empty(cls, value: tuple[BasicParameters, ...]) -> tuple[BasicParameters, ...]:
        if not value:
            raise ValueError("is an empty list; expected at least one data_path")
        weighted = [basic.weight is not None for basic in value]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f'set {weighted.index(False)} has no "weight" but others have one; give every set one, or none'
            )
        if any(basic.weight is not None and basic.repeat_time > 1 for basic in value):
            raise ValueError('a set has both "weight" and "repeat_time" above 1; the weight alone decides, keep one')
        return value

    @pydantic.field_validator("template_name")
    @classmethod
    def _known_template(cls, value: str | None) -> str | None:
        if value not in (None, OWN_TEMPLATE):
            get_template(value)
        return value

    @pydantic.field_validator("dataset_type")
    @classmethod
    def _known_dataset(cls, value: str) -> str:
        return known_dataset(value)

    @pydantic.model_validator(mode="after")
    def _own_keys(self) -> "DatasetParam":
        for basic in self.all_sets:
            self.check_keys(basic)
        return self

    @pydantic.model_validator(mode="after")
    def _known_sets(self) -> "DatasetParam":
        check_mix(self.mixing, self.set_names, weighted=self.weights is not None)
        return self

    def check_keys(self, basic: BasicParameters) -> None:
        """Keys of one format are refused in sets of another, which would not read them. Raises ValueError."""
        for name, kinds in READ_BY.items():
            if getattr(basic, name) is not None and self.kind_of(basic) not in kinds:
                readers = " or ".join(f'"{kind}"' for kind in kinds)
                raise ValueError(f'{basic.data_path} has "{name}", which only the dataset_type {readers} reads')

    @property
    def all_sets(self) -> tuple[BasicParameters, ...]:
        """Those that are trained on, beside pairs as well, and those of validation."""
        return (*self.basic_parameters, *self.validation_parameters, *self.auxiliary_parameters)

    @property
    def set_names(self) -> list[str | None]:
        """Names of the sets, where they have one."""
        return [basic.name for basic in self.basic_parameters]

    @property
    def weights(self) -> list[float] | None:
        """Weights of the sets, or None where repeat_time decides."""
        if self.basic_parameters[0].weight is None:
            return None
        return [float(basic.weight or 0) for basic in self.basic_parameters]

    @property
    def dataset_kind(self) -> str:
        """Name of the module in DATASETS."""
        return DATASET_TYPES.get(self.dataset_type, self.dataset_type)

    def kind_of(self, basic: BasicParameters) -> str:
        """Name of the module in DATASETS that reads this set."""
        kind = basic.dataset_type or self.dataset_type
        return DATASET_TYPES.get(kind, kind)


def _from_command_line(flag: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is not None:
            raise ValueError(f"found {value!r}: it comes from {flag} on the command line; remove it here")
        return value

    return pydantic.AfterValidator(check)


class CollateParam(StrictModel):
    """How samples become a batch."""

    model_name: Annotated[str, only("llava", reason="there is one way to collate")] = "llava"
    pad_token_id: pydantic.NonNegativeInt | None = None
    """Default: the tokenizer's. It is never seen by the loss."""

    model_max_length: pydantic.PositiveInt | None = None
    """As tokenizer_config.model_max_length."""


class DataloaderParam(StrictModel):
    """How batches are fetched. Batch size, seed and number of workers come from the command line."""

    dataloader_mode: Annotated[
        str, only("sampler", "base", reason="samples come in an order that depends on --seed alone")
    ] = "sampler"
    sampler_type: Annotated[str, only("BaseRandomBatchSampler", reason="there is one sampler")] = (
        "BaseRandomBatchSampler"
    )
    shuffle: bool = True
    drop_last: bool = True
    """Accepted as information: epochs run on into each other, so no batch is partial and no sample is dropped."""

    pin_memory: bool = False
    data_sharding: Annotated[
        bool, only(False, reason="the order must not depend on the number of ranks, so that training resumes on any")
    ] = False
    prefetch_factor: pydantic.PositiveInt | None = None
    persistent_workers: bool | None = None
    """Accepted as information: workers live as long as training."""

    packing: bool = False
    """Several samples share a row of --seq-length positions; attention and positions keep them apart. A row then counts
    as a sample for --global-batch-size and --train-samples."""

    packing_length: pydantic.PositiveInt | None = None
    """Positions of a row; default: the maximum length of a sample. Longer rows are filled better (docs/data.md);
    positions start again with each sample, so the model's maximum length does not bound them."""

    packing_window: Annotated[int, pydantic.Field(ge=1)] = 4096
    """So many samples at a time are sorted into rows (first-fit decreasing)."""

    group_by_modality_length: bool = False
    """As in the original LLaVA: a global batch holds samples with images or without, sorted by length."""

    batch_size: Annotated[int | None, _from_command_line("--micro-batch-size")] = None
    num_workers: Annotated[int | None, _from_command_line("--num-workers")] = None
    collate_param: CollateParam = CollateParam()

    @pydantic.model_validator(mode="after")
    def _one_order(self) -> "DataloaderParam":
        if self.group_by_modality_length and (self.packing or not self.shuffle):
            raise ValueError(
                "group_by_modality_length is an order of its own; it goes with shuffle true and packing false"
            )
        return self


class DataConfig(StrictModel):
    """The whole of data.json."""

    dataset_param: DatasetParam
    dataloader_param: DataloaderParam = DataloaderParam()
    objective: str | dict[str, Any] | None = None
    """What is minimised where --objective does not say it: a name, or {"name": ..} with the objective's options."""

    prediction: Prediction | None = None
    """Sets that the trained model answers (data/prediction.py)."""

    @pydantic.model_validator(mode="after")
    def _own_keys(self) -> "DataConfig":
        for basic in self.predicted_sets.values():
            self.dataset_param.check_keys(basic)
        return self

    @pydantic.model_validator(mode="after")
    def _one_order(self) -> "DataConfig":
        if self.dataloader_param.group_by_modality_length and self.dataset_param.weights is not None:
            raise ValueError('"weight" and group_by_modality_length do not go together; use repeat_time')
        return self

    @property
    def predicted_sets(self) -> dict[str, PredictedSet]:
        """The sets of `prediction`, by the prefix of their files."""
        return {} if self.prediction is None else self.prediction.sets()

    @property
    def all_sets(self) -> tuple[BasicParameters, ...]:
        """Every set that is read."""
        return (*self.dataset_param.all_sets, *self.predicted_sets.values())

    @classmethod
    def load(cls, source: str | Path | ConfigFile | dict[str, Any]) -> "DataConfig":
        """Read and check a data.json (path or parsed). Raises ConfigError with every problem found."""
        if isinstance(source, dict):
            return load_config(cls, source, what="data config")
        return load_config(cls, read_config(source), what="data config", context=str(source))

    def max_length(self, seq_length: int) -> int:
        """The smallest of --seq-length and the limits that are set here."""
        tokenizer = self.dataset_param.tokenizer_config
        limits = (
            seq_length,
            tokenizer.model_max_length if tokenizer else None,
            self.dataloader_param.collate_param.model_max_length,
        )
        return min(limit for limit in limits if limit is not None)
