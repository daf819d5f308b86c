"""Question templates: a JSON list of texts, one of which is chosen for each sample, the same one in every run."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed_mm.errors import ConfigError


@dataclass(frozen=True)
class QuestionTemplates:
    """Templates that each hold every one of `placeholders` once."""

    texts: tuple[str, ...]
    placeholders: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.texts:
            raise ConfigError("there is no question template; expected at least one text")
        for text in self.texts:
            for name in self.placeholders:
                if text.count(name) != 1:
                    raise ConfigError(
                        f"the question template {text!r:.80} holds {text.count(name)} {name}; expected exactly one. "
                        "Correct template_string, or the file"
                    )

    @classmethod
    def read(
        cls, text: str | None, file: str | Path | None, placeholders: Sequence[str], most: int | None = None
    ) -> QuestionTemplates:
        """From exactly one of a text and a file; `most` keeps so many from the head of the file's list.

        Raises ConfigError.
        """
        if (text is None) == (file is None):
            raise ConfigError("found template_string and template_file both given, or both missing; give exactly one")
        if most is not None and most < 1:
            raise ConfigError(f"found max_dynamic_size {most}; expected at least 1")
        texts = [text] if file is None else _texts(Path(file))
        return cls(tuple(texts[:most]), tuple(placeholders))

    def chosen(self, sample: str, seed: int = 0, *, fixed: bool = False) -> str:
        """The template of a sample, by its name and the seed alone; with `fixed` (evaluation) always the first."""
        number = 0 if fixed else zlib.crc32(f"{seed} {sample}".encode("utf-8", "surrogatepass")) % len(self.texts)
        return self.texts[number]

    @staticmethod
    def filled(text: str, values: Mapping[str, str]) -> str:
        """A template with its placeholders replaced, each at its place; what a value holds is not looked at again."""
        pieces = [text]
        for name, value in values.items():
            pieces = [part for piece in pieces for part in _split(piece, name, value)]
        return "".join(pieces)


class _Filled(str):
    """A text that stands for a placeholder."""


def _split(piece: str, name: str, value: str) -> list[str]:
    if isinstance(piece, _Filled):
        return [piece]
    parts: list[str] = []
    for number, part in enumerate(piece.split(name)):
        parts += [part] if number == 0 else [_Filled(value), part]
    return parts


def _texts(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read template_file {path}: {error.strerror}; correct it") from error
    except ValueError as error:
        raise ConfigError(f"template_file {path} is not JSON ({error}); expected a list of texts") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ConfigError(f"template_file {path} holds {found!r:.80}; expected a JSON list of texts")
    return found
