"""Finding and reading checkpoints, without a process group.

Two files of a torch_dist checkpoint are pickles: common.pt, which torch.load reads with weights_only=True, and
.metadata, which torch.distributed.checkpoint unpickles without any restriction. `read_metadata` allows .metadata
nothing but the classes that describe tensors; call it before anything of torch opens the folder.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron.driver.arguments import DriverArguments
from megatron.driver.checkpoint import integrity, storage
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.run_folders import AVERAGED

FORMAT = 2
"""Version of run.json."""

_RUN_FIELDS = {
    **{"iteration": int, "consumed_samples": int, "skipped_iterations": int, "rng": bool},
    **{"scheduler": dict, "layout": dict, "files": dict, "extra": dict},
    **{"optimizer": (dict, type(None)), "frozen": (dict, type(None))},
}

OPTIMIZER_PREFIX = "optimizer."
AVERAGE_PREFIX = OPTIMIZER_PREFIX + "ema."
"""Of the moving average of a parameter, in float32 (--ema-decay)."""
METADATA_FILE = ".metadata"
METADATA_LIMIT = 2**30
"""Bytes; 2 million tensors take about 400 MB."""

# torch's CheckpointException derives from BaseException and carries one error per rank.
_READING_ERRORS = (
    *(dcp.api.CheckpointException, pickle.UnpicklingError),
    *(RuntimeError, OSError, EOFError, KeyError),
)

_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {
        *("Size", "float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"),
        *("strided", "contiguous_format", "preserve_format", "channels_last"),
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    # Paths appear in StorageMeta.checkpoint_id.
    "pathlib": {"PosixPath", "WindowsPath", "Path"},
    "pathlib._local": {"PosixPath", "WindowsPath", "Path"},
}

# megatron.core up to 0.15 writes a subclass with one more field. It is read as torch's own class.
_OLDER_METADATA = ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _OLDER_METADATA:
            return Metadata
        if name not in _DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """The description of all tensors in a torch_dist folder.

    Raises:
        CheckpointError: missing, damaged, asking for foreign code, or pointing outside its folder.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no torch_dist checkpoint: {METADATA_FILE} is missing; load another iteration"
        )
    if path.stat().st_size > METADATA_LIMIT:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes: expected at most {METADATA_LIMIT}")
    try:
        with path.open("rb") as file:
            metadata = _DescriptionUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path} is refused: {error}. It is damaged or was not written by a training run; do not load it elsewhere"
        ) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(
            f"{path} is refused: it holds {type(metadata).__name__}, expected the tensors' description"
        )
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{path} is refused: it points to {info.relative_path!r}, outside its folder")
    return metadata


class SafeReader(dcp.FileSystemReader):
    """torch's reader of checkpoint files, with the metadata read safely and once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata = read_metadata(Path(path))

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """See torch.distributed.checkpoint.StorageReader."""
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = dcp.metadata.StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def read_tracker(folder: Path) -> str | None:
    """What the tracker file names: digits or `release`; None where there is no tracker.

    Raises:
        CheckpointError: the tracker holds something else.
    """
    path = folder / storage.TRACKER
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text != storage.RELEASE and not (text.isascii() and text.isdigit()):
        raise CheckpointError(
            f"{path} holds {text[:60]!r}: expected the number of an iteration, or {storage.RELEASE!r}"
        )
    return text


def find_checkpoint(folder: str | Path, step: int | None = None) -> Path | None:
    """The checkpoint that a folder stands for.

    Args:
        folder: a save folder, whose tracker decides, or the folder of one checkpoint.
        step: take this iteration instead of the tracker's.

    Returns:
        The checkpoint's folder; None where `folder` is missing or has no tracker.

    Raises:
        CheckpointError: nonsense in the tracker, or the folder it names is missing.
    """
    folder = Path(folder)
    if step is None and (folder / storage.RUN_FILE).is_file():
        return folder
    word = str(step) if step is not None else read_tracker(folder)
    if word is None:
        return None
    path = folder / storage.RELEASE if word == storage.RELEASE else storage.iteration_dir(folder, int(word))
    if not path.is_dir():
        present = storage.iterations(folder)
        cure = "give one of them to --ckpt-step" if present else "give another folder"
        raise CheckpointError(
            f"{'--ckpt-step' if step is not None else folder / storage.TRACKER} names {word}, but {path} is missing; "
            f"whole iterations in {folder}: {', '.join(map(str, present)) or 'none'}; {cure}"
        )
    return path


def check_folders(args: DriverArguments) -> None:
    """Raise CheckpointError where a folder that has to hold a checkpoint has none; nothing need be built for it.

    The folder of --load may be empty only where the run itself fills it: the same command begins a run and goes on
    with it. Any other one was meant to be there.
    """
    if args.load is not None:
        if find_checkpoint(args.load, args.ckpt_step) is not None:
            return
        text = missing("--load", args.load, "to go on from the last one")
        if args.exit_on_missing_checkpoint:
            raise CheckpointError(f"{text}, and --exit-on-missing-checkpoint is given: check the path")
        if args.finetune:
            raise CheckpointError(f"{text}, from which --finetune takes weights: check the path, or leave both away")
        if args.save is None or Path(args.load).resolve() != Path(args.save).resolve():
            raise CheckpointError(
                f"{text}: check the path. A new run leaves --load away, or has it equal to --save (a launcher: set "
                "SAVE_PATH in place of --save)"
            )
        if len(storage.iterations(Path(args.load))) > 1:  # one alone: the run was killed in its first save
            raise CheckpointError(f"{text}. A new run would write over them: it has another --save")
    given = args.pretrained_checkpoint
    if given is not None and find_checkpoint(given) is None:
        raise CheckpointError(f"{missing('--pretrained-checkpoint', given, 'to take the last one')}: check the path")


def missing(flag: str, folder: str | Path, aim: str) -> str:
    """What is said of a folder without a tracker; where one is lost, how it comes back."""
    text = f"{flag} {folder} holds no checkpoint ({storage.TRACKER} is missing)"
    present = storage.iterations(Path(folder))
    if not present:
        return text
    lost = f"; whole iterations are there ({', '.join(map(str, present))}): write {present[-1]} into that file {aim}"
    return f"{text[:-1]}{lost})"


def read_run(path: Path) -> dict[str, Any]:
    """run.json of a checkpoint, after it was compared with its checksum, and the files' sizes with what it records.

    Raises:
        CheckpointError: missing, changed or unreadable run.json, another format, missing or truncated files.
    """
    file = path / storage.RUN_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path} is no whole checkpoint of this suite: {storage.RUN_FILE} is missing. Restore the files"
            f"{storage.offer(path)}"
        )
    integrity.check_file(path, storage.RUN_FILE)
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Load another iteration") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        found = run.get("format") if isinstance(run, dict) else type(run).__name__
        raise CheckpointError(f"{file} has format {found!r}: expected {FORMAT}; use the release that wrote it")
    wrong = [name for name, kind in _RUN_FIELDS.items() if not isinstance(run.get(name), kind)]
    if wrong:
        raise CheckpointError(f"{file} lacks {', '.join(wrong)} or has them in another form. Load another iteration")
    storage.check_sizes(path, run["files"])
    return run


def frozen_source(path: Path, run: dict[str, Any]) -> Path | None:
    """Folder of a checkpoint's frozen parameters, None where nothing was frozen.

    run.json holds the hash of the folder's checksums, so other frozen parameters are noticed at every layout.

    Raises:
        CheckpointError: run.json names a folder that is not there, damaged, another one, or not below the save folder.
    """
    frozen = run.get("frozen")
    if not frozen:
        return None
    if not (isinstance(frozen.get("id"), str) and frozen["id"].isalnum()):
        raise CheckpointError(f"{path / storage.RUN_FILE}: frozen id {frozen.get('id')!r} is no hash")
    folder = storage.frozen_dir(path.resolve().parent, frozen["id"])
    if not folder.is_dir():
        raise CheckpointError(
            f"{path} keeps its frozen parameters in {folder}, which is missing: copy a checkpoint together with "
            f"its save folder's {storage.FROZEN}/"
        )
    storage.check_sizes(folder, frozen["files"])
    checksums = folder / storage.CHECKSUMS
    if not checksums.is_file() or integrity.digest(checksums) != frozen["checksums"]:
        raise CheckpointError(
            f"the frozen parameters in {folder} are not those that {path} was saved with: {storage.CHECKSUMS} has "
            "changed. Restore the folder"
        )
    return folder


@dataclass(frozen=True)
class Checkpoint:
    """Model tensors of one checkpoint, wherever they lie."""

    path: Path
    run: dict[str, Any]
    sources: dict[str, SafeReader]
    """Reader of each model tensor, by name."""
    averages: frozenset[str] = frozenset()
    """Names of the tensors whose moving average is read in their place."""

    @property
    def names(self) -> list[str]:
        """Names of all model tensors."""
        return list(self.sources)

    def _description(self, name: str) -> TensorStorageMetadata:
        if name not in self.sources:
            raise CheckpointError(f"checkpoint {self.path} holds no tensor {name!r}")
        return self.sources[name].read_metadata().state_dict_metadata[name]

    def stored(self, name: str) -> str:
        """What the values of a tensor are called in the files."""
        return AVERAGE_PREFIX + name if name in self.averages else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor, whatever the parallel layout it was written at."""
        return tuple(self._description(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Type that a tensor was written in; an average is rounded to it."""
        return self._description(name).properties.dtype

    def get(self, name: str) -> torch.Tensor:
        """A full tensor on the CPU, in the type it was written in.

        Raises:
            CheckpointError: unknown name, or a damaged file.
        """
        description = self._description(name)
        kept = torch.float32 if name in self.averages else description.properties.dtype
        tensor = torch.empty(description.size, dtype=kept)
        with reading_errors(self.path):
            dcp.load({self.stored(name): tensor}, storage_reader=self.sources[name], no_dist=True)
        return tensor.to(description.properties.dtype)


@contextlib.contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn what a damaged or hostile checkpoint raises in torch and megatron.core into a CheckpointError."""
    try:
        yield
    except _READING_ERRORS as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {first_line(error)}. Load another iteration"
        ) from error


_TORN_WRITE = "unexpected pos"
"""What torch's zip writer says when the system took less than it was given; what the system said does not reach us."""


def first_line(error: BaseException) -> str:
    """Type and first line of an error; of torch's collection of all ranks' errors, of the first."""
    failures = getattr(error, "failures", None)
    if failures:
        wrapped = next(iter(failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    line = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if _TORN_WRITE in line:
        line += " (torch could not write a file to its end: a full disk, a quota, or a limit on the size of files)"
    return line


def is_model_tensor(name: str, description: Any) -> bool:
    """True for parameters and buffers, False for optimizer state and anything that is no tensor."""
    return isinstance(description, TensorStorageMetadata) and not name.startswith(OPTIMIZER_PREFIX)


def folders(path: Path, run: dict[str, Any]) -> list[Path]:
    """The checkpoint's own folder and, where there is one, that of its frozen parameters."""
    frozen = frozen_source(path, run)
    return [path] if frozen is None else [path, frozen]


def open_checkpoint(path: Path, run: dict[str, Any]) -> Checkpoint:
    """Open the folder of one checkpoint whose run.json is read; nothing but descriptions is loaded."""
    sources: dict[str, SafeReader] = {}
    for folder in folders(path, run):
        reader = SafeReader(folder)
        tensors = reader.read_metadata().state_dict_metadata
        sources |= {name: reader for name, about in tensors.items() if is_model_tensor(name, about)}
    return Checkpoint(path, run, sources)


def read_checkpoint(folder: str | Path, step: int | None = None) -> Checkpoint:
    """Open a checkpoint for inference or conversion: a save folder (the tracker decides) or one iteration's folder, or
    one of these with `ema` behind it, for its moving averages.

    All its files are read once, to compare their checksums.

    Raises:
        CheckpointError: there is none, or it is damaged, or it holds no averages.
    """
    folder, averaged = split_averaged(folder)
    path = find_checkpoint(folder, step)
    if path is None:
        raise CheckpointError(f"{folder} holds no checkpoint: {storage.TRACKER} is missing")
    run = read_run(path)
    integrity.check(folders(path, run), together=False)
    checkpoint = open_checkpoint(path, run)
    return with_averages(checkpoint) if averaged else checkpoint


def split_averaged(folder: str | Path) -> tuple[Path, bool]:
    """(the folder of a checkpoint, whether its moving averages are meant): RUN/ema where there is no such folder."""
    folder = Path(folder)
    averaged = folder.name == AVERAGED and not folder.exists() and folder.parent.is_dir()
    return (folder.parent, True) if averaged else (folder, False)


def with_averages(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its moving averages in place of what was trained.

    Raises:
        CheckpointError: it holds none.
    """
    kept = {name for reader in checkpoint.sources.values() for name in reader.read_metadata().state_dict_metadata}
    averages = frozenset(name for name in checkpoint.sources if AVERAGE_PREFIX + name in kept)
    if not averages:
        raise CheckpointError(
            f"{checkpoint.path} holds no moving average of the weights: the run had no --ema-decay. Give the path "
            f"without {AVERAGED}"
        )
    return replace(checkpoint, averages=averages)
