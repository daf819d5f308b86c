"""A torch file (.pt, .bin) written tensor by tensor: the archive of torch.save without holding its content.

torch.save needs all tensors at once. The archive is a plain zip of stored records: data.pkl (the dict, whose tensors
name their storages), one record per storage, byteorder and version; see torch's docs/source/notes/serialization.rst.
"""

import json
import os
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mindspeed_mm.weights.torch_file import RECORD_NAME

ROOT = "archive"
ALIGNMENT = 64
"""torch aligns storages so that they can be mapped."""

DATE = 1 << 5 | 1
"""1 January 1980: the same input gives the same bytes."""

MARK = 2**32 - 1
"""Stands where a size or place does not fit into 32 bits."""

LARGE = MARK
"""Sizes and places from here on take 64 bits."""

STORAGE_NAMES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
}


class _Storage:
    """Stands for a storage in the pickle."""

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.id = ("storage", getattr(torch, STORAGE_NAMES[dtype]), key, "cpu", numel)


class _Tensor:
    """Stands for a contiguous tensor in the pickle."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.storage = _Storage(key, dtype, torch.Size(shape).numel())

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.shape, device="meta").stride()
        arguments = (self.storage, 0, self.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        """See pickle.Pickler."""
        return value.id if isinstance(value, _Storage) else None


def write_torch_zip(
    path: Path,
    outputs: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    blocks: Iterable[memoryview],
    *,
    record: dict[str, Any] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a flat dict of tensors that torch.load reads, also with weights_only and mmap.

    Args:
        outputs: (name, shape, type) of each tensor; blocks: their bytes in the same order, none over two tensors.
        record: what the tensors are (see weights/torch_file.py), a member that torch.load does not look at.
    """
    content = {name: _Tensor(str(key), dtype, shape) for key, (name, shape, dtype) in enumerate(outputs)}
    buffer = BytesIO()
    _Pickler(buffer, protocol=2).dump(content)
    coming = iter(blocks)
    with path.open("xb", buffering=0) as file:
        archive = _StoredZip(file, advance)
        archive.add_bytes("data.pkl", buffer.getvalue())
        archive.add_bytes("byteorder", b"little")
        for key, tensor in enumerate(content.values()):
            archive.add(f"data/{key}", tensor.nbytes, coming)
        archive.add_bytes("version", b"3\n")
        if record is not None:
            archive.add_bytes(RECORD_NAME, json.dumps(record).encode())
        archive.close()


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all of `data` to an unbuffered file, which takes 2 GiB at a time at most on Linux."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])


class _StoredZip:
    """A zip file of members that are stored as they are, written in order (format: PKWARE's APPNOTE.TXT).

    zipfile does the same with several copies of the data.
    """

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance, self._place = file, advance, 0
        self._table: list[bytes] = []

    def add_bytes(self, name: str, data: bytes) -> None:
        """A small member."""
        self.add(name, len(data), iter([memoryview(data)]), counted=False)

    def add(self, name: str, nbytes: int, blocks: Iterator[memoryview], *, counted: bool = True) -> None:
        """The next `nbytes` of `blocks` as a member that begins at a multiple of ALIGNMENT."""
        begin, path = self._place, f"{ROOT}/{name}".encode()
        large = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if nbytes >= LARGE else b""
        padding = -(begin + 30 + len(path) + len(large) + 4) % ALIGNMENT
        extra = large + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        size = MARK if large else nbytes
        header = bytes(30 + len(path) + len(extra))  # its checksum is known behind the data
        self._write(header)
        checksum, left = 0, nbytes
        while left:
            block = next(blocks)
            checksum = zlib.crc32(block, checksum)
            self._write(block)
            left -= len(block)
            if counted:
                self._advance(len(block))
        fixed = struct.pack("<HHHHHIII", 45, 0, 0, 0, DATE, checksum, size, size)
        header = b"PK\3\4" + fixed + struct.pack("<HH", len(path), len(extra)) + path + extra
        os.pwrite(self._file.fileno(), header, begin)
        self._table.append(_table_entry(path, fixed, nbytes if large else None, begin))

    def close(self) -> None:
        """Write the table of members."""
        begin, table, count = self._place, b"".join(self._table), len(self._table)
        self._write(table)
        if begin >= LARGE or count >= 2**16 - 1:
            end = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(table), begin)
            self._write(b"PK\6\6" + end + b"PK\6\7" + struct.pack("<IQI", 0, begin + len(table), 1))
        count, begin = min(count, 2**16 - 1), MARK if begin >= LARGE else begin
        self._write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(table), begin, 0))

    def _write(self, data: bytes | memoryview) -> None:
        write_all(self._file, memoryview(data))
        self._place += len(data)


def _table_entry(path: bytes, fixed: bytes, large: int | None, begin: int) -> bytes:
    """The line of one member; sizes and places of 4 GB and more follow in an extra field."""
    values = ([large, large] if large is not None else []) + ([begin] if begin >= LARGE else [])
    extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    place = MARK if begin >= LARGE else begin
    sizes = struct.pack("<HHHHHII", len(path), len(extra), 0, 0, 0, 0, place)
    return b"PK\1\2" + struct.pack("<H", 45) + fixed + sizes + path + extra
