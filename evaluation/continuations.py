"""Log-probabilities of continuations; those that share their beginning share its forward.

Several continuations of one context stand in one row, one behind the other. A mask keeps them apart and
positions restart behind the context, so that each is computed exactly as if it stood there alone:

    row        c0 c1 c2 | a0 a1 | b0 b1 b2          a and b both continue c
    position    0  1  2    3  4    3  4  5
    a1 sees     x  x  x    x  x
    b1 sees     x  x  x           x  x
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from evaluation.isolation import bare_model

# The softmax over a vocabulary is taken for this many positions at a time, to keep it in the processor's
# cache.
POSITIONS_PER_CHUNK = 256


@dataclass(frozen=True)
class Continuation:
    """A token sequence of which the last `scored` tokens count.

    Only neighbours of one `group` share a row: sequences that happen to begin alike would make it wide, and
    wide rows pad all others.
    """

    tokens: list[int]
    scored: int
    group: int = 0


@dataclass(frozen=True)
class _Row:
    """One row of a forward: tokens, their positions, which branch each belongs to (0: the shared beginning).

    `predictors` are indices in the row, `targets` the tokens that they should predict, `owners` the number
    of the continuation that each target counts for.
    """

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    predictors: list[int]
    targets: list[int]
    owners: list[int]


def score_continuations(
    model: nn.Module,
    continuations: Sequence[Continuation],
    accelerator: Accelerator,
    *,
    context: int | None,
    packed: bool,
) -> list[float]:
    """The summed log-probability, in nats, of each continuation's scored tokens given all before them.

    Neighbours with the same beginning share it if `packed`. One longer than `context` inputs loses its
    beginning. A batch that does not fit the memory is halved, down to one row.
    """
    sums = torch.zeros(len(continuations), dtype=torch.float64)
    waiting = [_lay_out(continuations, context, packed)]
    while waiting:
        rows = waiting.pop()
        try:
            log_probabilities = _forward(model, rows, accelerator)
        except Exception as error:
            if not should_reduce_batch_size(error) or len(rows) == 1:
                raise
            middle = len(rows) // 2
            waiting += [rows[middle:], rows[:middle]]
            continue
        owners = torch.tensor([owner for row in rows for owner in row.owners])
        sums.index_add_(0, owners, log_probabilities.double().cpu())
    return sums.tolist()


def supports_packing(model: nn.Module, examples: Sequence[Continuation], accelerator: Accelerator) -> bool:
    """Whether the model gives continuations in one row the same log-probabilities as alone.

    It does if it heeds masks of four dimensions and position ids, which is tried on `examples`: recurrent
    models, sliding windows and attention kernels without free masks do not.
    """
    config = bare_model(model).config
    if not examples or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    context = getattr(config, "max_position_embeddings", None)
    alone = score_continuations(model, examples, accelerator, context=context, packed=False)
    try:
        together = score_continuations(model, examples, accelerator, context=context, packed=True)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if should_reduce_batch_size(error):
            raise
        return False
    # Rounding alone differs: float32 sums of some hundred nats in another order, or bfloat16's three digits.
    exact = next(model.parameters()).dtype == torch.float32 and accelerator.mixed_precision == "no"
    relative = 1e-5 if exact else 2e-2
    return all(abs(a - b) <= relative * max(1.0, abs(a)) for a, b in zip(alone, together, strict=True))


def _lay_out(continuations: Sequence[Continuation], context: int | None, packed: bool) -> list[_Row]:
    """Rows in the order of the continuations, as many of one beginning in a row as it has room for."""
    rows: list[_Row] = []
    group: list[tuple[int, list[int], int]] = []
    for owner, continuation in enumerate(continuations):
        tokens = continuation.tokens
        if context is not None and len(tokens) > context + 1:
            tokens = tokens[-(context + 1) :]
        joins = packed and owner > 0 and continuation.group == continuations[owner - 1].group
        if group and not (joins and _fits([*group, (owner, tokens, continuation.scored)], context)):
            rows.append(_row(group))
            group = []
        group.append((owner, tokens, continuation.scored))
    return [*rows, _row(group)] if group else rows


def _shared_length(group: Sequence[tuple[int, list[int], int]]) -> int:
    """How many first tokens all members have in common, short of what any of them scores."""
    shared = min(len(tokens) - scored for _, tokens, scored in group)
    first = group[0][1]
    for _, tokens, _ in group[1:]:
        shared = next((i for i in range(shared) if tokens[i] != first[i]), shared)
    return shared


def _fits(group: Sequence[tuple[int, list[int], int]], context: int | None) -> bool:
    """Whether one row is shorter than the members apart, and no longer than the model's context."""
    shared = _shared_length(group)
    length = shared + sum(len(tokens) - 1 - shared for _, tokens, _ in group)
    return shared > 0 and (context is None or length <= context)


def _row(group: Sequence[tuple[int, list[int], int]]) -> _Row:
    shared = _shared_length(group)
    tokens = list(group[0][1][:shared])
    row = _Row(tokens, list(range(shared)), [0] * shared, [], [], [])
    for branch, (owner, member, scored) in enumerate(group, start=1):
        start = len(row.tokens)  # where this branch begins; its last token predicts nothing and is left out
        row.tokens.extend(member[shared:-1])
        row.positions.extend(range(shared, len(member) - 1))
        row.branches.extend([branch] * (len(member) - 1 - shared))
        for position in range(len(member) - scored, len(member)):
            before = position - 1
            row.predictors.append(before if before < shared else start + before - shared)
            row.targets.append(member[position])
            row.owners.append(owner)
    return row


def _forward(model: nn.Module, rows: Sequence[_Row], accelerator: Accelerator) -> Tensor:
    """Log-probabilities of all targets of all rows, float32 (targets,), one after the other."""
    device = accelerator.device
    width = max(len(row.tokens) for row in rows)
    # B rows, T = width, N targets

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([getattr(row, name) + [fill] * (width - len(row.tokens)) for row in rows])

    # Any id does as padding, for no real token looks at it: a missing pad token needs no special case.
    inputs = {"input_ids": padded("tokens", 0).to(device)}
    if any(max(row.branches) > 1 for row in rows):
        branches = padded("branches", -1).to(device)  # (B, T)
        visible = (branches[:, :, None] == branches[:, None, :]) | (branches[:, None, :] == 0)
        visible = visible.tril()[:, None]  # (B, 1, T, T); padding sees itself, so that no softmax is empty
        config = bare_model(model).config
        if config._attn_implementation == "eager":  # which adds its mask to the scores
            dtype = next(model.parameters()).dtype
            visible = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(
                ~visible, torch.finfo(dtype).min
            )
        inputs["attention_mask"] = visible
        inputs["position_ids"] = padded("positions", 0).to(device)

    chosen = torch.tensor(
        [b * width + p for b, row in enumerate(rows) for p in row.predictors], device=device
    )  # (N,)
    logits = logits_at(model, inputs, chosen)
    targets = torch.tensor([target for row in rows for target in row.targets], device=device)
    log_probabilities = []
    for part, wanted in zip(
        logits.split(POSITIONS_PER_CHUNK), targets.split(POSITIONS_PER_CHUNK), strict=True
    ):
        part = part.float()
        log_probabilities.append(part.gather(1, wanted[:, None])[:, 0] - part.logsumexp(1))
    return torch.cat(log_probabilities)


def logits_at(model: nn.Module, inputs: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Logits (N, vocabulary) at the positions `chosen`, (N,) indices into the flattened (B, T).

    The head, the largest product of a small model, is shown those positions alone, in any model that calls
    its output embeddings as a module; whatever it does to the logits afterwards is kept.
    """
    head = bare_model(model).get_output_embeddings()
    rows, width = inputs["input_ids"].shape

    def choose(module, args):
        hidden, *rest = args
        return (hidden.reshape(rows * width, -1)[chosen][None], *rest)  # (1, N, C)

    handle = head.register_forward_pre_hook(choose)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    if logits.shape[:2] == (rows, width) and (rows, width) != (1, len(chosen)):
        return logits.flatten(0, 1)[chosen]  # the hook was passed by
    return logits[0]
