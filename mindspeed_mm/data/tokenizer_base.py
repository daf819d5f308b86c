"""What every tokenizer offers, and the settings that lie beside tokenizer files."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_mm.config.load import read_json
from mindspeed_mm.data.tokenizer_keys import (
    LISTS,
    NAMED,
    OTHER_ROLES,
    ROLES,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    GenerationSettings,
)
from mindspeed_mm.errors import DataError

SPACE = "\u2581"
"""SentencePiece's visible space (LOWER ONE EIGHTH BLOCK)."""

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer folder may hold, by the names of the Hugging Face hub."""

LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
"""`tokenizer_class` values whose tokenizer.model is a SentencePiece model under the Llama rule."""


class Tokenizer(ABC):
    """Text to ids and back. Ids are Python ints; positions count characters of the text."""

    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int
    unk_token_id: int | None
    vocab_size: int
    """Number of ids including the added tokens (the highest id + 1)."""

    special_ids: frozenset[int]
    """Ids that `decode` leaves out by default."""

    user_tokens: dict[str, int]
    """Tokens that were added for use in texts, with their ids: they are tokens wherever they stand."""

    control_tokens: frozenset[str]
    """All other added tokens: typed, they stay text unless special_text is "tokens"."""

    def __init__(self, folder: Path):
        self._files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        self._generation = GenerationSettings.read(folder)

    def encode(self, text: str, add_bos: bool = True, *, special_text: bool = True) -> list[int]:
        """Ids of a text; with `add_bos` the begin-of-sequence id comes first where the checkpoint uses one.

        `special_text=False` keeps the text of control tokens ("</s>" typed by a user) plain text. EOS is never added:
        a template does that.
        """
        return self.encode_with_starts(text, add_bos, special_text=special_text)[0]

    @abstractmethod
    def encode_with_starts(
        self, text: str, add_bos: bool = True, *, special_text: bool = True, plain: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[int]]:
        """As `encode`, plus the position in `text` where each token starts (-1 for BOS).

        `plain` are spans (begin, end) of `text` in which the text of control tokens stays text.
        """

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: EOS, and those that generation_config.json (else config.json) beside it names."""
        return tuple(dict.fromkeys((self.eos_token_id, *self._generation.ids)))

    @property
    def generation(self) -> GenerationSettings:
        """What generation_config.json beside it says."""
        return self._generation

    def take_generation(self, folder: Path) -> None:
        """Take end ids and options of another folder's files: the model's own, where the tokenizer lies elsewhere.
        Raises ConfigError as GenerationSettings.read does."""
        self._generation = GenerationSettings.read(folder)

    @property
    def digest(self) -> str:
        """Changes with any of the tokenizer's files."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()

    @property
    def chat_templates(self) -> tuple[str, ...]:
        """The Jinja chat templates that lie beside the tokenizer, the one that transformers takes first."""
        found = [self._files["chat_template.jinja"].decode()] if "chat_template.jinja" in self._files else []
        for name in ("chat_template.json", "tokenizer_config.json"):  # the former is an older processor's
            template = json.loads(self._files.get(name, b"{}").decode("utf-8-sig")).get("chat_template")
            if isinstance(template, list):  # several, each with a name
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
            found += [template] if isinstance(template, str) else []
        return tuple(dict.fromkeys(found))

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Raises DataError for an id that the vocabulary does not have."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """Id of one token by its exact text, or None."""

    @abstractmethod
    def _piece(self, token_id: int) -> str:
        """Vocabulary entry of an id that is known to be in range."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Vocabulary entries of ids, as they are stored. Raises DataError for an unknown id."""
        unknown = [token_id for token_id in ids if not 0 <= token_id < self.vocab_size]
        if unknown:
            raise DataError(f"token id {unknown[0]} is not in the vocabulary; expected 0 to {self.vocab_size - 1}.")
        return [self._piece(token_id) for token_id in ids]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer files as they were read, and what generation_config.json says, into `folder` (made if
        none)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)
        self._generation.save(folder)


CONTROL = re.compile(r"<\|.*\|>|<image>")
"""Added tokens that mark up a conversation, whatever their entry says of them."""


def is_control(content: str, *, special: bool, in_model: bool, is_role: bool) -> bool:
    """Whether an added token is one that nobody may type (it stays text unless special_text is "tokens").

    All others were added by a user for use in texts: they are tokens wherever they stand. `special` is the entry's own
    flag; `in_model`: the vocabulary has it without being added; `is_role`: it is BOS, EOS, UNK or PAD.
    """
    return special or in_model or is_role or CONTROL.fullmatch(content) is not None


def outside(
    splitter: re.Pattern[str], text: str, plain: Sequence[tuple[int, int]], everywhere: Container[str] = ()
) -> Iterator[tuple[int, int]]:
    """(begin, end) of the added tokens in a text outside the spans in `plain`; of those in `everywhere` inside, too."""
    position = 0
    while match := splitter.search(text, position):
        inside = next((stop for start, stop in plain if match.start() < stop and match.end() > start), None)
        if match.group() in everywhere:
            inside = None
        if inside is None:
            yield match.span()
        # A token that begins inside a span is none; one that begins in its middle may still be.
        position = match.end() if inside is None else match.start() + 1


@dataclass(frozen=True)
class TokenizerSettings:
    """What the JSON files beside a tokenizer say, in the old and the new spelling."""

    config: dict[str, Any]
    special: dict[str, str]
    """Role ("bos_token", ...) to token text."""
    additional: tuple[str, ...]
    added: dict[int, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "TokenizerSettings":
        def optional(name: str) -> dict[str, Any]:
            return read_json(folder / name) if (folder / name).is_file() else {}

        config, special_map = optional("tokenizer_config.json"), optional("special_tokens_map.json")
        TOKENIZER_CONFIG.check(config, where=str(folder))
        SPECIAL_TOKENS_MAP.check(special_map, where=str(folder))
        special, additional = {}, []
        for role in ROLES:
            content = _content(config.get(role), role, folder) or _content(special_map.get(role), role, folder)
            if content:
                special[role] = content
        for source in (config, special_map):
            for role in (*OTHER_ROLES, *NAMED):
                additional += [content] if (content := _content(source.get(role), role, folder)) else []
            for key in LISTS:
                entries = source.get(key) or []  # transformers 5 also writes {"image_token": "<image>"}
                for entry in entries.values() if isinstance(entries, dict) else entries:
                    additional.append(_content(entry, key, folder))
        added: dict[int, dict[str, Any]] = {}
        for content, token_id in optional("added_tokens.json").items():
            entry = {"content": content, "special": content in {*special.values(), *additional}}
            added[_token_id(token_id, folder)] = entry
        for key, entry in (config.get("added_tokens_decoder") or {}).items():
            token_id, content = _token_id(key, folder), _content(entry, "added_tokens_decoder", folder)
            known = added.get(token_id, {"content": content})["content"]
            if known != content:
                raise DataError(
                    f"{folder}: id {token_id} is {known!r} in added_tokens.json and {content!r} in "
                    "tokenizer_config.json; correct one of them."
                )
            added[token_id] = entry
        return cls(config, special, tuple(dict.fromkeys(additional)), added)

    def is_llama(self, has_fast: bool) -> bool:
        return not has_fast or self.config.get("tokenizer_class", "LlamaTokenizer") in LLAMA_CLASSES

    @property
    def legacy(self) -> bool:
        """transformers takes an absent (or null) flag as true."""
        return self.config.get("legacy") is not False


def _content(entry: Any, role: str, folder: Path) -> str | None:
    """A token is stored as its text or as an object with its text under "content"."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    if entry is not None and not isinstance(entry, str):
        raise DataError(f"{folder}: {role} is {entry!r}; expected a token's text or an object with a content.")
    return entry


def _token_id(value: Any, folder: Path) -> int:
    """Ids are integers, or their decimal text where they are JSON keys."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{folder}: an added token has the id {value!r}; expected a non-negative integer.")
    return value
