"""Read the tensors of a TorchScript archive (OpenAI's CLIP files) without loading its program.

torch.jit.load would compile the archive's code and run its __setstate__ methods. Here only data.pkl is read, by an
unpickler that knows tensors and inert records, and storages are then read one by one from the zip file. Layout of the
archive: torch/csrc/jit/docs/serialization.md.
"""

import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.files import PARSER_ERRORS, damaged, describe

MAX_PICKLE_BYTES = 16 * 2**20
"""data.pkl of ViT-L/14@336px is about 0.2 MiB; tensors are not in it."""

MAX_ATTRIBUTES = 1_000_000
"""Attributes visited before an archive counts as malicious (records may refer to each other)."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a zip file holds a TorchScript program (a pickled dict of tensors has no constants.pkl)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
    except PARSER_ERRORS as error:
        raise damaged(path, describe(error)) from error


@dataclass(frozen=True)
class _TensorRecord:
    """Where a tensor lies: its storage's key and type, and the view into it, in elements."""

    key: str
    dtype: torch.dtype
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Record:
    """An object of the archive's program: its attributes, without its class. (Unpickling calls no __init__.)"""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


class TorchScriptFile:
    """A TorchScript archive as a file of named tensors (attribute paths, as in its state dict).

    Raises WeightError when the archive is damaged or asks for anything but tensors and records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            content = _Unpickler(self._read_pickle(), path).load()
        except PARSER_ERRORS as error:
            if isinstance(error, WeightError):
                raise
            raise damaged(path, f"its data.pkl does not describe a module, {describe(error)}") from error
        self._tensors = _named_tensors(content, path)
        self.names = tuple(self._tensors)

    def _read_pickle(self) -> bytes:
        """data.pkl of the archive, checked before an unpickler sees it."""
        members = [name for name in self._archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(members) != 1:
            raise damaged(self.path, f"{len(members)} data.pkl in the archive, expected 1")
        self._root = members[0].removesuffix("data.pkl")
        if self._archive.getinfo(members[0]).file_size > MAX_PICKLE_BYTES:
            raise damaged(self.path, f"its data.pkl is larger than {MAX_PICKLE_BYTES} bytes")
        order = f"{self._root}byteorder"
        if order in self._archive.namelist() and self._archive.read(order) != b"little":
            raise WeightError(f"{self.path}: stored in big-endian order; expected little. Save it on a common machine.")
        data = self._archive.read(members[0])
        # An unpickler reserves its memo up to the largest index, which a few bytes can set to billions.
        if any(code.name.endswith("PUT") and index > len(data) for code, index, _ in pickletools.genops(data)):
            raise damaged(self.path, "its data.pkl numbers more values than it can hold")
        return data

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        return self._tensors[name].dtype

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """The indices start..stop-1 of one axis. (An archive's tensors are read whole.)"""
        return self.get(name).narrow(axis, start, stop - start)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        record = self._tensors[name]
        member = f"{self._root}data/{record.key}"
        try:
            info = self._archive.getinfo(member)
            fits = info.compress_type == zipfile.ZIP_STORED and info.file_size == record.numel * record.dtype.itemsize
            data = bytearray(self._archive.read(info) if fits else b"")
        except PARSER_ERRORS as error:
            raise damaged(self.path, f"{member}, {describe(error)}") from error
        if not fits:
            raise damaged(self.path, f"{member} does not hold {record.numel} values of {record.dtype}")
        extent = sum((size - 1) * stride for size, stride in zip(record.shape, record.stride, strict=True))
        if 0 in record.shape:
            return torch.empty(record.shape, dtype=record.dtype)
        if record.offset + extent >= record.numel:
            raise damaged(self.path, f"{name} reaches beyond its storage")
        storage = torch.frombuffer(data, dtype=record.dtype)
        return storage.as_strided(record.shape, record.stride, record.offset).contiguous()


class _Unpickler(pickle.Unpickler):
    """Builds records and tensor records; every other class or function is refused."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Called by pickle for each name the stream wants to use."""
        if module.startswith("__torch__"):
            return _Record
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        # New functions for each archive: a pickle can set attributes of whatever it is handed.
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _rebuild(*arguments),
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _tag: value,
        }
        if (module, name) not in known:
            raise WeightError(
                f"{self._path}: refused, because reading it would call {module}.{name}; expected tensors and "
                "TorchScript modules alone. Do not use this file unless you trust it."
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype, int]:
        """("storage", type, key, device, numel) -> (key, dtype, numel). The device is where it was saved."""
        _, dtype, key, _, numel = pid
        if not isinstance(key, str) or not isinstance(dtype, torch.dtype) or type(numel) is not int or numel < 0:
            raise damaged(self._path, f"storage {key!r} is not described as one")
        return key, dtype, numel


def _rebuild(storage: tuple[str, torch.dtype, int], offset: int, shape: Any, stride: Any, *_: Any) -> _TensorRecord:
    """Arguments of torch._utils._rebuild_tensor_v2, kept for later."""
    numbers = (offset, *shape, *stride)
    if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(stride):
        raise ValueError("impossible tensor geometry")
    key, dtype, numel = storage
    return _TensorRecord(key, dtype, numel, offset, tuple(shape), tuple(stride))


def _named_tensors(content: Any, path: Path) -> dict[str, _TensorRecord]:
    tensors: dict[str, _TensorRecord] = {}
    stack = [("", content)]
    visited = 0
    while stack:
        prefix, record = stack.pop()
        for name, value in record.attributes.items() if isinstance(record, _Record) else ():
            visited += 1
            if visited > MAX_ATTRIBUTES:
                raise damaged(path, f"more than {MAX_ATTRIBUTES} attributes")
            if isinstance(value, _TensorRecord):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Record):
                stack.append((f"{prefix}{name}.", value))
    return tensors
