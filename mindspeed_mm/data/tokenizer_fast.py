"""tokenizer.json of any model family."""

import json
import re
from collections.abc import Container, Sequence
from pathlib import Path

import tokenizers

from mindspeed_mm.data.tokenizer_base import LLAMA_CLASSES, SPACE, Tokenizer, TokenizerSettings, is_control, outside
from mindspeed_mm.errors import DataError

BOS_CLASSES = (*LLAMA_CLASSES, "GemmaTokenizer", "GemmaTokenizerFast")
"""`tokenizer_class` values whose add_bos_token decides, whatever tokenizer.json says."""

TOKEN_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
"""What an entry of added_tokens_decoder says of a token besides its text."""


class FastTokenizer(Tokenizer):
    """tokenizer.json of any model, run by the `tokenizers` library."""

    def __init__(self, folder: Path, settings: TokenizerSettings):
        super().__init__(folder)
        try:
            self._model = tokenizers.Tokenizer.from_str(self._files["tokenizer.json"].decode())
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise DataError(f"{folder / 'tokenizer.json'} cannot be used: {error}. Fetch it again.") from error
        self._model.no_padding()
        self._model.no_truncation()
        legacy = settings.config.get("tokenizer_class") in LLAMA_CLASSES and settings.legacy
        _add_listed_tokens(self._model, settings, folder, legacy=legacy)
        if legacy:
            _restore_legacy_prefix(self._model)
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        named = {role: self._model.token_to_id(content) for role, content in settings.special.items()}
        missing = [settings.special[role] for role, token_id in named.items() if token_id is None]
        if missing:
            raise DataError(
                f"{folder}: tokenizer.json has no token {missing[0]!r}, which tokenizer_config.json or "
                "special_tokens_map.json names. Correct the name, or list the token with its id under "
                "added_tokens_decoder in tokenizer_config.json."
            )
        self.bos_token_id, self.unk_token_id = named.get("bos_token"), named.get("unk_token")
        if "eos_token" not in named:
            raise DataError(f"{folder}: tokenizer_config.json names no eos_token; add it, generation needs an end.")
        self.eos_token_id = named["eos_token"]
        pads = (named.get("pad_token"), self.unk_token_id, self.eos_token_id)
        self.pad_token_id = next(token_id for token_id in pads if token_id is not None)
        special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special | {token_id for token_id in named.values()})
        added = {token.content: token for token in self._model.get_added_tokens_decoder().values()}
        model_alone = self._model.get_vocab(with_added_tokens=False)
        self.control_tokens = frozenset(
            content
            for content, token in added.items()
            if is_control(
                content,
                special=token.special,
                in_model=content in model_alone,
                is_role=content in settings.special.values(),
            )
        )
        user = added.keys() - self.control_tokens
        self.user_tokens = {content: self._model.token_to_id(content) for content in user}
        self._plain = _without(self._model, self.control_tokens)
        self._strips = {content: (token.lstrip, token.rstrip) for content, token in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._splitter = re.compile("|".join(re.escape(content) for content in longest_first) or r"(?!)")
        sample = self._model.encode("a")
        body = sample.special_tokens_mask.index(0) if 0 in sample.special_tokens_mask else len(sample.ids)
        self._prefix = sample.ids[:body]
        adds_bos = settings.config.get("add_bos_token")
        decides = settings.config.get("tokenizer_class") in BOS_CLASSES and self.bos_token_id is not None
        if decides and adds_bos is not None:  # transformers makes the post-processor anew from it
            others = [token_id for token_id in self._prefix if token_id != self.bos_token_id]
            self._prefix = [self.bos_token_id, *others] if adds_bos else others
        _check_prefix_space(self._model, settings.config.get("add_prefix_space"), folder)

    def encode_with_starts(
        self, text: str, add_bos: bool = True, *, special_text: bool = True, plain: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[int]]:
        prefix = self._prefix if add_bos else []
        ids, starts = list(prefix), [-1] * len(prefix)
        for begin, end, special in (
            self._pieces(text, plain) if special_text and plain else [(0, len(text), special_text)]
        ):
            encoding = (self._model if special else self._plain).encode(text[begin:end], add_special_tokens=False)
            ids += encoding.ids
            starts += [begin + start for start, _ in encoding.offsets]
        return ids, starts

    def _pieces(self, text: str, plain: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool]]:
        """(begin, end, whether special tokens are seen) of the parts of a text with plain spans.

        The library cannot leave spans out, so the text is cut at the special tokens outside of them, where it would cut
        the text anyway, and what lies between is encoded without special tokens.
        """
        matches = [(match.start(), match.end()) for match in self._splitter.finditer(text)]
        if not any(begin < stop and end > start for begin, end in matches for start, stop in plain):
            return [(0, len(text), True)]
        pieces, position = [], 0
        for begin, end in outside(self._splitter, text, plain):
            lstrip, rstrip = self._strips[text[begin:end]]
            before = len(text[position:begin].rstrip()) + position if lstrip else begin
            pieces += [(position, before, False), (begin, end, True)]
            position = end + (len(text[end:]) - len(text[end:].lstrip()) if rstrip else 0)
        return [piece for piece in [*pieces, (position, len(text), False)] if piece[1] > piece[0]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.pieces(ids)  # refuses unknown ids
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        return self._model.decode(kept, skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def _piece(self, token_id: int) -> str:
        piece = self._model.id_to_token(token_id)
        if piece is None:
            raise DataError(f"token id {token_id} has no entry in the vocabulary (a gap between the added tokens).")
        return piece


def _add_listed_tokens(model: tokenizers.Tokenizer, settings: TokenizerSettings, folder: Path, *, legacy: bool) -> None:
    """Add the tokens that the files beside tokenizer.json list and it lacks, as transformers does: those with an id in
    its order, then the special ones without. What added_tokens_decoder says of a token holds, whatever tokenizer.json
    says; added_tokens.json says no more than ids. `legacy`: of a LLaMA, see `_restore_legacy_prefix`.

    Raises DataError for a token whose listed id is not the one that it has or would get.
    """
    found = {token.content: token for token in model.get_added_tokens_decoder().values()}
    decoder = settings.config.get("added_tokens_decoder") or {}
    for token_id, entry in sorted(settings.added.items()):
        known = found.get(entry["content"])
        own = {name: getattr(known, name, False) for name in TOKEN_FLAGS}
        says = entry if known is None or str(token_id) in decoder else {}
        flags = own | {name: bool(says[name]) for name in TOKEN_FLAGS if says.get(name) is not None}
        if known is None and says.get("normalized") is None:
            flags["normalized"] = not flags["special"]
        if legacy:  # its normalizer puts a space in front of every text, and so in front of a normalized token
            flags["normalized"] = own["normalized"]
        if known is None or flags != own:
            token = tokenizers.AddedToken(entry["content"], **flags)
            (model.add_special_tokens if flags["special"] else model.add_tokens)([token])
        has = model.token_to_id(entry["content"])
        if has != token_id:
            raise DataError(
                f"{folder}: the token {entry['content']!r} is listed with the id {token_id} beside tokenizer.json, in "
                f"which it has the id {has}, or gets it as the next free one. Correct the id, or list all added tokens."
            )
    listed = {entry["content"] for entry in settings.added.values()} | found.keys()
    special = [content for content in settings.additional if content not in listed]
    model.add_special_tokens([tokenizers.AddedToken(content, normalized=False, special=True) for content in special])


def _without(model: tokenizers.Tokenizer, contents: Container[str]) -> tokenizers.Tokenizer:
    """A copy for which these added tokens are text; the library leaves out those that are marked as special."""
    content = json.loads(model.to_str())
    for entry in content["added_tokens"]:
        entry["special"] = entry["content"] in contents
    copy = tokenizers.Tokenizer.from_str(json.dumps(content))
    copy.encode_special_tokens = True
    return copy


def _check_prefix_space(model: tokenizers.Tokenizer, asked: bool | None, folder: Path) -> None:
    """Raise DataError where tokenizer_config.json asks for another space in front of a text than tokenizer.json has."""
    parts = [model.pre_tokenizer, *(model.pre_tokenizer if hasattr(model.pre_tokenizer, "__getitem__") else ())]
    own = next((part.add_prefix_space for part in parts if hasattr(part, "add_prefix_space")), None)
    if asked is not None and own is not None and asked != own:
        raise DataError(
            f"{folder}: tokenizer_config.json has add_prefix_space {str(asked).lower()}, tokenizer.json "
            f"{str(own).lower()}; expected one value, since each gives other ids. Correct the file that is wrong."
        )


def _restore_legacy_prefix(model: tokenizers.Tokenizer) -> None:
    """Give a Llama tokenizer.json that transformers 5 has rewritten its legacy prefix rule back.

    transformers 5 saves a Metaspace pre-tokenizer, which adds no prefix to a chunk that starts with a space;
    transformers 4 saved the normalizers below, which always add it.
    """
    if isinstance(model.pre_tokenizer, tokenizers.pre_tokenizers.Metaspace):
        if model.pre_tokenizer.prepend_scheme == "always":
            prefix = tokenizers.normalizers.Prepend(SPACE)
            model.normalizer = tokenizers.normalizers.Sequence([prefix, tokenizers.normalizers.Replace(" ", SPACE)])
            model.pre_tokenizer = None
