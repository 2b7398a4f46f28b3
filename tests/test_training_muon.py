"""Muon beside AdamW: which parameter gets which rule, and what a skipped step leaves."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from training.device import choose_precision
from training.muon import MuonAndAdamW, _product_dtype, orthogonalised
from training.optimizer import build_optimizer, hidden_matrices, set_learning_rate
from training.recipe import TrainSettings

MUON = TrainSettings(optimizer="muon", schedule="trapezoidal", warmup_steps=0, max_steps=10)


def toy(seed=0, **changes):
    torch.manual_seed(seed)
    return GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", vocab_size=64, **changes))


def gradients(model, seed):
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 32, 96), (2, 96, 32)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalised(matrices).float()
    # In the frame of the singular vectors it is nearly diagonal; bfloat16 products leave some per cent.
    inside = u.mT @ result @ v.mT
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    well_conditioned = s > 0.1 * s.amax(dim=-1, keepdim=True)
    assert ((diagonal > 0.6) & (diagonal < 1.3))[well_conditioned].all()
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_updates_agree_with_torchs_own_muon(shape):
    """Tall matrices with a larger share, as its rule named "original" has it."""
    ours = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(9)))
    theirs = torch.nn.Parameter(ours.detach().clone())
    vector = torch.nn.Parameter(torch.ones(3))
    vector.grad = torch.ones(3)
    group = {"params": [ours], "weight_decay": 0.1, "momentum": 0.95}
    optimizer = MuonAndAdamW(group, [{"params": [vector]}], lr=0.02)
    rule = {"weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "original"}
    reference = torch.optim.Muon([theirs], lr=0.02, **rule)
    for seed in range(3):
        ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    # Both round to bfloat16 inside, in other places: a few units in its last place of an entry of the update.
    # Tall ones move twice as far. A wrong share would be off by half of an update: ten times that.
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(ours, theirs, atol=3 * 0.02 * 2**-6 * scale, rtol=0)


def test_products_are_in_the_type_that_the_device_has_in_hardware():
    """On GPUs before Ampere, and Apple's, they were once in a bfloat16 that is emulated."""
    assert _product_dtype(torch.device("mps")) == torch.float32
    has_bfloat16 = choose_precision(torch.device("cpu"), "auto").value == "bf16"
    assert _product_dtype(torch.device("cpu")) == (torch.bfloat16 if has_bfloat16 else torch.float32)


def test_hidden_matrices_are_those_between_embeddings_and_head():
    ours = toy()
    names = {id(p): name for name, p in ours.named_parameters()}
    hidden = {names[id(p)] for p in hidden_matrices(ours)}
    assert hidden and all(".h." in name and name.endswith("weight") for name in hidden)
    assert len(hidden) == 6 * ours.config.n_layer
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    assert len(hidden_matrices(stock)) == 4 * 2
    untied = toy(tie_word_embeddings=False)
    assert id(untied.lm_head.weight) not in {id(p) for p in hidden_matrices(untied)}


def test_every_trainable_parameter_is_updated_by_one_rule():
    model = toy()
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = build_optimizer(model, MUON)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    gradients(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_learning_rate(optimizer, 0, MUON)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == (name == "transformer.wpe.weight"), name


def test_rates_keep_their_ratio_over_the_schedule():
    optimizer = build_optimizer(toy(), MUON)
    for step in (0, 3, 9):
        rate = set_learning_rate(optimizer, step, MUON)
        muon, *adamw = (group["lr"] for group in optimizer.param_groups)
        assert muon / rate == pytest.approx(MUON.muon_learning_rate / MUON.learning_rate)
        assert adamw == [rate] * len(adamw)


def test_a_step_that_is_not_finite_changes_neither_weights_nor_state():
    model = toy()
    optimizer = build_optimizer(model, MUON)
    set_learning_rate(optimizer, 0, MUON)
    gradients(model, 0)
    optimizer.step()
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in model.parameters():
        parameter.grad.fill_(float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for number, kinds in optimizer.state_dict()["state"].items():
        for kind, tensor in kinds.items():
            assert torch.equal(tensor, state[number][kind]), kind
    gradients(model, 1)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(
        model.state_dict()["transformer.h.0.mlp.c_fc.weight"], weights["transformer.h.0.mlp.c_fc.weight"]
    )


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        MuonAndAdamW({"params": [torch.nn.Parameter(torch.ones(3))]}, [], lr=0.1)
