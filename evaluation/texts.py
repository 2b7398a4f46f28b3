"""How well a model predicts whole texts, also those longer than its context."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from evaluation.continuations import Continuation, score_continuations
from evaluation.isolation import bare_model, undisturbed


@dataclass(frozen=True)
class TextResult:
    """Over all texts together, and in `text_perplexities` for each one alone.

    `loss` is in nats per token, `bits_per_byte` per UTF-8 byte of the texts; `word_perplexity` is per word,
    as lm-evaluation-harness counts them, and `byte_perplexity` per byte. Every token of every text is a
    target; the token that stands for the beginning is none.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    word_perplexity: float
    byte_perplexity: float
    targets: int
    bytes: int
    words: int
    text_perplexities: list[float]

    @property
    def mean_text_perplexity(self) -> float:
        """The mean of the texts' perplexities, each text counting alike: what `evaluate`'s metric reports."""
        return sum(self.text_perplexities) / len(self.text_perplexities)


def windows(targets: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """How to score `targets` tokens with a model that sees `context` inputs: triples (begin, scored from,
    end).

    Inputs are the tokens begin … end - 1 of a row whose token 0 stands for the beginning, and tokens scored
    from … end of that row are scored, each once. The first window scores `context` tokens and every later
    one the next `stride`, after as many earlier tokens as fit. A stride of `context` is the disjoint
    windows of lm-evaluation-harness; a smaller one costs more and lets every token see at least `context` -
    `stride` others.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be from 1 to the context of {context} tokens")
    done = 0
    while done < targets:
        end = min(targets, done + (stride if done else context))
        yield max(0, end - context), done + 1, end
        done = end


def evaluate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    accelerator: Accelerator,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
) -> TextResult:
    """Predict each text from its beginning, in windows of `context` tokens (default: all that the model can
    see).

    `stride`, by default `context`, is how far the windows are apart. The beginning is one token, bos or else
    eos, also with a tokenizer that adds one by itself. The processes share the work and all get the result,
    to the last bit the same on any number of them. Nothing is padded into the numbers, and no mode or random
    state is touched.

    Raises:
        ValueError: if there is no text, a text is empty, the tokenizer has no token to begin with, the
            stride does not fit, or the model returns NaN.
    """
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has neither a bos nor an eos token to begin a text with"
        )
    if not texts:
        raise ValueError("no texts to evaluate")
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if empty := [number for number, ids in enumerate(encoded) if not ids]:
        raise ValueError(f"{len(empty)} texts have no tokens, the first is number {empty[0]}; leave them out")
    limit = getattr(bare_model(model).config, "max_position_embeddings", None)
    if context is None:
        context = limit or max(len(ids) for ids in encoded)
    elif limit is not None and context > limit:
        raise ValueError(f"context={context} is more than the {limit} tokens that the model can see")

    pieces, owners = [], []
    for number, ids in enumerate(encoded):
        row = [start_id, *ids]
        for begin, first, end in windows(len(ids), context, stride or context):
            pieces.append(Continuation(row[begin : end + 1], end + 1 - first))
            owners.append(number)
    piece_nats = _score_pieces(model, pieces, accelerator, batch_tokens)
    nats = [0.0] * len(texts)
    for owner, piece in zip(owners, piece_nats, strict=True):
        nats[owner] += piece

    total, targets = math.fsum(nats), sum(len(ids) for ids in encoded)
    size = sum(len(text.encode()) for text in texts)
    # The harness's way of counting, in which a blank at either end makes one word more.
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    if math.isnan(total):
        broken = next(number for number, value in enumerate(nats) if math.isnan(value))
        raise ValueError(
            f"the model returned NaN, first on text {broken}: its weights are broken or overflow"
        )
    return TextResult(
        loss=total / targets,
        perplexity=_exp(total / targets),
        bits_per_byte=total / math.log(2) / size,
        word_perplexity=_exp(total / max(1, words)),
        byte_perplexity=_exp(total / size),
        targets=targets,
        bytes=size,
        words=words,
        text_perplexities=[_exp(n / len(ids)) for n, ids in zip(nats, encoded, strict=True)],
    )


def _score_pieces(
    model: nn.Module, pieces: Sequence[Continuation], accelerator: Accelerator, batch_tokens: int | None
) -> list[float]:
    """Nats of each piece's scored tokens, on every process."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    budget = batch_tokens or (2048 if accelerator.device.type == "cpu" else 32768)
    order = sorted(range(len(pieces)), key=lambda number: -len(pieces[number].tokens))
    batches: list[list[int]] = []
    for number in order:  # longest first: the first of a batch says how wide it is
        if not batches or len(pieces[batches[-1][0]].tokens) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(number)

    table = torch.zeros(len(pieces), dtype=torch.float64)
    with undisturbed(model):
        for first in range(0, len(batches), world_size):
            # A sharded model's forward needs every process: one without a batch repeats the last, uncounted.
            mine = batches[min(first + rank, len(batches) - 1)]
            sums = score_continuations(
                model, [pieces[number] for number in mine], accelerator, context=None, packed=False
            )
            if first + rank < len(batches):
                table[mine] = -torch.tensor(sums, dtype=torch.float64)
    if world_size > 1:
        table = accelerator.reduce(table.to(accelerator.device), reduction="sum").cpu()
    return table.tolist()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
