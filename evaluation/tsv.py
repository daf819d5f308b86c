"""Benchmark tables in VLMEvalKit's TSV form: a header line, one row per question, images inside as base64.

All cells stay text: "None", "NA", "007" and "1+1" are what they are. The image cell, by far the largest part of a
file, is checked while the table is opened and read again from the file when the image is needed, so a table of a
gigabyte needs memory for its texts only.
"""

import binascii
import csv
import hashlib
import io
import logging
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import PIL.Image

from evaluation.image_files import find_images, image_texts, read_image, root_of
from evaluation.pandas_rules import NA_TEXTS
from mindspeed_mm.data.storage.objects import local_file, parent_of
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
    image_root: Path | str
    """A folder, or the address of one."""
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
            found = find_images(row.cells["image_path"], self.image_root, where)
            contents = [read_image(image, where) for image in found]
        else:
            cells = _read_record(self.path, row.image_source)
            contents = [_decode(text, where) for text in image_texts(cells[self.columns.index("image")], where)]
        return tuple(_open_image(content, where) for content in contents)

    def image_sizes(self) -> str | None:
        """Digest of the sizes of the image files, which tells other images under the same names apart without
        reading them; None where the images stand in the table itself, or in an object store."""
        if "image" in self.columns or isinstance(self.image_root, str):
            return None
        names = {name for row in self.rows if row.image_count for name in image_texts(row.cells["image_path"], "")}
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
    given, path = path, Path(local_file(path))
    root = root_of(image_root if image_root is not None else parent_of(given))
    records = _records(path)
    columns = _check_columns(next(records, (0, []))[1], path)
    read = _checked_records(records, columns, path, root)
    if not read:
        raise DataError(f"{path} has a header but no rows; expected at least one question.")
    texts, cells = [record.index for record in read], tuple(record.cells for record in read)
    sources = [read[place] for place in _image_sources(texts, [record.kind for record in read], path)]
    indices = typed_indices(texts)
    rows = tuple(
        Row(indices[i], cells[i], i, sources[i].offset, int(sources[i].kind), sources[i].image)
        for i in range(len(read))
        if read[i].kind != 0 or text_questions
    )
    if not rows:
        raise DataError(
            f"{path}: none of the {len(read)} rows has an image; fill column {_image_column(columns)}, or ask for "
            "text questions too."
        )
    kept = {row.position for row in rows}
    dropped = tuple(index for i, index in enumerate(indices) if i not in kept)
    sha256, md5 = digests_of_files([path])
    return Table(path, columns, rows, cells, dropped, sha256, root, md5=md5)


class _TableRecord(NamedTuple):
    """A record whose number of cells, index and image are as they should be."""

    offset: int
    index: str
    kind: str | int
    """What _check_image_cell says of its image."""
    image: str
    """image_digest of its image cell."""
    cells: dict[str, str]


def _image_column(columns: Sequence[str]) -> str:
    return "image" if "image" in columns else "image_path"


def _checked_records(
    records: Iterable[tuple[int, list[str]]], columns: Sequence[str], path: Path, root: Path
) -> list[_TableRecord]:
    """All records. Raises DataError with the problems of every one."""
    image_name = _image_column(columns)
    image_place, index_place = columns.index(image_name), columns.index("index")
    read: list[_TableRecord] = []
    problems: list[str] = []
    for number, (offset, record) in enumerate(records, 1):
        where = f"{path}, data row {number}"
        if len(record) != len(columns):
            own = f" (index {record[index_place][:40]})" if len(record) > index_place else ""
            problems.append(
                f"{where} has {len(record)} cells; expected {len(columns)} as in the header{own}. Check its tabs and "
                "quotes."
            )
            continue
        index, image = record[index_place], record[image_place]
        if not index:
            problems.append(f"{where} has no index; give every row its own.")
            continue
        try:
            kind = _check_image_cell(image, image_name, root, f"{path}, row with index {index}")
        except DataError as error:
            problems.append(str(error))
            continue
        cells = {name: cell for name, cell in zip(columns, record, strict=True) if name != "image"}
        read.append(_TableRecord(offset, index, kind, image_digest(image), cells))
    refuse_all(problems)
    return read


MAX_NAMED = 20
"""Problems of one file that an error names one by one."""


def refuse_all(problems: Sequence[str]) -> None:
    """Raise DataError that names all problems of a file, so that they can be corrected together; nothing for none."""
    if problems:
        more = [f"and {len(problems) - MAX_NAMED} more"] if len(problems) > MAX_NAMED else []
        raise DataError("\n  ".join([*problems[:MAX_NAMED], *more]))


def _check_image_cell(cell: str, column: str, root: Path | str, where: str) -> str | int:
    """What an image cell holds: the number of its images, or the index of the row that is referred to."""
    if cell in NA_TEXTS:
        return 0
    if column == "image_path":
        return len(find_images(cell, root, where))
    if len(cell) <= MAX_REFERENCE_CHARACTERS:
        return cell
    return len([_decode(text, where) for text in image_texts(cell, where)])


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
    """Names of columns as they are meant: one that differs from a known one by case (not for single letters), width,
    spaces, hyphens, underscores, brackets around it or a full stop is that one (which is `told`), unless the known one
    is there, too."""
    known = {_plain(name): name for name in COLUMNS if len(name) > 1}
    meant = []
    for name in names:
        bare = unicodedata.normalize("NFKC", name).strip(" \t()[].:\u3002")
        new = bare if bare in COLUMNS else known.get(_plain(bare), name)
        if new != name and new not in names:
            if told:
                logger.warning('%s: column "%s" is read as %s', where, name, new)
            name = new
        meant.append(name)
    return meant


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _decode(text: str, where: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{where}: the image is not base64 ({error}); found {text[:20]!r}..., {len(text)} characters. "
            "Export the row again."
        ) from error


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
