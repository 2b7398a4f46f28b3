"""HellaSwag accuracy, in both published ways, from one forward per question and way.

*completion*, after build-nanogpt: the raw context, an ending's log-probability as a sum and per token.
*harness*, after lm-evaluation-harness: the activity as a label in front, cleaned text, as a sum and per
character.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.hellaswag import ENDINGS, Question
from evaluation.continuations import (
    Budget,
    Continuation,
    Row,
    Scored,
    add_up,
    lay_out,
    score_rows,
    supports_packing,
)
from evaluation.isolation import NotFiniteError, bare_model, is_sharded, undisturbed
from evaluation.statistics import PairedComparison, Proportion, compare_paired, proportion

STYLES = ("completion", "harness")
MOST_PADDING = 0.03  # of a batch's tokens
# So many forwards before results are fetched: on an accelerator the fetch waits for all that it was given.
FORWARDS_PER_FETCH = {"cpu": 1, "accelerator": 8}


@dataclass(frozen=True)
class QuestionScores:
    """Log-probabilities of a question's four endings, in nats, and what each is divided by for the norm.

    `log_probabilities[style]` and `lengths[style]` hold four numbers each; a length is in tokens for
    "completion" and in characters for "harness". `question` is the question's fingerprint. `truncated`: the
    model's context was too short for the whole text.
    """

    index: int
    question: str
    label: int
    source: str
    log_probabilities: dict[str, list[float]]
    lengths: dict[str, list[int]]
    truncated: bool = False

    def predictions(self) -> dict[str, int]:
        """The ending that each metric chooses: "<style>_acc" by the sum, "<style>_acc_norm" by the norm."""
        chosen = {}
        for style, sums in self.log_probabilities.items():
            # A cleaned ending without a character left has no per-character score: it is never chosen.
            normed = [s / n if n else -math.inf for s, n in zip(sums, self.lengths[style], strict=True)]
            chosen[f"{style}_acc"] = max(range(len(sums)), key=sums.__getitem__)
            chosen[f"{style}_acc_norm"] = max(range(len(sums)), key=normed.__getitem__)
        return chosen


@dataclass(frozen=True)
class HellaSwagResult:
    """Accuracy by metric, over all questions and by their source, with 95% intervals."""

    questions: int
    truncated: int
    accuracy: dict[str, Proportion]
    by_source: dict[str, dict[str, Proportion]]


def evaluate_hellaswag(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    accelerator: Accelerator,
    *,
    batch_tokens: int | None = None,
    styles: Sequence[str] = STYLES,
    progress: bool = False,
) -> HellaSwagResult:
    """Accuracy on `questions`, which the processes share. Arguments and errors as `score_questions`."""
    scores = score_questions(
        model,
        tokenizer,
        questions,
        accelerator,
        batch_tokens=batch_tokens,
        styles=styles,
        progress=progress,
    )
    return summarize([question for batch in scores for question in batch])


def summarize(scores: Sequence[QuestionScores]) -> HellaSwagResult:
    """Raises: ValueError: if there are no scores."""
    if not scores:
        raise ValueError("no questions were scored: give at least one")
    right = [(s.source, {m: choice == s.label for m, choice in s.predictions().items()}) for s in scores]
    metrics = list(right[0][1])
    sources = sorted({source for source, _ in right})

    def shares(rows: list[dict[str, bool]]) -> dict[str, Proportion]:
        return {metric: proportion(sum(row[metric] for row in rows), len(rows)) for metric in metrics}

    return HellaSwagResult(
        questions=len(scores),
        truncated=sum(s.truncated for s in scores),
        accuracy=shares([row for _, row in right]),
        by_source={name: shares([row for source, row in right if source == name]) for name in sources},
    )


def compare(
    scores: Sequence[QuestionScores], baseline: Sequence[QuestionScores]
) -> dict[str, PairedComparison]:
    """Each metric of a model against the same metric of another on the same questions.

    Raises:
        ValueError: if the baseline lacks one of the questions, or has another in its place.
    """
    others = {score.index: score for score in baseline}
    if missing := [score.index for score in scores if score.index not in others]:
        raise ValueError(f"the baseline lacks {len(missing):,} of the questions, the first is {missing[0]}")
    if changed := [score.index for score in scores if score.question != others[score.index].question]:
        raise ValueError(
            f"the baseline has other questions or answers in the place of {len(changed):,}, the first is "
            f"{changed[0]}: both models must be scored on one file or split"
        )
    return {
        metric: compare_paired(
            [score.predictions()[metric] == score.label for score in scores],
            [others[score.index].predictions()[metric] == score.label for score in scores],
        )
        for metric in scores[0].predictions()
    }


def score_questions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    accelerator: Accelerator,
    *,
    batch_tokens: int | None = None,
    styles: Sequence[str] = STYLES,
    progress: bool = False,
) -> Iterator[list[QuestionScores]]:
    """Scores as they come, longest questions first, every process yielding the same ones.

    `model` may be compiled or prepared by Accelerate; its mode and all random states are left as they were
    once the iterator ends. `batch_tokens` bounds the tokens of one forward on one process, padding
    included; by default it suits the device. A batch that does not fit the memory is halved, and so are
    later ones of its size. A question longer than the model's context loses its beginning, as in
    lm-evaluation-harness, and is marked.

    Raises:
        ValueError: if an ending or context tokenises to nothing.
        NotFiniteError: on every process, if the model returns NaN.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    context = getattr(bare_model(model).config, "max_position_embeddings", None)
    work = encode(questions, tokenizer, styles)
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(model, accelerator)

    with (
        undisturbed(model),
        tqdm(
            total=len(questions),
            unit="question",
            desc="HellaSwag",
            disable=not (progress and accelerator.is_main_process),
        ) as bar,
    ):
        pieces = _pieces(work, context, packed=True)
        packed = supports_packing(
            model,
            examples=pieces[0].continuations if pieces else [],
            longest_row=max((piece.width for piece in pieces), default=0),
            accelerator=accelerator,
        )
        if world_size > 1:  # rounding may differ between machines, and all must lay out the same batches
            votes = torch.tensor(int(packed), device=accelerator.device)
            packed = accelerator.reduce(votes, reduction="sum").item() == world_size
        if not packed:
            pieces = _pieces(work, context, packed=False)
        batches = list(_batches(pieces, batch_tokens))
        rounds_per_fetch = FORWARDS_PER_FETCH["cpu" if accelerator.device.type == "cpu" else "accelerator"]
        budget = Budget()
        table = torch.zeros(len(pieces), ENDINGS, dtype=torch.float64)
        sums: dict[tuple[int, str], list[float]] = {}  # by question's place in `work` and style
        found: list[Scored] = []
        launched: list[Piece] = []  # by all processes, since the last fetch
        for number, first in enumerate(range(0, len(batches), world_size), start=1):
            # The last round may have fewer batches than processes: the others repeat one, for a sharded
            # forward needs everybody, and what they find is not counted.
            mine = batches[min(first + rank, len(batches) - 1)]
            scored = score_rows(model, [row for piece in mine for row in piece.rows], accelerator, budget)
            found += scored if first + rank < len(batches) else []
            launched += [piece for batch in batches[first : first + world_size] for piece in batch]
            if number % rounds_per_fetch and first + world_size < len(batches):
                continue
            add_up(table.view(-1), found)
            fetched = table[[piece.number for piece in launched]]
            if world_size > 1:
                fetched = accelerator.reduce(fetched.to(accelerator.device), reduction="sum").cpu()
            for piece, four in zip(launched, fetched.tolist(), strict=True):
                sums[piece.place, piece.style] = four
            touched = dict.fromkeys(piece.place for piece in launched)
            complete = [place for place in touched if all((place, style) in sums for style in styles)]
            finished = _collect(
                [(work[place], {style: sums.pop((place, style)) for style in styles}) for place in complete],
                context,
            )
            found, launched = [], []
            bar.update(len(finished))
            yield finished


def default_batch_tokens(model: nn.Module, accelerator: Accelerator) -> int:
    """Tokens of one forward: what a CPU's caches like, or a GPU's memory holds beside a training run.

    A sharded model gets fewer, because its batches cannot be halved when they do not fit.
    """
    if accelerator.device.type == "cpu":
        return 1024
    return 4096 if is_sharded(model) else 16384


@dataclass(frozen=True)
class EncodedQuestion:
    """A question with its four endings as token sequences, and what they are divided by, for each style."""

    question: Question
    continuations: dict[str, list[Continuation]]
    lengths: dict[str, list[int]]

    @property
    def tokens(self) -> int:
        return max(len(c.tokens) for four in self.continuations.values() for c in four)


def encode(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, styles: Sequence[str]
) -> list[EncodedQuestion]:
    """Questions as token sequences, longest first."""
    unknown = set(styles) - set(STYLES)
    if unknown or not styles:
        raise ValueError(f"styles {list(styles)!r}: give one or both of {list(STYLES)}")
    if not questions:  # a resumed run may have nothing left, and tokenizers refuse an empty list
        return []
    per_style = {
        style: {"completion": _encode_completion, "harness": _encode_harness}[style](questions, tokenizer)
        for style in styles
    }
    work = []
    for number, question in enumerate(questions):
        continuations = {style: per_style[style][number][0] for style in styles}
        for four in continuations.values():
            for ending, continuation in zip(question.endings, four, strict=True):
                if continuation.scored == 0 or continuation.scored == len(continuation.tokens):
                    what = "ending" if continuation.scored == 0 else "context before the ending"
                    raise ValueError(
                        f"question {question.index}: the {what} {ending!r} tokenises to nothing with "
                        f"{type(tokenizer).__name__}; there is nothing to score"
                    )
        work.append(
            EncodedQuestion(question, continuations, {style: per_style[style][number][1] for style in styles})
        )
    return sorted(work, key=lambda item: -item.tokens)


def _encode_completion(questions, tokenizer) -> list[tuple[list[Continuation], list[int]]]:
    """Context and ending are tokenised apart, the ending with a blank in front (build-nanogpt)."""
    contexts = tokenizer([q.ctx for q in questions])["input_ids"]
    endings = tokenizer([" " + e for q in questions for e in q.endings], add_special_tokens=False)[
        "input_ids"
    ]
    encoded = []
    for number, context in enumerate(contexts):
        four = endings[4 * number : 4 * number + 4]
        encoded.append(([Continuation(context + e, len(e)) for e in four], [len(e) for e in four]))
    return encoded


def _encode_harness(questions, tokenizer) -> list[tuple[list[Continuation], list[int]]]:
    """Context and ending are tokenised together; the ending is what is longer than the context alone."""
    contexts, wholes, characters = [], [], []
    for question in questions:
        context = clean(f"{question.activity_label}: {question.ctx_a} {question.ctx_b.capitalize()}")
        endings = [clean(ending) for ending in question.endings]
        wholes += [f"{context} {ending}" for ending in endings]
        contexts.append(
            context.rstrip()
        )  # blanks at the end belong to the ending, or they would become tokens
        characters.append([len(ending) for ending in endings])
    context_ids, whole_ids = tokenizer(contexts)["input_ids"], tokenizer(wholes)["input_ids"]
    encoded = []
    for number, context in enumerate(context_ids):
        four = whole_ids[4 * number : 4 * number + 4]
        encoded.append(
            ([Continuation(ids, max(0, len(ids) - len(context))) for ids in four], characters[number])
        )
    return encoded


def clean(text: str) -> str:
    """WikiHow's markup out of a text, in the harness's order, which decides where blanks are left over."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@dataclass(frozen=True)
class Piece:
    """The endings of one question in one style, laid out: piece `number` is about `work[place]`."""

    number: int
    place: int
    style: str
    continuations: list[Continuation]
    rows: list[Row]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.tokens) for row in self.rows)


def _pieces(work: Sequence[EncodedQuestion], context: int | None, packed: bool) -> list[Piece]:
    # Each question by itself: others that happen to begin alike would make its row wide, which pads the rest.
    pieces: list[Piece] = []
    for place, item in enumerate(work):
        for style, four in item.continuations.items():
            rows = lay_out(four, context, packed, first_owner=ENDINGS * len(pieces))
            pieces.append(Piece(len(pieces), place, style, four, rows))
    return pieces


def _batches(pieces: Sequence[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Runs of pieces, longest rows first, each within the budget when padded.

    A batch that is a quarter full ends where rows get so much shorter that padding would be a waste.
    """
    batch: list[Piece] = []
    width = rows = tokens = 0
    for piece in sorted(pieces, key=lambda piece: -piece.width):
        new_rows, new_tokens = len(piece.rows), sum(len(row.tokens) for row in piece.rows)
        padded = width * (rows + new_rows)
        wasteful = 4 * padded > batch_tokens and tokens + new_tokens < (1 - MOST_PADDING) * padded
        if batch and (padded > batch_tokens or wasteful):
            yield batch
            batch, width, rows, tokens = [], 0, 0, 0
        width = max(width, piece.width)
        batch.append(piece)
        rows, tokens = rows + new_rows, tokens + new_tokens
    if batch:
        yield batch


def _collect(
    work: Sequence[tuple[EncodedQuestion, dict[str, list[float]]]], context: int | None
) -> list[QuestionScores]:
    broken = [
        item.question.index
        for item, by_style in work
        if any(math.isnan(s) for four in by_style.values() for s in four)
    ]
    if broken:
        raise NotFiniteError(
            f"the model returned NaN on {len(broken)} of {len(work)} questions of a batch (first: question "
            f"{min(broken)}); its weights are broken or overflow in this dtype"
        )
    return [
        QuestionScores(
            index=item.question.index,
            question=item.question.fingerprint,
            label=item.question.label,
            source=item.question.source,
            log_probabilities=by_style,
            lengths=item.lengths,
            truncated=context is not None and item.tokens > context + 1,
        )
        for item, by_style in work
    ]
