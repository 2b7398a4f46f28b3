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
from evaluation.continuations import Continuation, lay_out, score_continuations, supports_packing
from evaluation.isolation import bare_model, is_sharded, undisturbed
from evaluation.statistics import PairedComparison, Proportion, compare_paired, proportion

STYLES = ("completion", "harness")
MOST_PADDING = 0.03  # of a batch's tokens


@dataclass(frozen=True)
class QuestionScores:
    """Log-probabilities of a question's four endings, in nats, and what each is divided by for the norm.

    `log_probabilities[style]` and `lengths[style]` hold four numbers each; a length is in tokens for
    "completion" and in characters for "harness". `truncated`: the model's context was too short for the
    whole text.
    """

    index: int
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
        ValueError: if the baseline lacks one of the questions.
    """
    others = {score.index: score for score in baseline}
    if missing := [score.index for score in scores if score.index not in others]:
        raise ValueError(f"the baseline lacks {len(missing):,} of the questions, the first is {missing[0]}")
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
    included; by default it suits the device. A batch that does not fit the memory is halved. A question
    longer than the model's context loses its beginning, as in lm-evaluation-harness, and is marked.

    Raises:
        ValueError: if an ending or context tokenises to nothing, or the model returns NaN.
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
        examples = next(iter(work[0].continuations.values())) if work else []
        packed = supports_packing(model, examples, accelerator)
        if world_size > 1:  # rounding may differ between machines, and all must lay out the same batches
            votes = torch.tensor(int(packed), device=accelerator.device)
            packed = accelerator.reduce(votes, reduction="sum").item() == world_size
        batches = list(_batches(work, batch_tokens, context, packed))
        sums: dict[tuple[int, str], list[float]] = {}  # by question's place in `work` and style
        for first in range(0, len(batches), world_size):
            # The last round may have fewer batches than processes: the others repeat one, for a sharded
            # forward needs everybody, and what they find is not counted.
            mine = batches[min(first + rank, len(batches) - 1)]
            continuations = [c for number, style in mine for c in work[number].continuations[style]]
            found = torch.tensor(
                score_continuations(model, continuations, accelerator, context=context, packed=packed),
                dtype=torch.float64,
            ).view(1, -1, ENDINGS)
            round_of = batches[first : first + world_size]
            if world_size > 1:
                table = torch.zeros(world_size, max(map(len, round_of)), ENDINGS, dtype=torch.float64)
                if first + rank < len(batches):
                    table[rank, : len(mine)] = found
                found = accelerator.reduce(table.to(accelerator.device), reduction="sum").cpu()
            for batch, of_batch in zip(round_of, found.tolist(), strict=False):
                sums.update(zip(batch, of_batch, strict=False))
            touched = dict.fromkeys(number for batch in round_of for number, _ in batch)
            complete = [number for number in touched if all((number, style) in sums for style in styles)]
            finished = _collect(
                [
                    (work[number], {style: sums.pop((number, style)) for style in styles})
                    for number in complete
                ],
                context,
            )
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
        encoded.append(([Continuation(context + e, len(e), number) for e in four], [len(e) for e in four]))
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
            ([Continuation(ids, max(0, len(ids) - len(context)), number) for ids in four], characters[number])
        )
    return encoded


def clean(text: str) -> str:
    """WikiHow's markup out of a text, in the harness's order, which decides where blanks are left over."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _batches(
    work: Sequence[EncodedQuestion], batch_tokens: int, context: int | None, packed: bool
) -> Iterator[list[tuple[int, str]]]:
    """Runs of (question's place in `work`, style), longest rows first, each within the budget when padded.

    A batch that is a quarter full ends where rows get so much shorter that padding would be a waste.
    """
    pieces = []
    for number, item in enumerate(work):
        for style, four in item.continuations.items():
            lengths = [len(row.tokens) for row in lay_out(four, context, packed)]
            pieces.append((max(lengths), len(lengths), sum(lengths), (number, style)))
    pieces.sort(key=lambda piece: -piece[0])
    batch: list[tuple[int, str]] = []
    width = rows = tokens = 0
    for length, new_rows, new_tokens, piece in pieces:
        padded = width * (rows + new_rows)
        wasteful = 4 * padded > batch_tokens and tokens + new_tokens < (1 - MOST_PADDING) * padded
        if batch and (padded > batch_tokens or wasteful):
            yield batch
            batch, width, rows, tokens = [], 0, 0, 0
        width = max(width, length)
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
        raise ValueError(
            f"the model returned NaN on {len(broken)} of {len(work)} questions of a batch (first: question "
            f"{min(broken)}); its weights are broken or overflow in this dtype"
        )
    return [
        QuestionScores(
            index=item.question.index,
            label=item.question.label,
            source=item.question.source,
            log_probabilities=by_style,
            lengths=item.lengths,
            truncated=context is not None and item.tokens > context + 1,
        )
        for item, by_style in work
    ]
