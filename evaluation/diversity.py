"""Numbers about generated texts that need no model: variety, repetition, coverage, copying."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

# Words that carry none of a request: "a well of black water" asks for a well, something black, and water.
FUNCTION_WORDS = frozenset(
    {
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "into",
        "is",
        "it",
        "its",
        "of",
        "off",
        "on",
        "or",
        "out",
        "over",
        "that",
        "the",
        "their",
        "there",
        "this",
        "to",
        "under",
        "up",
        "was",
        "were",
        "with",
    }
)
SEED_WORDS = 5  # a shared run is looked for from every shared run of this many words


def words(text: str) -> list[str]:
    """Lower-case words; an apostrophe inside belongs to the word."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams among all n-grams of all texts (Li et al. 2016); 0 if there are none.

    It falls as texts get more or longer: compare only like amounts of text.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 4) -> float:
    """The share of a text's n-grams that repeat an earlier one of the same text."""
    grams = ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mentions(text: str, request: str) -> bool:
    """Whether at least half of the content words of `request` appear in the text, whatever their endings.

    A request of function words alone, such as the exit "up", asks for those.
    """
    content = [word for word in words(request) if word not in FUNCTION_WORDS]
    asked = {_stem(word) for word in content or words(request)}
    found = asked & {_stem(word) for word in words(text)}
    return bool(asked) and 2 * len(found) >= len(asked)


def field_coverage(text: str, fields: Mapping[str, str | Sequence[str]]) -> dict[str, float]:
    """For each field that asks for something, the share of what it asks for that the text mentions."""
    coverage = {}
    for name, value in fields.items():
        requests = [value] if isinstance(value, str) else list(value or ())
        requests = [request for request in requests if words(request)]
        if requests:
            coverage[name] = sum(mentions(text, request) for request in requests) / len(requests)
    return coverage


def _stem(word: str) -> str:
    """Plural and verb endings off: enough to find "torches" where a torch was asked for."""
    for ending in ("'s", "’s", "ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


class CopyIndex:
    """Finds what generated texts share word for word with a set of training texts."""

    def __init__(self, training_texts: Sequence[str]):
        self.texts = [words(text) for text in training_texts]
        self.places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, tokens in enumerate(self.texts):
            for position, gram in enumerate(ngrams(tokens, SEED_WORDS)):
                self.places[gram].append((number, position))

    def longest_span(self, text: str) -> int:
        """Words in the longest run that some training text also has; 0 if shorter than SEED_WORDS."""
        tokens = words(text)
        longest = 0
        for start, gram in enumerate(ngrams(tokens, SEED_WORDS)):
            if start and longest and len(tokens) - start <= longest:
                break
            for number, position in self.places.get(gram, ()):
                other = self.texts[number]
                length = SEED_WORDS
                while (
                    start + length < len(tokens)
                    and position + length < len(other)
                    and tokens[start + length] == other[position + length]
                ):
                    length += 1
                longest = max(longest, length)
        return longest

    def overlap(self, text: str, n: int = 13) -> float:
        """The share of the text's n-grams that occur in a training text; 13 is GPT-3's contamination test."""
        tokens = words(text)
        grams = ngrams(tokens, n)
        copied = sum(
            any(
                tuple(self.texts[number][position : position + n]) == gram
                for number, position in self.places.get(gram[:SEED_WORDS], ())
            )
            for gram in grams
        )
        return copied / len(grams) if grams else 0.0
