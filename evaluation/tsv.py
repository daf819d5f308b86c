"""Benchmark tables in VLMEvalKit's TSV form: a header line, one row per question, images inside as base64.

All cells stay text: "None", "NA", "007" and "1+1" are what they are. The image cell, by far the largest part of a
file, is checked while the table is opened and read again from the file when the image is needed, so a table of a
gigabyte needs memory for its texts only.
"""

import ast
import binascii
import csv
import hashlib
import io
import logging
import re
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import PIL.Image

from evaluation.pandas_rules import NA_TEXTS
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

MAX_CELL_CHARACTERS = 256 * 2**20
"""Longest cell, and longest line, accepted: base64 of a 192 MiB image file; the csv module's default is 131,072."""

MAX_REFERENCE_CHARACTERS = 64
"""An image cell of at most this length names the row that holds the image (VLMEvalKit's rule)."""

MAX_PIXELS = 128 * 2**20
"""Largest image that is decoded (width x height); above it a small file could exhaust the memory."""

_BLOCK = 2**20
_DIGEST_BYTES = 16

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class Row:
    """One question. `cells` holds every column but `image`; `position` counts the data rows of the file from 0;
    `image_count` is 0 for a question of text only."""

    index: int | str
    cells: dict[str, str]
    position: int
    image_source: int
    """Byte offset of the record that holds the image (the row's own one, or the one it refers to)."""
    image_count: int
    image: str = ""
    """Digest of what the image cell holds (or of the cell it refers to): equal for questions on equal images."""


@dataclass(frozen=True)
class Table:
    """A benchmark file. `rows` are those that are asked; `all_cells` also holds the cells of dropped rows."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    all_cells: tuple[dict[str, str], ...]
    dropped: tuple[int | str, ...]
    sha256: str
    image_root: Path
    is_json_lines: bool = False
    """Whether the file has the form of a benchmark's own questions instead of VLMEvalKit's table."""
    md5: str = ""
    """MD5 sum of the file's bytes, by which VLMEvalKit knows its tables."""

    def images(self, row: Row) -> tuple[PIL.Image.Image, ...]:
        """Decode the images of `row`, in order and in the mode they were stored in. Raises DataError."""
        where = f"{self.path}, row with index {row.index}"
        if row.image_count == 0:
            return ()
        if "image" not in self.columns:
            contents = [path.read_bytes() for path in find_images(row.cells["image_path"], self.image_root, where)]
        else:
            cells = _read_record(self.path, row.image_source)
            contents = [_decode(text, where) for text in _image_texts(cells[self.columns.index("image")], where)]
        return tuple(_open_image(content, where) for content in contents)

    def image_sizes(self) -> str | None:
        """Digest of the sizes of the image files, which tells other images under the same names apart without
        reading them; None where the images stand in the table itself."""
        if "image" in self.columns:
            return None
        names = {name for row in self.rows if row.image_count for name in _image_texts(row.cells["image_path"], "")}
        digest = hashlib.sha256()
        for name in sorted(names):
            digest.update(f"{name} {(self.image_root / name).stat().st_size}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def read_table(path: str | Path, *, image_root: str | Path | None = None, text_questions: bool = False) -> Table:
    """Read and check a TSV.

    Needed columns are `index` and either `image` (base64, a Python list of base64 texts, or the index of the row that
    holds the image) or `image_path` (a file, or a Python list of files, below `image_root`, which is by default the
    folder of the TSV). Rows without an image are kept with `text_questions`; else they are dropped, as VLMEvalKit
    does, and named in `Table.dropped`.

    Raises DataError with file and row: unreadable file, missing or repeated column, short or long row, repeated index,
    unclosed quote, bad base64, reference to a row without an image, missing image file.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    records = _records(path)
    columns = _check_columns(next(records, (0, []))[1], path)
    image_column = columns.index("image") if "image" in columns else columns.index("image_path")
    index_column = columns.index("index")

    texts: list[str] = []
    all_cells: list[dict[str, str]] = []
    offsets: list[int] = []
    kinds: list[str | int] = []
    images: list[str] = []
    problems: list[str] = []
    rows_read = 0
    for offset, record in records:
        where = f"{path}, data row {rows_read + 1}"
        rows_read += 1
        if len(record) != len(columns):
            own = f" (index {record[index_column][:40]})" if len(record) > index_column else ""
            problems.append(
                f"{where} has {len(record)} cells; expected {len(columns)} as in the header{own}. Check its tabs and "
                "quotes."
            )
            continue
        index = record[index_column]
        if not index:
            problems.append(f"{where} has no index; give every row its own.")
            continue
        where = f"{path}, row with index {index}"
        try:
            kinds.append(_check_image_cell(record[image_column], columns[image_column], root, where))
        except DataError as error:
            problems.append(str(error))
            continue
        images.append(image_digest(record[image_column]))
        texts.append(index)
        offsets.append(offset)
        all_cells.append({name: cell for name, cell in zip(columns, record, strict=True) if name != "image"})
    refuse_all(problems)
    if not texts:
        raise DataError(f"{path} has a header but no rows; expected at least one question.")
    sources = _image_sources(texts, kinds, path)
    indices = typed_indices(texts)
    rows = tuple(
        Row(indices[i], all_cells[i], i, offsets[sources[i]], int(kinds[sources[i]]), images[sources[i]])
        for i in range(len(texts))
        if kinds[i] != 0 or text_questions
    )
    if not rows:
        raise DataError(
            f"{path}: none of the {len(texts)} rows has an image; fill column {columns[image_column]}, or ask for "
            "text questions too."
        )
    kept = {row.position for row in rows}
    dropped = tuple(index for i, index in enumerate(indices) if i not in kept)
    sha256, md5 = digests_of_files([path])
    return Table(path, columns, rows, tuple(all_cells), dropped, sha256, root, md5=md5)


MAX_NAMED = 20
"""Problems of one file that an error names one by one."""


def refuse_all(problems: Sequence[str]) -> None:
    """Raise DataError that names all problems of a file, so that they can be corrected together; nothing for none."""
    if problems:
        more = [f"and {len(problems) - MAX_NAMED} more"] if len(problems) > MAX_NAMED else []
        raise DataError("\n  ".join([*problems[:MAX_NAMED], *more]))


def _check_image_cell(cell: str, column: str, root: Path, where: str) -> str | int:
    """What an image cell holds: the number of its images, or the index of the row that is referred to."""
    if cell in NA_TEXTS:
        return 0
    if column == "image_path":
        return len(find_images(cell, root, where))
    if len(cell) <= MAX_REFERENCE_CHARACTERS:
        return cell
    return len([_decode(text, where) for text in _image_texts(cell, where)])


def _image_sources(texts: list[str], kinds: list[str | int], path: Path) -> list[int]:
    """Number of the data row that holds the images, per row; also finds repeated indices."""
    numbers: dict[str, int] = {}
    for i, text in enumerate(texts):
        if text in numbers:
            raise DataError(
                f"{path}: index {text} is used by data rows {numbers[text] + 1} and {i + 1}; make every index unique."
            )
        numbers[text] = i
    sources = []
    for i, kind in enumerate(kinds):
        target = numbers.get(kind) if isinstance(kind, str) else i
        if target is None or (target != i and kinds[target] == 0) or isinstance(kinds[target], str):
            raise DataError(
                f'{path}, row with index {texts[i]}: its image cell "{kind}" refers to a row that '
                f"{'does not exist' if target is None else 'holds no image of its own'}; "
                "expected base64 or the index of a row with an image."
            )
        sources.append(target)
    return sources


_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}")


def typed_indices(texts: Sequence[str]) -> list[int | str]:
    """Integers if every index is written as one ("7", not "007"), else the texts."""
    if all(_INTEGER.fullmatch(text) for text in texts):
        return [int(text) for text in texts]
    return list(texts)


def _check_columns(header: list[str], path: Path) -> tuple[str, ...]:
    if not header:
        raise DataError(f"{path} is empty; expected a header line with tab separated column names.")
    header = meant_columns(header, path)
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: column {', '.join(repeated)} is given twice; keep one.")
    if "index" not in header or not {"image", "image_path"} & set(header):
        raise DataError(
            f"{path}: found columns {', '.join(header)[:500]}; expected index and image (or image_path), tab separated."
        )
    return tuple(header)


COLUMNS = (
    *("index", "image", "image_path", "question", "hint", "answer"),
    *("category", "l2-category", "split", *string.ascii_uppercase),
)
"""Columns with a meaning, in every benchmark or most."""


def meant_columns(names: Sequence[str], where: Path | str, *, told: bool = True) -> list[str]:
    """Names of columns as they are meant: one that differs from a known one by case (not for single letters), spaces
    around it or a full stop is that one (which is `told`), unless the known one is there, too."""
    known = {name.lower(): name for name in COLUMNS if len(name) > 1}
    meant = []
    for name in names:
        bare = name.strip().rstrip(".:").strip()
        new = bare if bare in COLUMNS else known.get(bare.lower(), name)
        if new != name and new not in names:
            if told:
                logger.warning('%s: column "%s" is read as %s', where, name, new)
            name = new
        meant.append(name)
    return meant


def _image_texts(cell: str, where: str) -> list[str]:
    """The base64 texts of an image cell, or the names of an image_path cell: one, or a Python list of them."""
    if not cell.startswith("["):
        return [cell]
    try:
        values = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{where}: the image list is not a Python list of texts: {cell[:40]}...") from error
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        raise DataError(f"{where}: the image list must hold one or more texts; found {cell[:40]}...")
    return values


def _decode(text: str, where: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{where}: the image is not base64 ({error}); found {text[:20]!r}..., {len(text)} characters. "
            "Export the row again."
        ) from error


def find_images(cell: str, root: Path, where: str) -> list[Path]:
    """Files that an image_path cell names. Raises DataError for one that is missing or outside `root`."""
    paths = []
    for name in _image_texts(cell, where):
        target = (root / name).resolve()
        if not target.is_relative_to(root.resolve()):
            raise DataError(
                f"{where}: image file {name} lies outside {root}; give the folder that holds it as image_root."
            )
        if not target.is_file():
            raise DataError(f"{where}: image file {name} does not exist below {root}.")
        paths.append(target)
    return paths


def _open_image(content: bytes, where: str) -> PIL.Image.Image:
    try:
        image = PIL.Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"{where}: the image has {image.width} x {image.height} pixels; at most {MAX_PIXELS} are read."
            )
        image.load()
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise DataError(
            f"{where}: the image cannot be decoded ({error}); expected one of {', '.join(IMAGE_FORMATS)}."
        ) from error
    return image


def image_digest(cell: str) -> str:
    """Short name of an image cell's content."""
    return hashlib.blake2b(cell.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()


def digests_of_files(paths: Sequence[Path]) -> tuple[str, str]:
    """SHA-256 and MD5 of the files' bytes, one after the other."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                sha256.update(block)
                md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Records of the file with the byte offset at which each begins; empty lines are skipped."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected a benchmark TSV there.") from error
    with file, _wide_cells():
        lines = _Lines(file, path)
        reader = csv.reader(lines, delimiter="\t")
        while True:
            offset = lines.offset
            try:
                record = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}, line {lines.number}: {error}; check tabs and quotes there.") from error
            if lines.ended and record is not None and lines.offset != offset:
                raise DataError(f"{path}: the quote opened in the record that begins at byte {offset} is never closed.")
            if record is None:
                return
            if record:
                yield offset, record


def _read_record(path: Path, offset: int) -> list[str]:
    with path.open("rb") as file, _wide_cells():
        file.seek(offset)
        return next(csv.reader(_Lines(file, path, offset), delimiter="\t"))


class _Lines:
    """Decoded lines of a binary file. The csv reader asks for one line at a time, so `offset` is where it stands."""

    def __init__(self, file: BinaryIO, path: Path, offset: int = 0):
        self.file, self.path, self.offset = file, path, offset
        self.number = 0
        self.ended = False

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_CELL_CHARACTERS + 1)
        if len(line) > MAX_CELL_CHARACTERS:
            raise DataError(
                f"{self.path}, line {self.number + 1} is longer than {MAX_CELL_CHARACTERS} bytes; expected a table of "
                "questions. Store smaller images."
            )
        if not line:
            self.ended = True
            raise StopIteration
        codec = "utf-8-sig" if self.offset == 0 else "utf-8"
        self.offset += len(line)
        self.number += 1
        try:
            return line.decode(codec)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}, line {self.number} is not UTF-8 text; save the table as UTF-8.") from error


@contextmanager
def _wide_cells():
    """Let the csv module read image cells; its limit is global to the process, so it is put back."""
    previous = csv.field_size_limit(MAX_CELL_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(previous)
