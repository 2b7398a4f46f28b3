"""Which of several writers is better, by a judge who does not know who wrote what."""

import dataclasses
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.endpoint import Endpoint, EndpointError

INSTRUCTION = """Two writers were given the same request for a role-playing game.

Request:
{request}

Text 1:
{first}

Text 2:
{second}

Which text serves a game master better? It gives what was requested, is specific and vivid, makes sense and
can be played. Answer with one word: 1, 2 or tie."""

ELO_PER_NAT = 400 / math.log(10)


@dataclass(frozen=True)
class Verdict:
    """One reading of two texts for request number `request`, `first` shown first.

    `score` is the first writer's: 1 won, 0.5 tie, 0 lost; None if the judge gave no usable answer, of which
    `problem` then says why.
    """

    request: int
    first: str
    second: str
    score: float | None
    problem: str = ""


@dataclass(frozen=True)
class Rating:
    """Bradley–Terry strength on Elo's scale (400 points: ten to one), mean 0, with a 95% interval."""

    value: float
    low: float
    high: float


def compare_blind(
    judge: Endpoint,
    requests: Sequence[str],
    texts: Mapping[str, Sequence[str | None]],
    *,
    concurrency: int = 8,
    attempts: int = 3,
    progress: str = "",
) -> list[Verdict]:
    """Every pair of writers on every request, twice with the order swapped.

    `texts` holds one text per request for each writer; where it is None, whose failure is not the writer's,
    there is no game. An answer that is none of 1, 2 and tie is asked for again up to `attempts` times; what
    stays unanswered is a verdict without a score, and so is at once what the endpoint itself gave up.
    """
    games = [
        (number, first, second)
        for number in range(len(requests))
        for first, second in itertools.permutations(texts, 2)
        if texts[first][number] is not None and texts[second][number] is not None
    ]
    verdicts: dict[tuple[int, str, str], Verdict] = {}
    open_games = games
    for attempt in range(attempts):
        prompts = [
            INSTRUCTION.format(request=requests[n], first=texts[first][n], second=texts[second][n])
            for n, first, second in open_games
        ]
        # A deterministic judge would repeat its nonsense: later attempts are asked at a higher temperature.
        answers = judge.complete_all(
            prompts,
            concurrency=concurrency,
            progress=progress,
            max_tokens=8,
            temperature=0.5 * attempt,
            seed=attempt,
        )
        confused = []
        for game, answer in zip(open_games, answers, strict=True):
            if isinstance(answer, EndpointError):
                verdicts[game] = Verdict(*game, None, answer.reason)
            elif (score := parse_verdict(answer)) is None:
                verdicts[game] = Verdict(*game, None, "an answer that is none of 1, 2 and tie")
                confused.append(game)
            else:
                verdicts[game] = Verdict(*game, score)
        open_games = confused
        if not open_games:
            break
    return [verdicts[game] for game in games]


def judge_texts(
    judge: Endpoint, requests: Sequence[str], texts: Mapping[str, Sequence[str | None]]
) -> tuple[dict[str, Rating], dict[str, Any]]:
    """Ratings by writer, none if there was no verdict, and what a report says of the judge and its games."""
    verdicts = compare_blind(judge, requests, texts, progress="verdicts")
    unusable = Counter(verdict.problem for verdict in verdicts if verdict.score is None)
    left_out = len(requests) * math.perm(len(texts), 2) - len(verdicts)
    print(
        f"judge: {len(verdicts)} games, {unusable.total()} without a verdict; {left_out} more for want of a "
        f"text; asked again: {dict(judge.retries) or 'never'}"
    )
    for problem, count in unusable.most_common():
        print(f"  {count} without a verdict: {problem}")
    if judge.given_up:
        print(f"  given up: {judge.given_up}")
    told = {"model": judge.model, "unusable": unusable, "left_out": left_out, "retries": judge.retries}
    report = {"judge": told, "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts]}
    return (rate(verdicts) if unusable.total() < len(verdicts) else {}), report


def parse_verdict(answer: str) -> float | None:
    """From "1", "tie" or "2" the first text's 1, 0.5 or 0; None if the answer names none or several."""
    named = set(re.findall(r"\b(1|2|tie)\b", answer.lower()))
    return {"1": 1.0, "2": 0.0, "tie": 0.5}[named.pop()] if len(named) == 1 else None


def rate(verdicts: Sequence[Verdict], *, resamples: int = 500, seed: int = 0) -> dict[str, Rating]:
    """Bradley–Terry ratings of all writers; requests, not single verdicts, are resampled for the intervals.

    Raises:
        ValueError: if no verdict has a score.
    """
    scored = [verdict for verdict in verdicts if verdict.score is not None]
    if not scored:
        raise ValueError(f"none of the judge's {len(verdicts)} answers was usable: there is nothing to rate")
    writers = sorted({name for verdict in verdicts for name in (verdict.first, verdict.second)})
    by_request: dict[int, list[Verdict]] = {}
    for verdict in scored:
        by_request.setdefault(verdict.request, []).append(verdict)
    center = bradley_terry(writers, scored)
    generator = random.Random(seed)
    groups = list(by_request.values())
    samples = [
        bradley_terry(writers, [v for group in generator.choices(groups, k=len(groups)) for v in group])
        for _ in range(resamples)
    ]
    ratings = {}
    for name in writers:
        spread = sorted(sample[name] for sample in samples)
        ratings[name] = Rating(
            center[name], spread[int(0.025 * len(spread))], spread[math.ceil(0.975 * len(spread)) - 1]
        )
    return ratings


def bradley_terry(writers: Sequence[str], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Ratings by Hunter's (2004) minorisation-maximisation; a tie is half a win for each side.

    Every pair starts with one tie, without which a writer who never lost would have no finite rating.
    """
    wins = dict.fromkeys(writers, 0.0)
    games = dict.fromkeys(itertools.combinations(sorted(writers), 2), 1.0)
    for first, second in games:
        wins[first] += 0.5
        wins[second] += 0.5
    for verdict in verdicts:
        assert verdict.score is not None
        wins[verdict.first] += verdict.score
        wins[verdict.second] += 1 - verdict.score
        games[min(verdict.first, verdict.second), max(verdict.first, verdict.second)] += 1
    strength = dict.fromkeys(writers, 1.0)
    for _ in range(200):
        pull = dict.fromkeys(writers, 0.0)
        for (first, second), count in games.items():
            share = count / (strength[first] + strength[second])
            pull[first] += share
            pull[second] += share
        strength = {name: wins[name] / pull[name] for name in writers}
        scale = math.exp(sum(map(math.log, strength.values())) / len(writers))
        strength = {name: value / scale for name, value in strength.items()}
    return {name: ELO_PER_NAT * math.log(value) for name, value in strength.items()}
