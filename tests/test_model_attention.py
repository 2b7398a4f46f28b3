"""Attention in blocks, which trains in bfloat16 on CPUs, is the attention that it stands in for."""

import pytest
import torch
import torch.nn.functional as F

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from modeling_gpt_scratch import modeling_gpt_scratch as modeling
from modeling_gpt_scratch.kernels_gpt_scratch import AttentionInBlocks

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


def in_blocks(query, key, value, visible=None, dropout=0.0):
    return AttentionInBlocks.apply(query, key, value, query.shape[-1] ** -0.5, visible, dropout)


def fused(query, key, value, visible=None):
    attended = F.scaled_dot_product_attention(query, key, value, visible, is_causal=visible is None)
    return attended.transpose(1, 2)


def documents(tokens):
    """(2, 1, T, T): what tokens of packed documents see, which begin elsewhere in each row."""
    places = torch.arange(tokens)
    starts = torch.stack([places // length for length in (30, 197)])
    return ((starts[:, :, None] == starts[:, None, :]) & (places[:, None] >= places))[:, None]


def prefixes(tokens):
    """(2, 1, T, T): a mask that is not causal, as a caller may hand one over."""
    places = torch.arange(tokens)
    return ((places[:, None] >= places) | (places < 50)).expand(2, 1, -1, -1)


def padded(tokens):
    """(2, 1, T, T): padding on the left, in a long row more than a block; who is padding sees nothing."""
    places = torch.arange(tokens)
    begins = torch.tensor([tokens // 2, tokens // 7])[:, None, None]
    return ((places[:, None] >= places) & (places >= begins))[:, None]


def for_all_rows(tokens):
    """(1, 1, T, T)."""
    return documents(tokens)[:1]


def for_each_head(tokens):
    """(2, 3, T, T)."""
    return torch.cat([documents(tokens), prefixes(tokens), padded(tokens)], dim=1)


MASKS = [lambda tokens: None, documents, prefixes, padded, for_all_rows, for_each_head]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.__name__.replace("<lambda>", "causal"))
@pytest.mark.parametrize("tokens", LENGTHS)
def test_attention_in_blocks_is_attention_with_its_gradients(tokens, mask):
    """In float32, where nothing but the order of sums differs."""
    ours, theirs = (
        output_and_gradients(lambda *qkv, f=attend: f(*qkv, mask(tokens)), heads(tokens, torch.float32))
        for attend in (in_blocks, fused)
    )
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_dropout_in_blocks_drops_weights_and_its_gradient_is_that_of_what_it_gave():
    """The weights that stay are read off with values that are a unit matrix."""
    tokens, rate = 150, 0.25
    query, key, _ = (tensor.double() for tensor in heads(tokens, torch.float64))
    unit = torch.eye(tokens, dtype=torch.float64).expand(2, 3, tokens, tokens)
    query, key = (F.pad(tensor, (0, tokens - 16)) for tensor in (query, key))
    whole = in_blocks(query, key, unit)
    torch.manual_seed(1)
    dropped = in_blocks(query, key, unit, None, rate)
    stay = dropped != 0
    torch.testing.assert_close(dropped, torch.where(stay, whole / (1 - rate), 0))
    assert abs(stay.sum() / (whole != 0).sum() - (1 - rate)) < 0.01

    def again(*qkv):
        torch.manual_seed(1)
        return in_blocks(*qkv, None, rate)

    tensors = [
        tensor[:, :, :12].detach().double().requires_grad_() for tensor in heads(tokens, torch.float64)
    ]
    assert torch.autograd.gradcheck(again, tensors)


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
        loss = model(input_ids, **{"labels": input_ids, **more}).loss
    loss.backward()
    return loss.detach(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def test_a_model_that_trains_in_bfloat16_takes_the_blocks_and_the_same_step(monkeypatch):
    model, input_ids = model_and_batch()
    taken = []
    apply = AttentionInBlocks.apply
    monkeypatch.setattr(AttentionInBlocks, "apply", lambda *a: taken.append(1) or apply(*a))
    blocks = loss_and_gradient_norm(model, input_ids)
    assert len(taken) == model.config.n_layer
    monkeypatch.setattr(modeling, "ATTENTION_BLOCKS_LONGEST", 100)
    kernel = loss_and_gradient_norm(model, input_ids)
    assert len(taken) == model.config.n_layer
    # bfloat16 keeps eight bits; losses and norms are averages over many roundings.
    torch.testing.assert_close(blocks, kernel, rtol=2e-3, atol=0)


@pytest.mark.parametrize("case", ["padded on the left", "padded on the right", "packed"])
def test_masked_rows_take_the_blocks_and_the_same_step(case, monkeypatch):
    model, input_ids = model_and_batch()
    mask, labels, more = torch.ones_like(input_ids), input_ids.clone(), {}
    if case == "packed":
        more["position_ids"] = torch.arange(80).repeat(2).expand(2, -1)
    else:
        free = slice(0, 130) if "left" in case else slice(30, None)
        mask[1, free], labels[1, free] = 0, -100
        more["attention_mask"] = mask
    more["labels"] = labels
    blocks = loss_and_gradient_norm(model, input_ids, **more)
    monkeypatch.setattr(AttentionInBlocks, "apply", lambda *_: pytest.fail("took the blocks"))
    with pytest.raises(pytest.fail.Exception):
        loss_and_gradient_norm(model, input_ids, **more)
    monkeypatch.setattr(modeling, "ATTENTION_BLOCKS_LONGEST", 100)
    torch.testing.assert_close(blocks, loss_and_gradient_norm(model, input_ids, **more), rtol=2e-3, atol=0)


@pytest.mark.parametrize("case", ["eval", "weights of its own", "a mask for all queries"])
def test_what_is_not_training_goes_past_the_blocks(case, monkeypatch):
    model, input_ids = model_and_batch()
    monkeypatch.setattr(AttentionInBlocks, "apply", lambda *_: pytest.fail("took the blocks"))
    more = {}
    if case == "eval":
        model.eval()
    elif "all queries" in case:
        more["attention_mask"] = (torch.arange(160) < 150)[None, None, None]
    else:  # added to the scores, as some libraries hand masks over
        more["attention_mask"] = torch.full((160, 160), -1e4).triu(1)[None, None]
    loss, _ = loss_and_gradient_norm(model, input_ids, **more)
    assert loss.isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_compiled_model_takes_the_same_step_without_a_break_in_its_graph(is_packed):
    """Packed rows go past the blocks then: a compiler may not look into a mask."""
    model, input_ids = model_and_batch()
    more = {"position_ids": torch.arange(80).repeat(2).expand(2, -1)} if is_packed else {}
    eager = loss_and_gradient_norm(model, input_ids, **more)
    compiled = loss_and_gradient_norm(torch.compile(model, fullgraph=True), input_ids, **more)
    torch.testing.assert_close(compiled, eager, rtol=2e-3, atol=0)
