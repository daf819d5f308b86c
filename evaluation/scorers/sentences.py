"""Sentences of a description, what a judge says of each, and repetition: the rules of SHR (Zhao et al., 2023)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HALLUCINATION, CORRECT, CANNOT_JUDGE = LABELS = ("hallucination", "correct", "cannot judge")
MARK = "Judgement"
"""The word behind which a judge's verdicts stand."""
NGRAMS = (1, 2, 3, 4)
_REMOVED = str.maketrans("", "", ".:\n?,")
_VERDICT = re.compile(rf"\W*(\d+)[.):]\W*({'|'.join(LABELS)})\b", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """What stands between points, without repetitions and without sentences that an earlier one contains."""
    found: list[str] = []
    for part in text.split("."):
        part = part.strip()
        if part and not any(part in earlier for earlier in found):
            found.append(part)
    return found


def words(sentence: str) -> int:
    """Words of a sentence: what stands between single spaces."""
    return len(sentence.split(" "))


def strict_labels(reply: str, count: int) -> list[str] | None:
    """A judge's label of each of `count` sentences: one numbered line for each, in any order. None for any other
    reply."""
    found = [match for line in reply.splitlines() if (match := _VERDICT.match(line))]
    labels = {int(match[1]): match[2].lower() for match in found}
    if len(found) != count or set(labels) != set(range(1, count + 1)):
        return None
    return [labels[number] for number in range(1, count + 1)]


def compat_labels(reply: str, count: int) -> list[str] | None:
    """HA-DPO's reading: of each line behind the mark the text between its first word and its first colon. None where
    there are not just as many lines as sentences; a text that is none of LABELS says nothing of its sentence."""
    lines = [line for line in reply.split("\n") if line]
    start = next((number for number, line in enumerate(lines) if f"{MARK}:" in line), None)
    if start is None:
        return None
    verdicts = [line.partition(" ")[2].strip() for line in lines[start + 1 :]]
    labels = [verdict.partition(":")[0].lower() for verdict in verdicts if verdict]
    return labels if len(labels) == count else None


def distinct_share(text: str, length: int) -> float | None:
    """Distinct runs of `length` words / all of them; None for a text that is shorter."""
    found = text.translate(_REMOVED).split()
    runs = [tuple(found[start : start + length]) for start in range(len(found) - length + 1)]
    return len(set(runs)) / len(runs) if runs else None


@dataclass(frozen=True)
class JudgedText:
    """The sentences of a description with their labels; None where a judge gave none that can be read."""

    sentences: Sequence[str]
    labels: Sequence[str] | None

    def counts(self) -> dict[str, int]:
        """Sentences and words: all, of those with a label, of the hallucinated ones."""
        pairs = () if self.labels is None else zip(self.sentences, self.labels, strict=True)
        labelled = [pair for pair in pairs if pair[1] in LABELS]
        wrong = [sentence for sentence, label in labelled if label == HALLUCINATION]
        return {
            "sentences": len(self.sentences),
            "words": sum(map(words, self.sentences)),
            "labelled_sentences": len(labelled),
            "labelled_words": sum(words(sentence) for sentence, _ in labelled),
            "hal_sentences": len(wrong),
            "hal_words": sum(map(words, wrong)),
        }


def rates(texts: Sequence[JudgedText]) -> dict[str, float]:
    """SHR's numbers under HA-DPO's names: averages per image, and hallucinated / labelled over all images. nan for
    0 / 0."""
    counts = [text.counts() for text in texts]
    total: Mapping[str, int] = {key: sum(one[key] for one in counts) for key in JudgedText((), ()).counts()}
    images = len(texts)
    return {
        "num_images": images,
        "sents_per_image": _share(total["sentences"], images),
        "words_per_image": _share(total["words"], images),
        "hal_sents_per_image": _share(total["hal_sentences"], images),
        "hal_words_per_image": _share(total["hal_words"], images),
        "hal_sents_ratio": _share(total["hal_sentences"], total["labelled_sentences"]),
        "hal_words_ratio": _share(total["hal_words"], total["labelled_words"]),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
