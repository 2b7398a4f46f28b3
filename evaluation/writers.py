"""What writers gave for their prompts, kept on disk before anything is made of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.dungeons import CHAT_REQUEST
from evaluation.endpoint import Endpoint, EndpointError


@dataclass(frozen=True)
class Written:
    """One text per prompt, None where the writer could not be reached, and numbers that belong to them."""

    texts: list[str | None]
    numbers: dict[str, Any] = field(default_factory=dict)


def kept(path: Path, asked: Mapping[str, Any]) -> Written | None:
    """The newest texts in `path` of which `keep` was told exactly this; None if there are none."""
    if not path.exists():
        return None
    found = None
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
            if row["asked"] == asked:
                found = Written(row["texts"], row["numbers"])
        except (ValueError, KeyError, TypeError):
            continue  # empty, or cut short by a kill
    return found


def keep(path: Path, asked: Mapping[str, Any], written: Written) -> None:
    """Add a line, handed to the system before this returns. `asked` is all that decides the texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"asked": asked, "texts": written.texts, "numbers": written.numbers})
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")  # a line before it may have been cut short


def write_remotely(
    endpoint: Endpoint, prompts: Sequence[str], sampling: Mapping[str, Any], path: Path
) -> Written:
    """A text for each prompt from a model behind an endpoint; what `path` has already is not asked for again.

    A chat model gets the prompt with CHAT_REQUEST around it. `sampling` has the arguments of
    `Endpoint.complete`.

    Raises:
        EndpointError: if no prompt at all was answered.
    """
    requests = [CHAT_REQUEST.format(prompt=prompt) for prompt in prompts] if endpoint.chat else list(prompts)
    asked = {"writer": endpoint.model, "url": endpoint.url, "requests": requests, **sampling}
    before = kept(path, asked)
    texts: list[str | None] = list(before.texts) if before else [None] * len(requests)
    missing = [number for number, text in enumerate(texts) if text is None]
    answers = endpoint.complete_all([requests[number] for number in missing], progress="answers", **sampling)
    failures = [answer for answer in answers if isinstance(answer, EndpointError)]
    for number, answer in zip(missing, answers, strict=True):
        texts[number] = None if isinstance(answer, EndpointError) else answer
    written = Written(texts, {"retries": dict(endpoint.retries)})
    if len(failures) < len(missing):
        keep(path, asked, written)
    if len(failures) == len(texts):
        raise EndpointError(
            f"{endpoint.model} answered none of {len(texts)} prompts: {failures[0]}", failures[0].reason
        )
    if failures:
        print(
            f"  {len(failures)} of {len(texts)} were not answered; the first: {failures[0]}. They are left "
            "out; the same command asks for them again."
        )
    return written
