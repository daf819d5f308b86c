"""A torch file (.pt, .bin) written tensor by tensor: the archive of torch.save without holding its content.

torch.save needs all tensors at once. The archive is a plain zip of stored records: data.pkl (the dict, whose tensors
name their storages), one record per storage, byteorder and version; see torch's docs/source/notes/serialization.rst.
"""

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.weights.files import RECORD_NAME

ROOT = "archive"
ALIGNMENT = 64
"""torch aligns storages so that they can be mapped."""

DATE = (1980, 1, 1, 0, 0, 0)
"""The same input gives the same bytes."""

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
    tensors: Iterable[Tensor],
    *,
    record: dict[str, Any] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a flat dict of tensors that torch.load reads, also with weights_only and mmap.

    Args:
        outputs: (name, shape, type) of each tensor; tensors: their values in the same order, taken one at a time.
        record: what the tensors are (see weights/files.py), a member that torch.load does not look at.
    """
    outputs = list(outputs)
    content = {name: _Tensor(str(key), dtype, shape) for key, (name, shape, dtype) in enumerate(outputs)}
    buffer = BytesIO()
    _Pickler(buffer, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, "data.pkl", memoryview(buffer.getvalue()))
        _add(archive, "byteorder", memoryview(b"little"))
        for key, tensor in enumerate(tensors):
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            _add(archive, f"data/{key}", data)
            advance(len(data))
        _add(archive, "version", memoryview(b"3\n"))
        if record is not None:
            _add(archive, RECORD_NAME, memoryview(json.dumps(record).encode()))


def _add(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """One stored member whose bytes begin at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}", DATE)
    info.file_size = len(data)
    large = len(data) > 2**30  # zipfile adds 20 bytes of sizes then
    header = 30 + len(info.filename) + (20 if large else 0) + 4
    padding = -(archive.fp.tell() + header) % ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        member.write(data)
