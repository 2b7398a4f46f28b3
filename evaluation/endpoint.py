"""A language model behind an OpenAI-compatible endpoint; every retry and failure is counted."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from tqdm import tqdm

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# A wrong key, no money, no permission, no such model or path: other prompts would fare no better.
HOPELESS_STATUS = frozenset({401, 402, 403, 404})
# So many prompts in a row without an answer, each after all its tries, mean that the endpoint has failed.
FAILURES_THAT_END_IT = 10


class EndpointError(RuntimeError):
    """An endpoint gave no usable answer, after all retries or for a reason that a retry cannot mend.

    `reason` is that in a few words, to be counted.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class Endpoint:
    """`url` ends where the paths /chat/completions and /completions begin, mostly in /v1.

    With `chat` the prompt is a user's message, else plain text to continue. The key, if one is needed, is
    read from the environment variable `key_variable` and never stored. `retries` counts what was asked
    again and why. `given_up` says why nothing more is asked: what other prompts would meet as well, or
    FAILURES_THAT_END_IT failures in a row.
    """

    url: str
    model: str
    chat: bool = True
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = 120.0
    attempts: int = 5
    first_pause_seconds: float = 1.0
    retries: Counter[str] = field(default_factory=Counter)
    given_up: EndpointError | None = None
    _failures_in_a_row: int = field(default=0, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    def complete(
        self,
        prompt: str,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """The model's answer to one prompt.

        Raises:
            EndpointError: if no answer with text in it came after `attempts` tries, or the endpoint refuses,
                or it was given up.
        """
        if self.given_up:
            raise EndpointError(str(self.given_up), self.given_up.reason)
        body = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        body |= {} if top_p is None else {"top_p": top_p}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        try:
            answer = self._ask(body)
        except EndpointError as error:
            with self._lock:
                self._failures_in_a_row += 1
                if self._failures_in_a_row >= FAILURES_THAT_END_IT:
                    self.given_up = self.given_up or error
            raise
        self._failures_in_a_row = 0
        return answer

    def complete_all(
        self, prompts: Sequence[str], *, concurrency: int = 8, progress: str = "", **options
    ) -> list[str | EndpointError]:
        """One answer per prompt, in order; where there was none, the error stands in its place.

        `progress` names a bar on the terminal; without a name there is none.
        """

        def ask(prompt: str) -> str | EndpointError:
            try:
                return self.complete(prompt, **options)
            except EndpointError as error:
                return error

        with ThreadPoolExecutor(concurrency) as pool:
            answers = pool.map(ask, prompts)
            return list(tqdm(answers, desc=progress, total=len(prompts), disable=not progress))

    def _ask(self, body: dict[str, Any]) -> str:
        pause, reason = self.first_pause_seconds, ""
        for attempt in range(self.attempts):
            if attempt:
                with self._lock:
                    self.retries[reason] += 1
                time.sleep(pause)
                pause *= 2
            try:
                choice = self._post(body)["choices"][0]
                text = choice["message"]["content"] if self.chat else choice["text"]
                if isinstance(text, str) and text.strip():
                    return text
                reason = "empty answer"
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code not in RETRIED_STATUS:
                    message = f"{self.url} refused the request with {reason}: {_detail(error)}"
                    refusal = EndpointError(message, reason)
                    if error.code in HOPELESS_STATUS:
                        self.given_up = refusal
                    raise refusal from error
                pause = max(pause, _seconds(error.headers.get("Retry-After")))
            except http.client.InvalidURL as error:
                self.given_up = EndpointError(f"{self.url!r} is no http(s) address: {error}", "no address")
                raise self.given_up from error
            except TimeoutError:
                reason = f"no answer within {self.timeout_seconds:g} s"
            except (urllib.error.URLError, ConnectionError) as error:
                timed_out = isinstance(getattr(error, "reason", None), TimeoutError)
                reason = (
                    f"no answer within {self.timeout_seconds:g} s"
                    if timed_out
                    else f"no connection ({error})"
                )
            except (http.client.HTTPException, ValueError, KeyError, IndexError, TypeError):
                reason = "malformed answer"  # cut short, not HTTP, not JSON, or other JSON
        raise EndpointError(
            f"{self.url} gave no usable answer in {self.attempts} attempts; the last: {reason}", reason
        )

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.url.startswith(("http://", "https://")) or not self.url.isascii():
            raise http.client.InvalidURL("http:// or https:// and ASCII letters are needed")
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        path = "/chat/completions" if self.chat else "/completions"
        request = urllib.request.Request(
            self.url.rstrip("/") + path, data=json.dumps(body).encode(), headers=headers
        )
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
            return json.loads(response.read())


def _detail(error: urllib.error.HTTPError) -> str:
    """The beginning of what a refusal says, as far as it arrives."""
    try:
        return error.read(300).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return "(the rest did not arrive)"


def _seconds(header: str | None) -> float:
    """A Retry-After header's seconds, at most a minute; 0 for a date or nothing."""
    try:
        return min(60.0, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0
