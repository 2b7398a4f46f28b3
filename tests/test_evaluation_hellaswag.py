"""HellaSwag: the two references' numbers, whatever the batches, the wrapping or the model's kind."""

import dataclasses
import hashlib
import io
import json
import lzma
import math
import os
import socket
import sys
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from data.hellaswag import Question, load_questions, origin, parse_questions
from data.tokenizer import gpt2_tokenizer
from evaluation.continuations import (
    Continuation,
    attention_window,
    lay_out,
    score_continuations,
    supports_packing,
)
from evaluation.hellaswag import (
    FORWARDS_PER_FETCH,
    clean,
    compare,
    evaluate_hellaswag,
    score_questions,
    summarize,
)
from modeling_gpt_scratch.convert_gpt2 import from_gpt2
from tests.hub_server import HubServer
from tests.processes import run

ROOT = Path(__file__).parent.parent
QUESTIONS = ROOT / "tests" / "fixtures" / "hellaswag.jsonl"
EXPECTED = ROOT / "tests" / "fixtures" / "hellaswag_expected.jsonl"

pytestmark = pytest.mark.filterwarnings("ignore:hellaswag.jsonl is not the official")


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def tokenizer():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def questions():
    return load_questions(str(QUESTIONS))


def wavy_gpt2(**settings) -> GPT2LMHeadModel:
    """A stock GPT-2 whose weights follow from a formula: its numbers hang on no generator's version."""
    config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 256, "vocab_size": 50257} | settings
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=1):
            steps = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(torch.sin(steps * (1.3 + number) + number) * 0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return wavy_gpt2()


def all_scores(*arguments, **options):
    batches = score_questions(*arguments, **options)
    return sorted((score for batch in batches for score in batch), key=lambda score: score.index)


@pytest.fixture(scope="module")
def whole(model, tokenizer, questions, accelerator):
    """The model's scores of all questions, with default settings."""
    return all_scores(model, tokenizer, questions, accelerator)


def assert_same_scores(ours, others, relative):
    for a, b in zip(ours, others, strict=True):
        assert (a.index, a.label, a.source, a.lengths) == (b.index, b.label, b.source, b.lengths)
        for style in a.log_probabilities:
            assert a.log_probabilities[style] == pytest.approx(b.log_probabilities[style], rel=relative)


FLOAT32_SUMS = 1e-5  # sums of float32 terms in another order


def test_log_probabilities_and_choices_are_those_that_the_references_gave(whole):
    """Recorded from lm-evaluation-harness 0.4.13 and build-nanogpt on this model and these questions."""
    expected = [json.loads(line) for line in EXPECTED.read_text().splitlines()]
    for ours, reference in zip(whole, expected, strict=True):
        for style in ("completion", "harness"):
            assert ours.log_probabilities[style] == pytest.approx(reference[style], rel=FLOAT32_SUMS)
        assert ours.predictions() == reference["predictions"]


def test_our_model_with_the_same_weights_scores_the_same(model, tokenizer, questions, accelerator, whole):
    assert_same_scores(all_scores(from_gpt2(model), tokenizer, questions, accelerator), whole, FLOAT32_SUMS)


@pytest.mark.parametrize("batch_tokens", [1, 700, 100_000])
def test_the_size_of_batches_changes_nothing(model, tokenizer, questions, accelerator, whole, batch_tokens):
    parts = all_scores(model, tokenizer, questions, accelerator, batch_tokens=batch_tokens)
    assert_same_scores(parts, whole, FLOAT32_SUMS)


def test_training_mode_compilation_and_preparation_change_nothing(
    model, tokenizer, questions, accelerator, whole
):
    """Nor is anything compiled: neither by an evaluation nor by the training that goes on after it."""
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    plain = summarize(whole)
    wrapped = torch.compile(accelerator.prepare(model).train(), backend=backend)
    step = {"input_ids": torch.arange(12).view(2, 6)}
    with torch.no_grad():
        wrapped(**step)
    before = len(compilations)
    assert before > 0
    for _ in range(2):
        state = torch.get_rng_state()
        assert evaluate_hellaswag(wrapped, tokenizer, questions, accelerator) == plain
        assert model.training and torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            wrapped(**step)
    assert len(compilations) == before
    model.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_endings_in_one_row_do_not_see_each_other(model, tokenizer, questions, accelerator, attention):
    model.set_attn_implementation(attention)
    beginning = tokenizer(questions[0].ctx)["input_ids"]
    four = [
        Continuation(
            [*beginning, *tokenizer(" " + ending)["input_ids"]], len(tokenizer(" " + ending)["input_ids"])
        )
        for ending in questions[0].endings
    ]
    alone = score_continuations(model, four, accelerator, context=256, packed=False)
    assert score_continuations(model, four, accelerator, context=256, packed=True) == pytest.approx(
        alone, rel=FLOAT32_SUMS
    )
    assert supports_packing(model, four, 256, accelerator)


def near_sighted(kind: str, window: int):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50257, "hidden_size": 16, "initializer_range": 0.5}
    if kind == "gpt_neo":
        types = [[["global", "local"], 1]]
        config = GPTNeoConfig(num_layers=2, num_heads=2, attention_types=types, window_size=window, **sizes)
        return GPTNeoForCausalLM(config).eval()
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MistralConfig(intermediate_size=32, sliding_window=window, **heads, **sizes)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["gpt_neo", "mistral"])
def test_a_model_with_a_window_shares_rows_only_as_far_as_it_sees(kind, tokenizer, questions, accelerator):
    """Both once passed a trial of eight tokens, whatever their window. GPT-Neo masks by the place in the row,
    which for a second ending is far from its context; Mistral forgets its window when it is given a mask.
    """
    (question,) = questions[:1]
    context = tokenizer(question.ctx)["input_ids"]
    endings = [tokenizer(" " + ending)["input_ids"] for ending in question.endings]
    for window in (16, 4096):
        model = near_sighted(kind, window)
        rows_of_a_forward = []
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=rows_of_a_forward: seen.append(len(kwargs["input_ids"])),
            with_kwargs=True,
        )
        (score,) = all_scores(model, tokenizer, [question], accelerator, styles=["completion"])
        handle.remove()
        assert rows_of_a_forward[-1] == (4 if window == 16 else 1)
        for ending, found in zip(endings, score.log_probabilities["completion"], strict=True):
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([context + ending])).logits[0].log_softmax(-1)
            expected = sum(logs[len(context) + i - 1, token].item() for i, token in enumerate(ending))
            assert found == pytest.approx(expected, rel=1e-4)  # float32, in a row and alone


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (GPT2Config(), math.inf),
        (MistralConfig(sliding_window=None), math.inf),
        (MistralConfig(sliding_window=64), 64),
        (GPTNeoConfig(window_size=256), 256),
        (Gemma3Config(text_config={"sliding_window": 32}), 32),  # inside a model that also sees pictures
        (Llama4TextConfig(attention_chunk_size=128), 128),
        (Gemma3TextConfig(sliding_window=None, layer_types=["sliding_attention"], num_hidden_layers=1), 0),
    ],
)
def test_how_far_layers_see_is_read_from_the_configuration(config, tokens):
    assert attention_window(config) == tokens


def test_continuations_that_differ_before_the_scored_part_share_only_what_is_common(model, accelerator):
    """A tokenizer may merge the context's last letters into the ending's first token."""
    rows = [
        Continuation([5, 6, 7, 8, 9, 10], 2),
        Continuation([5, 6, 7, 11, 12, 13], 2),
        Continuation([5, 6, 7], 1),
    ]
    alone = score_continuations(model, rows, accelerator, context=256, packed=False)
    together = score_continuations(model, rows, accelerator, context=256, packed=True)
    assert together == pytest.approx(alone, rel=FLOAT32_SUMS)


def test_questions_that_begin_alike_do_not_share_a_row(model, tokenizer, questions, accelerator):
    """They once did: twenty "How to …" in one row of 635 tokens, and every other row padded to that width."""
    wikihow = questions[6:12]  # all begin with "[header] How to"
    shapes = []

    def shapes_of(some):
        shapes.clear()
        all_scores(model, tokenizer, some, accelerator, styles=["completion"])
        return shapes[2:]  # after the two forwards of the trial of packing

    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        alone = [shape for question in wikihow for shape in shapes_of([question])]
        together = shapes_of(wikihow)
    finally:
        handle.remove()
    assert sum(rows for rows, _ in together) == sum(rows for rows, _ in alone) == 6
    assert max(width for _, width in together) == max(width for _, width in alone)


def test_a_recurrent_model_is_scored_row_by_row(tokenizer, questions, accelerator):
    torch.manual_seed(0)
    mamba = MambaForCausalLM(
        MambaConfig(
            vocab_size=50257, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=0.5
        )
    ).eval()
    scores = all_scores(mamba, tokenizer, questions[:2], accelerator)
    with torch.no_grad():
        question = questions[0]
        context, ending = (tokenizer(text)["input_ids"] for text in (question.ctx, " " + question.endings[3]))
        logits = mamba(input_ids=torch.tensor([context + ending])).logits[0].log_softmax(-1)
    expected = sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(ending))
    assert scores[0].log_probabilities["completion"][3] == pytest.approx(expected, rel=1e-4)


def test_a_question_longer_than_the_context_loses_its_beginning_and_is_counted(
    tokenizer, questions, accelerator
):
    short = wavy_gpt2(n_positions=32)
    result = evaluate_hellaswag(short, tokenizer, questions, accelerator)
    assert 0 < result.truncated <= result.questions
    score = all_scores(short, tokenizer, questions[:1], accelerator)[0]
    question = questions[0]
    context, ending = (tokenizer(text)["input_ids"] for text in (question.ctx, " " + question.endings[0]))
    row = (context + ending)[-33:]
    with torch.no_grad():
        logits = short(input_ids=torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
    expected = sum(logits[len(row) - len(ending) + i - 1, token].item() for i, token in enumerate(ending))
    assert score.log_probabilities["completion"][0] == pytest.approx(expected, rel=FLOAT32_SUMS)


def test_an_ending_longer_than_the_context_is_scored_on_what_fits(model, accelerator):
    """Of eight scored tokens a model that sees four can predict the last four."""
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    for packed in (False, True):
        (found,) = score_continuations(
            model, [Continuation(tokens, 8)], accelerator, context=4, packed=packed
        )
        (expected,) = score_continuations(
            model, [Continuation(tokens[-5:], 4)], accelerator, context=256, packed=packed
        )
        assert found == expected


def test_what_endings_have_in_common_is_computed_once_and_scored_for_each(model, accelerator):
    rows = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 11], [5, 6, 7, 8, 12], [5, 6, 7, 8, 9, 10]]
    four = [Continuation(row, len(row) - 2) for row in rows]
    (tree,) = lay_out(four, 256, True)
    assert tree.tokens == [5, 6, 7, 8, 9] and len(tree.sources) == 4 + 4 + 3 + 4
    alone = score_continuations(model, four, accelerator, context=256, packed=False)
    together = score_continuations(model, four, accelerator, context=256, packed=True)
    assert together == pytest.approx(alone, rel=FLOAT32_SUMS) and together[0] == together[3]


def test_a_batch_that_does_not_fit_the_memory_is_halved_and_so_are_later_ones(
    model, tokenizer, questions, accelerator, whole
):
    """Every later batch of the old size once failed first."""
    sizes, failures, limit = [], [], math.inf

    def full_memory(module, args, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > limit:
            failures.append(sizes[-1])
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.register_forward_pre_hook(full_memory, with_kwargs=True)
    try:
        all_scores(model, tokenizer, questions, accelerator, batch_tokens=400)
        limit = sorted(sizes)[-3] - 1  # so that three batches do not fit
        scores = all_scores(model, tokenizer, questions, accelerator, batch_tokens=400)
    finally:
        handle.remove()
    assert_same_scores(scores, whole, FLOAT32_SUMS)
    assert len(failures) == 1


def test_one_row_that_does_not_fit_the_memory_is_the_devices_error(model, tokenizer, questions, accelerator):
    def full_memory(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.register_forward_pre_hook(full_memory, with_kwargs=True)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            all_scores(model, tokenizer, questions, accelerator)
    finally:
        handle.remove()


def test_fetching_results_of_several_forwards_at_once_changes_nothing(
    model, tokenizer, questions, accelerator, whole, monkeypatch
):
    """As on accelerators, where each fetch waits for all that was launched."""
    monkeypatch.setitem(FORWARDS_PER_FETCH, "cpu", 3)
    batches = list(score_questions(model, tokenizer, questions, accelerator, batch_tokens=300))
    assert len([batch for batch in batches if len(batch) > 1]) > 1
    scores = sorted((score for batch in batches for score in batch), key=lambda score: score.index)
    assert_same_scores(scores, whole, FLOAT32_SUMS)


def test_a_tokenizer_without_a_pad_token_and_one_that_adds_bos_both_work(
    model, questions, accelerator, whole
):
    plain, adding = gpt2_tokenizer(), gpt2_tokenizer()
    assert plain.pad_token is None
    from tokenizers.processors import TemplateProcessing

    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", adding.eos_token_id)]
    )
    score = all_scores(model, adding, questions[:1], accelerator)[0]
    context, ending = (plain(text)["input_ids"] for text in (questions[0].ctx, " " + questions[0].endings[1]))
    beginning = plain(f"{questions[0].activity_label}: {questions[0].ctx_a} She")["input_ids"]
    for style, before in (("completion", context), ("harness", beginning)):
        # Once, in front of the context, never before the ending.
        row = [adding.eos_token_id, *before, *ending]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        expected = sum(logits[len(before) + i, token].item() for i, token in enumerate(ending))
        assert score.log_probabilities[style][1] == pytest.approx(expected, rel=FLOAT32_SUMS)
        assert score.lengths[style] == whole[0].lengths[style]


def test_an_ending_that_tokenises_to_nothing_is_named(model, questions, accelerator):
    from tokenizers import Regex
    from tokenizers.normalizers import Replace

    deaf = gpt2_tokenizer()
    deaf.backend_tokenizer.normalizer = Replace(Regex(" orange orange orange."), "")
    with pytest.raises(
        ValueError, match=r"question 2: the ending 'orange orange orange.' tokenises to nothing"
    ):
        evaluate_hellaswag(model, deaf, questions, accelerator)


def test_a_model_that_returns_nan_is_an_error(tokenizer, questions, accelerator):
    broken = wavy_gpt2()
    with torch.no_grad():
        broken.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(ValueError, match="returned NaN"):
        evaluate_hellaswag(broken, tokenizer, questions, accelerator)


def test_an_empty_set_is_an_error(model, tokenizer, accelerator):
    with pytest.raises(ValueError, match="no questions"):
        evaluate_hellaswag(model, tokenizer, [], accelerator)


def row(**changes):
    first = json.loads(QUESTIONS.read_text().splitlines()[0])
    return {**first, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endings": ["a", "b", "c"]}, "line 2: endings is .*4 texts"),
        ({"endings": ["a", "b", "c", " "]}, "line 2: endings is .*none of them empty"),
        ({"label": 4}, "line 2: label is 4"),
        ({"label": ""}, "the test split has no labels"),
        ({"ctx_a": None}, "line 2: ctx_a is None"),
        ({"ctx": "  "}, "line 2: ctx is blank"),
    ],
)
def test_a_malformed_question_is_named_with_its_line(tmp_path, changes, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row(**changes)) + "\n")
    with pytest.warns(UserWarning, match="not the official"), pytest.raises(ValueError, match=message):
        load_questions(str(path))


def test_broken_json_and_missing_files_say_where(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row()) + "\n{not json\n")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="line 2: not JSON"):
        load_questions(str(path))
    with pytest.raises(ValueError, match=r"no file .*missing.jsonl"):
        load_questions(str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match="no questions"):
        parse_questions([])


def test_a_label_written_as_text_and_the_limit_are_understood():
    rows = [("row 0", row(label="2")), ("row 1", row(label="3"))]
    (question,) = parse_questions(rows, limit=1)
    assert question.label == 2 and question.source == "activitynet" and isinstance(question, Question)
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit of {limit} questions leaves none; give at least 1"):
            load_questions(str(QUESTIONS), limit=limit)


def test_a_question_is_known_by_all_that_is_asked_and_its_answer(questions):
    (question,) = questions[:1]
    assert dataclasses.replace(question, index=7, source="x").fingerprint == question.fingerprint
    fields = {"activity_label": "x", "ctx_a": "x", "ctx_b": "x", "ctx": "x", "label": 1}
    changed = [dataclasses.replace(question, **{name: value}) for name, value in fields.items()]
    changed.append(dataclasses.replace(question, endings=question.endings[::-1]))
    assert len({one.fingerprint for one in [question, *changed]}) == 7


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_only_the_official_file_is_called_the_official_one(tmp_path, monkeypatch, suffix):
    """Its hash stands in for the official one's, which is too large to come with the tests."""
    path = tmp_path / f"mine{suffix}"
    content = QUESTIONS.read_bytes()
    path.write_bytes(lzma.compress(content) if suffix.endswith("xz") else content)
    own = {"type": "text", "name": f"HellaSwag questions of {path.name}", "split": None}
    assert origin(str(path), "validation") == own
    with pytest.warns(UserWarning, match="not the official"):
        load_questions(str(path))
    monkeypatch.setattr("data.hellaswag.OFFICIAL_VALIDATION_SHA256", hashlib.sha256(content).hexdigest())
    official = {"type": "Rowan/hellaswag", "name": "HellaSwag", "split": "validation"}
    assert origin(str(path), "train") == official  # a file has the split that it has
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_questions(str(path))
    assert origin("Rowan/hellaswag", "train") == official | {"split": "train"}
    assert origin("me/swag", "test") == {"type": "me/swag", "name": "swag", "split": "test"}


def test_a_file_of_questions_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "mine.jsonl.xz"
    for content in (lzma.compress(QUESTIONS.read_bytes())[:-20], b"no xz at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mine\.jsonl\.xz is damaged or cut off"):
            load_questions(str(path))


def test_comparing_with_itself_shows_no_difference_and_a_missing_question_is_an_error(whole):
    scores = whole
    for paired in compare(scores, scores).values():
        assert (paired.difference, paired.p_value) == (0.0, 1.0)
    with pytest.raises(ValueError, match="lacks 1 of the questions"):
        compare(scores, scores[1:])
    with pytest.raises(ValueError, match=r"other questions or answers in the place of 2, the first is 3"):
        other = [dataclasses.replace(score, question="0" * 16) for score in scores[3:5]]
        compare(scores, [*scores[:3], *other, *scores[5:]])
    result = summarize(scores)
    assert set(result.by_source) == {"activitynet", "wikihow"}
    for metric, share in result.accuracy.items():
        right = sum(rows[metric].value * rows[metric].total for rows in result.by_source.values())
        assert right == pytest.approx(share.value * len(scores))


SPLITS = ("validation", "train")
READ_FROM_HUB = """
import json, sys
from data.hellaswag import load_questions
try:
    found = load_questions(sys.argv[1], split=sys.argv[2], limit=3)
    print("RESULT", json.dumps([vars(question) for question in found]))
except ValueError as error:
    print("ERROR", error)
"""


def read_from_hub(folder: Path, endpoint: str, name: str, split: str = "validation") -> str:
    """What a fresh process prints, with a cache of its own and this address as the Hub's."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    done = run([sys.executable, "-c", READ_FROM_HUB, name, split], folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_questions_come_from_the_hub_as_from_the_file(tmp_path, questions):
    """Parquet files as in Rowan/hellaswag, where `ind` and `source_id` are there and labels are texts."""
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    files = {}
    for split, part in (("validation", rows), ("train", rows[::-1])):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([{**row, "label": str(row["label"])} for row in part]), buffer)
        files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    with HubServer({"Rowan/hellaswag": files}) as hub:
        printed = {split: read_from_hub(tmp_path, hub.url, "Rowan/hellaswag", split) for split in SPLITS}
        assert any("resolve" in path for _, path, _ in hub.served)
    found = {split: json.loads(text.split("RESULT ")[1]) for split, text in printed.items()}
    as_questions = [Question(**{**row, "endings": tuple(row["endings"])}) for row in found["validation"]]
    assert as_questions == questions[:3]
    assert [row["ctx"] for row in found["train"]] == [row["ctx"] for row in rows[::-1][:3]]


@pytest.mark.slow
def test_without_network_the_error_names_the_local_file(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        printed = read_from_hub(tmp_path, f"http://127.0.0.1:{nobody.getsockname()[1]}", "Rowan/hellaswag")
    assert "ERROR cannot load split 'validation' of the dataset 'Rowan/hellaswag'" in printed
    assert "hellaswag_val.jsonl" in printed and "give its path" in printed


@pytest.mark.slow
def test_log_probabilities_equal_those_of_the_installed_harness(model, tokenizer, questions, accelerator):
    import numpy as np
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import preprocess

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    requests, endings = [], []
    for question in questions:
        context = preprocess(f"{question.activity_label}: {question.ctx_a} {question.ctx_b.capitalize()}")
        endings.append([preprocess(ending) for ending in question.endings])
        requests += [
            Instance("loglikelihood", {}, (context, " " + ending), number)
            for number, ending in enumerate(endings[-1])
        ]
    sums = np.array([total for total, _ in harness.loglikelihood(requests)]).reshape(-1, 4)
    for score, row, texts in zip(
        all_scores(model, tokenizer, questions, accelerator), sums, endings, strict=True
    ):
        assert score.log_probabilities["harness"] == pytest.approx(row.tolist(), rel=FLOAT32_SUMS)
        assert score.predictions()["harness_acc"] == row.argmax()
        assert score.predictions()["harness_acc_norm"] == (row / [len(text) for text in texts]).argmax()


PIECES = ["[title]", " [title]", "[step] ", "[", "]", " ", "  ", "a", "Be", ".", "\n", "[www.x.org]"]
MARKUP = st.lists(st.sampled_from(PIECES)).map("".join)


@pytest.mark.slow
@given(MARKUP)
def test_markup_is_cleaned_as_the_installed_harness_does(text):
    from lm_eval.tasks.hellaswag.utils import preprocess

    assert clean(text) == preprocess(text)
