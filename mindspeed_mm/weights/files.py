"""Files that hold named tensors: safetensors and torch's pickles. Read lazily, never executing anything.

Every file class has `path`, `names`, `shape(name)` and `get(name)`.
"""

import json
import math
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mindspeed_mm.errors import WeightError

MAX_HEADER_BYTES = 100 * 2**20
"""Largest safetensors header; the same bound as the safetensors library's own."""

MAX_JSON_BYTES = 64 * 2**20
"""Index files of the largest public models stay below 1 MiB."""

RECORD_NAME = "mindspeed_mm.json"
"""Member of our own .pt files that says what the tensors are; torch.load does not look at it."""

ZIP_MAGIC = b"PK\x03\x04"
GIT_LFS_MAGIC = b"version https://git-lfs"

PARSER_ERRORS = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile, pickle and torch's loader raise on a file that is cut off or overwritten (found by changing bytes at
random): they have no error type of their own for it."""


class TensorFile(Protocol):
    """A file of named tensors."""

    path: Path
    names: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""


class SafetensorsFile:
    """A .safetensors file. Raises WeightError that names the file when it is cut off or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = _read_header(path)
        self.names = tuple(self._header)
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise damaged(path, str(error)) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._header[name]["shape"])

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        return self._file.get_tensor(name)


class PickleFile:
    """A torch file with a flat dict of tensors, unpickled by torch's weights_only reader and mapped lazily.

    `record` says what the tensors are, where the file is one that we wrote.
    Raises WeightError when the pickle asks for anything else than tensors (it would execute code), when it is damaged
    and when it is not a flat dict of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            mapped = file.read(4) == ZIP_MAGIC
        self.record = _read_record(path) if mapped else None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise _unpicklable(path, error) from error
        except PARSER_ERRORS as error:
            raise damaged(
                path, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        self._tensors = _flat_tensors(path, content)
        self.names = tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._tensors[name].shape)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        return self._tensors[name].detach()


def damaged(path: Path, detail: str) -> WeightError:
    """The error of a file that is cut off or overwritten."""
    return WeightError(
        f"{path}: the file is cut off or damaged ({detail.strip()}); expected a complete weight file. "
        "Download or copy it again."
    )


def describe(error: Exception) -> str:
    """Type and first line of another library's error."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object that belongs to the weights (config.json, an index). Raises WeightError naming the file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise WeightError(f"{path} is larger than {MAX_JSON_BYTES} bytes; expected a small JSON file.")
        data = json.loads(raw.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightError(f"{path} cannot be read as JSON ({error}). Download or copy it again.") from error
    if not isinstance(data, dict):
        raise WeightError(f"{path} holds a JSON {type(data).__name__}; expected an object.")
    return data


def contained(folder: Path, name: str, *, told_by: Path) -> Path:
    """The file `name` of `folder`. Raises WeightError when the name points outside the folder.

    Checked on the name alone: a symbolic link inside the folder is the owner's, as in Hugging Face's cache.
    """
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or not name:
        raise WeightError(f"{told_by}: the file name {name!r} points outside {folder}; expected a file inside it.")
    return folder / relative


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file, with its bounds checked."""
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(8)
        length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise damaged(path, f"its header claims {length} bytes of a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if any(not _is_shape(entry["shape"]) for entry in header.values()):
            raise damaged(path, "its header holds an impossible shape")
    except PARSER_ERRORS as error:
        if isinstance(error, WeightError):
            raise
        raise damaged(path, "its header is not that of a safetensors file") from error
    if end != size - 8 - length:
        raise damaged(path, f"its header promises {end} bytes of tensors, {size - 8 - length} are there")
    return header


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(item) is int and item >= 0 for item in shape) and math.prod(shape) >= 0


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record inside one of our .pt files, None in a file of others."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.split("/", 1)[1:] == [RECORD_NAME]]
            size = members[0].file_size if members else 0
            text = archive.read(members[0]) if members and size <= MAX_JSON_BYTES else b"null"
        record = json.loads(text)
    except PARSER_ERRORS as error:
        raise damaged(path, describe(error)) from error
    if size > MAX_JSON_BYTES:
        raise damaged(path, f"its {RECORD_NAME} is larger than {MAX_JSON_BYTES} bytes")
    if members and not isinstance(record, dict):
        raise damaged(path, f"its {RECORD_NAME} is not an object")
    return record


def _flat_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise WeightError(f"{path}: found a pickled {type(content).__name__}; expected a dict from names to tensors.")
    tensors = {}
    for name, value in content.items():
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue  # megatron.core's placeholder beside a linear's weight; holds no weight
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightError(
                f"{path}: found {type(value).__name__} under {name!r}; expected a flat dict from names to tensors. "
                "Save the model's state dict alone."
            )
        tensors[name] = value
    return tensors


def _unpicklable(path: Path, error: pickle.UnpicklingError) -> WeightError:
    text = str(error)
    if "Unsupported" in text or "not an allowed" in text.lower() or "GLOBAL" in text:
        reason = next((line.strip() for line in text.splitlines() if "GLOBAL" in line), text.splitlines()[-1].strip())
        return WeightError(
            f"{path}: refused, because unpickling it would call code ({reason}); expected a dict of tensors. "
            "Do not use this file unless you trust it; then save its state dict alone, best as safetensors."
        )
    return damaged(path, text.splitlines()[0] if text else "not a pickle")
