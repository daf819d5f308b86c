"""A language model that reads the answers which no rule can read, over an OpenAI-compatible HTTP interface.

Every reply is kept in a file, so a second run asks nothing twice. Whatever goes wrong ends the run with an error:
an unreachable judge never turns into a guess.
"""

import hashlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from evaluation.journal import FINGERPRINT_DIGITS
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "judge"
TIMEOUT_SECONDS = 120
MAX_REPLY_BYTES = 2**20
MAX_ANSWER = 4000
"""Characters of an answer that the judge is shown."""
NONE_OF_THEM = "Z"
INSTRUCTION = (
    "You match the answer of a student with the options of a question. Reply with one capital letter and nothing "
    f"else: the letter of the option that the answer claims, or {NONE_OF_THEM} if it claims none or several of them.\n"
    "Question: {question}\nOptions:\n{options}\nAnswer of the student: {answer}\nLetter:"
)


class HttpJudge:
    """evaluation.judge_protocol.Judge over POST <url>/chat/completions, greedy."""

    def __init__(self, url: str, cache: Path, *, model: str = DEFAULT_MODEL, key: str | None = None):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise DataError(f"the judge is {url!r}; expected an address that begins with http:// or https://.")
        self._url, self._model, self._key = url.rstrip("/"), model, key
        self._cache_path = cache
        self._cache = self._read_cache()
        self.asked = 0

    def pick(self, question: str, options: Mapping[str, str], answer: str) -> str | None:
        """Letter of the option that the answer claims, or None.

        Raises DataError when the judge cannot be reached or replies with anything but a letter.
        """
        prompt = INSTRUCTION.format(
            question=question,
            options="\n".join(f"{letter}. {text}" for letter, text in options.items()),
            answer=answer[:MAX_ANSWER],
        )
        name = hashlib.sha256(json.dumps([self._url, self._model, prompt]).encode()).hexdigest()[
            : 2 * FINGERPRINT_DIGITS
        ]
        reply = self._cache.get(name)
        if reply is None:
            reply = self._ask(prompt).strip().strip(".()*\"'").upper()
            if reply != NONE_OF_THEM and reply not in options:
                raise DataError(
                    f"the judge {self._model} at {self._url} replied {reply[:60]!r}; expected one of "
                    f"{', '.join(options)} or {NONE_OF_THEM}. Use a model that follows instructions."
                )
            self._keep(name, reply)
        return None if reply == NONE_OF_THEM else reply

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self._model,
            "temperature": 0,
            "max_tokens": 8,
            "messages": [{"role": "user", "content": prompt}],
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{self._url}/chat/completions", json.dumps(body).encode(), headers)
        self.asked += 1
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                reply = json.loads(response.read(MAX_REPLY_BYTES))
            return str(reply["choices"][0]["message"]["content"])
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DataError(
                f"the judge at {self._url} cannot be asked: {error}. Answers and replies so far are kept; start it and "
                "run again, or leave out --judge."
            ) from error
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"the judge at {self._url} sent no choices[0].message.content; expected an OpenAI-compatible server."
            ) from error

    def _read_cache(self) -> dict[str, str]:
        if not self._cache_path.is_file():
            return {}
        replies = {}
        *lines, rest = self._cache_path.read_bytes().split(b"\n")
        if rest:
            logger.warning("%s: the last line is unfinished (a run was cut off); it is asked again", self._cache_path)
            os.truncate(self._cache_path, self._cache_path.stat().st_size - len(rest))
        for number, line in enumerate(lines, start=1):
            try:
                name, reply = json.loads(line)
                replies[name] = reply
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{self._cache_path}, line {number} is damaged: {error}. Remove that line; it is asked again."
                ) from error
        return replies

    def _keep(self, name: str, reply: str) -> None:
        self._cache[name] = reply
        try:
            self._cache_path.parent.mkdir(parents=True, exist_ok=True)
            with self._cache_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, reply]) + "\n")
        except OSError as error:
            raise DataError(f"cannot write {self._cache_path}: {error.strerror}; make room and run again.") from error
