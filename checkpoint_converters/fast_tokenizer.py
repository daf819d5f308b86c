"""tokenizer.json of a Llama tokenizer that has only its SentencePiece model.

Without it transformers 5 builds a fast tokenizer of its own, which leaves out the space that Llama's rule puts before
a text. Format: the tokenizers library's serialisation, with what transformers 4 wrote for LlamaTokenizer.
"""

from pathlib import Path
from typing import Any

import sentencepiece

from mindspeed_mm.errors import WeightError

TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

SPACE = "\u2581"


def fast_tokenizer(model: Path) -> dict[str, Any]:
    """Content of a tokenizer.json for a tokenizer.model with Llama's rule (BPE, bytes for what is unknown).

    Raises WeightError for a file that sentencepiece cannot read.
    """
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        raise WeightError(f"{model} is no SentencePiece model ({error}); expected one. Copy it again.") from error
    vocabulary = {pieces.id_to_piece(number): number for number in range(pieces.vocab_size())}
    special = [number for number in vocabulary.values() if pieces.is_control(number) or pieces.is_unknown(number)]
    bos = pieces.id_to_piece(pieces.bos_id())
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(number, pieces.id_to_piece(number)) for number in special],
        "normalizer": _sequence(
            "normalizers",
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ),
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                first,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [pieces.bos_id()], "tokens": [bos]}},
        },
        "decoder": _sequence(
            "decoders",
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": _merges(vocabulary, {piece: pieces.get_score(number) for piece, number in vocabulary.items()}),
        },
    }


def _merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[str]:
    """Every way to join two pieces into a third, the best score first; a score says when the third was learnt."""
    found = []
    for piece, score in scores.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, f"{left} {right}") for left, right in known]
    found.sort(key=lambda item: item[0], reverse=True)
    return [item[1] for item in found]


def added_token(number: int, token: str) -> dict[str, Any]:
    """An entry of added_tokens for a special token."""
    return {"id": number, "content": token, **dict.fromkeys(TOKEN_FLAGS, False), "special": True}


def _sequence(key: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}
