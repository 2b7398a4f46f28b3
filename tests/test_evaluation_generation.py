"""What `generate_samples` promises: the same texts for the same seed, whatever surrounds the model."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from data.tokenizer import train_tokenizer
from evaluation.generation import generate_samples

CORPUS = ["You stand in a long hall of grey stone. Torches burn. A door leads north to the old well."] * 20
PROMPTS = ["You stand", "", "A door leads north to the"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    # Rows 300 to 383 stand for no token, as in a vocabulary padded for tensor cores.
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=32, vocab_size=384, n_positions=64, eos_token_id=299, bos_token_id=299
        )
    )


def test_texts_depend_on_the_seed_and_not_on_the_random_state_around(model, tokenizer):
    torch.manual_seed(1)
    first = generate_samples(model, tokenizer, PROMPTS, max_new_tokens=16, seed=7)
    state = torch.get_rng_state()
    assert generate_samples(model.train(), tokenizer, PROMPTS, max_new_tokens=16, seed=7) == first
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert generate_samples(model, tokenizer, PROMPTS, max_new_tokens=16, seed=8) != first
    assert len(first) == len(PROMPTS) and all(isinstance(text, str) for text in first)


def test_greedy_texts_in_one_padded_batch_equal_those_alone(model, tokenizer):
    together = generate_samples(model, tokenizer, PROMPTS, max_new_tokens=12, seed=0, temperature=0.0)
    alone = [
        generate_samples(model, tokenizer, [prompt], max_new_tokens=12, seed=0, temperature=0.0)[0]
        for prompt in PROMPTS
    ]
    assert together == alone


def test_ids_that_stand_for_no_token_are_never_sampled(model, tokenizer):
    before = generate_samples(model, tokenizer, PROMPTS, max_new_tokens=12, seed=0, temperature=0.0)
    tempting = copy.deepcopy(model)
    with torch.no_grad():
        tempting.lm_head.weight[300:] *= 100.0
        ids = tempting(input_ids=torch.tensor([tokenizer("You stand")["input_ids"]])).logits[0, -1]
    assert ids.argmax() >= 300
    assert (
        generate_samples(tempting, tokenizer, PROMPTS, max_new_tokens=12, seed=0, temperature=0.0) == before
    )


def test_a_compiled_and_prepared_model_writes_the_same(model, tokenizer):
    plain = generate_samples(model, tokenizer, PROMPTS, max_new_tokens=8, seed=5)
    prepared = torch.compile(Accelerator(cpu=True).prepare(model), backend="eager")
    assert generate_samples(prepared, tokenizer, PROMPTS, max_new_tokens=8, seed=5) == plain


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_returns_nan_is_an_error(model, tokenizer, broken, temperature):
    """Greedy, it once wrote token 0 ("!!!") for ever; sampled, it died with an error of the device's."""
    ill = copy.deepcopy(model)
    with torch.no_grad():
        ill.transformer.ln_f.bias[0] = broken
    with pytest.raises(ValueError, match="returned NaN or infinity after"):
        generate_samples(ill, tokenizer, PROMPTS, max_new_tokens=4, seed=0, temperature=temperature)


def test_a_prompt_that_does_not_fit_is_an_error_that_names_the_numbers(model, tokenizer):
    with pytest.raises(ValueError, match=r"max_new_tokens=60.*64 tokens"):
        generate_samples(
            model, tokenizer, ["You stand in a long hall of grey stone"], max_new_tokens=60, seed=0
        )
