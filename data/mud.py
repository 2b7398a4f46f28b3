"""MUD world files: rooms, as one document each. The largest public source of prose about dungeons.

Two families share an ancestor (DikuMUD, 1990): CircleMUD and DikuMUD keep rooms in `.wld` files of their own;
ROM, SMAUG and their kin keep a whole area in one `.are` file, whose rooms follow the line `#ROOMS`. In both,
a room is

    #<number>
    <title>~
    <description, several lines>
    ~

and then exits and the like, which hold no prose of interest and are left out. A room becomes
"Title\\n\\nDescription".
"""

from __future__ import annotations

import re
from collections.abc import Iterator

ROOM = re.compile(r"^#(\d+)[ \t]*\n([^~]*)~[ \t]*\n?([^~]*)~", re.MULTILINE)
# `&r`, `&x` (SMAUG, CircleMUD's patches), `{r`, `{x` (ROM), `@r`, `@n` (tbaMUD), `^r`: one letter after the
# sign.
COLOUR = re.compile(
    r"&&|\{\{|@@|&[a-zA-Z0-9](?![a-z]*;)|\{[a-zA-Z0-9*/!-]|@[a-zA-Z](?=\W|[A-Z])|\x1b\[[0-9;]*m"
)
SECTION = re.compile(r"^#(?!\d)[A-Z$]*.*$", re.MULTILINE)
MIN_DESCRIPTION_WORDS = 8


def room_texts(content: str, area: bool) -> Iterator[tuple[int, str]]:
    """(number, text) of every room with a description; `area` for `.are` files, where rooms are one
    section.
    """
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    if area:
        start = re.search(r"^#ROOMS\b.*\n", content, re.MULTILINE)
        if start is None:
            return
        content = content[start.end() :]
        end = SECTION.search(content)
        content = content[: end.start()] if end else content
    for match in ROOM.finditer(content):
        title = " ".join(without_colours(match[2]).split())
        description = tidy(without_colours(match[3]))
        if len(description.split()) >= MIN_DESCRIPTION_WORDS:
            yield int(match[1]), f"{title}\n\n{description}\n"


def without_colours(text: str) -> str:
    return COLOUR.sub(lambda code: code[0][0] if code[0] in ("&&", "{{", "@@") else "", text)


def tidy(description: str) -> str:
    """Lines broken for an 80-column terminal become paragraphs; a leading indent or blank line starts a new
    one.
    """
    paragraphs: list[list[str]] = [[]]
    for line in description.split("\n"):
        if not line.strip():
            paragraphs.append([])
            continue
        if line.startswith("  ") and paragraphs[-1] and paragraphs[-1][-1].endswith((".", "!", "?", '"')):
            paragraphs.append([])
        paragraphs[-1].append(line.strip())
    return "\n\n".join(" ".join(" ".join(lines).split()) for lines in paragraphs if lines)
