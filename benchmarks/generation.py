"""Generation beside its peers: tokens/s at batch 1 and 16, 256 and 1,000 new tokens, greedy, 124M weights.

    python -m benchmarks.generation --peers DIR

Weights are random, the same numbers of them for all; a prompt has PROMPT_TOKENS, and no end token stops them.
The bound is memory: every new token of a batch reads all weights once.
"""

import contextlib
import io
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.contenders import NANOGPT, OURS, Shape, our_model, peer_model, stock_model, why_missing
from benchmarks.harness import (
    Result,
    Table,
    benchmark_parser,
    describe_limits,
    median,
    physical_limits,
    reported,
    timed,
    with_spread,
)

SHAPE = Shape(12, 12, 768, 50_257, 1024, 1)
TOY = Shape(2, 2, 32, 512, 64, 1)
PROMPT_TOKENS = 16
STOCK = "stock GPT-2"
# Long enough that nobody waits for it twice: these run once, the others as often as --rounds says.
SECONDS_RUN_ONCE = 15.0


def generate_with(model: Any, cache: str | None) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """transformers' generate; `static` compiles the step of one token by itself where it is told to."""
    from transformers import CompileConfig

    more: dict[str, Any] = {}
    if cache == "static":
        more = {"cache_implementation": "static"}
        if model.device.type == "cpu":  # on a GPU generate compiles static caches without being asked
            more["compile_config"] = CompileConfig(fullgraph=False, mode="default")
            more["compile_config"]._compile_all_devices = True

    def generate(prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **more,
        )

    return generate


def contenders(shape: Shape, arguments: Any) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Name → (prompt, new tokens) → all tokens."""
    device, found = arguments.device, {}
    torch.manual_seed(0)
    models: dict[str, Any] = {OURS: our_model(shape), STOCK: stock_model(shape)}
    for name, model in models.items():
        model.eval().to(device, getattr(torch, arguments.dtype))
        model.config.use_cache = True  # the steps of training leave it off
        model.generation_config.eos_token_id = None
        model.generation_config.use_cache = True
        found[f"{name}, dynamic cache"] = generate_with(model, None)
        if not arguments.no_compile:
            found[f"{name}, static cache, compiled"] = generate_with(model, "static")
    if not why_missing(NANOGPT, device, arguments.peers):
        with contextlib.redirect_stdout(io.StringIO()):
            nanogpt = peer_model(NANOGPT, shape, arguments.peers).eval()
        nanogpt.to(device, getattr(torch, arguments.dtype))
        found[NANOGPT] = lambda prompt, new_tokens: nanogpt.generate(prompt, new_tokens, top_k=1)
    return found


def measure(ways: dict, batch: int, new_tokens: int, shape: Shape, arguments: Any) -> list[dict]:
    prompt = torch.arange(batch * PROMPT_TOKENS).view(batch, PROMPT_TOKENS) % shape.vocabulary
    prompt = prompt.to(arguments.device)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, float] = {}
    with torch.no_grad():
        for name, generate in ways.items():
            began = time.perf_counter()
            # A static cache is made, and compiled for, at its full length.
            tokens = generate(prompt, new_tokens if "static" in name else 4)
            assert tokens.shape == (batch, PROMPT_TOKENS + (new_tokens if "static" in name else 4))
            first[name] = time.perf_counter() - began
        for number in range(arguments.rounds):
            for name, generate in ways.items():
                if number and batch * new_tokens / rates[name][0] > SECONDS_RUN_ONCE:
                    continue
                seconds = timed(partial(generate, prompt, new_tokens), arguments.device)
                rates[name].append(batch * new_tokens / seconds.wall)
    return [
        {"contender": name, "batch": batch, "new_tokens": new_tokens, "tokens_per_second": rates[name]}
        | {"first_call_seconds": first[name]}
        for name in ways
    ]


def table_of(figures: list[dict], limits: dict[str, float], shape: Shape, dtype: str) -> Table:
    rows = []
    for row in figures:
        same = [
            other
            for other in figures
            if (other["batch"], other["new_tokens"]) == (row["batch"], row["new_tokens"])
        ]
        speed = median(row["tokens_per_second"])
        bound = (
            row["batch"] * limits["bytes_per_second"] / (getattr(torch, dtype).itemsize * shape.parameters)
        )
        row["of_bound"] = speed / bound
        beside = []
        for peer in (f"{STOCK}, dynamic cache", f"{STOCK}, static cache, compiled", NANOGPT):
            theirs = [other for other in same if other["contender"] == peer]
            beside.append(f"{speed / median(theirs[0]['tokens_per_second']):.2f}" if theirs else "")
        rows.append(
            [
                f"{row['batch']}",
                f"{row['new_tokens']:,}",
                row["contender"],
                with_spread(row["tokens_per_second"], ",.1f"),
                f"{row['of_bound']:.0%}",
                *beside,
                f"{row['first_call_seconds']:.1f}",
            ]
        )
    columns = ["batch", "new tokens", "", "tokens/s (smallest–largest)", "of the memory bound"]
    columns += ["stock dynamic = 1", "stock compiled = 1", "nanoGPT = 1", "first call, s"]
    return Table(
        f"{dtype}, {shape.parameters / 1e6:,.0f} M parameters, {PROMPT_TOKENS} tokens before", columns, rows
    )


def main() -> None:
    parser = benchmark_parser(str(__doc__))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["1x256", "1x1000", "16x256"],
        help="batch x new tokens; 16x1000 adds ten minutes on two CPU cores",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of all weights")
    parser.add_argument("--no_compile", action="store_true", help="leave the compiled static caches out")
    parser.add_argument(
        "--nanogpt_tokens", type=int, default=256, help="ask nanoGPT for batch x new tokens up to so many"
    )
    arguments = parser.parse_args()
    shape = SHAPE
    if arguments.quick:
        shape, arguments.rounds, arguments.cases = TOY, 1, ["2x8"]
        arguments.no_compile = True
    torch.set_num_threads(arguments.threads)
    result = Result(
        "generation",
        "Generation",
        "The same prompt, greedy, to a fixed length, in turns in one process. nanoGPT has no cache. What "
        f"takes over {SECONDS_RUN_ONCE:.0f} s is run once.",
    )
    if why := why_missing(NANOGPT, arguments.device, arguments.peers):
        result.not_run.append([NANOGPT, why])
    if arguments.device == "cpu":
        result.not_run.append(["on a GPU", "the same command on a machine with one"])
    with reported(result, arguments.json):
        limits = physical_limits(arguments.device)
        result.about += f" Limits here, {arguments.threads} threads: {describe_limits(limits)}."
        ways = contenders(shape, arguments)
        for case in arguments.cases:
            batch, new_tokens = map(int, case.split("x"))
            some = dict(ways)
            if NANOGPT in some and batch * new_tokens > arguments.nanogpt_tokens:
                del some[NANOGPT]
                asked = f"--nanogpt_tokens {batch * new_tokens} runs it"
                result.not_run.append([f"{NANOGPT}, batch {batch}, {new_tokens:,} new tokens", asked])
            result.figures += measure(some, batch, new_tokens, shape, arguments)
            print(table_of(result.figures, limits, shape, arguments.dtype).as_markdown(), flush=True)
        result.tables.append(table_of(result.figures, limits, shape, arguments.dtype))


if __name__ == "__main__":
    main()
