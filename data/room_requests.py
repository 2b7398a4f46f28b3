"""What a large model is asked to write, and whether its answer will do."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.corpora.dungeons.check import FUNCTION_WORDS, split_of, stem, words
from data.dungeons import Dungeon, build_prompt
from data.loader import permuted

FEWEST_WORDS, MOST_WORDS = 40, 180
# Two texts that share so many words in a row are one text and its echo.
SHARED_RUN_WORDS = 10
LONGEST_TITLE_WORDS = 9
INSTRUCTIONS = (
    "Write one room for a tabletop role-playing game, for the game master to read to the players. Between "
    "60 and 130 words, in the second person or none. Concrete and playable: something to see, something to "
    "touch, something to fear or to want. Mention every feature, exit and inhabitant that is asked for. No "
    "names from published worlds, no advice, no rules, no headings. Answer with a title on the first line, "
    "an empty line, and the description; nothing else."
)
# A model that talks about its task instead of doing it. In rooms, too, something is here and people cannot do
# things: most of it counts only where an answer begins, or with what models go on to say.
META_TALK = re.compile(
    r"\A\W*(sure|certainly|of course|absolutely)[,!.:]|"
    r"\A\W*(i cannot|i can[’']t|i[’']m (sorry|unable)|i am (sorry|unable)|i apologi[sz]e|unfortunately, i)\b|"
    r"\bi (cannot|can[’']t|am unable to|won[’']t) (write|create|provide|generate|assist|fulfil)|"
    r"\bas an ai\b|\blanguage model\b|"
    r"\bhere(’s|'s| is) (a|an|the|your)\b[^.!?:]{0,60}\b(room|description|entry|response)\b|"
    r"\bword count\W|\b(your|this) (prompt|request)\b|\blet me know (if|whether|what)\b|"
    r"\bhope (this|that) helps\b|\*\*|^#|<\|",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Request:
    """One room to be written; `id` and `fields` are a function of (seed, number)."""

    id: str
    fields: dict[str, str | list[str]]
    messages: list[dict[str, str]] = field(default_factory=list)


def requests(rooms: Sequence[Dungeon], count: int, seed: int) -> Iterator[Request]:
    """The first `count` points of a grid over settings and places of `rooms`, shuffled by the seed.

    Mood, features, exits and inhabitants come from rooms of that setting, each from another one. Settings and
    pairs that the bundled dataset holds out are not asked for.

    Raises:
        ValueError: if no room has a setting, a place and features.
    """
    complete = [room.fields for room in rooms if {"setting", "place", "features"} <= room.fields.keys()]
    settings, places = (sorted({str(fields[name]) for fields in complete}) for name in ("setting", "place"))
    grid = [(s, p) for s in settings for p in places if split_of(s, p) == "train"]
    if not grid:
        raise ValueError("no room has a setting, a place and features, of which a grid could be made")
    for number in range(count):
        setting, place = grid[permuted(number, len(grid), seed)]
        randomness = random.Random(f"{seed} {number}")
        alike = [fields for fields in complete if fields["setting"] == setting]

        def some(
            name: str, most: int, alike: list = alike, randomness: random.Random = randomness
        ) -> list[str]:
            pool = sorted({item for fields in alike for item in _listed(fields.get(name))})
            return randomness.sample(pool, min(len(pool), randomness.randint(1, most)))

        fields: dict[str, Any] = {"setting": setting, "place": place}
        fields["mood"] = str(randomness.choice(alike).get("mood") or "calm")
        fields["features"] = some("features", 3)
        for name in ("exits", "inhabitants"):
            if randomness.random() < 0.5 and (found := some(name, 1)):
                fields[name] = found
        asked = build_prompt(**fields).removesuffix("Description:").strip()
        message = {"role": "user", "content": f"{INSTRUCTIONS}\n\n{asked}"}
        yield Request(f"{seed}-{number}", fields, [message])


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def split_answer(answer: str) -> tuple[str, str]:
    """(title or "", description) of an answer, without the quotation marks and labels that models add."""
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
    title = ""
    if (
        len(lines) > 1
        and len(lines[0].split()) <= LONGEST_TITLE_WORDS
        and not lines[0].endswith((".", "!", "?"))
    ):
        title = re.sub(r"^(title\s*:)", "", lines.pop(0).strip('"“”*# '), flags=re.IGNORECASE).strip()
    text = " ".join(lines)
    return title, re.sub(r"^description\s*:\s*", "", text, flags=re.IGNORECASE).strip()


def what_is_wrong(description: str, fields: Mapping[str, Any], title: str = "") -> str:
    """Why a description will not do, in a few words that can be counted; "" if it will.

    Features, exits and inhabitants are there if all words that carry them are, whatever their endings; of
    three and more one may be another.
    """
    length = len(description.split())
    if META_TALK.search(description) or META_TALK.search(title):
        return "refusal or talk about the task"
    if not FEWEST_WORDS <= length <= MOST_WORDS:
        return "too short" if length < FEWEST_WORDS else "too long"
    if description[-1] not in ".!?…\"”'’)":
        return "cut off"
    stems = {stem(word) for word in words(description)}
    for name in ("features", "exits", "inhabitants"):
        for item in fields.get(name, ()):
            asked = {stem(word) for word in words(item) if word not in FUNCTION_WORDS}
            if len(asked - stems) > (len(asked) > 2):
                return f"{name} not mentioned"
    return ""


class Seen:
    """Descriptions met so far; finds one that shares SHARED_RUN_WORDS words in a row with any of them."""

    def __init__(self, descriptions: Sequence[str] = ()):
        self._runs: set[int] = set()
        for description in descriptions:
            self.add(description)

    @staticmethod
    def _runs_of(description: str) -> set[int]:
        text = words(description)
        last = max(1, len(text) - SHARED_RUN_WORDS + 1)
        return {hash(tuple(text[i : i + SHARED_RUN_WORDS])) for i in range(last)}

    def has(self, description: str) -> bool:
        return not self._runs.isdisjoint(self._runs_of(description))

    def add(self, description: str) -> None:
        self._runs |= self._runs_of(description)
