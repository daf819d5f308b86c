"""Records of a parquet file by number; needs the optional package pyarrow.

A row of a parquet file cannot be read without its whole row group. So the file is converted once to Arrow's own format
in batches of few rows, stored beside the indexes (as large as the data, uncompressed) and mapped: a row is then read
without its neighbours, and memory stays constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mindspeed_mm.data.index import Index
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.storage.objects import local_file
from mindspeed_mm.errors import ConfigError, DataError

BATCH_ROWS = 64


class ParquetFile:
    """As RecordFile, for parquet. Safe to use from several processes; can be pickled."""

    def __init__(self, path: str | Path, *, index: Index | None = None, problems: list[DataError] | None = None):
        """Convert the file, or take a stored conversion that fits.

        Raises DataError for a missing, empty or damaged file, ConfigError without pyarrow.
        """
        self.name, self.path = path, Path(local_file(path))
        self._index = index or Index(self.path, None)
        self._reader: Any = None
        self._arrow = _pyarrow(self.path)
        self._content: np.ndarray | None = None
        batches = self._open().num_record_batches
        self._length = (batches - 1) * BATCH_ROWS + self._open().get_batch(batches - 1).num_rows if batches else 0
        if not self._length:
            raise DataError(f"{self.name} holds no records; expected rows with messages.")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, Any]:
        batch, row = divmod(number, BATCH_ROWS)
        try:
            return self._open().get_batch(batch).slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:  # Arrow itself does not look at what texts hold
            raise DataError(
                f"{self.where(number)} holds a text that is not UTF-8 ({error}); expected one that is. Correct the row."
            ) from error

    verified = __getitem__

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self._open().schema.names)

    def column(self, name: str) -> Iterator[Any]:
        """The cells of a column, in order; a batch of them is held at a time."""
        for batch in range(self._open().num_record_batches):
            yield from self._open().get_batch(batch).column(name).to_pylist()

    def cell(self, number: int, name: str) -> Any:
        """One cell."""
        batch, row = divmod(number, BATCH_ROWS)
        return self._open().get_batch(batch).column(name)[row].as_py()

    def __getstate__(self) -> dict[str, Any]:
        # What is stored is mapped again rather than sent.
        content = None if self._index.stores else self._content
        return self.__dict__ | {"_reader": None, "_arrow": None, "_content": content}

    def where(self, number: int) -> str:
        """Name of a record for messages."""
        return f"{self.name}: record {number}"

    def _open(self) -> Any:
        if self._reader is None:
            self._arrow = self._arrow or _pyarrow(self.path)
            if self._content is None:
                try:
                    self._content = self._index.content("rows", self._convert)
                except self._arrow.ArrowException as error:
                    raise DataError(f"{self.name} cannot be read ({error}). Fetch the file again.") from error
                except OSError as error:
                    raise DataError(
                        f"cannot read the data file {self.name}, or store it in Arrow's format: {error}. Correct "
                        "data_path, fetch the file again, or set index_folder to a folder with room for its content."
                    ) from error
            self._reader = self._arrow.ipc.open_file(self._arrow.py_buffer(self._content))
        return self._reader

    def _convert(self, target: BinaryIO) -> None:
        """Write the rows to `target` in Arrow's file format, BATCH_ROWS at a time."""
        arrow = self._arrow
        with arrow.parquet.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False) as source:
            with (
                arrow.ipc.new_file(_Sink(target), source.schema_arrow) as writer,
                progress_bar(f"converting {self.path.name}", source.metadata.num_rows) as advance,
            ):
                rest = source.schema_arrow.empty_table()
                for batch in source.iter_batches(batch_size=BATCH_ROWS):
                    # Batches end where row groups do; the rows that are left over wait for the next ones.
                    rest = arrow.concat_tables([rest, arrow.Table.from_batches([batch])]).combine_chunks()
                    whole = rest.num_rows // BATCH_ROWS * BATCH_ROWS
                    if whole:
                        writer.write_table(rest.slice(0, whole), max_chunksize=BATCH_ROWS)
                        rest = rest.slice(whole)
                    advance(batch.num_rows)
                if rest.num_rows:
                    writer.write_table(rest)


class _Sink:
    """A file to write to whose positions count from where it stands: Arrow's format notes them."""

    closed = False

    def __init__(self, file: BinaryIO):
        self._file, self._written = file, 0

    def write(self, data: Any) -> int:
        self._written += self._file.write(data)
        return len(data)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path} is parquet, which needs pyarrow: pip install mindspeed-mm[parquet], or convert it to JSONL."
        ) from error
    return pyarrow
