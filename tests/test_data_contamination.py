"""Questions are found in a corpus wherever 13 words in a row are the same, and only there."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from data import contamination
from data.contamination import ngrams_of

WORD = re.compile(r"[^\W_]+")
TOKENS = [
    "cat",
    "Dog's",
    "x1",
    "naïve",
    "ÉCOLE",
    "—",
    "“so”",
    "don't",
    "«a»",
    "end.",
    "_u_",
    "日本",
    "no-one",
]
SEQUENCES = st.lists(st.sampled_from(TOKENS), min_size=14, max_size=24)


def passages(text):
    """What 13 words in a row are, spelt out: runs of letters and digits, without case."""
    words = WORD.findall(text.lower())
    return {tuple(words[at : at + 13]) for at in range(len(words) - 12)}


@settings(deadline=None, max_examples=200)
@given(
    question=SEQUENCES,
    before=SEQUENCES,
    first=st.integers(0, 10),
    length=st.integers(8, 18),
    glue=st.sampled_from([" ", ", ", "\n", " — ", "\u00a0", "; ", "\u3000"]),
    change=st.sampled_from([str.upper, str.lower, str]),
)
def test_a_question_is_found_exactly_where_13_words_in_a_row_are_its_own(
    question, before, first, length, glue, change
):
    asked = " ".join(question)
    document = change(" ".join(before) + glue + glue.join(question[first : first + length]) + glue + "last")
    ngrams, _ = ngrams_of([asked])
    found = ngrams.found_in(["another text", document, "one more"])
    assert (len(found) > 0) == bool(passages(asked) & passages(document))


def test_a_passage_across_two_texts_or_two_pieces_of_one_is_told_apart(monkeypatch):
    words = [f"word{number}" for number in range(40)]
    ngrams, _ = ngrams_of([" ".join(words)])
    assert len(ngrams.found_in([" ".join(words[:12]), " ".join(words[12:24])])) == 0
    whole = ngrams.found_in(["x " * 70_000 + " ".join(words) + " y" * 70_000])
    assert len(whole) == 28
    monkeypatch.setattr(contamination, "PIECE_BYTES", 2**12)
    for shift in range(0, 4096, 37):
        text = "x" * shift + " " + "z " * 2000 + " ".join(words) + " y" * 3000
        assert (ngrams.found_in([text]) == whole).all()


def test_a_question_of_few_words_is_never_found():
    ngrams, each = ngrams_of(["too short", "One two three four five six seven eight nine ten eleven twelve"])
    assert [len(keys) for keys in each] == [0, 0]
    assert len(ngrams.found_in(["too short", "One two three four five six seven eight nine ten"])) == 0
