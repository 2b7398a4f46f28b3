"""What `evaluate_loss` promises: exact numbers, on any number of processes, without a trace in training."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from data.tokenizer import gpt2_tokenizer, token_byte_lengths
from evaluation.language_modeling import evaluate_loss
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from tests.processes import run_workers

VOCABULARY = 96


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def small_gpt2(**overrides):
    torch.manual_seed(0)
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": VOCABULARY, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0, **overrides))


def small_gpt_scratch():
    torch.manual_seed(0)
    return GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", vocab_size=VOCABULARY))


def batches_of_uneven_size(count: int, vocabulary: int = VOCABULARY):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(count):
        ids = torch.randint(0, vocabulary, (1 + number % 3, 8 + 4 * number), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
        batches.append({"input_ids": ids, "labels": labels})
    return batches


@pytest.mark.parametrize("build", [small_gpt2, small_gpt_scratch])
def test_loss_is_the_mean_over_targets_not_over_batches(accelerator, build):
    """Stock models are scored from their logits, ours from hidden states through the head in chunks."""
    model, batches = build().eval(), batches_of_uneven_size(4)
    result = evaluate_loss(model, batches, accelerator)
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        losses.append(F.cross_entropy(logits[targets != -100], targets[targets != -100], reduction="none"))
    losses = torch.cat(losses).double()
    assert result.targets == len(losses)
    assert result.loss == pytest.approx(
        losses.mean().item(), rel=1e-6
    )  # float32 logits, another order of sums
    assert result.perplexity == math.exp(result.loss)


def test_evaluation_loss_equals_the_loss_that_training_minimises(accelerator):
    model = small_gpt_scratch().eval()
    batch = batches_of_uneven_size(3)[2]
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert evaluate_loss(model, [batch], accelerator).loss == pytest.approx(expected, rel=1e-6)


def test_bits_per_byte_of_a_uniform_model_counts_text_and_leaves_special_tokens_out(accelerator):
    tokenizer = gpt2_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=32))
    nn.init.zeros_(model.lm_head.weight)  # every token equally likely: log2(50257) bits each
    end, text = tokenizer.eos_token_id, "Der Zwölfte Raum – ein Gewölbe 🐉."
    ids = torch.tensor([[end, *tokenizer(text)["input_ids"], end]])
    result = evaluate_loss(
        model,
        [{"input_ids": ids, "labels": ids}],
        accelerator,
        token_bytes=torch.from_numpy(token_byte_lengths(tokenizer)),
    )
    text_targets = ids.shape[1] - 2
    assert result.targets == text_targets + 1  # the last <|endoftext|> is a target of the loss …
    assert result.bytes == len(text.encode())  # … but no text
    assert result.bits_per_byte == pytest.approx(
        text_targets * math.log2(50257) / len(text.encode()), rel=1e-6
    )


def test_only_the_first_max_batches_count(accelerator):
    model, batches = small_gpt2(), batches_of_uneven_size(5)
    assert evaluate_loss(model, batches, accelerator, max_batches=2) == evaluate_loss(
        model, batches[:2], accelerator
    )


def test_a_set_without_targets_is_an_error(accelerator):
    batch = batches_of_uneven_size(1)[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for loader in ([], [batch]):
        with pytest.raises(ValueError, match="no targets"):
            evaluate_loss(small_gpt2(), loader, accelerator)


@pytest.mark.parametrize("build", [small_gpt2, small_gpt_scratch])
def test_a_model_that_returns_nan_is_an_error_unless_a_training_run_asks(accelerator, build):
    """It once was a loss of NaN and a perplexity of infinity. The training loop notes it and goes on."""
    broken = build()
    with torch.no_grad():
        broken.transformer.ln_f.bias[0] = math.nan
    batches = batches_of_uneven_size(3)
    with pytest.raises(ValueError, match="returned NaN on 3 of 3 batches"):
        evaluate_loss(broken, batches, accelerator)
    assert math.isnan(evaluate_loss(broken, batches, accelerator, allow_nan=True).loss)


def test_training_goes_on_as_if_nobody_had_looked(accelerator):
    """A DataLoader draws its seed from the global generator when iterated, and dropout draws from it too."""
    model = small_gpt2().train()
    model.transformer.h[0].eval()  # a part that its owner had put to rest
    modes = [module.training for module in model.modules()]
    loader = torch.utils.data.DataLoader(batches_of_uneven_size(3), batch_size=None, shuffle=True)
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    first, second = evaluate_loss(model, loader, accelerator), evaluate_loss(model, loader, accelerator)
    assert first == second
    assert random.getstate() == states[0] and np.random.get_state()[1].tobytes() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


def test_a_compiled_model_is_scored_without_compiling_again(accelerator):
    model, compilations = small_gpt2(), []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    batches = batches_of_uneven_size(3)
    compiled(input_ids=batches[0]["input_ids"])
    before = len(compilations)
    assert before > 0
    assert evaluate_loss(compiled, batches, accelerator) == evaluate_loss(model, batches, accelerator)
    compiled(input_ids=batches[0]["input_ids"])
    assert len(compilations) == before


WORKER = """
import copy, torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from evaluation.language_modeling import evaluate_loss
from tests.processes import report
from tests.test_evaluation_language_modeling import VOCABULARY, batches_of_uneven_size, small_gpt_scratch

accelerator = Accelerator(cpu=True)
alone = accelerator.num_processes == 1
model = small_gpt_scratch()
sharded = copy.deepcopy(model)
if not alone:
    model = accelerator.prepare(model)
    assert type(model).__name__ == "DistributedDataParallel"
    for block in sharded.transformer.h:
        fully_shard(block)
    fully_shard(sharded)
    assert isinstance(sharded.lm_head.weight, DTensor)
rows, token_bytes = [], torch.arange(VOCABULARY, dtype=torch.int32) % 5
for which in (model, sharded):
    for batches, max_batches in ((5, None), (1, None), (6, 3)):
        mine = batches_of_uneven_size(batches)[accelerator.process_index :: accelerator.num_processes]
        result = evaluate_loss(which, mine, accelerator, token_bytes=token_bytes, max_batches=max_batches)
        rows.append(vars(result))
report(rows)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_agree_with_one_to_the_last_bit_replicated_and_sharded(tmp_path):
    """With an odd number of batches, fewer batches than processes, and a limit that falls unevenly."""
    (alone,) = run_workers(1, WORKER, tmp_path)
    assert run_workers(2, WORKER, tmp_path) == [alone, alone]
