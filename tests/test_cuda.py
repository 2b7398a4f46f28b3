"""What an NVIDIA GPU computes is what the CPU does, compiled or sharded too; whole runs end as they should.

Runs are those of the other tests' toy, small enough that most of their time is starting and compiling.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from training_toys import ROOT, environment, metrics_of, run_to_its_end, train_command, write_toy_shards

from data.hellaswag import load_questions
from data.tokenizer import gpt2_tokenizer
from evaluation.hellaswag import evaluate_hellaswag
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM, linear_cross_entropy
from modeling_gpt_scratch.kernels_gpt_scratch import LOSS_CHUNK_ROWS_ON_GPU
from training.checkpoint import latest_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU")

# Float32 sums in another order, without TF32.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def model_on(device, attention="sdpa", **sizes):
    torch.manual_seed(0)
    config = GPTScratchConfig.preset("tiny", **{"initializer_range": 0.1, **sizes})
    config._attn_implementation = attention
    return GPTScratchForCausalLM(config).to(device)


def ids(rows, tokens):
    return torch.randint(0, 511, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_logits_are_those_of_the_cpu(attention):
    input_ids, mask = ids(3, 100), torch.ones(3, 100, dtype=torch.long)
    mask[1, :40] = 0
    on_cpu, on_gpu = model_on("cpu", "eager").eval(), model_on("cuda", attention).eval()
    for given in ({}, {"attention_mask": mask}):
        expected = on_cpu(input_ids, **given).logits
        found = on_gpu(input_ids.cuda(), **{name: tensor.cuda() for name, tensor in given.items()}).logits
        rows = given.get("attention_mask", torch.ones_like(input_ids)).bool()
        torch.testing.assert_close(found.cpu()[rows], expected[rows], **TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_packed_documents_do_not_see_one_another(attention):
    model, input_ids = model_on("cuda", attention).train(), ids(1, 64).cuda()
    position_ids = torch.cat([torch.arange(24), torch.arange(40)])[None].cuda()
    packed = model(input_ids, position_ids=position_ids).logits
    alone = model(input_ids[:, 24:]).logits
    torch.testing.assert_close(packed[:, 24:], alone, **TOLERANCE)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_loss_without_logits_is_as_good_as_the_plain_one_and_takes_a_part_of_its_memory(compiled):
    """Under autocast in bfloat16, beside float32; in two chunks, and with the words of GPT-2."""
    rows, width, words = 2 * LOSS_CHUNK_ROWS_ON_GPU, 256, 50_304
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device="cuda", requires_grad=True)
    weight = (0.1 * torch.randn(words, width, device="cuda")).requires_grad_()
    targets = torch.randint(words, (rows,), device="cuda")
    targets[::5] = -100

    def plain():
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def ours():
        return linear_cross_entropy(hidden, weight, targets)

    def take(loss, autocast=True):
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            value = loss()
        value.backward()
        memory = torch.cuda.max_memory_allocated() - before
        return value.item(), hidden.grad.double(), weight.grad.double(), memory

    exact, *exact_gradients, _ = take(plain, autocast=False)
    way = torch.compile(ours, fullgraph=True) if compiled else ours
    take(way)
    found, *gradients, memory = take(way)
    expected, *plain_gradients, plain_memory = take(plain)
    assert abs(found - exact) <= 2 * abs(expected - exact) + 1e-4
    for gradient, its_plain, its_exact in zip(gradients, plain_gradients, exact_gradients, strict=True):
        error, plain_error = ((g - its_exact).norm() / its_exact.norm() for g in (gradient, its_plain))
        assert error <= 1.1 * plain_error + 1e-4
    assert memory < 0.6 * plain_memory


def test_a_compiled_step_is_one_graph_with_the_eager_gradients_and_without_whole_logits():
    words, rows, tokens = 50_304, 16, 1024
    model = model_on("cuda", vocab_size=words, n_positions=tokens).train()
    input_ids = torch.randint(words, (rows, tokens), device="cuda")

    def gradients(forward):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(input_ids, labels=input_ids).loss
        loss.backward()
        # A key's bias moves all scores of a query alike: its gradient is zero, and what is found is rounding.
        named = {name: p.grad.clone() for name, p in model.named_parameters() if "k_proj.bias" not in name}
        return loss.detach(), list(named.values())

    eager_loss, eager = gradients(model)
    compiled = torch.compile(model, fullgraph=True)
    gradients(compiled)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, found = gradients(compiled)
    # Whole logits, in two bytes each, would be as much by themselves.
    assert torch.cuda.max_memory_allocated() - before < 2 * rows * tokens * words
    torch.testing.assert_close(loss, eager_loss, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(found, eager, strict=True):
        assert (mine - theirs).norm() <= 0.02 * theirs.norm() + 1e-6  # bfloat16 products in another order


@torch.no_grad()
def test_every_cache_generates_the_same_tokens():
    model, prompt = model_on("cuda").eval(), ids(2, 9).cuda()

    def greedy(**more):
        return model.generate(
            prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, **more
        )

    expected = greedy(use_cache=False)
    assert torch.equal(greedy(), expected)
    assert torch.equal(greedy(cache_implementation="static"), expected)  # compiled, with CUDA graphs
    requests = model.generate_batch(prompt.tolist(), max_new_tokens=24, eos_token_id=-1, progress_bar=False)
    assert [r.generated_tokens for r in requests.values()] == expected[:, 9:].tolist()


def test_hellaswag_is_scored_as_on_the_cpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    questions = load_questions(str(ROOT / "tests" / "fixtures" / "hellaswag.jsonl"))
    tokenizer = gpt2_tokenizer()
    model = model_on("cpu", vocab_size=50_257, n_positions=256).eval()
    scores = []
    for device in ("cpu", "cuda"):
        accelerator = Accelerator(cpu=device == "cpu")
        assert accelerator.device.type == device
        scores.append(evaluate_hellaswag(model.to(device), tokenizer, questions, accelerator))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert scores[0].accuracy == scores[1].accuracy


# ----------------------------------------------------------------------------------------------------------
# Whole runs.


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


def run(config: str, **settings) -> str:
    """A run through `accelerate launch`, on the GPU; what it printed."""
    launch = ["--config_file", str(ROOT / "accelerate_configs" / config), "--num_processes", "1"]
    variables = {**environment(), "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    folder = Path(settings["run_dir"]).parent
    done = run_to_its_end(train_command(*launch, **settings), env=variables, cwd=folder, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run_dir) if "loss" in line]


def test_a_run_takes_bfloat16_by_itself_and_samples_while_compiled(shards, tmp_path):
    settings = {"mixed_precision": "auto", "compile": "whole", "sample_every_steps": 4, "max_steps": 40}
    said = run("single_gpu.yaml", shards=shards, run_dir=tmp_path / "run", **settings)
    assert "precision bf16 (the GPU has it in hardware); torch.compile whole (as asked)" in said
    found = losses(tmp_path / "run")
    assert len(found) == 40 and found[-1] < found[0] - 0.5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_stopped_after_every_step_matches_an_unbroken_one_bit_for_bit(shards, tmp_path, precision):
    settings = {"shards": shards, "mixed_precision": precision, "deterministic": True, "max_steps": 3}
    settings |= {"dropout": 0.1, "compile": "whole"}
    run("single_gpu.yaml", run_dir=tmp_path / "unbroken", **settings)
    for _ in range(3):
        run("single_gpu.yaml", run_dir=tmp_path / "broken", **settings, max_minutes=1e-9)
    runs = [tmp_path / name for name in ("broken", "unbroken")]
    assert metrics_of(runs[0]) == metrics_of(runs[1])
    for name in ("model.safetensors", "optimizer.safetensors", "random_states.safetensors"):
        ends = [(latest_checkpoint(run_dir) / name).read_bytes() for run_dir in runs]
        assert ends[0] == ends[1], name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fsdp2_of_one_process_trains_as_one_process_does(shards, tmp_path, optimizer):
    settings = {"shards": shards, "mixed_precision": "bf16", "compile": "whole", "optimizer": optimizer}
    said = {
        config: run(f"{config}.yaml", run_dir=tmp_path / config, **settings)
        for config in ("single_gpu", "fsdp2")
    }
    assert "(FSDP)" in said["fsdp2"] and "(FSDP)" not in said["single_gpu"]
    # Products in bfloat16, of weights that FSDP2 casts once and autocast once more.
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "single_gpu"), rel=2e-3)
    ends = [load_file(tmp_path / config / "export" / "model.safetensors") for config in said]
    assert ends[0].keys() == ends[1].keys()
