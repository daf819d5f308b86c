"""Requests from a JSONL file, answers into another one, line by line, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import pydantic

from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.load import StrictModel, load_config, parse_json, read_json
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.storage.objects import in_folder, local_file
from mindspeed_mm.errors import ConfigError, DataError, naming_file

MAX_BYTES = 2**30
"""A larger file of requests is refused: all of it is held in memory."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".distcp", ".model")
WEIGHT_NAMES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "latest_checkpointed_iteration.txt",
    "model.json",
    "preprocessor_config.json",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What decides a model's answers; other files may lie in its folder."""

DIGITS = 16
"""Hexadecimal digits of a digest."""


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


Images = Annotated[str | list[str], pydantic.AfterValidator(_as_list)]
"""A path (relative ones start at the file's folder) or several, in reading order."""


class AnsweredExample(StrictModel):
    """A question with its answer, which the model sees in front of the prompt."""

    prompt: str
    answer: str
    image: Images = []


class Line(StrictModel):
    """One request."""

    id: str | int | None = None
    """Default: the number of the line, from 1."""
    prompt: str
    image: Images = []
    examples: list[AnsweredExample] = []
    """In context, as earlier turns."""
    system: str | None = None
    options: dict[str, Any] = {}
    """Generation options of this request, on top of the command's."""

    @property
    def images(self) -> list[str]:
        """Of the examples and of the prompt, in reading order."""
        return [image for each in (*self.examples, self) for image in each.image]

    def turns(self, after_image: str) -> tuple[tuple[str, str | None], ...]:
        """(question, answer) pairs, the last one open. Images that have no place in the text of an example, or of the
        prompt behind examples, stand in front of it, `after_image` behind each."""
        if not self.examples:
            return ((self.prompt, None),)

        def placed(each: AnsweredExample | Line) -> str:
            own = "" if IMAGE_TOKEN in each.prompt else (IMAGE_TOKEN + after_image) * len(each.image)
            return own + each.prompt

        return (*((placed(each), each.answer) for each in self.examples), (placed(self), None))

    def digest(self, folder: str | Path) -> str:
        """Name of all that an answer depends on: the line, and size and time of change of its images' files (objects of
        a store count as never changed)."""
        found = [in_folder(folder, image) for image in self.images]
        images = [_stamp(Path(image)) if isinstance(image, str) else None for image in found]
        examples = [each.model_dump() for each in self.examples]
        return _hash([self.prompt, self.image, self.system, self.options, images, *([examples] if examples else [])])


def read_requests(path: str | Path) -> dict[str, Line | DataError]:
    """The requests of a file by id, in order. A line without an id has its number for it, or "line <number>" if that
    is another line's id. A line that is no request, or whose id was there before, stands as its error: it fails alone.

    Raises:
        DataError: the file cannot be read, is too large, is not UTF-8, or has no line.
    """
    path = Path(local_file(path))
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES} bytes: split it")
        # Not splitlines: it takes characters such as U+2028 for ends of lines, and texts may hold them.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected a JSONL file there") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    parsed = [
        (number, *_line(text, f"{path}, line {number}")) for number, text in enumerate(lines, start=1) if text.strip()
    ]
    taken = {name for _, name, _ in parsed if name is not None}
    requests: dict[str, Line | DataError] = {}
    for number, name, line in parsed:
        if name in requests:
            line = DataError(f"{path}, line {number}: the id {name} is there twice; give every request its own")
            name = None
        if name is None:
            name = _free_name(number, taken | requests.keys())
        requests[name] = line
    if not requests:
        raise DataError(f'{path} holds no request; expected lines such as {{"image": "view.jpg", "prompt": "What?"}}')
    return requests


def weights_stamp(path: Path) -> str:
    """Name of the state of a model's files by their sizes and times of change: a folder's, or those that a JSON file
    names."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES or file.name in WEIGHT_NAMES)
        return _hash([(str(file.relative_to(path)), _stamp(file)) for file in files])
    if path.suffix != ".json":
        return _hash([_stamp(path), []])
    values = read_config(path)  # of the bases, too
    return _hash([_stamp(path), [weights_stamp(Path(text)) for text in _paths(values)], values])


def _paths(value: Any) -> Iterator[str]:
    """Existing files and folders among the texts of a JSON value."""
    if isinstance(value, str) and "/" in value and Path(value).exists():
        yield value
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _paths(below)


def _stamp(path: Path) -> list[int] | None:
    """Size and time of the last change in nanoseconds; None for what is no file."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]


def _free_name(number: int, taken: set[str]) -> str:
    """Id of a line that has none of its own."""
    name = str(number)
    while name in taken:
        name = f"line {name}"
    return name


def _line(text: str, where: str) -> tuple[str | None, Line | DataError]:
    """The id that the line gives itself (None if it has none), and the request or what is wrong with it."""
    try:
        data = parse_json(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return None, DataError(f"{where} is not JSON ({error}); correct it")
    except ConfigError as error:
        return None, DataError(f"{where}: {error}")
    if not isinstance(data, dict):
        found = "a list: give each of its objects a line of its own" if isinstance(data, list) else "no JSON object"
        return None, DataError(f'{where} is {found}; expected {{"prompt": ..., "image": ...}}')
    own = data.get("id")
    name = str(own) if isinstance(own, str | int) and not isinstance(own, bool) else None
    try:
        return name, load_config(Line, data, what="request", context=where if name is None else f"{where} (id {name})")
    except ConfigError as error:
        return name, DataError(str(error))


class Answers:
    """The file of answers. Beside it, <name>.run.json says what they depend on: answers of another model, template or
    other options are never mixed in."""

    def __init__(self, path: Path, facts: Mapping[str, Any], *, writes: bool) -> None:
        self._path, self._writes = path, writes
        self._facts_path = path.with_name(path.name + ".run.json")
        self._facts = json.loads(json.dumps(facts))
        self.done = self._read()
        self._file: TextIO | None = None

    def _read(self) -> dict[str, dict[str, Any]]:
        """Answers of earlier runs by id, failed ones left out (they are tried again)."""
        if not self._path.exists():
            return {}
        found = read_json(self._facts_path) if self._facts_path.exists() else {}
        differ = [name for name, value in self._facts.items() if name not in found or found[name] != value]
        if differ:
            raise ConfigError(
                f"{self._path} holds answers of another model, template or other options (different: "
                f"{', '.join(differ)}): choose another --output, or delete it"
            )
        done = {}
        for number, line in enumerate(self._path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                if "error" not in record:
                    done[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self._path}, line {number} is no answer ({error}); delete that line") from error
        return done

    @contextmanager
    def open(self, order: list[str]) -> Iterator[None]:
        """Append answers inside; at the end they stand in the order of the ids `order`."""
        if not self._writes:
            yield
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._replace(self._facts_path, json.dumps(self._facts, indent=2) + "\n")
        self._rewrite(list(self.done.values()))
        self._file = self._path.open("a", encoding="utf-8")
        try:
            yield
        finally:
            with naming_file(self._path):  # it writes once more what could not be written
                self._file.close()
        self._rewrite([self.done[name] for name in order if name in self.done])

    def append(self, record: dict[str, Any]) -> None:
        """Write one answer and hand it to the operating system at once."""
        self.done[record["id"]] = record
        if self._file is not None:
            with naming_file(self._path):
                self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
                self._file.flush()

    def _rewrite(self, records: list[dict[str, Any]]) -> None:
        self._replace(self._path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        beside = path.with_name(path.name + ".tmp")
        with naming_file(path):
            beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
