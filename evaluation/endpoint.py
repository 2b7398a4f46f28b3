"""A language model behind an OpenAI-compatible endpoint; every retry and failure is counted."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class EndpointError(RuntimeError):
    """An endpoint gave no usable answer, after all retries or for a reason that a retry cannot mend."""


@dataclass
class Endpoint:
    """`url` ends where the paths /chat/completions and /completions begin, mostly in /v1.

    With `chat` the prompt is a user's message, else plain text to continue. The key, if one is needed, is
    read from the environment variable `key_variable` and never stored. `retries` counts what was asked
    again and why.
    """

    url: str
    model: str
    chat: bool = True
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = 120.0
    attempts: int = 5
    first_pause_seconds: float = 1.0
    retries: dict[str, int] = field(default_factory=dict)
    _lock: Any = field(default_factory=Lock, repr=False)

    def complete(self, prompt: str, *, max_tokens: int, temperature: float = 1.0, seed: int = 0) -> str:
        """The model's answer to one prompt.

        Raises:
            EndpointError: if no answer with text in it came after `attempts` tries, or the endpoint refuses.
        """
        body = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        pause, reason = self.first_pause_seconds, ""
        for attempt in range(self.attempts):
            if attempt:
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
                    detail = error.read(300).decode("utf-8", "replace")
                    raise EndpointError(f"{self.url} refused the request with {reason}: {detail}") from error
                pause = max(pause, _seconds(error.headers.get("Retry-After")))
            except TimeoutError:
                reason = f"no answer within {self.timeout_seconds:g} s"
            except (urllib.error.URLError, ConnectionError) as error:
                timed_out = isinstance(getattr(error, "reason", None), TimeoutError)
                reason = (
                    f"no answer within {self.timeout_seconds:g} s"
                    if timed_out
                    else f"no connection ({error})"
                )
            except (ValueError, KeyError, IndexError, TypeError):
                reason = "malformed answer"
            with self._lock:
                self.retries[reason] = self.retries.get(reason, 0) + 1
        raise EndpointError(
            f"{self.url} gave no usable answer in {self.attempts} attempts; the last: {reason}"
        )

    def complete_all(
        self, prompts: Sequence[str], *, concurrency: int = 8, **options
    ) -> list[str | EndpointError]:
        """One answer per prompt, in order; where there was none, the error stands in its place."""

        def ask(prompt: str) -> str | EndpointError:
            try:
                return self.complete(prompt, **options)
            except EndpointError as error:
                return error

        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(ask, prompts))

    def write(self, prompts: Sequence[str], **options) -> tuple[list[str], dict[str, Any]]:
        """A text for each prompt, empty where there was no answer, and how many failed and were asked again.

        Raises:
            EndpointError: if no prompt at all was answered.
        """
        answers = self.complete_all(prompts, **options)
        failures = [answer for answer in answers if isinstance(answer, EndpointError)]
        if len(failures) == len(prompts):
            raise EndpointError(f"{self.model} answered none of {len(prompts)} prompts: {failures[0]}")
        if failures:
            print(f"  {len(failures)} of {len(prompts)} failed, now empty texts; the first: {failures[0]}")
        texts = ["" if isinstance(answer, EndpointError) else answer for answer in answers]
        return texts, {"failed": len(failures), "retries": self.retries}

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(f"{self.url!r} is no http(s) address")
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        path = "/chat/completions" if self.chat else "/completions"
        request = urllib.request.Request(
            self.url.rstrip("/") + path, data=json.dumps(body).encode(), headers=headers
        )
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
            return json.loads(response.read())


def _seconds(header: str | None) -> float:
    """A Retry-After header's seconds, at most a minute; 0 for a date or nothing."""
    try:
        return min(60.0, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0
