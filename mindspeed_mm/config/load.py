"""Strict JSON to frozen pydantic models, with all problems reported at once and located by their JSON path.

Nothing is coerced (no "1" for 1, no true for 1; an int is accepted where a float is expected), no key is ignored.
"""

import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from mindspeed_mm.errors import ConfigError

MAX_CONFIG_BYTES = 64 * 2**20
"""A configuration larger than this is not one; weight indexes of the largest public models stay below 1 MiB."""

MAX_SHOWN_CHARACTERS = 80

TOP = "(top level)"
"""In the place of a JSON path, for what concerns several keys."""

Model = TypeVar("Model", bound=pydantic.BaseModel)


class StrictModel(pydantic.BaseModel):
    """Base of every config class: frozen, no unknown keys, no type coercion, finite numbers only."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # a start imports the specs of many parts and reads few
    )


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a UTF-8 file (a byte order mark is tolerated).

    Raises ConfigError when the file is missing, unreadable, too large, not UTF-8, not JSON (with line and column), has
    a key twice, or does not hold an object.
    """
    path = Path(path)
    raw = config_bytes(path, "JSON")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save the JSON file as UTF-8.") from error
    try:
        data = parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}. Correct the file there."
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not a configuration: it is nested too deeply.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {_describe(data)}; expected a JSON object {{...}} at the top.")
    return data


def config_bytes(path: Path, kind: str) -> bytes:
    """The content of a configuration; `kind` ("JSON", "YAML") names it in errors.

    Raises ConfigError when the file is missing, unreadable or too large, of which no more is read than shows it.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; expected a {kind} file there. Correct the path or its permissions."
        ) from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes; expected a {kind} configuration.")
    return raw


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises JSONDecodeError, and ConfigError for NaN, Infinity and a key given twice."""
    return json.loads(text, object_pairs_hook=object_without_duplicates, parse_constant=_refuse_constant)


KIND = re.compile(r"(str|int|float|bool|none|(list|tuple|dict|literal)\[.*\]|constrained-\w+|function-.*|[A-Z]\w*)")
"""Names that pydantic gives the kinds of a value."""


def load_config(
    model_cls: type[Model],
    source: str | Path | dict[str, Any],
    *,
    what: str,
    context: str | None = None,
    names: typing.Mapping[str, str] | None = None,
) -> Model:
    """Check a JSON file or an already parsed object against `model_cls` and return the frozen instance.

    `what` names the thing in errors ("model config"), `context` the file that a parsed object came from.
    `names` are the keys that its fields have in that file, where they are others.
    Raises ConfigError that lists every problem, one per line: JSON path, what was found, what is expected.
    """
    if isinstance(source, dict):
        data = source
    else:
        data, context = read_json(source), context or str(source)
    try:
        text = json.dumps(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not made of JSON values: {error}.") from error
    try:
        # JSON mode: strict about types, yet arrays fill tuples and strings fill paths, which have no JSON type.
        return model_cls.model_validate_json(text)
    except pydantic.ValidationError as error:
        problems = _problems(model_cls, data, error.errors(include_url=False))
        problems = [_with_name(problem, names or {}) for problem in problems]
    where = f"{what} ({context})" if context else what
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConfigError("\n  ".join([f"{where}: {count}", *dict.fromkeys(problems)]))


def _with_name(problem: str, names: typing.Mapping[str, str]) -> str:
    """A problem with the keys that its field, or the fields that it tells of, have in the user's file."""
    field, _, told = problem.partition(":")
    if field == TOP:
        others = [f"{names[each]} for {each}" for each in re.findall(r"\w+", told) if names.get(each, each) != each]
        return f"{problem} (the file's keys: {', '.join(dict.fromkeys(others))})" if others else problem
    name = names.get(field, field)
    return problem if name == field else f"{problem} (the file's key: {name})"


def nearest(name: str, known: typing.Iterable[str]) -> str | None:
    """Return the known name that is closest to `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text from its members. Raises ConfigError for a key that is there twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f'key "{twice}" is given twice in one object; keep one of them.')
    return result


def _refuse_constant(name: str) -> Any:
    raise ConfigError(f"found {name}, which is not JSON; expected a finite number.")


def _problems(model_cls: type[pydantic.BaseModel], data: Any, details: list[Any]) -> list[str]:
    """One line for each value that is wrong. What may be of several kinds is one value: pydantic tells of each kind."""
    found = [(*_place(data, detail), detail) for detail in details]
    inside = {union for location, union, _ in found if union is not None and len(location) > len(union)}
    lines: dict[tuple, str] = {}
    for number, (location, union, detail) in enumerate(found):
        line = _problem(model_cls, json_path(location) or TOP, detail)
        if union is None or len(location) > len(union):
            lines[location, number] = line
        elif union not in inside and union in lines:
            lines[union] += f" or {line.rpartition('input should be ')[2]}"
        elif union not in inside:
            lines[union] = line
    return list(lines.values())


def _place(data: Any, detail: Any) -> tuple[tuple[str | int, ...], tuple[str | int, ...] | None]:
    """Where a pydantic error is, and the place of the value of several kinds that it is in, if any: a kind's name
    stands in pydantic's location like a key."""
    place: list[str | int] = []
    union = None
    for part in detail["loc"]:
        known = isinstance(data, dict) and part in data
        if not known and isinstance(part, str) and KIND.fullmatch(part):
            union = tuple(place)
            continue
        within = known or (isinstance(data, list) and isinstance(part, int) and part < len(data))
        data = data[part] if within else None
        place.append(part)
    return tuple(place), union


def _problem(model_cls: type[pydantic.BaseModel], path: str, detail: Any) -> str:
    """One line for one pydantic error detail at a path."""
    location = detail["loc"]
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = _known_keys(model_cls, location[:-1])
        close = nearest(str(location[-1]), known)
        hint = f'did you mean "{close}"?' if close else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if kind == "missing":
        return f"{path}: missing; this key is required"
    if kind == "value_error":
        return f"{path}: {detail['ctx']['error']}"
    message = detail["msg"]
    return f"{path}: found {_describe(detail['input'])}; {message[0].lower()}{message[1:]}"


def json_path(location: tuple[str | int, ...]) -> str:
    """("a", 0, "b") -> "a[0].b"; "" for the top."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _describe(value: Any) -> str:
    shown = json.dumps(value, default=str)
    if len(shown) > MAX_SHOWN_CHARACTERS:
        shown = shown[:MAX_SHOWN_CHARACTERS] + "..."
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return "null" if value is None else f"{shown} ({names.get(type(value), type(value).__name__)})"


def _known_keys(model_cls: type[pydantic.BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Keys (aliases where given) of the model that sits at `location` below `model_cls`."""
    models = [model_cls]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [item for model in models for item in model.model_fields.items()]
        matching = [field for name, field in fields if part in (name, field.alias)]
        models = [model for field in matching for model in _models_in(field.annotation)] or models
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """Model classes named in a type such as `list[Model] | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, pydantic.BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
