"""A judge's replies that are already there: HA-DPO's judgement.json, or that of an earlier run of ours."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.scorers.sentences import split_sentences
from mindspeed_mm.errors import DataError

MAX_FILE_BYTES = 2**30
FORM = '{"run1": {"2316462": {"raw_judgement": "Judgement: ...", "model_response": "A dog runs."}}}'
RESPONSE_KEYS = ("model_response", "mode_response")
"""HA-DPO's two scripts spell it in two ways."""


class RecordedJudge:
    """evaluation.judge_protocol.SentenceJudge that reads a file."""

    def __init__(self, path: str | Path):
        """Raises DataError for a file of another form."""
        self._path = Path(path)
        runs = self._read()
        if not isinstance(runs, Mapping) or len(runs) != 1:
            raise DataError(f"{path} holds {_kind(runs)}; expected one run of verdicts, such as {FORM}.")
        (found,) = runs.values()
        if not isinstance(found, Mapping):
            raise DataError(f"{path} holds {_kind(found)} in its run; expected verdicts by image, such as {FORM}.")
        wrong = [image for image, record in found.items() if not _is_verdict(record)]
        if wrong:
            raise DataError(
                f"{path}, image {wrong[0]}: it has no raw_judgement or no model_response ({len(wrong)} of {len(found)} "
                f"images); expected {FORM}."
            )
        self._verdicts: Mapping[str, Mapping[str, Any]] = found

    def verdicts(
        self, image_id: str, sentences: Sequence[str], prompt: str, is_read: Callable[[str], bool]
    ) -> str | None:
        """The recorded reply; None where there is none for this image. Raises DataError for one to another text."""
        found = self._verdicts.get(image_id)
        if found is None:
            return None
        if split_sentences(_response(found)) != list(sentences):
            raise DataError(
                f"{self._path} judges another description of image {image_id}: {_response(found)!r:.100}. Give the "
                "verdicts on these answers, or a judge that can be asked."
            )
        return found["raw_judgement"]

    def _read(self) -> Any:
        try:
            if self._path.stat().st_size > MAX_FILE_BYTES:
                raise DataError(f"{self._path} is larger than {MAX_FILE_BYTES} bytes; expected a judgement.json.")
            return json.loads(self._path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise DataError(
                f"cannot read the judge {self._path}: {error.strerror}; expected a judgement.json, or an address that "
                "begins with http:// or https://."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._path} is not JSON: {error}; expected a judgement.json such as {FORM}.") from error


def _is_verdict(record: Any) -> bool:
    return isinstance(record, Mapping) and all(
        isinstance(text, str) for text in (_response(record), record.get("raw_judgement"))
    )


def _response(record: Mapping[str, Any]) -> str | None:
    return next((record[key] for key in RESPONSE_KEYS if key in record), None)


def _kind(value: Any) -> str:
    return f"{len(value)} runs" if isinstance(value, Mapping) else f"a {type(value).__name__}"
