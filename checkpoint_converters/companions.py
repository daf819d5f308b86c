"""What belongs beside weights: tokenizer, generation settings and image processor, copied and fitted to the layout."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_converters.fast_tokenizer import TOKEN_FLAGS, added_token, fast_tokenizer
from checkpoint_converters.write import write_json
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.files import read_json_object
from mindspeed_mm.weights.sources import Source

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_FILES = ("generation_config.json",)
PROCESSOR_FILES = ("preprocessor_config.json",)

SAVED_TOKENIZER = "tokenizer"
"""Folder beside training checkpoints that keeps the run's tokenizer."""

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
"""Tokens that the llava-hf layout adds to the vocabulary, in this order."""

ROW_MULTIPLE = 64
"""The hub's llava-hf checkpoints pad their vocabulary to a multiple of this (32002 -> 32064)."""


@dataclass
class Companions:
    """Where the files beside the weights come from, the first folder that has one; or a parsed image processor."""

    folders: list[Path] = field(default_factory=list)
    processor: dict[str, Any] | None = None

    def find(self, name: str) -> Path | None:
        """The first file of that name."""
        return next((folder / name for folder in self.folders if (folder / name).is_file()), None)

    def copy(self, folder: Path, names: Iterable[str]) -> None:
        """Copy those of the named files that exist. The tokenizer's files come from one folder."""
        tokenizer = self.tokenizer_folder()
        for name in names:
            here = tokenizer / name if tokenizer and (tokenizer / name).is_file() else None
            found = here if name in TOKENIZER_FILES else self.find(name)
            if found is not None:
                shutil.copyfile(found, folder / name)
        if self.processor is not None and set(PROCESSOR_FILES) <= set(names):
            write_json(folder / PROCESSOR_FILES[0], {"image_processor_type": "CLIPImageProcessor"} | self.processor)

    def tokenizer_folder(self) -> Path | None:
        """The folder with a tokenizer."""
        for folder in self.folders:
            if any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
                return folder
        return None


def companions_of(
    source: Source, tokenizer: str | Path | None = None, image_processor: str | Path | None = None
) -> Companions:
    """The files of a source: those given, its own folder's, its parts' (the vision encoder's), a training run's."""
    config = source.config or {}
    folders = [Path(path) for path in (tokenizer, image_processor) if path]
    folders += [source.path, *(part.path for part in source.part_sources.values())]
    if source.layout == "llava" and isinstance(config.get("mm_vision_tower"), str):
        folders.append(source.path / config["mm_vision_tower"])
    if source.layout == "checkpoint":
        folders.append(source.path.parent / SAVED_TOKENIZER)
    data = config.get("data") if source.layout == "checkpoint" else None
    data = data if isinstance(data, dict) else {}
    folders += [Path(value) for key in ("tokenizer", "image_processor") if isinstance(value := data.get(key), str)]
    folders = [folder if folder.is_dir() else folder.parent for folder in folders]
    processor = None if image_processor else data.get("image_processor")
    return Companions(folders, processor if isinstance(processor, dict) else None)


@dataclass(frozen=True)
class ImageVocabulary:
    """Ids of the two tokens that llava-hf has and rows of its vocabulary. `new`: the tokenizer must learn them."""

    image_id: int
    pad_id: int
    rows: int
    new: bool


def image_vocabulary(companions: Companions, rows: int, pad_id: int | None) -> ImageVocabulary:
    """The ids that an export to llava-hf uses, for weights with `rows` rows.

    A tokenizer that knows <image> keeps it, with <pad>, the source's `pad_id` or its own padding; else <image> and
    <pad> follow the tokenizer's last token.
    Raises WeightError where no tokenizer is there.
    """
    folder = companions.tokenizer_folder()
    if folder is None:
        raise WeightError(
            "llava-hf needs a tokenizer, which learns <image>; found none beside the weights. "
            "Give --tokenizer (tokenizer=), a folder with tokenizer.model or tokenizer.json."
        )
    tokenizer = load_tokenizer(folder)
    image_id = tokenizer.token_to_id(IMAGE_TOKEN)
    if image_id is not None:
        pads = (tokenizer.token_to_id(PAD_TOKEN), pad_id, tokenizer.pad_token_id)
        pad_id = next(token_id for token_id in pads if token_id is not None)
        needed = rows if image_id < rows else _rounded(tokenizer.vocab_size)
        return ImageVocabulary(image_id, pad_id, needed, new=False)
    first = max(tokenizer.vocab_size, 0)
    needed = first + 2
    return ImageVocabulary(first, first + 1, rows if needed <= rows else _rounded(needed), new=True)


def rows_without_image(source: Source, companions: Companions, rows: int) -> int:
    """Rows of a llava-hf vocabulary without the tokens that this layout adds.

    They are cut only where the tokenizer shows that nothing but <image> and <pad> follows, else all are kept.
    """
    config = source.config or {}
    image_id = config.get("image_token_index", config.get("image_token_id")) if source.layout == "llava-hf" else None
    own = source.path if source.path.is_dir() else source.path.parent
    added = _added_tokens(companions.tokenizer_folder() or own)
    if image_id is None:
        image_id = next((number for token, number in added.items() if token == IMAGE_TOKEN), None)
    if image_id is None or not 0 < image_id < rows:
        return rows
    behind = {token for token, number in added.items() if number >= image_id}
    if IMAGE_TOKEN not in behind or behind - {IMAGE_TOKEN, PAD_TOKEN}:
        return rows
    given = config.get("vocab_size")
    return given if source.layout == "llava-hf" and isinstance(given, int) and image_id <= given <= rows else image_id


def complete_tokenizer(folder: Path) -> None:
    """Write the tokenizer.json that a new folder with a SentencePiece model alone lacks, with its added tokens."""
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model.is_file() or fast.is_file():
        return
    content = fast_tokenizer(model)
    known = {item["content"] for item in content["added_tokens"]}
    others = sorted((number, token) for token, number in _added_tokens(folder).items() if token not in known)
    decoder = _optional(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    flags = {number: {"special": decoder.get(str(number), {}).get("special", True)} for number, _ in others}
    content["added_tokens"] += [added_token(number, token) | flags[number] for number, token in others]
    _write_as_is(fast, content)


def add_image_tokens(folder: Path, vocabulary: ImageVocabulary) -> None:
    """Teach the tokenizer files of a new folder <image> and <pad>."""
    ids = {IMAGE_TOKEN: vocabulary.image_id, PAD_TOKEN: vocabulary.pad_id}
    entry = dict.fromkeys(TOKEN_FLAGS, False)
    write_json(folder / "added_tokens.json", _optional(folder / "added_tokens.json") | ids)
    config = _optional(folder / "tokenizer_config.json")
    decoder = dict(config.get("added_tokens_decoder") or {})
    decoder |= {str(number): {"content": token, **entry, "special": True} for token, number in ids.items()}
    others = [token for token in config.get("additional_special_tokens") or [] if token != IMAGE_TOKEN]
    config |= {"added_tokens_decoder": decoder, "additional_special_tokens": [*others, IMAGE_TOKEN]}
    write_json(folder / "tokenizer_config.json", config | {"pad_token": PAD_TOKEN})
    special = _optional(folder / "special_tokens_map.json")
    others = [item for item in special.get("additional_special_tokens") or [] if _content(item) != IMAGE_TOKEN]
    special |= {"additional_special_tokens": [*others, {"content": IMAGE_TOKEN, **entry}]}
    write_json(folder / "special_tokens_map.json", special | {"pad_token": {"content": PAD_TOKEN, **entry}})
    fast = folder / "tokenizer.json"
    if fast.is_file():
        content = read_json_object(fast)
        added = [item for item in content.get("added_tokens") or [] if item.get("content") not in ids]
        added += [added_token(number, token) for token, number in ids.items()]
        _write_as_is(fast, content | {"added_tokens": added})


def remove_image_tokens(folder: Path) -> None:
    """Take <image> and <pad> out of the tokenizer files of a new folder; padding becomes the unknown token."""
    added = folder / "added_tokens.json"
    names = (IMAGE_TOKEN, PAD_TOKEN)
    if added.is_file():
        left = {token: number for token, number in read_json_object(added).items() if token not in names}
        added.unlink()
        if left:
            write_json(added, left)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        config = read_json_object(path)
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            config["added_tokens_decoder"] = {k: v for k, v in decoder.items() if v.get("content") not in names}
        others = config.pop("additional_special_tokens", None) or []
        if kept := [item for item in others if _content(item) != IMAGE_TOKEN]:
            config["additional_special_tokens"] = kept
        if _content(config.get("pad_token")) == PAD_TOKEN and "unk_token" in config:
            config["pad_token"] = config["unk_token"]
        write_json(path, config)
    fast = folder / "tokenizer.json"
    if fast.is_file():
        content = read_json_object(fast)
        kept = [item for item in content.get("added_tokens") or [] if item.get("content") not in names]
        _write_as_is(fast, content | {"added_tokens": kept})


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens that were added to a tokenizer, from whichever file says it."""
    added = {token: number for token, number in _optional(folder / "added_tokens.json").items()}
    for item in _optional(folder / "tokenizer.json").get("added_tokens") or []:
        added.setdefault(item.get("content"), item.get("id"))
    for number, item in (_optional(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        added.setdefault(item.get("content"), int(number) if number.isdigit() else -1)
    return {token: number for token, number in added.items() if isinstance(number, int)}


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _content(item: Any) -> Any:
    return item.get("content") if isinstance(item, dict) else item


def _rounded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def _write_as_is(path: Path, content: dict[str, Any]) -> None:
    """A tokenizer.json with its own characters: some have thousands that are not ASCII."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
