"""Log-probabilities of continuations; what several have in common is computed once.

Continuations of one context stand in one row as a tree. A mask shows each token those on its way to the root
and positions count that way, so that each continuation is computed exactly as if it stood there alone:

    row        c0 c1 c2 a0 a1 b1 b2          c a0 a1 and c a0 b1 b2 both continue c
    position    0  1  2  3  4  4  5
    way a       x  x  x  x  x
    way b       x  x  x  x     x  x          of the tokens before it, b1 sees those that share a way with it
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedConfig

from evaluation.isolation import bare_model, is_sharded, without_wrappers

# The ways through a token are bits of an int64.
MOST_IN_A_ROW = 62
# What configurations call the number of tokens that a near-sighted layer sees.
WINDOW_NAMES = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
)


@dataclass(frozen=True)
class Continuation:
    """A token sequence of which the last `scored` tokens count."""

    tokens: list[int]
    scored: int


@dataclass
class Row:
    """One row of a forward: a tree of tokens, each continuation a way from the root.

    By token: `tokens`, `positions`, and `ways`, in which bit i says that the row's continuation i goes
    through it. By target: `sources`, the place of the token that predicts it, `wanted`, the token that
    should come, and `owners`, the number of its continuation. `paths` are each continuation's input tokens
    and their places.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ways: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    paths: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def add(self, tokens: list[int], scored: int, owner: int, context: int | None) -> bool:
        """Whether these begin like what is there and the row then still fits the context; if so they are in.

        The first ones always are.
        """
        inputs = tokens[:-1]  # the last token predicts nothing and is left out
        shared, path = 0, []
        for known, places in self.paths:
            common = _common_beginning(inputs, known)
            if common > shared:
                shared, path = common, places
        width = len(self.tokens) + len(inputs) - shared
        if self.paths and (
            not shared or len(self.paths) == MOST_IN_A_ROW or (context is not None and width > context)
        ):
            return False
        way = 1 << len(self.paths)
        path = [*path[:shared], *range(len(self.tokens), width)]
        for place in path[:shared]:
            self.ways[place] |= way
        self.tokens += inputs[shared:]
        self.positions += range(shared, len(inputs))
        self.ways += [way] * (len(inputs) - shared)
        self.sources += path[len(inputs) - scored :]
        self.wanted += tokens[len(tokens) - scored :]
        self.owners += [owner] * scored
        self.paths.append((inputs, path))
        return True


def _common_beginning(a: list[int], b: list[int]) -> int:
    """How many tokens the two begin with alike."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def lay_out(
    continuations: Sequence[Continuation], context: int | None, packed: bool, first_owner: int = 0
) -> list[Row]:
    """Rows in the order of the continuations, which are numbered from `first_owner`; neighbours that begin
    alike share a row if `packed`.

    What is longer than `context` inputs loses its beginning.
    """
    rows: list[Row] = []
    for owner, continuation in enumerate(continuations, start=first_owner):
        tokens = continuation.tokens
        if context is not None and len(tokens) > context + 1:
            tokens = tokens[-(context + 1) :]
        scored = min(continuation.scored, len(tokens) - 1)  # the first token follows nothing
        if not (packed and rows and rows[-1].add(tokens, scored, owner, context)):
            rows.append(Row())
            rows[-1].add(tokens, scored, owner, context)
    return rows


@dataclass
class Budget:
    """The most tokens of one forward, padding included: it remembers what the memory did not take."""

    tokens: float = math.inf


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of targets, float32 (targets,), which the device may still be computing, and the
    number of the continuation of each, int64 (targets,).
    """

    log_probabilities: Tensor
    owners: Tensor


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
    beginning. Errors as `score_rows`.
    """
    sums = torch.zeros(len(continuations), dtype=torch.float64)
    add_up(sums, score_rows(model, lay_out(continuations, context, packed), accelerator, Budget()))
    return sums.tolist()


def score_rows(
    model: nn.Module, rows: Sequence[Row], accelerator: Accelerator, budget: Budget
) -> list[Scored]:
    """Start the forward of these rows, and of its parts where it is more than `budget` or the memory takes.

    A batch that does not fit the memory is halved, down to one row, and the budget with it.

    Raises:
        ValueError: if a batch does not fit the memory and the model is sharded. The other processes are then
            inside this forward, waiting for this one's share of the weights; a second, smaller forward would
            answer them with the wrong layer's.
    """
    scored, waiting = [], [rows]
    while waiting:
        rows = waiting.pop()
        width, middle = max(len(row.tokens) for row in rows), (len(rows) + 1) // 2
        if len(rows) * width <= budget.tokens or len(rows) == 1:
            try:
                scored.append(_forward(model, rows, accelerator))
                continue
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                if is_sharded(model):
                    raise ValueError(
                        f"a batch of {len(rows) * width:,} tokens does not fit the memory of process "
                        f"{accelerator.process_index}, and one process alone cannot halve the batches of a "
                        "sharded model; give a smaller batch_tokens"
                    ) from error
                if len(rows) == 1:
                    raise
            budget.tokens = middle * width
            clear_device_cache()
        waiting += [rows[middle:], rows[:middle]]
    return scored


def add_up(sums: Tensor, scored: Sequence[Scored]) -> None:
    """Add each log-probability to its continuation's in `sums`, float64 on the CPU. Waits for the device."""
    if scored:
        found = torch.cat([part.log_probabilities for part in scored]).cpu().double()
        sums.index_add_(0, torch.cat([part.owners for part in scored]), found)


def supports_packing(
    model: nn.Module, examples: Sequence[Continuation], longest_row: int, accelerator: Accelerator
) -> bool:
    """Whether the model gives continuations in one row the same log-probabilities as alone.

    It does if it heeds masks of four dimensions and position ids, which is tried on the last few tokens of
    `examples`, of one beginning (recurrent models and attention kernels without free masks do not), and if no
    layer sees less than the longest row that is to be scored, in tokens: windows count places in the row, or
    are forgotten where a mask is given. So few tokens show no window; the configuration names it.
    """
    config = bare_model(model).config
    if not examples or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    if longest_row > attention_window(config):
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


def attention_window(config: PreTrainedConfig) -> float:
    """Up to how many tokens of a row every layer sees all that came before; inf if there is no limit.

    0 where the configuration has layers of other kinds than full attention and does not say how far they see.
    """
    config = config.get_text_config()
    sizes = [getattr(config, name, None) for name in WINDOW_NAMES]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    kinds = set(getattr(config, "layer_types", None) or ())
    return min(known, default=0.0 if kinds - {"full_attention"} else math.inf)


def _forward(model: nn.Module, rows: Sequence[Row], accelerator: Accelerator) -> Scored:
    """Start one forward of `rows`; nothing in it waits for the device."""
    device = accelerator.device
    width = max(len(row.tokens) for row in rows)
    # B rows, T = width, N predicting tokens

    # Any id does as padding, for no real token looks at it: a missing pad token needs no special case.
    columns = np.zeros((3, len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        columns[:, number, : len(row.tokens)] = row.tokens, row.positions, row.ways
    input_ids, position_ids, ways = _sent(torch.from_numpy(columns), device)  # each (B, T)
    inputs = {"input_ids": input_ids}
    if any(len(row.paths) > 1 for row in rows):
        visible = _visible(ways)  # (B, T, T)
        if bare_model(model).config._attn_implementation == "eager":  # which adds its mask to the scores
            dtype = next(model.parameters()).dtype
            nothing = torch.zeros((), dtype=dtype, device=device)
            visible = torch.where(visible, nothing, torch.finfo(dtype).min)
        inputs |= {"attention_mask": visible[:, None], "position_ids": position_ids}

    # Of each target: the place of its predicting token in the flattened (B, T), its own token, its owner.
    places = [number * width + place for number, row in enumerate(rows) for place in row.sources]
    wanted = [token for row in rows for token in row.wanted]
    owners = [owner for row in rows for owner in row.owners]
    targets = np.array([places, wanted, owners], dtype=np.int64)
    targets = targets[:, np.argsort(targets[0], kind="stable")]
    chosen, slots = np.unique(targets[0], return_inverse=True)  # (N,), and where in it each target's place is
    logits = logits_at(model, inputs, _sent(torch.from_numpy(chosen), device))

    # Small parts stay in a processor's cache: 16 at a time take a quarter of the time that 256 take.
    part = 16 if device.type == "cpu" else 2048
    indices = _sent(torch.from_numpy(np.stack([slots % part, targets[1]])), device)
    bounds = np.searchsorted(slots, range(0, len(chosen) + part, part)).tolist()
    log_probabilities = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        logs = logits[number * part : (number + 1) * part].log_softmax(-1, dtype=torch.float32)
        log_probabilities.append(logs[indices[0, begin:end], indices[1, begin:end]])
    return Scored(torch.cat(log_probabilities), torch.from_numpy(targets[2]))


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU by way of pinned memory, from which the host need not wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _visible(ways: Tensor) -> Tensor:
    """Which tokens each one sees, bool (B, T, T), from the bits (B, T) of the ways through each.

    Places grow along a way, so that of two tokens on one way the earlier is above the later.
    """
    together = (ways[:, :, None] & ways[:, None, :]) != 0
    # Padding is on no way and sees itself, so that no softmax is empty.
    return together.tril() | torch.eye(ways.shape[1], dtype=torch.bool, device=ways.device)


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
