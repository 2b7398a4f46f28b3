"""A model, loaded in the background, that writes several rooms at once for several visitors."""

import queue
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import modeling_gpt_scratch  # noqa: F401  (registers our classes: our exports load without code of theirs)
from data.dungeons import build_prompt
from evaluation.loading import load_causal_model
from release.folder import check_export

DEFAULT_CONTEXT = 1024  # of a model whose configuration names none
DEFAULT_TOP_P = 0.95
SECONDS_BETWEEN_UPDATES = 0.08


class SampleByRow(LogitsProcessor):
    """Makes the largest score of each row a draw from its softmax, by that row's own seed (Gumbel-max).

    What a row draws depends neither on its neighbours nor on any random state that visitors share.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        draws = [torch.empty(scores.shape[1]).exponential_(generator=one) for one in self.generators]
        return scores.float() - torch.stack(draws).log().to(scores.device)  # type: ignore[return-value]


class StopWhenAsked(StoppingCriteria):
    """All rows end as soon as `asked` is set."""

    def __init__(self, asked: threading.Event):
        self.asked = asked

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


class Tokens(BaseStreamer):
    """Hands on the tokens of a whole batch, (B,) at a time; transformers' own streamer takes one row."""

    def __init__(self, pieces: "queue.SimpleQueue[Any]"):
        self.pieces, self.prompt_is_over = pieces, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_over:
            self.pieces.put(value.tolist())
        self.prompt_is_over = True

    def end(self) -> None:
        self.pieces.put(None)


class Writer:
    """A causal language model of this name, a folder or on the Hub, and its tokenizer.

    `state` is "loading", "ready" or "failed", and `problem` says why it failed.
    """

    def __init__(self, name: str, device: torch.device, trust_remote_code: bool = False):
        self.name, self.device, self.trust_remote_code = name, device, trust_remote_code
        self.state, self.problem = "failed", "not loaded yet"
        self.lock = threading.Lock()

    def load(self) -> None:
        """Begin to load, unless that goes on or is done; a failed attempt is made again."""
        with self.lock:
            if self.state == "failed":
                self.state, self.problem = "loading", ""
                threading.Thread(target=self._load, daemon=True).start()

    def _load(self) -> None:
        try:
            # Whatever is no folder and could be a name on the Hub is looked for there.
            if Path(self.name).is_dir() or self.name.count("/") > 1 or self.name.startswith((".", "/")):
                check_export(Path(self.name))
            dtype = "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
            model, tokenizer = load_causal_model(
                self.name, dtype=dtype, device=self.device, trust_remote_code=self.trust_remote_code
            )
            # Weights on the CPU are views of the file. Copied, they outlive whatever is done to the folder.
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
            self.model, self.tokenizer = model, tokenizer
            self.context = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
            self.parameters = sum(parameter.numel() for parameter in model.parameters())
            self.state = "ready"
        except Exception as error:
            self.problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self.state = "failed"
            print(f"The model {self.name} was not loaded: {self.problem}", file=sys.stderr)

    def prompt_tokens(self, fields: Mapping[str, str]) -> int:
        return len(self.tokenizer(build_prompt(**fields))["input_ids"])

    def write(
        self, fields: Mapping[str, str], seeds: Sequence[int], temperature: float, max_new_tokens: int
    ) -> Generator[list[tuple[str, bool]], None, None]:
        """Each seed's text so far and whether it has come to its end, again and again until all are written.

        A text depends on the fields, its seed, the temperature and the length. Closing the iterator ends the
        generation after the token at hand. The log gets their number and nothing of their content.
        """
        tokenizer, pieces, gone = self.tokenizer, queue.SimpleQueue[Any](), threading.Event()
        start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        prompt = tokenizer(build_prompt(**fields))["input_ids"] or [start_id]
        input_ids = torch.tensor([prompt] * len(seeds), device=self.device)
        tuned = self.model.generation_config  # type: ignore[attr-defined]
        ends = tuned.eos_token_id if tuned.eos_token_id is not None else tokenizer.eos_token_id
        end_ids = {ends} if isinstance(ends, int) else set(ends or ())
        settings = GenerationConfig(
            do_sample=False,  # SampleByRow draws, and what is the model's own is in `draw`
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else min(end_ids, default=0),
            repetition_penalty=tuned.repetition_penalty or 1.0,
            # A vocabulary padded for tensor cores has rows that stand for no token.
            suppress_tokens=list(range(len(tokenizer), self.model.config.vocab_size)) or None,
        )
        draw = [
            TemperatureLogitsWarper(temperature),
            TopPLogitsWarper(tuned.top_p or DEFAULT_TOP_P),
            SampleByRow(seeds),
        ]

        def generate() -> None:
            try:
                self.model.generate(  # type: ignore[operator]
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList(draw),
                    stopping_criteria=StoppingCriteriaList([StopWhenAsked(gone)]),
                    streamer=Tokens(pieces),
                )
            except Exception as error:
                pieces.put(error)

        threading.Thread(target=generate, daemon=True).start()
        rows: list[list[int]] = [[] for _ in seeds]
        goes_on = True
        try:
            while goes_on:
                piece = pieces.get()
                until = time.monotonic() + SECONDS_BETWEEN_UPDATES
                while piece is not None:
                    if isinstance(piece, Exception):
                        raise piece
                    for row, token in zip(rows, piece, strict=True):
                        if not row or row[-1] not in end_ids:
                            row.append(token)
                    try:
                        piece = pieces.get(timeout=max(0.0, until - time.monotonic()))
                    except queue.Empty:
                        break
                else:
                    goes_on = False
                # A character may be spread over tokens: its first bytes alone are no text yet.
                texts = [
                    text.rstrip("\ufffd").strip()
                    for text in tokenizer.batch_decode(rows, skip_special_tokens=True)
                ]
                yield [
                    (text, bool(row) and row[-1] in end_ids) for text, row in zip(texts, rows, strict=True)
                ]
        finally:
            gone.set()
            count = f"rooms: {len(rows)}, tokens: {sum(map(len, rows)):,}"
            print(count if not goes_on else f"{count}, broken off", file=sys.stderr, flush=True)
