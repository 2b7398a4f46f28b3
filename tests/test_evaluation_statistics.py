"""Intervals and paired tests against values from the literature and by brute force."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.statistics import compare_paired, proportion


def test_the_wilson_interval_of_a_textbook_case():
    """81 of 263, Newcombe (1998), table I: 0.2553 to 0.3662."""
    share = proportion(81, 263)
    assert (round(share.low, 4), round(share.high, 4)) == (0.2553, 0.3662)


def test_the_interval_never_leaves_zero_to_one_nor_shrinks_to_a_point():
    assert proportion(0, 12).low == 0.0 == proportion(0, 20).low and proportion(0, 20).high > 0.1
    assert proportion(20, 20).high == 1.0 and proportion(20, 20).low < 0.9
    with pytest.raises(ValueError, match="0 trials"):
        proportion(0, 0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_the_p_value_is_the_share_of_coin_flips_at_least_as_lopsided(pairs):
    """McNemar's exact test by brute force over every way in which the discordant pairs could have fallen."""
    first, second = zip(*pairs, strict=True)
    paired = compare_paired(first, second)
    discordant = paired.only_first + paired.only_second
    lopsided = abs(paired.only_first - paired.only_second)
    flips = list(itertools.product((1, -1), repeat=discordant))
    expected = sum(abs(sum(flip)) >= lopsided for flip in flips) / len(flips)
    assert paired.p_value == pytest.approx(expected)
    assert paired.difference == pytest.approx((sum(first) - sum(second)) / len(pairs))
    assert paired.low <= paired.difference <= paired.high


def test_all_of_hellaswag_is_not_too_large_for_exact_numbers():
    paired = compare_paired([True] * 5100 + [False] * 4942, [False] * 5100 + [True] * 4942)
    z = (abs(5100 - 4942) - 1) / math.sqrt(10042)  # the normal approximation with continuity correction
    assert paired.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_different_numbers_of_questions_cannot_be_paired():
    with pytest.raises(ValueError, match="got 2 and 1"):
        compare_paired([True, False], [True])
