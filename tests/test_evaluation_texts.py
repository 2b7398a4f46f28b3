"""Whole texts, longer than the context: every token once, as the reference harness and metric count them."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

from data.tokenizer import train_tokenizer
from evaluation.texts import evaluate_texts, windows

TEXTS = [
    "The corridor narrows. Water drips from a crack in the vault, and below a chain is dragged over stone.",
    "A rat.",
    "Zwölf Stufen führen hinab – „nicht weiter“, steht dort – und dann noch einmal zwölf. " * 3,
]
CONTEXT = 24


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 5, 320)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=32,
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            initializer_range=0.2,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_windows_score_every_token_once_with_as_much_before_it_as_fits(targets, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for begin, first, end in windows(targets, context, stride):
        assert 0 <= begin < first <= end <= targets and end - begin <= context
        assert begin == 0 or end - begin == context
        scored += range(first, end + 1)
    assert scored == list(range(1, targets + 1))


def nats_of(model, row, position, context):
    """Of row[position], from up to `context` tokens before it, alone in a forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row[max(0, position - context) : position]])).logits[0, -1]
    return -logits.log_softmax(-1)[row[position]].item()


def test_a_stride_of_one_gives_each_token_the_whole_context(model, tokenizer, accelerator):
    result = evaluate_texts(model, tokenizer, TEXTS, accelerator, stride=1)
    nats = 0.0
    for text in TEXTS:
        row = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        nats += sum(nats_of(model, row, position, CONTEXT) for position in range(1, len(row)))
    assert result.loss * result.targets == pytest.approx(nats, rel=1e-5)  # float32 sums in another order
    assert result.bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-5)


def test_a_shorter_stride_is_another_number_and_batches_are_not(model, tokenizer, accelerator):
    one = evaluate_texts(model, tokenizer, TEXTS, accelerator)
    assert evaluate_texts(model, tokenizer, TEXTS, accelerator, batch_tokens=1).loss == pytest.approx(
        one.loss, rel=1e-6
    )
    assert abs(evaluate_texts(model, tokenizer, TEXTS, accelerator, stride=5).loss - one.loss) > 1e-4


def test_a_tokenizer_that_adds_bos_begins_a_text_once(model, tokenizer, accelerator):
    """The one in front is given and not scored; a second one, as target, would cost it bits of no text."""
    adding = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert adding("A rat.")["input_ids"] == [tokenizer.eos_token_id, *tokenizer("A rat.")["input_ids"]]
    found = evaluate_texts(model, adding, TEXTS, accelerator)
    assert found == evaluate_texts(model, tokenizer, TEXTS, accelerator)


def test_a_model_that_returns_nan_is_an_error_that_names_the_text(model, tokenizer, accelerator):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.wpe.weight[10] = math.nan  # which only longer texts reach
    assert evaluate_texts(broken, tokenizer, ["A rat."], accelerator).loss > 0
    with pytest.raises(ValueError, match="returned NaN, first on text 1"):
        evaluate_texts(broken, tokenizer, ["A rat.", *TEXTS], accelerator, batch_tokens=1)


def test_perplexities_of_short_texts_follow_the_evaluate_librarys_formula(model, tokenizer, accelerator):
    """A start token in front, exp of each text's mean loss over all its tokens, the mean of those. Written
    out here: the library fetches the metric's own code from the Hub.
    """
    short = ["A rat.", "Water drips", "The corridor"]
    result = evaluate_texts(model, tokenizer, short, accelerator)
    expected = []
    for text in short:
        row = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logits = model(input_ids=row).logits[0, :-1]
        expected.append(torch.nn.functional.cross_entropy(logits, row[0, 1:]).exp().item())
    assert result.text_perplexities == pytest.approx(expected, rel=1e-5)
    assert result.mean_text_perplexity == pytest.approx(sum(expected) / 3, rel=1e-5)


@pytest.mark.slow
def test_the_metrics_of_wikitext_equal_those_of_the_installed_harness(model, tokenizer, accelerator):
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=CONTEXT)
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(TEXTS)]
    rows = [
        process_results({"page": text}, [total])
        for text, total in zip(TEXTS, harness.loglikelihood_rolling(requests), strict=True)
    ]
    result = evaluate_texts(model, tokenizer, TEXTS, accelerator)
    assert result.word_perplexity == pytest.approx(
        weighted_perplexity([row["word_perplexity"] for row in rows]), rel=1e-4
    )
    assert result.byte_perplexity == pytest.approx(
        weighted_perplexity([row["byte_perplexity"] for row in rows]), rel=1e-5
    )
    assert result.bits_per_byte == pytest.approx(
        bits_per_byte([row["bits_per_byte"] for row in rows]), rel=1e-5
    )


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no texts"),
        (["x", ""], {}, "number 1"),
        (["x"], {"stride": 99}, "stride=99 must be from 1 to the context of 24"),
        (["x"], {"context": 99}, "context=99 is more than the 24"),
    ],
)
def test_bad_input_is_named(model, tokenizer, accelerator, texts, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_texts(model, tokenizer, texts, accelerator, **options)
