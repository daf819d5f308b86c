"""A language model that reads the answers which no rule can read, over an OpenAI-compatible HTTP interface.

Every reply is kept in a file, so a second run asks nothing twice. A judge that cannot be reached is asked again after a
while, and then ends the run with an error: it never turns into a guess.
"""

import hashlib
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evaluation.journal import FINGERPRINT_DIGITS
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "judge"
TIMEOUT_SECONDS = 120
WAITS = (1.0, 5.0, 20.0)
"""Seconds before a judge that cannot be reached, or is too busy, is asked again."""
TEMPERATURES = (0.0, 0.5, 0.5)
"""Of the first request, and of those that follow a reply that cannot be read: greedily it would come again."""
BUSY = frozenset([408, 409, 425, 429, 500, 502, 503, 504])
"""HTTP statuses that may be others a while later."""
TOO_LONG = frozenset([400, 413, 422])
"""HTTP statuses that speak of this prompt alone, such as one beyond the judge's context."""
MAX_REPLY_BYTES = 2**20
MAX_ANSWER = 4000
"""Characters of an answer that the judge is shown."""
LETTER_TOKENS = 8
VERDICT_TOKENS = 2048
"""Tokens of a reply: one letter, or a verdict with its reason on each sentence of a description."""
NONE_OF_THEM = "Z"
INSTRUCTION = (
    "You match the answer of a student with the options of a question. Reply with one capital letter and nothing "
    f"else: the letter of the option that the answer claims, or {NONE_OF_THEM} if it claims none or several of them.\n"
    "Question: {question}\nOptions:\n{options}\nAnswer of the student: {answer}\nLetter:"
)


class HttpJudge:
    """evaluation.judge_protocol.Judge and SentenceJudge over POST <url>/chat/completions."""

    def __init__(
        self,
        url: str,
        cache: Path,
        *,
        model: str = DEFAULT_MODEL,
        key: str | None = None,
        waits: Sequence[float] = WAITS,
    ):
        """`key` goes to the address in a header, and nowhere else. Raises DataError for another kind of address, a key
        that no header can hold, or a damaged `cache`."""
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise DataError(f"the judge is {url!r}; expected an address that begins with http:// or https://.")
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise DataError(
                "the judge's key holds spaces, line ends or letters outside ASCII (it is not shown); expected one word."
            )
        self._url, self._model, self._key, self._waits = url.rstrip("/"), model, key, tuple(waits)
        self._opener = urllib.request.build_opener(NoRedirect)
        self._cache_path = cache
        self._cache = self._read_cache()
        self._unread: dict[str, str] = {}
        self.asked = 0

    def pick(self, question: str, options: Mapping[str, str], answer: str) -> str | None:
        """Letter of the option that the answer claims, or None.

        Raises DataError when the judge cannot be reached or replies with anything but a letter, again and again.
        """
        prompt = INSTRUCTION.format(
            question=question,
            options="\n".join(f"{letter}. {text}" for letter, text in options.items()),
            answer=answer[:MAX_ANSWER],
        )
        reply = self._reply(prompt, LETTER_TOKENS, lambda text: _letter(text) in (*options, NONE_OF_THEM))
        letter = _letter(reply)
        if letter != NONE_OF_THEM and letter not in options:
            raise DataError(
                f"the judge {self._model} at {self._url} replied {letter[:60]!r}; expected one of "
                f"{', '.join(options)} or {NONE_OF_THEM}. Use a model that follows instructions."
            )
        return None if letter == NONE_OF_THEM else letter

    def verdicts(self, image_id: str, sentences: Sequence[str], prompt: str, is_read: Callable[[str], bool]) -> str:
        """The reply to `prompt` (see judge_protocol). Raises DataError when the judge cannot be reached."""
        return self._reply(prompt, VERDICT_TOKENS, is_read)

    def _reply(self, prompt: str, tokens: int, is_read: Callable[[str], bool]) -> str:
        """The kept reply, or a new one, which is kept if `is_read` accepts it. It is the last one of several if it
        accepts none."""
        name = hashlib.sha256(json.dumps([self._url, self._model, prompt]).encode()).hexdigest()
        name = name[: 2 * FINGERPRINT_DIGITS]
        reply = self._cache.get(name)
        if reply is not None and is_read(reply):
            return reply
        if name in self._unread:  # the other mode of scoring has asked
            return self._unread[name]
        for temperature in TEMPERATURES:
            reply = self._ask(prompt, tokens, temperature)
            if is_read(reply):
                self._keep(name, reply)
                return reply
        self._unread[name] = reply
        return reply

    def _ask(self, prompt: str, tokens: int, temperature: float) -> str:
        """One reply; of a server that refuses this prompt, its status and what it says."""
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self._model, "temperature": temperature, "max_tokens": tokens, "messages": messages}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{self._url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            reply = json.loads(self._read(request))
            return self._without_key(str(reply["choices"][0]["message"]["content"]))
        except urllib.error.HTTPError as error:
            said = self._without_key(error.read(MAX_REPLY_BYTES).decode("utf-8", "replace"))
            if error.code in TOO_LONG:
                return f"HTTP {error.code}: {said[:300]}"
            raise self._out_of_reach(f"{error}: {said[:200]}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._out_of_reach(str(error)) from error
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"the judge at {self._url} sent no choices[0].message.content; expected an OpenAI-compatible server."
            ) from error

    def _read(self, request: urllib.request.Request) -> bytes:
        """What the server sends, asked again while it cannot be reached or is busy."""
        for wait in self._waits:
            try:
                return self._read_once(request)
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError) and error.code not in BUSY:
                    raise
                logger.warning("the judge at %s: %s; asked again in %g s", self._url, error, wait)
            time.sleep(wait)
        return self._read_once(request)

    def _read_once(self, request: urllib.request.Request) -> bytes:
        self.asked += 1
        with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            return response.read(MAX_REPLY_BYTES)

    def _out_of_reach(self, reason: str) -> DataError:
        return DataError(
            f"the judge at {self._url} cannot be asked: {reason}. Answers and replies so far are kept; start it and "
            "run again, or leave out --judge."
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

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


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no other address: the key is for the one that was given."""

    def redirect_request(self, *arguments, **more):
        """None: the answer counts as an error."""
        return None


def _letter(reply: str) -> str:
    return reply.strip().strip(".()*\"'").upper()
