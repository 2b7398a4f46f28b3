"""How sure a number is: intervals and paired tests, exact where that is cheap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_QUANTILE_975 = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """A share of `total` with its 95% Wilson interval, which stays within [0, 1]; total need not be large."""

    value: float
    low: float
    high: float
    total: int


def proportion(successes: int, total: int) -> Proportion:
    """Wilson, "Probable inference, the law of succession, and statistical inference" (1927)."""
    if total <= 0:
        raise ValueError(f"a share of {total} trials has no value")
    z, share = NORMAL_QUANTILE_975, successes / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    # At the ends the two terms are equal but for rounding.
    low = middle - half if successes else 0.0
    high = middle + half if successes < total else 1.0
    return Proportion(share, low, high, total)


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same questions: how often only one was right, the difference and its p-value."""

    only_first: int
    only_second: int
    difference: float  # share right of the first minus that of the second
    low: float
    high: float
    p_value: float


def compare_paired(first: Sequence[bool], second: Sequence[bool]) -> PairedComparison:
    """McNemar's test, two-sided, by the exact binomial; the 95% interval of the difference is Wald's.

    Questions that both got right or both got wrong say nothing about which is better and do not enter the
    p-value.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"a paired test needs the same questions twice; got {len(first)} and {len(second)}")
    n = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant, tail, term = only_first + only_second, 0, 1
    for k in range(min(only_first, only_second) + 1):  # term is the binomial coefficient (discordant over k)
        tail += term
        term = term * (discordant - k) // (k + 1)
    difference = (only_first - only_second) / n
    half = NORMAL_QUANTILE_975 * math.sqrt((discordant / n - difference**2) / n)
    return PairedComparison(
        only_first=only_first,
        only_second=only_second,
        difference=difference,
        low=difference - half,
        high=difference + half,
        p_value=min(1.0, float(2 * tail / 2**discordant)),
    )
