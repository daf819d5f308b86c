"""Records of public data sets as grounding items: typed fields, a question, and what is chosen by chance."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data import chosen_records
from mindspeed_mm.data.chosen_records import ChosenRecords
from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.conversation import checked_text, shown
from mindspeed_mm.data.datasets import grounding
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.grounding.item import BOXES, POINTS, numbers
from mindspeed_mm.data.grounding.parameters import GroundingParameters
from mindspeed_mm.data.grounding.templates import QuestionTemplates
from mindspeed_mm.data.keys import Keys
from mindspeed_mm.data.storage.objects import absolute_folder, local_file
from mindspeed_mm.errors import ConfigError, DataError

TEMPLATE_KEYS = ("template_string", "template_file", "max_dynamic_size", "fixed_template", "seed")


class Fields:
    """A record's fields, each checked when it is read; a dot leads into an object."""

    def __init__(self, record: Mapping[str, Any], normalised: bool = False, unknown_keys: str = "error") -> None:
        """`normalised`: boxes and points are fractions of the image; `unknown_keys` as in data.json."""
        self.record, self.normalised, self._policy = record, normalised, unknown_keys
        self.ignored: list[str] = []
        """Keys of inner objects that nothing reads."""

    def check_keys(self, allowed: Keys, found: Any, place: str) -> None:
        """Look at the keys of an inner object, if it is one. Raises UnknownKeyError as Keys.unused does."""
        if isinstance(found, Mapping):
            self.ignored += [f"{place}.{name}" for name in allowed.unused(found, place, self._policy)]

    def value(self, name: str) -> Any:
        """What stands there; None where nothing does."""
        found: Any = self.record
        for key in name.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def text(self, name: str) -> str:
        """A text. Raises DataError for anything else."""
        return checked_text(self.value(name), f'"{name}"')

    def one_of(self, *names: str) -> str:
        """The first text that is there. Raises DataError where none is."""
        found = next((name for name in names if self.value(name) is not None), names[0])
        return self.text(found)

    def items(self, name: str) -> list[Any]:
        """A list. Raises DataError for anything else."""
        found = self.value(name)
        if not isinstance(found, list):
            raise DataError(f'"{name}" is {shown(found)}; expected a list.')
        return found

    def box(self, name: str) -> list[float]:
        """Left, top, right and bottom. Raises DataError for anything else."""
        return list(numbers(self.value(name), 4, f'"{name}"', self.normalised))

    def boxes(self, name: str) -> list[list[float]]:
        """A list of boxes. Raises DataError for anything else."""
        entries = enumerate(self.items(name))
        return [list(numbers(entry, 4, f'"{name}"[{index}]', self.normalised)) for index, entry in entries]

    def point(self, name: str) -> list[float]:
        """x and y. Raises DataError for anything else."""
        return list(numbers(self.value(name), 2, f'"{name}"', self.normalised))

    def first(self, name: str, count: int) -> list[float]:
        """The first two or four numbers of a list. Raises DataError for anything else."""
        return list(numbers(self.items(name)[:count], count, f'"{name}"', self.normalised))

    def plain(self, name: str) -> str:
        """A text without placeholders, which would take boxes or images that are not there. Raises DataError."""
        return without_placeholders(self.text(name), f'"{name}"')


def without_placeholders(text: str, place: str) -> str:
    """The text; raises DataError where it holds a placeholder of images, boxes or points."""
    found = next((name for name in (IMAGE_TOKEN, BOXES, POINTS) if name in text), None)
    if found is not None:
        raise DataError(f"{place} holds {found}, which stands for an image, box or point; expected words. Correct it.")
    return text


@dataclass(frozen=True)
class Chance:
    """What one record draws: the same for equal records and seeds."""

    templates: QuestionTemplates | None
    settings: GroundingParameters
    name: str
    """Of the record: a digest of its content."""

    @property
    def random(self) -> random.Random:
        """A generator of the record's own."""
        return random.Random(f"{self.settings.seed} {self.name}")

    def question(self, **values: str) -> str:
        """A template with `<name>` replaced by each of `values`."""
        assert self.templates is not None
        text = self.templates.chosen(self.name, self.settings.seed, fixed=self.settings.fixed_template)
        return QuestionTemplates.filled(text, {f"<{name}>": value for name, value in values.items()})


Convert = Callable[[Fields, Chance], dict[str, Any]]
Choose = Callable[[GroundingParameters], tuple[chosen_records.Choose, dict[str, Any]] | None]


def turns(question: str, answer: str, **sequences: Any) -> list[dict[str, Any]]:
    """Two turns; `sequences` are boxes_seq and points_seq of "question" and "answer": question_boxes=[[0]]."""
    human: dict[str, Any] = {"from": "human", "value": question}
    gpt: dict[str, Any] = {"from": "gpt", "value": answer}
    for key, value in sequences.items():
        whose, kind = key.split("_")
        (human if whose == "question" else gpt)[f"{kind}_seq"] = value
    return [human, gpt]


def reasoned(reason: str, answer: str) -> str:
    """A reason, and the answer that follows from it."""
    reason = reason.strip()
    return f"{reason if reason.endswith('.') else reason + '.'} So the answer is {answer}."


def pointed(fields: Fields, chance: Chance, question: str, version: str | None = None) -> dict[str, Any]:
    """The item of Point-QA: the question with the box (b) or point (p) that it is about, by chance one of them (bp)."""
    version = version or chance.settings.version
    place = chance.random.choice("bp") if version == "bp" else version
    answer = f"The answer is {fields.plain('answer')}."
    if place == "b":
        target, mark, sequence = {"boxes": [fields.box("bbox")]}, BOXES, {"question_boxes": [[0]]}
    else:
        target, mark, sequence = {"points": [fields.point("point")]}, POINTS, {"question_points": [[0]]}
    return {
        "image": fields.text("file_path"),
        "target": target,
        "conversations": turns(chance.question(question=f"{question} {mark}"), answer, **sequence),
    }


class PublicSet:
    """One kind of public records. Its module's DATASET is such an object."""

    def __init__(
        self,
        kind: str,
        keys: Keys,
        convert: Convert,
        *,
        template: str | None = None,
        placeholders: Sequence[str] = (),
        versions: Sequence[str] = (),
        uses: Sequence[str] = (),
        choose: Choose | None = None,
    ) -> None:
        """
        Args:
            kind: the dataset_type.
            keys: those that `convert` reads.
            convert: fields of a record and its chance -> an item (data/grounding/item.py).
            template: the question where the user gives none; None: the record holds it.
            placeholders: what a question must hold once each.
            versions: values of `version`, the default first.
            uses: further keys of the block `grounding` that `convert` or `choose` reads.
            choose: settings -> which records are taken and how often (data/chosen_records.py), with the values on which
                that depends; None: each once.
        """
        self.choose = choose
        self.kind, self.keys, self.convert = kind, keys, convert
        self.template, self.placeholders, self.versions = template, tuple(placeholders), tuple(versions)
        self.uses = (*(TEMPLATE_KEYS if template is not None else ("seed",) if uses or versions else ()), *uses)
        self.uses += ("version",) if versions else ()

    def __call__(self, parameters: BasicParameters, options: ReadOptions) -> FileRecords:
        """The source of a data set (see datasets/_files.py). Raises ConfigError for settings that do not fit."""
        settings = parameters.grounding or GroundingParameters()
        settings.refuse_unused(self.kind, self.uses)
        if self.versions:
            settings = settings.model_copy(update={"version": self._version(settings.version)})
        templates, folder = self._templates(settings), absolute_folder(parameters.data_folder)

        def parse(record: dict[str, Any], options: ReadOptions) -> Parsed:
            return self._parsed(record, options, folder, settings, templates)

        key = {"format": self.kind, "steps": [repr(step) for step in options.image_steps]} | asdict(settings.style)
        key |= {"settings": settings.model_dump(), "templates": [] if templates is None else list(templates.texts)}
        reader, chosen = None, None if self.choose is None else self.choose(settings)
        if chosen is not None:
            reader = partial(ChosenRecords, choose=chosen[0], key=chosen[1])
        return FileRecords(parameters, options, parse, reader=reader, key=key, lines=True)

    def _version(self, given: str | None) -> str:
        if given is not None and given not in self.versions:
            raise ConfigError(
                f'grounding.version is "{given}"; dataset_type {self.kind} has {", ".join(self.versions)}. Correct it'
            )
        return given or self.versions[0]

    def _templates(self, settings: GroundingParameters) -> QuestionTemplates | None:
        if self.template is None:
            return None
        given = settings.template_string is not None or settings.template_file is not None
        return QuestionTemplates.read(
            settings.template_string if given else self.template,
            settings.template_file and local_file(settings.template_file),
            self.placeholders,
            settings.max_dynamic_size,
        )

    def _parsed(
        self,
        record: dict[str, Any],
        options: ReadOptions,
        folder: str,
        settings: GroundingParameters,
        templates: QuestionTemplates | None,
    ) -> Parsed:
        name = f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"
        if not isinstance(record, Mapping):
            raise DataError(f"is {shown(record)}; expected an object, {self.keys.what}.")
        ignored = self.keys.unused(record, "", options.unknown_keys)  # first: a mistyped key is why another is missing
        fields = Fields(record, settings.normalised, options.unknown_keys)
        item = self.convert(fields, Chance(templates, settings, name))
        parsed = grounding.parse(item, options, folder=folder, style=settings.style, normalised=settings.normalised)
        return parsed._replace(ignored=(*ignored, *fields.ignored))
