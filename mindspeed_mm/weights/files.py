"""Files that hold named tensors, read lazily and never executing anything. Here: what all have, and safetensors.

Every file class has `path`, `names`, `shape(name)`, `dtype(name)`, `get(name)`, `get_slice(name, axis, start, stop)`
and `span(name)`.
Tensors are copies and no file is mapped, so that a pass over a large file needs the memory of one tensor.
"""

import json
import math
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
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

ZIP_MAGIC = b"PK\x03\x04"
GIT_LFS_MAGIC = b"version https://git-lfs"

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Type names of safetensors headers (its README), the only ones that are read and written."""

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
    record: dict[str, Any] | None
    """What a file of our own says of itself."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis, and from files that allow it no other bytes."""

    def span(self, name: str) -> "Span | None":
        """The bytes of a tensor; None where they lie in another order than row by row."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file: `nbytes` from `offset` on."""

    path: Path
    offset: int
    nbytes: int


class RawFile:
    """A file whose tensors lie in it as plain bytes. `bytes_read` counts what was read of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._file = path.open("rb", buffering=0)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        raise NotImplementedError

    def offset(self, name: str) -> int | None:
        """Where the values of a tensor begin, row by row without gaps; None where they lie in another order."""
        raise NotImplementedError

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor; None where they lie in another order than row by row."""
        begin = self.offset(name)
        nbytes = math.prod(self.shape(name)) * self.dtype(name).itemsize
        return None if begin is None else Span(self.path, begin, nbytes)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        shape = self.shape(name)
        return self._read(name, [(0, math.prod(shape))], shape)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis and no other bytes."""
        shape = list(self.shape(name))
        inner = math.prod(shape[axis + 1 :])
        stride = shape[axis] * inner
        runs = [(row * stride + start * inner, (stop - start) * inner) for row in range(math.prod(shape[:axis]))]
        shape[axis] = stop - start
        return self._read(name, runs, tuple(shape))

    def _read(self, name: str, runs: list[tuple[int, int]], shape: tuple[int, ...]) -> Tensor:
        """The tensor of runs of (first element, elements), in order."""
        dtype = self.dtype(name)
        result = torch.empty(shape, dtype=dtype)
        size = dtype.itemsize
        if not result.numel():
            return result
        buffer = memoryview(result.view(-1).view(torch.uint8).numpy())
        begin, filled = self.offset(name), 0
        for first, count in runs:
            self._fill(buffer[filled : filled + count * size], begin + first * size)
            filled += count * size
        return result

    def _fill(self, buffer: memoryview, offset: int) -> None:
        """Read from an offset until the buffer is full; one call may return less (2 GiB at most on Linux)."""
        self.bytes_read += len(buffer)
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
            if not count:
                raise damaged(self.path, "it became shorter while it was read")
            done += count


class SafetensorsFile(RawFile):
    """A .safetensors file. Raises WeightError that names the file when it is cut off or damaged."""

    record = None

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._header, self._start = _read_header(path)
        self.names = tuple(self._header)
        try:
            with safe_open(path, framework="pt", device="cpu"):  # the library's own checks of the header
                pass
        except SafetensorError as error:
            raise damaged(path, str(error)) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor. Raises WeightError for one that torch has not."""
        stored = self._header[name]["dtype"]
        if stored not in SAFETENSORS_DTYPES:
            raise WeightError(
                f"{self.path}: tensor {name} has type {stored}; expected one of {', '.join(SAFETENSORS_DTYPES)}. "
                "Give weights in one of these."
            )
        return SAFETENSORS_DTYPES[stored]

    def offset(self, name: str) -> int:
        """Where the values of a tensor begin."""
        return self._start + self._header[name]["data_offsets"][0]


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


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """(name -> {dtype, shape, data_offsets}, where the tensors begin) of a safetensors file, its bounds checked."""
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
    return header, 8 + length


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(item) is int and item >= 0 for item in shape) and math.prod(shape) >= 0
