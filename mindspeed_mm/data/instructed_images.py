"""Images of one size for a projector that reads the question about them (InstructBLIP): the pixels and its tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as WordPieces

from mindspeed_mm.config.load import read_json
from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.data.media import FixedSizeImages
from mindspeed_mm.errors import ConfigError, DataError

FOLDER = "qformer_tokenizer"
"""Where transformers' folders keep the tokenizer of the question, and the key of a processor's config that holds it."""


def read_question_tokenizer(folders: list[Path]) -> dict[str, Any] | None:
    """The tokenizer.json of the first folder that has one; None where none has."""
    files = (folder / FOLDER / "tokenizer.json" for folder in folders)
    return next((read_json(path) for path in files if path.is_file()), None)


def write_question_tokenizer(folder: Path, content: dict[str, Any]) -> None:
    """Write the tokenizer of the question into a transformers folder."""
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / FOLDER / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / FOLDER / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")


class InstructedImages(FixedSizeImages):
    """FixedSizeImages with the tokenizer of the question."""

    reads_instructions = True

    def __init__(
        self,
        processor: ImageProcessor,
        count: int,
        content: dict[str, Any] | None,
        most: int,
        *,
        fast_resize: bool = False,
    ) -> None:
        """`content` is the tokenizer.json of the question, None where there is none: then only ids can be given; `most`
        words are the longest question."""
        super().__init__(processor, count, fast_resize=fast_resize)
        self._content, self._most = content, most
        self._tokenizer = None
        if content is not None:
            self._tokenizer = WordPieces.from_str(json.dumps(content))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    def instruction(self, text: str) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise ConfigError(
                f"the model came without the tokenizer of its Q-Former, which reads the question; expected {FOLDER}/"
                "tokenizer.json beside preprocessor_config.json. Copy that folder of the model, or name the model's "
                "folder as image_processer_path"
            )
        ids = tuple(self._tokenizer.encode(text).ids)
        if not 0 < len(ids) <= self._most:
            raise DataError(
                f"has a question of {len(ids)} words of the Q-Former; expected 1 to {self._most} "
                "(vision_projector.text_positions). Shorten it, or give an image a question"
            )
        return ids

    @property
    def config(self) -> dict[str, Any]:
        return super().config | ({} if self._content is None else {FOLDER: self._content})

    @property
    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self._content, sort_keys=True).encode()).hexdigest()
        return super().settings | {"qformer_tokenizer": digest}
