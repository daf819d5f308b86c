"""The tokenizer of a checkpoint folder."""

from pathlib import Path

from mindspeed_mm.data.tokenizer_base import Tokenizer, TokenizerSettings
from mindspeed_mm.data.tokenizer_fast import FastTokenizer
from mindspeed_mm.data.tokenizer_sentencepiece import SentencePieceTokenizer
from mindspeed_mm.errors import DataError

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder: tokenizer.model (SentencePiece, Llama rule) or tokenizer.json.

    Raises DataError when the folder has neither or they cannot be used, ConfigError for damaged JSON beside them.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(
            f"no tokenizer folder at {folder}; expected a local folder with tokenizer.model or tokenizer.json "
            "(nothing is downloaded). Correct the path."
        )
    settings = TokenizerSettings.read(folder)
    if (folder / "tokenizer.model").is_file() and settings.is_llama(has_fast=(folder / "tokenizer.json").is_file()):
        return SentencePieceTokenizer(folder, settings)
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder, settings)
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"{folder} holds {found}; expected tokenizer.model (SentencePiece) or tokenizer.json.")
