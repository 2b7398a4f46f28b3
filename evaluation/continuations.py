"""Log-probabilities of continuations; what several have in common is computed once.

Continuations of one context stand in one row as a tree. A mask shows each token those on its way to the root
and positions count that way, so that each continuation is computed exactly as if it stood there alone:

    row        c0 c1 c2 a0 a1 b1 b2          c a0 a1 and c a0 b1 b2 both continue c
    parent      -  0  1  2  3  3  5
    position    0  1  2  3  4  4  5
    b1 sees     x  x  x  x     x
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from evaluation.isolation import bare_model, is_sharded, without_wrappers


@dataclass(frozen=True)
class Continuation:
    """A token sequence of which the last `scored` tokens count.

    Only neighbours of one `group` share a row: sequences that happen to begin alike would make it wide, and
    wide rows pad all others.
    """

    tokens: list[int]
    scored: int
    group: int = 0


@dataclass
class Row:
    """One row of a forward: a tree of tokens, each with its parent's place in the row (-1: it has none).

    `targets` lists which node should predict which token for which continuation, by its number.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)  # (parent, token) -> node

    def add(self, tokens: Sequence[int], scored: int, owner: int) -> None:
        node = -1
        for place, token in enumerate(tokens):
            if place >= len(tokens) - scored:
                self.targets.append((node, token, owner))
            if place == len(tokens) - 1:  # the last token predicts nothing and is left out
                break
            child = self.children.setdefault((node, token), len(self.tokens))
            if child == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(node)
                self.positions.append(place)
            node = child

    def room_for(self, tokens: Sequence[int], context: int | None) -> bool:
        """Whether these tokens begin like the row's, and the row then still fits the model's context."""
        node, known = -1, 0
        while known < len(tokens) - 1 and (node, tokens[known]) in self.children:
            node = self.children[node, tokens[known]]
            known += 1
        return known > 0 and (context is None or len(self.tokens) + len(tokens) - 1 - known <= context)


def lay_out(continuations: Sequence[Continuation], context: int | None, packed: bool) -> list[Row]:
    """Rows in the order of the continuations; neighbours of one group share a row if `packed`.

    What is longer than `context` inputs loses its beginning.
    """
    rows: list[Row] = []
    for owner, continuation in enumerate(continuations):
        tokens = continuation.tokens
        if context is not None and len(tokens) > context + 1:
            tokens = tokens[-(context + 1) :]
        scored = min(continuation.scored, len(tokens) - 1)  # the first token follows nothing
        joins = packed and owner > 0 and continuation.group == continuations[owner - 1].group
        if not (joins and rows[-1].room_for(tokens, context)):
            rows.append(Row())
        rows[-1].add(tokens, scored, owner)
    return rows


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

    Raises:
        ValueError: if a batch does not fit the memory and the model is sharded. The other processes are then
            inside this forward, waiting for this one's share of the weights; a second, smaller forward would
            answer them with the wrong layer's.
    """
    sums = torch.zeros(len(continuations), dtype=torch.float64)
    waiting = [lay_out(continuations, context, packed)]
    while waiting:
        rows = waiting.pop()
        try:
            log_probabilities = _forward(model, rows, accelerator)
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            if is_sharded(model):
                size = len(rows) * max(len(row.tokens) for row in rows)
                raise ValueError(
                    f"a batch of {size:,} tokens does not fit the memory of process "
                    f"{accelerator.process_index}, and one process alone cannot halve the batches of a "
                    "sharded model; give a smaller batch_tokens"
                ) from error
            if len(rows) == 1:
                raise
            middle = len(rows) // 2
            waiting += [rows[middle:], rows[:middle]]
            continue
        owners = torch.tensor([owner for row in rows for _, _, owner in sorted(row.targets)])
        sums.index_add_(0, owners, log_probabilities.double().cpu())
    return sums.tolist()


def supports_packing(model: nn.Module, examples: Sequence[Continuation], accelerator: Accelerator) -> bool:
    """Whether the model gives continuations in one row the same log-probabilities as alone.

    It does if it heeds masks of four dimensions and position ids, which is tried on the last few tokens of
    `examples`, of one group: recurrent models, sliding windows and attention kernels without free masks do
    not.
    """
    config = bare_model(model).config
    if not examples or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    # A few tokens of one beginning, then two branches that go apart and would disturb each other.
    beginning = examples[0].tokens[:4]
    branches = [[*beginning, *example.tokens[-4:]] for example in examples[:4]]
    few = [Continuation(tokens, 4) for tokens in branches]
    context = getattr(config, "max_position_embeddings", None)
    alone = score_continuations(model, few, accelerator, context=context, packed=False)
    try:
        together = score_continuations(model, few, accelerator, context=context, packed=True)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if should_reduce_batch_size(error):
            raise
        return False
    # Rounding alone differs: float32 sums of some ten nats in another order, or bfloat16's three digits.
    exact = next(model.parameters()).dtype == torch.float32 and accelerator.mixed_precision == "no"
    relative = 1e-5 if exact else 2e-2
    return all(abs(a - b) <= relative * max(1.0, abs(a)) for a, b in zip(alone, together, strict=True))


def _forward(model: nn.Module, rows: Sequence[Row], accelerator: Accelerator) -> Tensor:
    """Log-probabilities of all targets, float32 (targets,), row by row in the order of their nodes."""
    device = accelerator.device
    width = max(len(row.tokens) for row in rows)
    # B rows, T = width, N predicting nodes

    def padded(name: str) -> Tensor:
        # Any id does as padding, for no real token looks at it: a missing pad token needs no special case.
        return torch.tensor([getattr(row, name) + [0] * (width - len(row.tokens)) for row in rows])

    inputs = {"input_ids": padded("tokens").to(device)}
    if any(parent != place - 1 for row in rows for place, parent in enumerate(row.parents)):
        visible = torch.from_numpy(np.stack([_ancestors(row.parents, width) for row in rows]))
        config = bare_model(model).config
        if config._attn_implementation == "eager":  # which adds its mask to the scores
            dtype = next(model.parameters()).dtype
            visible = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        inputs["attention_mask"] = visible[:, None].to(device)  # (B, 1, T, T)
        inputs["position_ids"] = padded("positions").to(device)

    chosen: list[int] = []  # (N,) indices of predicting nodes in the flattened (B, T)
    slots, wanted = [], []  # of each target: where in `chosen` its node is, and the token
    for number, row in enumerate(rows):
        for node, token, _ in sorted(row.targets):
            place = number * width + node
            if not chosen or chosen[-1] != place:
                chosen.append(place)
            slots.append(len(chosen) - 1)
            wanted.append(token)
    logits = logits_at(model, inputs, torch.tensor(chosen, device=device))

    # Small parts stay in a processor's cache: 16 at a time take a quarter of the time that 256 take.
    part = 16 if device.type == "cpu" else 2048
    log_probabilities = []
    for first in range(0, len(chosen), part):
        begin, end = bisect_left(slots, first), bisect_left(slots, first + part)
        logs = logits[first : first + part].float().log_softmax(-1)
        places = torch.tensor([slots[begin:end], wanted[begin:end]], device=device)
        log_probabilities.append(logs[places[0] - first, places[1]])
    return torch.cat(log_probabilities)


def _ancestors(parents: Sequence[int], width: int) -> np.ndarray:
    """Which tokens each one sees, bool (width, width): itself and those on its way to the root."""
    visible = np.eye(width, dtype=bool)  # padding sees itself, so that no softmax is empty
    for node, parent in enumerate(parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    return visible


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
        logits = without_wrappers(model)(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    if logits.shape[:2] == (rows, width) and (rows, width) != (1, len(chosen)):
        return logits.flatten(0, 1)[chosen]  # the hook was passed by
    return logits[0]
