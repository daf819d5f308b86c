"""Agreement with ten people's answers (VQA, Antol et al., ICCV 2015; TextVQA, Singh et al., CVPR 2019).

The normalisers are those of the VQA evaluation code, of LLaVA's copy for TextVQA (m4c) and of VLMEvalKit, each with its
habits, and a strict one that follows the text of the VQA evaluation page.
"""

import math
import re
from collections.abc import Callable, Sequence

from evaluation.scorers.cells import kit_answers, strict_answers
from evaluation.scorers.text import strip_special_tokens

MARKS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(["a", "an", "the"])
NUMBER_WORDS = dict(
    zip("none zero one two three four five six seven eight nine ten".split(), [0, *range(11)], strict=True)
)
_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
"""Contracted words of the VQA evaluation code; each is found with one of its apostrophes missing."""


def _without_one_apostrophe(form: str) -> list[str]:
    return [form[:i] + form[i + 1 :] for i, character in enumerate(form) if character == "'"]


CONTRACTIONS = {key: form for form in _FORMS for key in _without_one_apostrophe(form)} | {"somebody'd": "somebodyd"}
_STRICT_CONTRACTIONS = {key: form for key, form in CONTRACTIONS.items() if key != "somebody'd"} | {
    key: form for form in ("i'm", "i've", "i'd've") for key in _without_one_apostrophe(form)
}
M4C_ANSWERS = 10
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_KIT_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_VQA_PERIOD = re.compile(r"\.(?!\d)")
_STRICT_PERIOD = re.compile(r"\.(?!\d)|(?<=[^\W\d_])\.")
_MAX_PERIODS = 32
"""Periods that are removed: re.UNICODE, which is 32, stands where the count belongs in the public code."""


def kit_normalise(text: str) -> str:
    """VLMEvalKit's normaliser; a period beside a digit is kept."""
    return _words(remove_marks(_one_line(text)), CONTRACTIONS)


def m4c_normalise(text: str) -> str:
    """LLaVA's TextVQA normaliser (m4c): lower case, no commas and question marks, " 's" is a word of its own."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(remove_marks(_one_line(text), _VQA_PERIOD), CONTRACTIONS)


def official_normalise(text: str) -> str:
    """The VQA evaluation code's normaliser."""
    return _words(remove_marks(_one_line(text), _VQA_PERIOD), CONTRACTIONS)


def strict_normalise(text: str) -> str:
    """The text of the VQA evaluation page: thousands commas and periods go, every other mark becomes a space."""
    text = re.sub(r"(?<=\d),(?=\d)", "", strip_special_tokens(text).lower())
    text = _STRICT_PERIOD.sub("", text)
    return _words(text.translate(str.maketrans(MARKS, " " * len(MARKS))), _STRICT_CONTRACTIONS)


def remove_marks(text: str, period: re.Pattern = _KIT_PERIOD) -> str:
    """The shared rule of the public normalisers: one test on the whole text says whether a mark goes or is a space."""
    deletes_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    found = text
    for mark in MARKS:
        deletes = deletes_all or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if deletes else " ")
    return period.sub("", found, count=_MAX_PERIODS)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _words(text: str, contractions: dict[str, str]) -> str:
    words = (str(NUMBER_WORDS.get(word, word)) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def kit_matches(answer: str, prediction: str) -> list[float]:
    """VLMEvalKit: per accepted answer, min(1, equal ones among the others / 3). The score is their mean."""
    return _agreement([str(gold) for gold in kit_answers(answer)], prediction, kit_normalise)


def kit_score(answer: str, prediction: str) -> float:
    """Mean of kit_matches, nan for an empty list."""
    matches = kit_matches(answer, prediction)
    return sum(matches) / len(matches) if matches else math.nan


def m4c_score(answers: Sequence[str], prediction: str) -> float:
    """LLaVA's TextVQA score of one question with its ten answers. Raises ValueError for another number of them."""
    if len(answers) != M4C_ANSWERS:
        raise ValueError(f"found {len(answers)} answers; TextVQA's scorer expects {M4C_ANSWERS} for each question.")
    matches = _agreement(answers, prediction, m4c_normalise)
    return sum(matches) / len(matches)


def _agreement(answers: Sequence[str], prediction: str, normalise: Callable[[str], str]) -> list[float]:
    golds, given = [normalise(gold) for gold in answers], normalise(prediction)
    total = golds.count(given)
    return [min(1.0, (total - (gold == given)) / 3) for gold in golds]


def strict_score(answer: str, prediction: str) -> float:
    """Strict normaliser; the divisor is min(3, n - 1) for n accepted answers, and one answer is right or not."""
    return strict_agreement(strict_answers(answer), prediction)


def strict_agreement(answers: Sequence[str], prediction: str) -> float:
    """As strict_score, for a list of accepted answers."""
    golds, given = [strict_normalise(gold) for gold in answers], strict_normalise(prediction)
    if len(golds) == 1:
        return float(golds[0] == given)
    total, divisor = golds.count(given), min(3, len(golds) - 1)
    return sum(min(1.0, (total - (gold == given)) / divisor) for gold in golds) / len(golds)
