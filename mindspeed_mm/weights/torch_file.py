"""Tensors of torch's files: dicts saved by torch.save (zip files and the older stream) and TorchScript archives.

Nothing of torch.load runs. The pickle inside is read by an unpickler that knows tensors and inert records; what it
says of a tensor is where its values lie, which are then read when asked for. Layouts: torch's
docs/source/notes/serialization.rst, torch/serialization.py (_legacy_save), torch/csrc/jit/docs/serialization.md.
"""

import io
import json
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.files import MAX_JSON_BYTES, PARSER_ERRORS, ZIP_MAGIC, RawFile, damaged, describe

RECORD_NAME = "mindspeed_mm.json"
"""Member of our own .pt files that says what the tensors are; torch.load does not look at it."""

MAX_PICKLE_BYTES = 16 * 2**20
"""data.pkl of ViT-L/14@336px is about 0.2 MiB, of a 7B model's shard less; tensors are not in it."""

MAX_ATTRIBUTES = 1_000_000
"""Attributes visited, or entries copied, before a file counts as malicious (records may refer to each other)."""

LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
"""What the first two pickles of a file hold that torch.save wrote before version 1.6."""

WRAPPERS = ("model", "model_state_dict", "state_dict")
"""Keys under which LAVIS, MiniGPT-4, OpenFlamingo and Otter put a model, with optimizer, epoch and the like beside."""

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


@dataclass(frozen=True)
class _TensorRecord:
    """Where a tensor lies: its storage's key and type, and the view into it, in elements."""

    key: str
    dtype: torch.dtype
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the values lie row by row without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


class _Record:
    """An object of an archive's program: its attributes, without its class. (Unpickling calls no __init__.)"""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


class TorchFile(RawFile):
    """A torch file as a file of named tensors: keys of the saved dict, or attribute paths of a TorchScript archive.

    `end`: a zip file that ends there stands in the file, behind other content; it holds one tensor, whose name is "".
    `record` says what the tensors are, where the file is one that we wrote.
    Raises WeightError when the pickle asks for anything else than tensors (it would execute code), when the file is
    damaged, and when it holds no flat dict of tensors.
    """

    def __init__(self, path: Path, end: int | None = None) -> None:
        super().__init__(path)
        self.record: dict[str, Any] | None = None
        self._places: dict[str, int] = {}
        self._size = path.stat().st_size
        zipped = os.pread(self._file.fileno(), len(ZIP_MAGIC), 0) == ZIP_MAGIC
        try:
            if end is not None:
                content = {"": self._open_zip(_Beginning(self._file, end))}
            else:
                content = self._open_zip(self._file) if zipped else self._open_legacy()
        except PARSER_ERRORS as error:
            if isinstance(error, WeightError):
                raise
            raise damaged(path, f"its pickle does not describe tensors, {describe(error)}") from error
        self._tensors = _flat_tensors(path, content)
        self.names = tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        return self._tensors[name].dtype

    def offset(self, name: str) -> int | None:
        """Where the values of a tensor begin; None where they lie in another order than row by row."""
        record = self._tensors[name]
        return self._storage(name) + record.offset * record.dtype.itemsize if record.contiguous else None

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        record = self._tensors[name]
        if record.contiguous:
            return super().get(name)
        storage = torch.empty(record.numel, dtype=record.dtype)
        self._fill(memoryview(storage.view(torch.uint8).numpy()), self._storage(name))
        return storage.as_strided(record.shape, record.stride, record.offset).contiguous()

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis, and no other bytes but of a tensor in another order."""
        if self._tensors[name].contiguous:
            return super().get_slice(name, axis, start, stop)
        return self.get(name).narrow(axis, start, stop - start)

    def _open_zip(self, file: Any) -> Any:
        self._archive = zipfile.ZipFile(file)
        names = self._archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise damaged(self.path, f"{len(pickles)} data.pkl in the archive, expected 1")
        self._root = pickles[0].removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in names and self._read_small(order, len("little")) != b"little":
            raise WeightError(f"{self.path}: stored in big-endian order; expected little. Save it on a common machine.")
        if self._root + RECORD_NAME in names:
            self.record = self._read_record()
        data = self._read_small(pickles[0], MAX_PICKLE_BYTES)
        _check_memo(self.path, data)
        content = _Unpickler(io.BytesIO(data), self.path).load()
        if f"{self._root}constants.pkl" in names:  # a TorchScript program
            return _attributes(self.path, content)
        return content

    def _read_record(self) -> dict[str, Any]:
        record = json.loads(self._read_small(self._root + RECORD_NAME, MAX_JSON_BYTES))
        if not isinstance(record, dict):
            raise damaged(self.path, f"its {RECORD_NAME} is not an object")
        return record

    def _read_small(self, member: str, largest: int) -> bytes:
        """A member's content. It may be compressed, and a few bytes to any size; no more than stated is unpacked."""
        if self._archive.getinfo(member).file_size > largest:
            raise damaged(self.path, f"its {member.removeprefix(self._root)} is larger than {largest} bytes")
        return self._archive.read(member)

    def _open_legacy(self) -> Any:
        """Five pickles (magic number, version, machine, content, keys of the storages), then storage by storage its
        number of elements and its values."""
        self._archive = None
        with self.path.open("rb") as file:
            pickles = [self._next_pickle(file) for _ in range(3)]
            if pickles[:2] != [LEGACY_MAGIC, LEGACY_VERSION]:
                raise damaged(self.path, "neither a zip file nor a file of torch.save")
            if not isinstance(pickles[2], dict) or not pickles[2].get("little_endian", True):
                raise WeightError(f"{self.path}: stored in big-endian order; expected little. Save it on a common one.")
            storages: dict[str, tuple[torch.dtype, int]] = {}
            content = self._next_pickle(file, storages)
            keys = self._next_pickle(file)
            place = file.tell()
        if not isinstance(keys, list) or any(key not in storages for key in keys):
            raise damaged(self.path, "its list of storages is not that of its tensors")
        for key in keys:
            dtype, numel = storages[key]
            count = bytearray(8)
            self._fill(memoryview(count), place)
            if int.from_bytes(count, "little", signed=True) != numel:
                raise damaged(self.path, f"storage {key} does not hold {numel} values")
            self._places[key] = place + 8
            place += 8 + numel * dtype.itemsize
        self.bytes_read = 0
        if place > self.path.stat().st_size:
            raise damaged(self.path, "its values end too early")
        return content

    def _next_pickle(self, file: Any, storages: dict[str, tuple[torch.dtype, int]] | None = None) -> Any:
        begin = file.tell()
        beginning = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        for _ in pickletools.genops(beginning):  # to the end of the pickle; raises for what is none
            pass
        file.seek(begin + beginning.tell())
        data = beginning.getvalue()[: beginning.tell()]
        _check_memo(self.path, data)
        return _Unpickler(io.BytesIO(data), self.path, storages).load()

    def _storage(self, name: str) -> int:
        """Where the storage of a tensor begins, checked to hold the tensor."""
        record = self._tensors[name]
        if record.key not in self._places:
            self._places[record.key] = self._find_member(record)
        extent = sum((size - 1) * stride for size, stride in zip(record.shape, record.stride, strict=True))
        if 0 not in record.shape and record.offset + extent >= record.numel:
            raise damaged(self.path, f"{name} reaches beyond its storage")
        return self._places[record.key]

    def _find_member(self, record: _TensorRecord) -> int:
        """Where the values of a stored member of the zip file begin: behind its own header."""
        member, nbytes = f"{self._root}data/{record.key}" if self._archive else record.key, record.numel
        nbytes *= record.dtype.itemsize
        try:
            info = self._archive.getinfo(member) if self._archive else None
        except KeyError as error:
            raise damaged(self.path, f"{member} is missing") from error
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size != nbytes:
            raise damaged(self.path, f"{member} does not hold {record.numel} values of {record.dtype}")
        header = bytearray(30)
        self._fill(memoryview(header), info.header_offset)
        self.bytes_read -= len(header)
        begin = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        begin += int.from_bytes(header[28:30], "little")
        if header[:4] != ZIP_MAGIC or begin + nbytes > self._size:
            raise damaged(self.path, f"{member} is not where the archive's table says")
        return begin


class _Beginning(io.RawIOBase):
    """The first `end` bytes of a file. (zipfile looks for its table at the end, and allows anything in front.)"""

    def __init__(self, file: Any, end: int) -> None:
        self._file, self._end, self._place = file, end, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._end}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self._end - self._place)]
        count = os.preadv(self._file.fileno(), [wanted], self._place) if wanted else 0
        self._place += count
        return count


def _check_memo(path: Path, data: bytes) -> None:
    """An unpickler reserves its memo up to the largest index, which a few bytes can set to billions."""
    if any(code.name.endswith("PUT") and index > len(data) for code, index, _ in pickletools.genops(data)):
        raise damaged(path, "its pickle numbers more values than it can hold")


class _Unpickler(pickle.Unpickler):
    """Builds records and tensor records; every other class or function is refused."""

    def __init__(self, file: Any, path: Path, storages: dict[str, tuple[torch.dtype, int]] | None = None) -> None:
        super().__init__(file)
        self._path = path
        self._storages = storages
        self._copied = 0

    def find_class(self, module: str, name: str) -> Any:
        """Called by pickle for each name the stream wants to use."""
        if module.startswith("__torch__"):
            return _Record
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        # New functions for each name: a pickle can set attributes of whatever it is handed. None copies what it is
        # given, since a few bytes of pickle can ask for the same copy a million times.
        known = {
            ("collections", "OrderedDict"): lambda *pairs: self._ordered(*pairs),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _rebuild(*arguments),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.jit._pickle", "build_intlist"): lambda values: values,
            ("torch.jit._pickle", "build_doublelist"): lambda values: values,
            ("torch.jit._pickle", "build_boollist"): lambda values: values,
            ("torch.jit._pickle", "build_tensorlist"): lambda values: values,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _tag: value,
        }
        if (module, name) not in known:
            raise WeightError(
                f"{self._path}: refused, because reading it would call {module}.{name}; expected tensors alone. "
                "Do not use this file unless you trust it; then save its state dict alone, best as safetensors."
            )
        return known[module, name]

    def _ordered(self, pairs: Any = ()) -> "OrderedDict[Any, Any]":
        """An OrderedDict, empty as Python 3 pickles it or of pairs as Python 2 did."""
        self._copied += len(pairs)
        if self._copied > MAX_ATTRIBUTES:
            raise damaged(self._path, f"more than {MAX_ATTRIBUTES} entries")
        return OrderedDict(pairs)

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype, int]:
        """("storage", type, key, device, numel[, None]) -> (key, dtype, numel). The device is where it was saved."""
        _, dtype, key, _, numel, *view = pid
        if not isinstance(key, str) or not isinstance(dtype, torch.dtype) or type(numel) is not int or numel < 0:
            raise damaged(self._path, f"storage {key!r} is not described as one")
        if any(part is not None for part in view):
            raise damaged(self._path, f"storage {key!r} is a part of another one, as no torch since 0.4 writes it")
        if self._storages is not None and self._storages.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise damaged(self._path, f"storage {key!r} is described in two ways")
        return key, dtype, numel


def _rebuild(storage: tuple[str, torch.dtype, int], offset: int, shape: Any, stride: Any, *_: Any) -> _TensorRecord:
    """Arguments of torch._utils._rebuild_tensor_v2, kept for later."""
    numbers = (offset, *shape, *stride)
    if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(stride):
        raise ValueError("impossible tensor geometry")
    key, dtype, numel = storage
    if math.prod(shape) * dtype.itemsize >= 2**63:
        raise ValueError("impossible tensor size")
    return _TensorRecord(key, dtype, numel, offset, tuple(shape), tuple(stride))


def _flat_tensors(path: Path, content: Any) -> dict[str, _TensorRecord]:
    if not isinstance(content, dict):
        raise WeightError(f"{path}: found a pickled {type(content).__name__}; expected a dict from names to tensors.")
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {}
    for name, value in content.items():
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue  # megatron.core's placeholder beside a linear's weight; holds no weight
        if not isinstance(name, str) or not isinstance(value, _TensorRecord):
            raise WeightError(
                f"{path}: found {type(value).__name__} under {name!r}; expected a flat dict from names to tensors. "
                "Save the model's state dict alone."
            )
        tensors[name] = value
    return tensors


def _attributes(path: Path, content: Any) -> dict[str, _TensorRecord]:
    """Tensors of a program's modules by their path of attributes, as in its state dict."""
    if not isinstance(content, _Record):
        raise damaged(path, "its pickle does not describe a module")
    tensors: dict[str, _TensorRecord] = {}
    stack = [("", content)]
    visited = 0
    while stack:
        prefix, record = stack.pop()
        for name, value in record.attributes.items():
            visited += 1
            if visited > MAX_ATTRIBUTES:
                raise damaged(path, f"more than {MAX_ATTRIBUTES} attributes")
            if isinstance(value, _TensorRecord):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Record):
                stack.append((f"{prefix}{name}.", value))
    return tensors
