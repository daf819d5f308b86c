"""Which files of a path hold the weights, and the union of their tensors."""

import functools
import logging
import re
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.files import (
    GIT_LFS_MAGIC,
    ZIP_MAGIC,
    SafetensorsFile,
    Span,
    TensorFile,
    contained,
    read_json_object,
)
from mindspeed_mm.weights.torch_file import TorchFile

logger = logging.getLogger(__name__)

STANDARD_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""Weights of a Hugging Face folder, the first that exists; others beside it are copies in another format."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

SHARD = re.compile(r"(?P<name>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.[a-z]+)")
"""Name of one of several files that hold one model."""

NO_WEIGHTS = ("training_args.bin", "optimizer.", "optimizer_", "scheduler.", "rng_state", "scaler.", "tokenizer.")
"""Beginnings of files that trainers leave beside the weights."""


class TensorFiles:
    """Several tensor files read as one. Raises WeightError for a tensor that two of them hold.

    `record` is what a single file of our own says of itself, else None.
    """

    def __init__(self, path: Path, files: list[TensorFile]) -> None:
        self.path = path
        self._holder: dict[str, TensorFile] = {}
        for file in files:
            for name in file.names:
                if name in self._holder:
                    raise WeightError(
                        f"{path}: tensor {name} is both in {self._holder[name].path.name} and in {file.path.name}; "
                        "expected every tensor once. Remove the file that does not belong here."
                    )
                self._holder[name] = file
        self.names = tuple(self._holder)
        self.record = files[0].record if len(files) == 1 else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._holder[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        return self._holder[name].dtype(name)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        return self._holder[name].get(name)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis."""
        return self._holder[name].get_slice(name, axis, start, stop)

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor in its file; None where they lie in another order than row by row."""
        return self._holder[name].span(name)

    def file_of(self, name: str) -> Path | None:
        """The file that holds a tensor, None where no file does."""
        holder = self._holder.get(name)
        return holder.path if holder else None


def open_file(path: Path) -> TensorFile:
    """Open one file of tensors, its format taken from its first bytes. Raises WeightError for any other file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS_MAGIC))
    except OSError as error:
        raise WeightError(f"cannot read {path}: {error.strerror}; expected a weight file. Correct the path.") from error
    if start.startswith(GIT_LFS_MAGIC):
        raise WeightError(f"{path}: found a git-lfs pointer instead of weights; run `git lfs pull` in its folder.")
    if start.startswith(ZIP_MAGIC):
        return TorchFile(path)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if start.startswith(b"\x80"):
        return TorchFile(path)
    raise WeightError(
        f"{path}: found neither safetensors nor a torch file (first bytes {start[:8]!r}); "
        "expected weights. Correct the path or download the file again."
    )


def find_groups(folder: Path) -> list[TensorFiles]:
    """The weights of a folder: one group for a standard Hugging Face folder, else one for each set of shards and for
    each other file.

    Raises WeightError when there are none, for a missing or unlisted shard and for a LoRA adapter.
    """
    for name in STANDARD_FILES:
        path = folder / name
        if path.is_file():
            if any(folder.glob("adapter_model.*")):
                _tell_adapter(folder)
            return [_indexed(path) if path.suffix == ".json" else TensorFiles(path, [open_file(path)])]
    indexes = sorted(folder.glob("*.index.json"))
    if len(indexes) == 1:
        return [_indexed(indexes[0])]
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in WEIGHT_SUFFIXES and path.is_file() and not path.name.startswith(NO_WEIGHTS)
    )
    if any(path.name.startswith("adapter_model.") for path in paths):
        raise WeightError(
            f"{folder}: found a LoRA adapter (adapter_model); expected full weights. Give its base model, and the "
            f"adapter beside it (--adapter {folder}; train: --lora-load {folder}), or merge both: "
            f"mindspeed-mm merge BASE {folder} --output DIR"
        )
    if len(indexes) > 1 or not paths:
        found = ", ".join(path.name for path in indexes) or "no weight file"
        raise WeightError(
            f"{folder}: found {found}; expected one of {', '.join(STANDARD_FILES)}, or files ending in "
            f"{', '.join(WEIGHT_SUFFIXES)}. Give the folder or file that holds the weights."
        )
    shards, others = _sets_of_shards(folder, paths)
    if shards:
        return [TensorFiles(folder, [open_file(path) for path in shards]), *_alone(others)]
    return _alone(others)


@functools.lru_cache(maxsize=256)
def _tell_adapter(folder: Path) -> None:
    logger.warning(
        "%s holds a LoRA adapter (adapter_model) beside whole weights: the weights are taken as they are. If they are "
        "not those with the adapter merged, give --adapter %s, too",
        folder,
        folder,
    )


def _alone(paths: list[Path]) -> list[TensorFiles]:
    return [TensorFiles(path, [open_file(path)]) for path in paths]


def _sets_of_shards(folder: Path, paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """(the shards of one model whose index is not there, the other files). Of two copies in different formats the first
    one of WEIGHT_SUFFIXES counts, as where there are indexes.

    Raises WeightError for a set with a missing shard, and for several sets of one format.
    """
    sets: dict[tuple[str, str, int], dict[int, Path]] = {}
    for path in paths:
        if found := SHARD.fullmatch(path.name):
            key = (found["suffix"], found["name"], int(found["count"]))
            sets.setdefault(key, {})[int(found["number"])] = path
    if not sets:
        return [], paths
    suffix = min((key[0] for key in sets), key=WEIGHT_SUFFIXES.index)
    chosen = [key for key in sets if key[0] == suffix]
    if len(chosen) > 1:
        listed = ", ".join(f"{name}-*-of-{count:05d}{suffix}" for _, name, count in sorted(chosen))
        raise WeightError(
            f"{folder}: found shards of several models: {listed}; expected one. Give each its own folder."
        )
    (_, name, count), numbered = chosen[0], sets[chosen[0]]
    absent = [number for number in range(1, count + 1) if number not in numbered]
    if absent:
        shown = ", ".join(f"{name}-{number:05d}-of-{count:05d}{suffix}" for number in absent[:4])
        raise WeightError(
            f"{folder}: found {len(numbered)} of {count} shards and no index; missing are {shown}"
            f"{', ...' if len(absent) > 4 else ''}. Download the missing ones."
        )
    members = {path for own in sets.values() for path in own.values()}
    return [numbered[number] for number in sorted(numbered)], [path for path in paths if path not in members]


def _indexed(index: Path) -> TensorFiles:
    """The shards that an index lists, which must hold exactly the tensors it lists."""
    folder = index.parent
    table = read_json_object(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(value, str) for value in table.values()):
        raise WeightError(f"{index}: weight_map is not a table from tensor to file. Download the index again.")
    shards = {name: contained(folder, name, told_by=index) for name in sorted(set(table.values()))}
    absent = [name for name, path in shards.items() if not path.is_file()]
    if absent:
        raise WeightError(
            f"{index} names {', '.join(absent)}, not found in {folder}; expected {len(shards)} shards. "
            "Download the missing ones."
        )
    files = TensorFiles(folder, [open_file(path) for path in shards.values()])
    for name, shard in table.items():
        if files.file_of(name) != shards[shard]:
            raise WeightError(
                f"{index} puts tensor {name} in {shard}, which does not hold it. Download shard and index again."
            )
    unlisted = [name for name in files.names if name not in table]
    if unlisted:
        raise WeightError(
            f"{index} does not list {len(unlisted)} tensors that its shards hold, such as {unlisted[0]}. "
            "Download shards and index again, from one version."
        )
    return files
