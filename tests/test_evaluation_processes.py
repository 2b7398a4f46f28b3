"""HellaSwag and texts on several processes: the numbers of one, and nobody left waiting."""

import sys

import pytest

from tests.processes import run, run_workers

SETTING = """
import copy, torch, warnings
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from data.hellaswag import load_questions
from data.tokenizer import gpt2_tokenizer
import evaluation.hellaswag
from evaluation.hellaswag import evaluate_hellaswag, score_questions
from evaluation.texts import evaluate_texts
from tests.processes import report
from tests.test_evaluation_hellaswag import QUESTIONS, wavy_gpt2

warnings.simplefilter("ignore")
accelerator = Accelerator(cpu=True)
rank, alone = accelerator.process_index, accelerator.num_processes == 1
tokenizer, questions = gpt2_tokenizer(), load_questions(str(QUESTIONS), limit=5)
plain, sharded = wavy_gpt2(), wavy_gpt2()
if not alone:
    for block in sharded.transformer.h:
        fully_shard(block)
    fully_shard(sharded)
    assert isinstance(sharded.lm_head.weight, DTensor)

def full_memory(module, args, kwargs):
    if len(kwargs["input_ids"]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
"""

AGREE = (
    SETTING
    + """
replicated = copy.deepcopy(plain)
replicated.register_buffer("counter", torch.zeros(1))  # which the wrapper broadcasts at each forward
replicated = accelerator.prepare(replicated)
assert alone or type(replicated).__name__ == "DistributedDataParallel"

def scores(model, fetch=1, **options):
    evaluation.hellaswag.FORWARDS_PER_FETCH["cpu"] = fetch
    model.train()
    state = torch.get_rng_state()
    found = [s for b in score_questions(model, tokenizer, questions, accelerator, **options) for s in b]
    assert model.training and torch.equal(torch.get_rng_state(), state)
    return sorted((vars(score) for score in found), key=lambda score: score["index"])

results = [
    scores(plain, batch_tokens=300),
    scores(torch.compile(replicated, backend="eager"), batch_tokens=300),
    scores(torch.compile(sharded, backend="eager"), batch_tokens=300),
    scores(plain, fetch=3, batch_tokens=300),  # as on a GPU: several rounds between two fetches
    scores(sharded, batch_tokens=10**6),  # one batch: the second process has none of its own
]
texts = [question.ctx for question in questions[:3]] + ["Zw\u00f6lf Stufen. " * 20]
for model in (plain, sharded):
    results.append(vars(evaluate_texts(model, tokenizer, texts, accelerator, context=64, stride=48,
                                       batch_tokens=100)))
# One process alone is short of memory and needs more forwards than the other.
if rank == 0:
    replicated.register_forward_pre_hook(full_memory, with_kwargs=True)
    getattr(replicated, "module", replicated).register_forward_pre_hook(full_memory, with_kwargs=True)
halved = scores(replicated, batch_tokens=300)
for found, expected in zip(halved, results[0], strict=True):
    for style, four in found["log_probabilities"].items():
        assert all(abs(a / b - 1) < 1e-5 for a, b in zip(four, expected["log_probabilities"][style]))
report(results)
accelerator.end_training()
"""
)

SHORT_OF_MEMORY = (
    SETTING
    + """
if rank == 1:
    sharded.transformer.h[1].register_forward_pre_hook(
        lambda module, args: full_memory(module, args, {"input_ids": args[0]}))
evaluate_hellaswag(sharded, tokenizer, questions, accelerator)
"""
)


@pytest.mark.slow
def test_two_processes_score_as_one_replicated_sharded_and_compiled(tmp_path):
    """To the last bit: neither who scores a batch nor how often results are fetched shows."""
    (alone,) = run_workers(1, AGREE, tmp_path)
    assert alone[0] == alone[1] == alone[2] == alone[3] and alone[5] == alone[6]
    assert run_workers(2, AGREE, tmp_path) == [alone, alone]


@pytest.mark.slow
def test_a_sharded_model_short_of_memory_ends_with_advice_and_does_not_hang(tmp_path):
    """The other process waits inside its forward for weights that never come; the launcher ends it."""
    script = tmp_path / "worker.py"
    script.write_text(SHORT_OF_MEMORY)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run([*launcher, str(script)], tmp_path)
    assert done.returncode != 0
    assert "does not fit the memory of process 1" in done.stderr and "smaller batch_tokens" in done.stderr
