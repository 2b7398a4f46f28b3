"""One export, every consumer: `python -m release.verify artifacts/runs/demo/export`.

Each consumer gets the same token ids; its logits are compared with those of our model in float32, and so is
what it writes greedily. A table says how far they are, and the command fails if one is past its tolerance.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from release.export import (
    GGUF_FILE,
    ONNX_FILE,
    NotInstalled,
    export_gguf,
    export_onnx,
    export_stock,
    export_torchao,
    load_export,
)
from release.folder import ReleaseError, read_config

PROBE_ROWS, PROBE_TOKENS, NEW_TOKENS = 2, 24, 12
# Contractions, digits, runs of blanks, line ends and other scripts: where byte-level tokenizers differ.
PROBE_TEXT = "Don't look: the bell, cracked in 1887, hangs – still – over  two ropes.\n\tÄlter als 50 €?"

# How far logits may be: the norm of the difference over that of the reference, both centred at each position.
SAME_CODE = 1e-6  # the same operations; threads may be shared out in another way
FLOAT32 = 1e-5  # the same function, its sums in another order
LLAMA_CPP = 2e-3  # its GELU is a table in float16, and so are its keys and values: 4e-4 was measured
BFLOAT16 = 5e-2  # eight bits of precision after every operation
INT8 = 5e-2  # a weight to 1/254 of its row's largest, through some layers
INT4 = 3e-1  # to 1/30 of its group's range: 9% of the norm of normal weights, through some layers


@dataclass(frozen=True)
class Probe:
    """What every consumer is given, and what our model in float32 answers."""

    folder: Path
    work: Path  # a temporary folder
    input_ids: torch.Tensor  # int64 (PROBE_ROWS, PROBE_TOKENS)
    logits: np.ndarray  # float32 (PROBE_ROWS, PROBE_TOKENS, vocabulary)
    written: list[int]  # NEW_TOKENS after the first row


@dataclass(frozen=True)
class Answer:
    """A consumer's logits, of the whole probe or of its first row, and what it wrote after the first row."""

    logits: np.ndarray
    written: list[int]


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # "ok", "FAILED", "not installed"
    tolerance: float
    difference: float | None
    same_tokens: int | None
    seconds: float
    note: str


def verify(folder: Path, names: Sequence[str] = (), say: Callable[[str], object] = print) -> list[Outcome]:
    """Try the named consumers, or all, one after the other.

    Raises:
        ReleaseError: if the folder is no whole export, or there is no such consumer.
    """
    if unknown := sorted(set(names) - set(CONSUMERS)):
        raise ReleaseError(f"{', '.join(unknown)}: no such consumer; there are {', '.join(CONSUMERS)}")
    outcomes = []
    with tempfile.TemporaryDirectory() as work:
        probe = _ask(folder, Path(work))
        for name, (consume, tolerance) in CONSUMERS.items():
            if names and name not in names:
                continue
            outcomes.append(_try(name, consume, tolerance, probe))
            say(_row(outcomes[-1]))
    return outcomes


def _ask(folder: Path, work: Path) -> Probe:
    model, tokenizer = load_export(folder)
    length = min(PROBE_TOKENS, model.config.n_positions - NEW_TOKENS)
    if length < 2:
        raise ReleaseError(f"a context of {model.config.n_positions} tokens is too short to try anything")
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(len(tokenizer), (PROBE_ROWS, length), generator=generator)
    answer = _answer(model, input_ids)
    return Probe(folder, work, input_ids, answer.logits, answer.written)


def _answer(model: Any, input_ids: torch.Tensor, cache: str | None = None) -> Answer:
    """Of a model of transformers, which writes with the kind of `cache` that generate knows by this name."""
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits.float().numpy()
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        settings["cache_implementation"] = cache
        first = input_ids[:1]
        written = model.generate(
            first, attention_mask=torch.ones_like(first), max_new_tokens=NEW_TOKENS, **settings
        )
    return Answer(logits, written[0, first.shape[1] :].tolist())


def _greedily(probe: Probe, last_logits: Callable[[list[int]], np.ndarray]) -> list[int]:
    """NEW_TOKENS from what gives the logits (vocabulary,) after some ids, without a cache."""
    ids = probe.input_ids[0].tolist()
    for _ in range(NEW_TOKENS):
        ids.append(int(last_logits(ids).argmax()))
    return ids[-NEW_TOKENS:]


REMOTE = """
import json, sys
import numpy
import torch
from transformers import AutoModelForCausalLM
folder, ids, new, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
where = type(model).__module__
assert where.startswith("transformers_modules"), f"the class came from {where}, not from the folder"
ids = torch.tensor(ids)
with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits.numpy()
    first = ids[:1]
    text = model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=new, do_sample=False,
                          eos_token_id=None, pad_token_id=0)
numpy.save(out, logits)
print(json.dumps(text[0, first.shape[1]:].tolist()))
"""


def _remote_code(probe: Probe) -> Answer:
    """Our class as a stranger gets it: the folder's own code, in a process without this repository."""
    out = probe.work / "remote.npy"
    environment = {**os.environ, "HF_MODULES_CACHE": str(probe.work / "modules"), "HF_HUB_OFFLINE": "1"}
    ids = json.dumps(probe.input_ids.tolist())
    folder = str(probe.folder.resolve())
    # -I: neither the working folder nor PYTHONPATH are searched for modules.
    command = [sys.executable, "-I", "-c", REMOTE, folder, ids, str(NEW_TOKENS), str(out)]
    done = subprocess.run(command, env=environment, cwd=probe.work, capture_output=True, text=True)
    if done.returncode != 0:
        # An exception that nobody caught ends Python with 1, and its last line says which.
        said = done.stderr.strip().splitlines() if done.returncode == 1 else []
        raise RuntimeError(said[-1] if said else f"its process ended with the status {done.returncode}")
    return Answer(np.load(out, allow_pickle=False), json.loads(done.stdout.splitlines()[-1]))


def _stock(probe: Probe) -> Answer:
    export_stock(probe.folder, probe.work / "stock")
    return _answer(GPT2LMHeadModel.from_pretrained(probe.work / "stock").eval(), probe.input_ids)


def _compiled(probe: Probe) -> Answer:
    if torch.device("cpu") == probe.input_ids.device and not any(
        map(shutil.which, ("c++", "g++", "clang++"))
    ):
        raise NotInstalled(
            "a C++ compiler is not installed: apt install g++ (torch.compile needs it on the CPU)"
        )
    model, _ = load_export(probe.folder)
    model.compile()  # in place: what torch.compile returns would generate with the model that it wraps
    # The cache for compiled models. Of one that grows torch 2.11 makes C++ that no compiler takes, of stock
    # GPT-2 as well.
    return _answer(model, probe.input_ids, cache="static")


def _bfloat16(probe: Probe) -> Answer:
    return _answer(load_export(probe.folder, torch.bfloat16)[0], probe.input_ids)


def _onnx(probe: Probe) -> Answer:
    try:
        import onnxruntime
    except ImportError:
        raise NotInstalled("onnxruntime not installed: pip install onnx onnxscript onnxruntime") from None
    export_onnx(probe.folder, probe.work / "onnx")
    session = onnxruntime.InferenceSession(
        str(probe.work / "onnx" / ONNX_FILE), providers=["CPUExecutionProvider"]
    )

    def run(rows: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {"input_ids": rows})[0]

    written = _greedily(probe, lambda ids: run(np.array([ids]))[0, -1])
    return Answer(run(probe.input_ids.numpy()), written)


def _gguf(probe: Probe) -> Answer:
    """Read back by transformers' own reader, which knows nothing of our writer; its tokenizer too."""
    path = _gguf_file(probe)
    config = read_config(probe.folder)
    # Its reader knows neither the context's length nor the width of the MLP, and takes GPT-2's 1,024 and 4 x.
    sizes: Any = {name: config.get(name) for name in ("n_positions", "n_inner")}
    model = GPT2LMHeadModel.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **sizes
    ).eval()
    ours = AutoTokenizer.from_pretrained(probe.folder, trust_remote_code=False)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if ours(PROBE_TEXT)["input_ids"] != theirs(PROBE_TEXT)["input_ids"]:
        raise RuntimeError("the tokenizer in the GGUF file splits text in another way")
    return _answer(model, probe.input_ids)


def _llama_cpp(probe: Probe) -> Answer:
    """The file in the program that it is for, its tokenizer too."""
    try:
        import llama_cpp
    except ImportError:
        raise NotInstalled("llama_cpp not installed: pip install llama-cpp-python") from None
    length = probe.input_ids.shape[1] + NEW_TOKENS
    llama = llama_cpp.Llama(
        str(_gguf_file(probe)), n_ctx=length, n_batch=length, logits_all=True, verbose=False, n_threads=1
    )

    ours = AutoTokenizer.from_pretrained(probe.folder, trust_remote_code=False)
    if ours(PROBE_TEXT)["input_ids"] != llama.tokenize(PROBE_TEXT.encode(), add_bos=False, special=False):
        raise RuntimeError("llama.cpp splits text in another way than the tokenizer of the folder")

    def run(ids: list[int]) -> np.ndarray:
        llama.reset()
        llama.eval(ids)
        return np.array(llama.scores[: len(ids)])

    first = probe.input_ids[0].tolist()
    return Answer(run(first)[None], _greedily(probe, lambda ids: run(ids)[-1]))


def _gguf_file(probe: Probe) -> Path:
    path = probe.work / "gguf" / GGUF_FILE
    if not path.exists():
        export_gguf(probe.folder, path)
    return path


def _torchao(probe: Probe, kind: str) -> Answer:
    """Saved and loaded again, as a user would."""
    export_torchao(probe.folder, probe.work / kind, kind)
    return _answer(AutoModelForCausalLM.from_pretrained(probe.work / kind).eval(), probe.input_ids)


Consumer = Callable[[Probe], Answer]
CONSUMERS: dict[str, tuple[Consumer, float]] = {
    "remote-code": (_remote_code, SAME_CODE),
    "stock": (_stock, FLOAT32),
    "compile": (_compiled, FLOAT32),
    "bfloat16": (_bfloat16, BFLOAT16),
    "onnx": (_onnx, FLOAT32),
    "gguf": (_gguf, FLOAT32),
    "llama.cpp": (_llama_cpp, LLAMA_CPP),
    "torchao-int8": (partial(_torchao, kind="int8"), INT8),
    "torchao-int4": (partial(_torchao, kind="int4"), INT4),
}


def _try(name: str, consume: Consumer, tolerance: float, probe: Probe) -> Outcome:
    began = time.monotonic()
    try:
        answer = consume(probe)
    except NotInstalled as error:
        return Outcome(name, "not installed", tolerance, None, None, 0.0, str(error))
    except Exception as error:  # one consumer's failure is a row, not the end of the table
        seconds = time.monotonic() - began
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome(name, "FAILED", tolerance, None, None, seconds, reason)
    seconds = time.monotonic() - began
    difference = relative_difference(answer.logits, probe.logits[: len(answer.logits)])
    same = _same_start(answer.written, probe.written)
    note = ""
    if not difference <= tolerance:  # also where it is not a number
        note = f"logits are {difference:.1e} away, more than {tolerance:.0e}"
    elif tolerance <= FLOAT32 and same < NEW_TOKENS:
        note = f"writes {answer.written[same]} where our model writes {probe.written[same]}"
    return Outcome(name, "FAILED" if note else "ok", tolerance, difference, same, seconds, note)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, of logits without what all words of a position have in common."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = (x - x.mean(-1, keepdims=True) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _same_start(written: list[int], expected: list[int]) -> int:
    pairs = list(zip(written, expected, strict=False))
    return next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs))


HEADER = f"{'consumer':<14}{'result':<15}{'difference':>11}{'allowed':>9}{'same tokens':>13}{'seconds':>9}"


def _row(outcome: Outcome) -> str:
    difference = "" if outcome.difference is None else f"{outcome.difference:.1e}"
    same = "" if outcome.same_tokens is None else f"{outcome.same_tokens} of {NEW_TOKENS}"
    cells = f"{outcome.name:<14}{outcome.status:<15}{difference:>11}{outcome.tolerance:>9.0e}{same:>13}"
    return f"{cells}{outcome.seconds:>9.1f}" + (f"  {outcome.note}" if outcome.note else "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m release.verify", description="One export, every consumer."
    )
    parser.add_argument("folder", type=Path, help="an export, such as artifacts/runs/demo/export")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=", ".join(CONSUMERS))
    arguments = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    print(HEADER)
    try:
        outcomes = verify(arguments.folder, arguments.only)
    except (ReleaseError, OSError) as error:
        sys.exit(f"error: {error}")
    if failed := [outcome.name for outcome in outcomes if outcome.status == "FAILED"]:
        sys.exit(f"error: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
