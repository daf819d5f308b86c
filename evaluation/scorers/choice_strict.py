"""The option that a careful reader takes from a free answer to a multiple-choice question.

No paper fixes such a rule. This one reads what is claimed and never guesses: two claims, or none, give None. In order:
the whole answer is a letter or an option text; a letter is stated ("the answer is B", "option B", "B. text"); one
letter stands alone in the text; one option text occurs in it. The article "A", the pronoun "I", letters inside an
option text ("vitamin C") and what is negated ("not B, A") are no claims.
"""

import re
from collections.abc import Mapping

from evaluation.scorers.text import fold, is_cjk, strip_special_tokens

_NO_ANSWER = re.compile(
    r"failed to obtain answer via api|can(?:'t|not| not) (?:help with|process|see|view|determine|answer)"
    r"|without the image provided",
    re.IGNORECASE,
)
_OUTER_MARKS = " \t\"'`*_()[]{}<>.,:;!?#~|=/\\-\u3002\u3001\u300a\u300b\u300c\u300d\u3010\u3011"
_TEXT_MARKS = " \"'`*_.,;:!?\u3002\u3001"

_LETTER = re.compile(r"(?<![A-Za-z0-9'\u00c0-\u024f])([A-Z])(?![A-Za-z0-9\u00c0-\u024f])(?!'[a-z])")
_STATING = re.compile(
    r"(?:\banswer(?:\s+(?:is|would be|should be|must be))?|\boption|\bchoice|\bchoose|\bselect|\bpick"
    r"|\u7b54\u6848(?:\u662f|\u4e3a)?|\u9009\u62e9|\u9009\u9879|\u9009)"
    r"[\s:=*\"'`(\[]*(?:option|choice)?[\s:*\"'`(\[]*\Z",
    re.IGNORECASE,
)
_LOWER_STATED = re.compile(r"\banswer(?:\s+is|\s*:)[\s:*\"'`(\[]*([a-z])[\s.*\"'`)\]!]*\Z", re.IGNORECASE)
_LEADING = re.compile(
    r"[\s*\"'`(\[]*([A-Za-z])\s*[*\"'`)\]]*\s*([.:,;)\]\u3001\u3002*]|-\s)[*\"'`)\]]*\s*(.*)", re.DOTALL
)
_NEXT_LETTER = re.compile(r"(?:and|or|&|/)?\s*[(\"'*]*[A-Z](?![A-Za-z0-9'])", re.IGNORECASE)
_NEGATION = re.compile(
    r"(?:\bnot|n't|\bneither|\bnor|\brather than|\binstead of|\bexcept|\u4e0d\u662f|\u5e76\u975e)"
    r"\s+(?:an?\s+|the\s+)?(?:option\s+)?[\"'`*(]*\Z|(?:\u4e0d\u662f|\u5e76\u975e)\Z",
    re.IGNORECASE,
)
_SIGNS = ("-", "+", "$")
_IN_NUMBERS = (".", ",", "/")
_WINDOW = 60
"""Characters before a claim in which words that state or negate it are looked for."""

_LETTER_GOES_ON = frozenset(
    "is was would seems looks fits matches because as since and or for in due shows describes represents".split()
)


def read_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """Letter of the one option that `answer` claims, or None. `options` maps capital letters to non-empty texts."""
    text = fold(strip_special_tokens(answer))
    options = {letter: fold(option) for letter, option in options.items()}
    if not text or _NO_ANSWER.search(text):
        return None
    whole = text.strip(_OUTER_MARKS)
    if len(whole) == 1 and whole.upper() in options and whole.isascii():
        return whole.upper()
    equal = [letter for letter, option in options.items() if _same(text, option)]
    if len(equal) == 1:
        return equal[0]

    texts, covered = _text_claims(text, options)
    letters = _letter_claims(text, options, covered)
    stated = {letter for letter, is_stated in letters if is_stated} | _lower_case_claim(text, options)
    leading, enumerates = _leading_claim(text, options)
    if enumerates:
        return None
    if leading:
        stated.add(leading)
    for claims in (stated, {letter for letter, _ in letters}, texts):
        if claims:
            return claims.pop() if len(claims) == 1 else None
    return None


def _same(answer: str, option: str) -> bool:
    return answer.casefold() == option.casefold() or _bare(answer) == _bare(option) != ""


def _bare(text: str) -> str:
    return text.strip(_TEXT_MARKS).casefold()


def _letter_claims(text: str, options: Mapping[str, str], covered: bytearray) -> list[tuple[str, bool]]:
    """Option letters that stand alone and are meant as letters, with whether words such as "answer is" state them."""
    claims = []
    for match in _LETTER.finditer(text):
        letter, start = match[1], match.start()
        if letter not in options or covered[start] or _is_word_not_letter(text, match.end(), letter, options):
            continue
        if not _ends_with(_NEGATION, text, start):
            claims.append((letter, _ends_with(_STATING, text, start)))
    return claims


def _ends_with(pattern: re.Pattern, text: str, end: int) -> bool:
    """True when the words just before `end` match a pattern that is anchored there."""
    return pattern.search(text, max(0, end - _WINDOW), end) is not None


def _is_word_not_letter(text: str, end: int, letter: str, options: Mapping[str, str]) -> bool:
    """True for the article "A" and the pronoun "I": a word that cannot follow a letter comes next."""
    if letter not in ("A", "I") or text[end : end + 1] != " ":
        return False
    rest = text[end + 1 :]
    word = re.match(r"[\w%$.-]*", rest)[0]
    if word.casefold() in _LETTER_GOES_ON or not word:
        return False
    if letter == "A" and any(_starts_with(rest, option) for option in options.values()):
        return True
    return word[0].islower() or word[0].isdigit() or is_cjk(word[0])


def _starts_with(text: str, option: str) -> bool:
    begin = text[: len(option)]
    return begin.casefold() == option.casefold() and _is_whole(text, 0, len(begin))


def _lower_case_claim(text: str, options: Mapping[str, str]) -> set[str]:
    match = _LOWER_STATED.search(text)
    return {match[1].upper()} & set(options) if match else set()


def _leading_claim(text: str, options: Mapping[str, str]) -> tuple[str | None, bool]:
    """The letter that the answer begins with ("B. text", "(B) text"), and whether it begins a list of letters."""
    match = _LEADING.match(text)
    if match is None or match[1].upper() not in options:
        return None, False
    letter, mark, rest = match[1].upper(), match[2], match[3]
    if match[1].islower() and mark not in ".:)]":
        return None, False
    if _same(rest, options[letter]):
        return letter, False
    following = _NEXT_LETTER.match(rest)
    if following and following[0][-1].upper() in options and following[0][-1].upper() != letter:
        is_article = _is_word_not_letter(rest, following.end(), following[0][-1], options)
        return None, not is_article
    return letter, False


def _text_claims(text: str, options: Mapping[str, str]) -> tuple[set[str], bytearray]:
    """Letters of the options whose texts occur as whole words, are not negated and not part of a longer option text;
    and for every character whether an option text of more than one character covers it."""
    lowered = _lower(text)
    covered = bytearray(len(text))
    claims = set()
    by_length: dict[int, list[tuple[str, str]]] = {}
    for letter, option in filter(lambda item: item[1], options.items()):
        by_length.setdefault(len(option), []).append((letter, _lower(option)))
    for length in sorted(by_length, reverse=True):
        found = [
            (letter, match.start())
            for letter, option in by_length[length]
            for match in re.finditer(re.escape(option), lowered)
            if not any(covered[match.start() : match.end()]) and _is_whole(lowered, match.start(), match.end())
        ]
        for letter, start in found:
            if length > 1:
                covered[start : start + length] = b"\1" * length
            if not _ends_with(_NEGATION, text, start):
                claims.add(letter)
    return claims, covered


def _lower(text: str) -> str:
    """Lower case without changing the length, so that positions stay valid."""
    return "".join(lower if len(lower := character.lower()) == 1 else character for character in text)


def _is_whole(text: str, start: int, end: int) -> bool:
    """True when text[start:end] is not a part of a longer word or number."""
    before, first = text[max(0, start - 1) : start], text[start]
    last, after = text[end - 1], text[end : end + 1]
    if _joins(before, first) or _joins(last, after):
        return False
    digit_before, digit_after = text[max(0, start - 2) : start - 1].isdigit(), text[end + 1 : end + 2].isdigit()
    goes_on_before = before in _SIGNS or (before in _IN_NUMBERS and digit_before)
    goes_on_after = after == "%" or (after in _IN_NUMBERS and digit_after)
    return not (first.isdigit() and goes_on_before) and not (last.isdigit() and goes_on_after)


def _joins(left: str, right: str) -> bool:
    return _is_word(left) and _is_word(right)


def _is_word(character: str) -> bool:
    return character.isalnum() and not is_cjk(character)
