"""Text steps that the answer rules share."""

import unicodedata

END_TOKENS = ("</s>", "<s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<pad>", "<unk>")


def strip_special_tokens(text: str) -> str:
    """Remove special tokens that a decoder left at the end, with the white space around them."""
    end = len(text)
    while True:
        stop = end
        while stop and text[stop - 1].isspace():
            stop -= 1
        token = next((token for token in END_TOKENS if text.endswith(token, 0, stop)), None)
        if token is None:
            return text if end == len(text) else text[:stop]
        end = stop - len(token)


def fold(text: str) -> str:
    """One spelling for characters that look alike: full-width forms, typographic quotes, runs of white space."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    return " ".join(text.split())


def is_cjk(character: str) -> bool:
    """True for a character of the block that VLMEvalKit takes for Chinese (U+4E00 to U+9FFF)."""
    return "\u4e00" <= character <= "\u9fff"


_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-"})


def narrow(text: str) -> str:
    """Full-width ASCII characters and the minus sign in their ASCII form."""
    return text.translate(_NARROW)


_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x2212: "-"}
