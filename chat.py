"""A trained model in a terminal: it goes on with what you type, as it writes.

    python chat.py
    python chat.py --rooms

An empty line goes on where the text stopped, Ctrl-C stops the text, Ctrl-D ends. These are no models for
conversation: a line is a beginning, and what comes is what might follow. `--rooms` asks the dungeon writer's
fields, one after the other.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

import modeling_gpt_scratch  # noqa: F401  (registers the Auto classes)
from data.dungeons import FIELDS, build_prompt
from evaluation.loading import load_causal_model

with contextlib.suppress(ImportError):  # not on every system; gives input() its arrow keys
    import readline  # noqa: F401

SEEDS = 2**32  # as many as numpy's generator, which set_seed seeds too, takes
DEMO, ROOMS = "artifacts/runs/demo/export", "artifacts/runs/dungeons/export"


class Terminal(TextStreamer):
    """Prints text as it is written, and keeps it; without what would steer a terminal."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = "".join(c for c in text if c.isprintable() or c in "\n\t")
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="chat.py", description="A trained model goes on with what you type. Ctrl-D ends."
    )
    parser.add_argument("--model", help=f"a folder or a Hub id (default: {DEMO}; with --rooms {ROOMS})")
    parser.add_argument("--rooms", action="store_true", help="ask the dungeon writer's fields")
    parser.add_argument("--max_new_tokens", type=int, default=120, help="of an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (%(default)s)")
    parser.add_argument("--top_p", type=float, default=0.95, help="the nucleus (%(default)s)")
    parser.add_argument("--seed", type=int, help="to write the same again")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model"
    )
    settings = parser.parse_args(argv)
    if problems := problems_with(settings):
        sys.exit(f"error: {'; '.join(problems)}")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        name = settings.model or (ROOMS if settings.rooms else DEMO)
        model, tokenizer = load_causal_model(
            name, dtype="float32", device=device, trust_remote_code=settings.trust_remote_code
        )
        longest_prompt = longest_prompt_of(settings.max_new_tokens, model)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if settings.seed is not None:
        set_seed(settings.seed)
    text = ""
    try:
        while True:
            text = ask_for_room() if settings.rooms else ask("\n> ") or text
            text += write(text, model, tokenizer, settings, longest_prompt)
    except (EOFError, KeyboardInterrupt):
        print()


def problems_with(settings: argparse.Namespace) -> list[str]:
    """Values that nothing could be written with; which lengths are possible only the model knows."""
    problems = []
    if not 0 <= settings.temperature < math.inf:
        problems.append(f"temperature={settings.temperature} is not a number from 0 up")
    if not 0 < settings.top_p <= 1:
        problems.append(f"top_p={settings.top_p} is not above 0 and at most 1 (1 is no nucleus)")
    if settings.seed is not None and not 0 <= settings.seed < SEEDS:
        problems.append(f"seed={settings.seed} is not in 0..{SEEDS - 1}")
    return problems


def longest_prompt_of(max_new_tokens: int, model: Any) -> int | None:
    """Tokens that a prompt may have, or None where the model sets no limit.

    Raises:
        ValueError: if `max_new_tokens` leaves none.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if max_new_tokens < 1 or (context is not None and max_new_tokens >= context):
        raise ValueError(f"max_new_tokens={max_new_tokens} is not in 1..{(context or 0) - 1} (the context)")
    return None if context is None else context - max_new_tokens


def ask(question: str) -> str:
    """A line that was typed; bytes that are no text become question marks."""
    return input(question).encode(errors="replace").decode()


def ask_for_room() -> str:
    """A prompt from the fields that are not left empty."""
    print("\nAny of these may stay empty; commas separate several:")
    return build_prompt(**{name: ask(f"{name}: ").strip() for name in FIELDS})


def write(text: str, model: Any, tokenizer: Any, settings: argparse.Namespace, longest: int | None) -> str:
    """What the model writes after `text`, printed meanwhile; what there is of it, if Ctrl-C stops it."""
    ids = tokenizer(text or tokenizer.eos_token, return_tensors="pt")["input_ids"]
    if longest is not None and ids.shape[1] > longest:
        print(f"(the model sees the last {longest} of these {ids.shape[1]} tokens)")
        ids = ids[:, -longest:]
    terminal = Terminal(tokenizer)
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
    try:
        model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=terminal,
            **sampling,
        )
    except KeyboardInterrupt:
        print()
    return terminal.text


if __name__ == "__main__":
    main()
