"""Tokenizers: the fast encoder gives the slow one's ids, `<|endoftext|>` in a text is text, fingerprints
hold.
"""

import functools
import json

import gigatoken
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.encoder import (
    IS_UNLIKE,
    PIECE_CHARACTERS,
    PROBE_TEXTS,
    REMEMBERED_BYTES,
    UNLIKE_RANGES,
    FastEncoder,
    split_long,
)
from data.tokenizer import (
    fingerprint_of_format_1,
    gpt2_tokenizer,
    load_tokenizer,
    token_byte_lengths,
    tokenizer_fingerprint,
    train_tokenizer,
)

PROSE = [
    "The corridor bends north. A cold draught smells of wet stone and old iron.",
    "You stand before a door of black oak; its hinges weep rust.",
    "Beyond it, something counts slowly in the dark: one, two, three.",
    *PROBE_TEXTS,
] * 5


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def small():
    return train_tokenizer(PROSE, 400)


@functools.cache
def plain_backend(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return backend


def reference_ids(tokenizer, text):
    """Ids by the plain `tokenizers` engine, special tokens in the text being text."""
    return plain_backend(tokenizer).encode(text, add_special_tokens=False).ids


@functools.cache
def fast_encoder(tokenizer):
    return FastEncoder(tokenizer)


def test_gpt2_needs_no_network_and_knows_its_published_ids(gpt2):
    assert len(gpt2) == 50_257
    assert gpt2.eos_token_id == gpt2.bos_token_id == 50_256
    # "Hello, I'm a language model," as in the examples of OpenAI's and Hugging Face's model cards.
    assert gpt2("Hello, I'm a language model,").input_ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


def test_gpt2_falls_back_to_the_package_and_says_so(capsys, monkeypatch, gpt2):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens there
    assert tokenizer_fingerprint(load_tokenizer("gpt2")) == tokenizer_fingerprint(gpt2)
    assert "cannot be reached" in capsys.readouterr().out


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_fast_ids_are_the_slow_ids_on_any_text(gpt2, small, text):
    for tokenizer in (gpt2, small):
        encoder = fast_encoder(tokenizer)
        assert encoder.is_fast, encoder.why_slow
        (ids,) = encoder.encode_batch([text])
        assert ids.tolist() == reference_ids(tokenizer, text)
        assert ids.dtype == np.uint16


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(
        st.sampled_from([chr(first) for first, _ in UNLIKE_RANGES] + list("a1 '!s\n日")), max_size=40
    )
)
def test_characters_newer_than_the_slow_encoders_unicode_get_its_ids(gpt2, small, text):
    """`'s` after a letter of Unicode 17 is a word for gigatoken; tokenizers sees no letter there."""
    for tokenizer in (gpt2, small):
        encoder = fast_encoder(tokenizer)
        assert encoder.encode_batch([text])[0].tolist() == reference_ids(tokenizer, text)


@pytest.mark.slow
def test_every_character_is_cut_alike_by_both_engines_or_known_not_to_be():
    """Should this fail after an update of either, UNLIKE_RANGES is what it finds."""
    slow = pre_tokenizers.ByteLevel(add_prefix_space=False)
    unlike = []

    def compare(characters):
        text = "".join(f"a{c}1{c}!{c} {c}'s{c}\n" for c in characters)
        ends = [end for _, (_, end) in slow.pre_tokenize_str(text)]
        fast_ends = np.cumsum([len(word.decode()) for word in gigatoken.pretokenizer(text.encode())])
        if ends == fast_ends.tolist():
            return
        if len(characters) == 1:
            unlike.append(ord(characters))
            return
        compare(characters[: len(characters) // 2])
        compare(characters[len(characters) // 2 :])

    everything = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    for start in range(0, len(everything), 2048):
        compare(everything[start : start + 2048])
    assert set(unlike) <= set(np.flatnonzero(IS_UNLIKE).tolist())


@pytest.mark.slow
def test_new_words_without_end_do_not_fill_the_memory(gpt2):
    """gigatoken remembers each word: so many random ones took 700 MiB before it started afresh."""
    encoder = FastEncoder(gpt2)
    generator = np.random.default_rng(0)
    before = psutil.Process().memory_info().rss
    most = 0
    for _ in range(120):
        letters = generator.integers(97, 123, (80_000, 9), dtype=np.uint8)
        letters[:, 0] = 32
        encoder.encode_batch([letters.tobytes().decode()])
        most = max(most, psutil.Process().memory_info().rss)
    assert most - before < 2 * REMEMBERED_BYTES


def test_a_literal_end_of_text_inside_a_document_is_text_in_both_encoders(small):
    text = "before<|endoftext|>after"
    fast = FastEncoder(small)
    slow = FastEncoder(small)
    slow.why_slow = "asked to be"
    for encoder in (fast, slow):
        (ids,) = encoder.encode_batch([text])
        assert small.eos_token_id not in ids
        assert small.decode(ids) == text


@pytest.mark.parametrize("filler", ["word ", " ", "\n", "a", "日本語", "=", "\t \n", "don't 12 "])
def test_an_enormous_document_gets_the_ids_of_the_whole_text(small, filler):
    """A cut in the wrong place changes ids."""
    text = (filler * (3 * PIECE_CHARACTERS))[: 3 * PIECE_CHARACTERS] + " end"
    many, one = FastEncoder(small).encode_batch([text, "short"])
    assert many.tolist() == reference_ids(small, text)
    assert one.tolist() == reference_ids(small, "short")


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab '\n.é1  ", max_size=120), limit=st.integers(2, 20))
def test_pieces_join_to_the_text_and_to_its_ids(small, text, limit):
    pieces = split_long(text, limit)
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in reference_ids(small, piece)] == reference_ids(small, text)


def test_a_trained_tokenizer_has_the_size_asked_for_and_ends_with_the_special_token(small):
    assert len(small) == 400
    assert small.eos_token_id == small.bos_token_id == 399
    assert small.convert_ids_to_tokens(399) == "<|endoftext|>"
    for text in PROSE:
        assert small.decode(small(text).input_ids) == text


def test_training_twice_gives_the_same_tokenizer(small):
    assert tokenizer_fingerprint(train_tokenizer(PROSE, 400)) == tokenizer_fingerprint(small)


def test_training_says_when_the_text_or_the_size_is_too_small():
    with pytest.raises(ValueError, match="supplies only 2"):
        train_tokenizer(["one line"], 4096)
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(PROSE, 100)


def test_the_fingerprint_survives_saving_and_depends_on_merges(tmp_path, small, gpt2):
    small.save_pretrained(tmp_path)
    for load in (load_tokenizer, AutoTokenizer.from_pretrained):
        assert tokenizer_fingerprint(load(str(tmp_path))) == tokenizer_fingerprint(small)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "tokenizer.json")) == tokenizer_fingerprint(small)
    # Reformatting the file changes nothing; another order of merges does.
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec, indent=7, sort_keys=True))
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == tokenizer_fingerprint(small)
    spec["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) != tokenizer_fingerprint(small)
    assert tokenizer_fingerprint(small) != tokenizer_fingerprint(gpt2)


def changed(tokenizer, **parts):
    """The same vocabulary and merges in a tokenizer that does something else to a text before."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def test_the_fingerprint_knows_all_that_decides_ids(small):
    """It knew vocabulary, merges and special tokens alone: text in lower case passed for the same."""
    ids = small("A Door 12").input_ids
    with_words, of_another_flag = changed(small), changed(small)
    with_words.add_tokens(["Door"])
    of_another_flag.add_tokens([AddedToken("Door", lstrip=True)])
    with_dropout = changed(small)
    with_dropout.backend_tokenizer.model.dropout = 0.5
    others = [
        changed(small, normalizer=normalizers.Lowercase()),
        changed(small, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        changed(small, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        with_words,
        of_another_flag,
        with_dropout,
    ]
    fingerprints = {tokenizer_fingerprint(tokenizer) for tokenizer in [small, *others]}
    assert len(fingerprints) == 1 + len(others)
    same = changed(
        small, decoder=decoders.ByteLevel(), post_processor=processors.ByteLevel(trim_offsets=False)
    )
    same.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=False
    )
    assert same("A Door 12").input_ids == ids
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(small)


def test_gpt2_has_one_fingerprint_from_the_package_and_in_the_hubs_spelling(tmp_path, gpt2):
    """The Hub's file spells defaults out in another way, writes merges as lines, and knows no `use_regex`."""
    model = json.loads(gpt2.backend_tokenizer.to_str())["model"]
    end = {"id": 50256, "special": True, "content": "<|endoftext|>", "single_word": False, "lstrip": False}
    hub = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, "rstrip": False, "normalized": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "dropout": None,
            "unk_token": None,
            "fuse_unk": False,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "vocab": {**model["vocab"], "<|endoftext|>": 50256},
            "merges": [" ".join(pair) for pair in model["merges"]],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(hub))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == tokenizer_fingerprint(gpt2)


def test_fingerprints_are_those_that_finished_shards_have_recorded():
    """Whoever changes them makes every set of shards one of another tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "th", "the"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    assert tokenizer_fingerprint(tokenizer).startswith("c06703da3590118a")
    assert fingerprint_of_format_1(tokenizer).startswith("7c241aa690605862")


@pytest.mark.parametrize("text", [text for text in PROBE_TEXTS if "<|" not in text])
def test_byte_lengths_add_up_to_the_bytes_of_the_text(small, gpt2, text):
    for tokenizer in (small, gpt2):
        lengths = token_byte_lengths(tokenizer)
        assert lengths.shape == (len(tokenizer),)
        assert lengths.dtype == np.int32
        assert lengths[tokenizer.eos_token_id] == 0
        assert lengths[tokenizer(text).input_ids].sum() == len(text.encode())


def whole_words(**settings):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **settings)


def test_byte_lengths_are_refused_where_ids_have_no_bytes():
    tokenizer = whole_words()
    tokenizer.add_tokens(["日本"])
    with pytest.raises(ValueError, match="not byte-level"):
        backend = Tokenizer(models.BPE(vocab={"日": 0}, merges=[]))
        token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_tokenizer_that_gigatoken_does_not_know_works_slowly_and_says_why(small):
    """Dropout, added words, blanks put in front and no cut at all are what it would take without a word."""
    with_words, with_dropout = changed(small), changed(small)
    with_words.add_tokens(["A"])
    with_dropout.backend_tokenizer.model.dropout = 1e-9
    own_cuts = [
        pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"),
        pre_tokenizers.ByteLevel(False, True, False),
    ]
    cases = {
        "another way (Whitespace)": whole_words(),
        "Lowercase": changed(small, normalizer=normalizers.Lowercase()),
        "added words": with_words,
        "dropout": with_dropout,
        "another way (ByteLevel)": changed(
            small, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
        ),
        "another way (none)": changed(small, pre_tokenizer=None),
        "no fast pretokenizer": changed(small, pre_tokenizer=pre_tokenizers.Sequence(own_cuts)),
    }
    for reason, tokenizer in cases.items():
        encoder = FastEncoder(tokenizer)
        assert not encoder.is_fast
        assert reason in encoder.why_slow
        (ids,) = encoder.encode_batch(["a b A"])
        assert ids.tolist() == tokenizer("a b A", add_special_tokens=False).input_ids


@pytest.mark.parametrize("checked", [False, True])
def test_a_panic_of_gigatokens_rust_is_a_reason_for_the_slow_encoder(small, monkeypatch, checked):
    """It is no Exception. An encoder that another process had checked met the probes in `verify`, which let
    it through.
    """

    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, text):
            raise PanicException("index out of bounds")

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda content: Panicking(), raising=True)
    encoder = FastEncoder(small, checked=checked)
    encoder.verify(["a text of the source"])
    assert encoder.why_slow == "index out of bounds"
    assert encoder.encode_batch(["a text"])[0].tolist() == small("a text").input_ids


def large_tokenizer():
    """More than 65,536 words: every pair of bytes is a merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet]
    vocab = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    return tokenizer


def test_ids_of_a_large_vocabulary_are_uint32():
    tokenizer = large_tokenizer()
    assert len(tokenizer) == 256 + 65_536 + 1
    encoder = FastEncoder(tokenizer)
    assert encoder.is_fast, encoder.why_slow
    (ids,) = encoder.encode_batch(["zz top"])
    assert ids.dtype == np.uint32
    assert ids.tolist() == reference_ids(tokenizer, "zz top")


def test_an_unknown_or_damaged_tokenizer_is_named(tmp_path):
    """What tokenizers raises for a damaged file is a plain Exception: it came out as a traceback."""
    with pytest.raises(ValueError, match="No tokenizer at"):
        load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json' is no tokenizer\.json that loads"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="No tokenizer at"):
        load_tokenizer(tmp_path)
