"""tokenizer.model of the Llama family, encoding as the checkpoint's own (legacy) rule does.

The legacy rule of the Llama family (transformers' slow LlamaTokenizer, `legacy: true`, the default): text is cut at
the added tokens (`<s>`, `</s>`, `<image>`, ...) and every piece in between is encoded by SentencePiece on its own,
each with its own dummy-prefix space. transformers 5 gives other ids where a piece starts with a space, so its
LlamaTokenizer is not used here. `legacy: false` in tokenizer_config.json is honoured.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from mindspeed_mm.data.tokenizer_base import SPACE, Tokenizer, TokenizerSettings, is_control, outside
from mindspeed_mm.errors import DataError


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before the model of the tokenizer runs."""

    content: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model under the Llama rule, legacy or not (see the module's text)."""

    def __init__(self, folder: Path, settings: TokenizerSettings):
        super().__init__(folder)
        self._legacy = settings.legacy
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self._files["tokenizer.model"])
        except RuntimeError as error:
            raise DataError(
                f"{folder / 'tokenizer.model'} is not a SentencePiece model; expected the file of a Llama-family "
                "checkpoint. Fetch it again, or give the folder a tokenizer.json."
            ) from error
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        special = defaults | settings.special
        self._added = self._added_tokens(settings, special)
        by_content = {token.content: token.id for token in self._added.values()}
        self._by_content = by_content
        self.bos_token_id = by_content[special["bos_token"]]
        self.eos_token_id = by_content[special["eos_token"]]
        self.unk_token_id = by_content[special["unk_token"]]
        self.pad_token_id = by_content[special["pad_token"]] if "pad_token" in special else self.unk_token_id
        self.special_ids = frozenset(token.id for token in self._added.values() if token.special)
        self.vocab_size = max(self._model.get_piece_size(), max(self._added) + 1)
        if settings.config.get("add_prefix_space") is False:
            raise DataError(
                f"{folder}: tokenizer_config.json has add_prefix_space false; expected true or none: tokenizer.model "
                "is run with the space that it was made with. Give the folder a tokenizer.json."
            )
        self._adds_bos = settings.config.get("add_bos_token", True) is not False
        size = self._model.get_piece_size()
        self.user_tokens = {
            token.content: token.id
            for token in self._added.values()
            if not is_control(
                token.content,
                special=token.special,
                in_model=token.id < size,
                is_role=token.content in special.values(),
            )
        }
        self.control_tokens = frozenset(by_content) - self.user_tokens.keys()
        contents = sorted(by_content, key=len, reverse=True)
        self._splitter = re.compile("|".join(re.escape(content) for content in contents))

    def _added_tokens(self, settings: TokenizerSettings, special: dict[str, str]) -> dict[int, AddedToken]:
        """Added tokens by id: the listed ones, then special tokens that are named without an id (as transformers does:
        their id in the vocabulary, or the next free one)."""
        added = {}
        for token_id, entry in settings.added.items():
            if entry.get("single_word"):
                raise DataError(f"added token {entry['content']!r} is single_word, not supported; set it to false.")
            flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip")}
            added[token_id] = AddedToken(entry["content"], token_id, **flags)
        contents = {token.content for token in added.values()}
        for content in dict.fromkeys([*special.values(), *settings.additional]):
            if content in contents:
                continue
            token_id = self._model.piece_to_id(content)
            if self._model.id_to_piece(token_id) != content:
                token_id = max([self._model.get_piece_size() - 1, *added]) + 1
            added[token_id] = AddedToken(content, token_id, special=True)
        return added

    def encode_with_starts(
        self, text: str, add_bos: bool = True, *, special_text: bool = True, plain: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[int]]:
        """See the base class. Tokens without width (a dummy prefix, the first bytes of a character) start where the
        character after them does."""
        prefix = [self.bos_token_id] if add_bos and self._adds_bos else []
        ids, starts = list(prefix), [-1] * len(prefix)
        first = True
        for chunk, start, token in self._split(text, plain if special_text else [(0, len(text))]):
            if token is not None:
                ids.append(token.id)
                starts.append(start)
            elif chunk:
                chunk_ids, chunk_starts = self._encode_chunk(chunk, dummy_prefix=self._legacy or first)
                ids += chunk_ids
                starts += [start + offset for offset in chunk_starts]
            first = False
        return ids, starts

    def _split(self, text: str, plain: Sequence[tuple[int, int]]) -> list[tuple[str, int, AddedToken | None]]:
        """(text, position, added token or None) in order; the longest token wins where several begin."""
        parts: list[tuple[str, int, AddedToken | None]] = []
        position = 0
        for begin, end in outside(self._splitter, text, plain, self.user_tokens):
            if begin < position:
                continue
            token = self._added[self._by_content[text[begin:end]]]
            before = text[position:begin]
            parts.append((before.rstrip() if token.lstrip else before, position, None))
            parts.append((text[begin:end], begin, token))
            position = end
            if token.rstrip:
                position += len(text[position:]) - len(text[position:].lstrip())
        parts.append((text[position:], position, None))
        return [part for part in parts if part[0]]

    def _encode_chunk(self, chunk: str, dummy_prefix: bool) -> tuple[list[int], list[int]]:
        """Ids and starts of text without added tokens.

        Without a dummy prefix (legacy: false) the chunk is encoded behind a line feed, whose tokens are then dropped:
        SentencePiece adds the prefix to what comes first, and nothing merges across a line feed.
        """
        if not dummy_prefix:
            ids, starts = self._encode_chunk("\n" + chunk, dummy_prefix=True)
            keep = next(index for index, start in enumerate(starts) if start > 0)
            return ids[keep:], [start - 1 for start in starts[keep:]]
        encode = getattr(self._model, "encode_as_proto", None)  # sentencepiece before 0.2.2 spells it differently
        proto = encode(chunk) if encode else self._model.encode(chunk, out_type="immutable_proto")
        ids, starts, position = [], [], 0
        for piece in proto.pieces:
            ids.append(piece.id)
            starts.append(position)
            position += len(piece.surface)
        return ids, starts

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See the base class. The space that encoding puts in front of the text is taken off again. With
        `skip_special_tokens=False` the spacing around special tokens is that of transformers' slow tokenizer."""
        self.pieces(ids)  # refuses unknown ids
        if skip_special_tokens:
            return self._text([i for i in ids if i not in self.special_ids]).removeprefix(" ")
        text, pending, after_special = "", [], False
        for index, token_id in enumerate(ids):
            if token_id not in self.special_ids:
                pending.append(token_id)
                after_special = False
                continue
            gap = " " if self._legacy and not after_special and index > 0 else ""
            text += gap + self._text(pending).removeprefix(" ") + self._piece(token_id)
            pending, after_special = [], True
        return text + self._text(pending).removeprefix(" ")

    def _text(self, ids: Sequence[int]) -> str:
        """Pieces joined; bytes become characters (or U+FFFD where they are not UTF-8)."""
        raw = b""
        for token_id in ids:
            piece = self._piece(token_id)
            if token_id not in self._added and self._model.is_byte(token_id):
                raw += bytes([int(piece[3:5], 16)])  # a byte's piece is "<0xNN>"
            else:
                raw += piece.replace(SPACE, " ").encode()
        return raw.decode("utf-8", errors="replace")

    def token_to_id(self, token: str) -> int | None:
        if token in self._by_content:
            return self._by_content[token]
        token_id = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None

    def _piece(self, token_id: int) -> str:
        if token_id in self._added:
            return self._added[token_id].content
        if token_id >= self._model.get_piece_size():
            raise DataError(f"token id {token_id} has no entry in the vocabulary (a gap between the added tokens).")
        return self._model.id_to_piece(token_id)
