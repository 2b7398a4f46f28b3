"""Causal attention in blocks, which trains in bfloat16 on CPUs, is the attention that it stands in for."""

import pytest
import torch
import torch.nn.functional as F

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from modeling_gpt_scratch import modeling_gpt_scratch as modeling
from modeling_gpt_scratch.modeling_gpt_scratch import _CausalAttentionInBlocks

# One token, less than a block, a block, a block and a bit, and the longest.
LENGTHS = (1, 40, 128, 150, 512)


def heads(tokens, dtype, seed=0):
    """Query, key, value (B, H, T, D), laid out as the projections leave them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(3, 2, tokens, 3, 16, generator=generator).to(dtype)
    return [tensor.transpose(1, 2).requires_grad_() for tensor in tensors]


def output_and_gradients(attend, tensors):
    attended = attend(*tensors)
    weights = torch.linspace(-1, 1, attended.numel()).view_as(attended).to(attended.dtype)
    return [attended, *torch.autograd.grad(attended, tensors, weights)]


def in_blocks(query, key, value):
    return _CausalAttentionInBlocks.apply(query, key, value, query.shape[-1] ** -0.5)


def fused(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_attention_in_blocks_is_causal_attention_with_its_gradients(tokens):
    """In float32, where nothing but the order of sums differs."""
    ours, theirs = (
        output_and_gradients(attend, heads(tokens, torch.float32)) for attend in (in_blocks, fused)
    )
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_attention_in_blocks_rounds_little_more_than_the_fused_kernel(tokens):
    """Both in bfloat16, against float32 on the same numbers. Scores are rounded here: a bit more is fine."""
    tensors = heads(tokens, torch.bfloat16)
    exact = output_and_gradients(fused, [t.detach().float().requires_grad_() for t in tensors])
    ours, theirs = (output_and_gradients(attend, tensors) for attend in (in_blocks, fused))
    for mine, other, reference in zip(ours, theirs, exact, strict=True):
        size = reference.norm() + 1e-6
        assert (mine - reference).norm() / size <= 2 * (other - reference).norm() / size + 4e-3


def test_attention_in_blocks_never_looks_ahead():
    before, after = heads(300, torch.bfloat16), heads(300, torch.bfloat16)
    with torch.no_grad():
        for tensor in after:
            tensor[:, :, 200:] += 1
    assert torch.equal(in_blocks(*before)[:, :200], in_blocks(*after)[:, :200])


def model_and_batch():
    torch.manual_seed(0)
    model = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", n_positions=160)).train()
    return model, torch.randint(model.config.vocab_size, (2, 160))


def loss_and_gradient_norm(model, input_ids, **more):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids, labels=input_ids, **more).loss
    loss.backward()
    return loss.detach(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def test_a_model_that_trains_in_bfloat16_takes_the_blocks_and_the_same_step(monkeypatch):
    model, input_ids = model_and_batch()
    taken = []
    apply = _CausalAttentionInBlocks.apply
    monkeypatch.setattr(_CausalAttentionInBlocks, "apply", lambda *a: taken.append(1) or apply(*a))
    blocks = loss_and_gradient_norm(model, input_ids)
    assert len(taken) == model.config.n_layer
    monkeypatch.setattr(modeling, "ATTENTION_BLOCKS_LONGEST", 100)
    kernel = loss_and_gradient_norm(model, input_ids)
    assert len(taken) == model.config.n_layer
    # bfloat16 keeps eight bits; losses and norms are averages over many roundings.
    torch.testing.assert_close(blocks, kernel, rtol=2e-3, atol=0)


@pytest.mark.parametrize("case", ["padded", "packed", "eval", "dropout"])
def test_what_is_not_plain_training_goes_past_the_blocks(case, monkeypatch):
    model, input_ids = model_and_batch()
    monkeypatch.setattr(_CausalAttentionInBlocks, "apply", lambda *_: pytest.fail("took the blocks"))
    more = {}
    if case == "padded":
        more["attention_mask"] = torch.ones_like(input_ids).index_fill(1, torch.tensor([159]), 0)
    if case == "packed":
        more["position_ids"] = torch.arange(80).repeat(2).expand(2, -1)
    if case == "eval":
        model.eval()
    if case == "dropout":
        model.config.attn_pdrop = 0.1
    loss, _ = loss_and_gradient_norm(model, input_ids, **more)
    assert loss.isfinite()


@pytest.mark.slow
def test_a_compiled_model_takes_the_blocks_without_a_break_in_its_graph():
    model, input_ids = model_and_batch()
    eager = loss_and_gradient_norm(model, input_ids)
    compiled = loss_and_gradient_norm(torch.compile(model, fullgraph=True), input_ids)
    torch.testing.assert_close(compiled, eager, rtol=2e-3, atol=0)
