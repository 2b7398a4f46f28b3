"""Is the dataset what its card says? `python -m data.corpora.dungeons.check [FOLDER]`; needs only Python.

Prints what is wrong, row by row, then the counts that the card quotes; exits with 1 if anything is.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")
TEXTS = ("title", "setting", "place", "mood", "description")
LISTS = ("features", "exits", "inhabitants")
OPTIONAL = ("exits", "inhabitants")

WORDS_OF_A_DESCRIPTION = (50, 140)
MOST_FEATURES = 3
SHARED_RUN_WORDS = 7  # no two descriptions share so many words in a row …
STOCK_PHRASES: tuple[str, ...] = ()  # … unless these are they
LEAST_VOCABULARY = 8_000
LEAST_SETTINGS = 30
LARGEST_SHARE_OF_A_SETTING = 0.06
LARGEST_SHARE_OF_A_FIRST_WORD = 0.12
LARGEST_SHARE_OF_A_SHAPE = 0.05
LEAST_SHARE_BY_FEATURES = {1: 0.15, 3: 0.25}  # of the rooms, so many at least have one feature, and three
# Cosine of two rooms' words, each weighed by how rare it is: above, they are one idea twice.
LARGEST_LIKENESS = 0.3
COMMON_WORD = 0.1  # of the rooms; words in more of them say nothing of one
SHORT_SENTENCE, LONG_SENTENCE = 7, 18  # words, by which shapes are told apart

# Whole settings that training never sees …
HELD_OUT_SETTINGS = {
    "lighthouse": "test",
    "orcish fortress": "test",
    "salt mine": "validation",
    "alchemist's laboratory": "validation",
}
# … and, of the others, about so many in a hundred pairs of setting and place, for each of the two.
HELD_OUT_PAIRS_PERCENT = 5


def words(text: str) -> list[str]:
    """Lower-case words; an apostrophe inside belongs to the word."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("’", "'"))


# Words that carry nothing of what was asked for.
FUNCTION_WORDS = frozenset(
    words(
        "a an the of in on with and to from by for at its it is as that this into over under out up down off "
        "through near"
    )
)
FIRST_PERSON = re.compile(r"(?<![\w-])(I|I'm|I've|me|my|we|we're|us|our|ours)(?![\w-])")
# "a owl", "an cane". Before u the sound decides, as it does in "a one-armed man" and "an hour".
WRONG_ARTICLE = re.compile(
    r"\ba (?!onc?e\b|eu|ewe|and\b)[aeio]\w+|\ban (?!hour|honest|honour|heir)[bcdfghjklmnpqrstvwyz]\w+",
    re.IGNORECASE,
)
NO_BLANK = re.compile(r"[^\W\d_]{2,}[.,;:!?][^\W\d_]+|[^\W\d_][.!?][”\"][^\W\d_]")
QUOTED = re.compile(r"[\"“][^\"”]*[\"”]|\*[^*]+\*")


def stem(word: str) -> str:
    """Plural and verb endings off, and a last e, which they replace."""
    word = word.replace("'s", "").strip("'")
    for ending in ("ing", "ied", "ies", "ed", "es", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def split_of(setting: str, place: str) -> str:
    """Where a room belongs: held-out settings whole, then pairs of setting and place by their hash."""
    if setting in HELD_OUT_SETTINGS:
        return HELD_OUT_SETTINGS[setting]
    percent = int(hashlib.sha256(f"{setting}/{place}".encode()).hexdigest(), 16) % 100
    held_out = ("test", "validation")
    number = percent // HELD_OUT_PAIRS_PERCENT
    return held_out[number] if number < len(held_out) else "train"


def shape(description: str) -> tuple[str, ...]:
    """How the first four sentences go: short, middling or long each; and how many there are, by threes."""
    sentences = [words(part) for part in re.split(r"(?<=[.!?…])[\"”']?\s+", description) if words(part)]
    lengths = [
        "short" if len(s) <= SHORT_SENTENCE else "long" if len(s) > LONG_SENTENCE else "middling"
        for s in sentences[:4]
    ]
    return (*lengths, str(len(sentences) // 3))


def read_rows(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """(split, where, row) of every line; a row that is no JSON is None."""
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
            try:
                yield split, f"{path.name}:{number}", json.loads(line)
            except json.JSONDecodeError:
                yield split, f"{path.name}:{number}", None


def schema_problems(row: Any) -> Iterator[str]:
    """What keeps a row from being read as the card says."""
    if not isinstance(row, dict):
        yield "is not a JSON object"
        return
    if unknown := sorted(set(row) - {*TEXTS, *LISTS}):
        yield f"has unknown fields: {', '.join(unknown)}"
    for name in TEXTS:
        if not isinstance(row.get(name), str) or not row[name].strip():
            yield f"{name} must be a text, is {row.get(name)!r}"
    for name in LISTS:
        value = row.get(name)
        if name in OPTIONAL and value is None:
            continue
        if not (isinstance(value, list) and value and all(isinstance(v, str) and v.strip() for v in value)):
            yield f"{name} must be a list of texts, is {value!r}"
    if isinstance(row.get("features"), list) and len(row["features"]) > MOST_FEATURES:
        yield f"has {len(row['features'])} features, more than {MOST_FEATURES}"


def text_problems(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one description by itself."""
    description = row["description"]
    length = len(description.split())
    fewest, most = WORDS_OF_A_DESCRIPTION
    if not fewest <= length <= most:
        yield f"has {length} words; {fewest} to {most} are right"
    stems = {stem(word) for word in words(description)}
    for name in LISTS:
        for asked in row.get(name) or ():
            missing = [w for w in words(asked) if w not in FUNCTION_WORDS and stem(w) not in stems]
            if missing:
                yield f"does not mention {', '.join(missing)} of {name} {asked!r}"
    for name in ("title", "description"):
        for fault, pattern in (("has a wrong article", WRONG_ARTICLE), ("lacks a blank", NO_BLANK)):
            if found := pattern.search(row[name]):
                yield f"{fault} in its {name}: {found[0]!r}"
    if found := FIRST_PERSON.search(QUOTED.sub("", description)):
        yield f"speaks in the first person outside quotations: {found[0]!r}"


def alike(texts: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Pairs of texts over LARGEST_LIKENESS: the cosine of their stems, each weighed by its rarity."""
    counts = [Counter(stem(word) for word in words(text)) for text in texts]
    in_texts = Counter(word for count in counts for word in count)
    having: dict[str, list[tuple[int, float]]] = defaultdict(list)  # by stem: text, weight
    for number, count in enumerate(counts):
        weights = {w: (1 + math.log(n)) * math.log(len(texts) / in_texts[w]) for w, n in count.items()}
        length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        for word, weight in weights.items():
            if 1 < in_texts[word] <= COMMON_WORD * len(texts):
                having[word].append((number, weight / length))
    likeness: dict[tuple[int, int], float] = defaultdict(float)
    for found in having.values():
        for (one, weight), (other, its_weight) in combinations(found, 2):
            likeness[one, other] += weight * its_weight
    yield from sorted((*pair, value) for pair, value in likeness.items() if value > LARGEST_LIKENESS)


def check(rows: Iterable[tuple[str, str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Everything that is wrong, as "where: what", and the counts of the card."""
    problems: list[str] = []
    good = []
    for split, where, row in rows:
        found = list(schema_problems(row))
        if not found:
            found = list(text_problems(row))
            good.append((split, where, row))
            if (right := split_of(row["setting"], row["place"])) != split:
                found.append(f"{row['setting']} / {row['place']} belongs to {right}")
        problems += [f"{where}: {problem}" for problem in found]

    titles: dict[str, str] = {}
    openings: dict[tuple[str, ...], str] = {}
    runs: dict[tuple[str, ...], str] = {}
    stock = {tuple(words(phrase)) for phrase in STOCK_PHRASES}
    first_words, shapes, settings = Counter[str](), Counter[tuple[str, ...]](), Counter[str]()
    vocabulary = Counter[str]()  # rows that have the word
    lengths = []
    for _, where, row in good:
        text = words(row["description"])
        vocabulary.update(set(text))
        lengths.append(len(row["description"].split()))
        settings[row["setting"]] += 1
        first_words[text[0] if text else ""] += 1
        shapes[shape(row["description"])] += 1
        title = row["title"].lower()
        if titles.setdefault(title, where) != where:
            problems.append(f"{where}: has the title of {titles[title]}")
        if openings.setdefault(tuple(text[:3]), where) != where:
            problems.append(f"{where}: opens like {openings[tuple(text[:3])]}: {' '.join(text[:3])!r}")
        shared = {tuple(text[i : i + SHARED_RUN_WORDS]) for i in range(len(text) - SHARED_RUN_WORDS + 1)}
        for run in shared - stock:
            if runs.setdefault(run, where) != where:
                problems.append(f"{where}: shares {' '.join(run)!r} with {runs[run]}")

    pairs: dict[frozenset[str], str] = {}
    for _, where, row in good:
        for pair in map(frozenset, combinations({feature.lower() for feature in row["features"]}, 2)):
            if (first := pairs.setdefault(pair, where)) != where:
                problems.append(f"{where}: has the features {' and '.join(sorted(pair))} of {first}")
        for word in set(words(row["description"])):  # "andwants", as rewriting leaves it
            rare = vocabulary[word] == 1 and word != "andiron"
            if rare and word.startswith("and") and vocabulary[word[3:]] > 1:
                problems.append(f"{where}: lacks a blank in {word!r}")
    for one, other, likeness in alike([f"{row['title']} {row['description']}" for _, _, row in good]):
        problems.append(f"{good[other][1]}: is too like {good[one][1]}, {likeness:.2f}")

    total = max(1, len(good))
    for count, least in LEAST_SHARE_BY_FEATURES.items():
        share = sum(len(row["features"]) == count for _, _, row in good) / total
        if share < least:
            problems.append(f"all: {share:.1%} of the rows have {count} feature(s), under {least:.0%}")
    for name, counts, limit in (
        ("setting", settings, LARGEST_SHARE_OF_A_SETTING),
        ("first word", first_words, LARGEST_SHARE_OF_A_FIRST_WORD),
        ("shape", shapes, LARGEST_SHARE_OF_A_SHAPE),
    ):
        for value, count in counts.most_common():
            if count > limit * total:
                problems.append(
                    f"all: the {name} {value!r} has {count / total:.1%} of the rows, over {limit:.0%}"
                )
    if len(vocabulary) <= LEAST_VOCABULARY:
        problems.append(
            f"all: {len(vocabulary):,} different words; more than {LEAST_VOCABULARY:,} are wanted"
        )
    if len(settings) < LEAST_SETTINGS:
        problems.append(f"all: {len(settings)} settings; at least {LEAST_SETTINGS} are wanted")
    return problems, {
        "rows": len(good),
        **{split: sum(one == split for one, _, _ in good) for split in SPLITS},
        "settings": len(settings),
        "places": len({row["place"] for _, _, row in good}),
        "moods": len({row["mood"] for _, _, row in good}),
        "different words": len(vocabulary),
        "words a description": f"{min(lengths, default=0)} to {max(lengths, default=0)}, "
        f"mean {sum(lengths) / total:.1f}",
        "first words": len(first_words),
        "commonest first word": f"{first_words.most_common(1)[0][1] / total:.1%}" if good else "none",
        "shapes": len(shapes),
        "commonest shape": f"{shapes.most_common(1)[0][1] / total:.1%}" if good else "none",
        "with exits": f"{sum('exits' in row for _, _, row in good) / total:.0%}",
        "with inhabitants": f"{sum('inhabitants' in row for _, _, row in good) / total:.0%}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    problems, counts = check(read_rows(parser.parse_args().folder))
    print("\n".join(problems))
    for name, value in counts.items():
        print(f"{name:>22}: {value:,}" if isinstance(value, int) else f"{name:>22}: {value}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
