"""Products by oneDNN are those of `F.linear`, and dropout with numbers drawn in fours is dropout."""

import pytest
import torch
import torch.nn.functional as F

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from modeling_gpt_scratch import kernels_gpt_scratch as kernels

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch is built without oneDNN",
)


@pytest.fixture
def taken(monkeypatch):
    """Products that oneDNN took, as on a processor where it is the faster one."""
    calls, take = [], kernels._onednn_linear
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(kernels, "_onednn_linear", lambda *a: calls.append(a[0].shape) or take(*a))
    return calls


def tiny():
    torch.manual_seed(0)
    return GPTScratchForCausalLM(GPTScratchConfig.preset("tiny")).eval()


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 1, 48),
        torch.randn(16, 1, 48),
        torch.randn(3, 70, 48),
        torch.randn(3, 70, 48)[:, -1:],
        torch.randn(48, 9).T,
        torch.randn(0, 5, 48),
    ],
    ids=["a token", "a batch of tokens", "rows", "a slice", "transposed", "empty"],
)
def test_products_by_onednn_are_those_of_torch(x, bias, taken):
    weight, b = torch.randn(33, 48), torch.randn(33) if bias else None
    with torch.no_grad():
        ours = kernels.linear(x, weight, b)
    assert taken == [x.shape] and ours.shape == (*x.shape[:-1], 33)
    torch.testing.assert_close(ours, F.linear(x, weight, b), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_model_gives_the_same_logits_and_loss_by_either_library(taken, monkeypatch):
    model, input_ids = tiny(), torch.arange(40).view(2, 20)
    with torch.no_grad():
        ours = model(input_ids, labels=input_ids)
        assert len(taken) == 3 * model.config.n_layer + 1
        monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", False)
        theirs = model(input_ids, labels=input_ids)
    assert len(taken) == 3 * model.config.n_layer + 1
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "case",
    ["training", "gradients", "autocast", "bfloat16", "export", "trace", "switched off", "a sharded weight"],
)
def test_what_onednn_must_not_take_it_does_not(case, taken):
    model, input_ids = tiny(), torch.arange(40).view(2, 20)
    if case == "gradients":
        model(input_ids).logits.sum().backward()
        assert model.transformer.wte.weight.grad is not None
    elif case == "export":
        with torch.no_grad():
            exported = torch.export.export(
                model, (), {"input_ids": input_ids, "use_cache": False}, strict=False
            )
        assert "onednn" not in exported.graph_module.code and "mkldnn" not in exported.graph_module.code
    elif case == "trace":
        mlp = model.transformer.h[0].mlp.requires_grad_(False)
        traced = torch.jit.trace(mlp, torch.randn(1, 2, 64), check_trace=False)
        assert "mkldnn" not in str(traced.inlined_graph)
    elif case == "switched off":
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
            model(input_ids)
    elif case == "a sharded weight":

        class Sharded(torch.Tensor):
            pass

        with torch.no_grad():
            kernels.linear(torch.randn(2, 8), torch.randn(4, 8).as_subclass(Sharded))
    else:
        if case == "training":
            model.train()
        if case == "bfloat16":
            model.bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            model(input_ids)
    assert taken == []


class Twice(torch.nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("how", ["a class of its own", "a hook", "a hook before", "a forward of its own"])
def test_what_stands_in_a_layers_place_is_called(how, taken):
    """As adapters, quantisers, offloading and tensor parallelism do it."""
    model, input_ids = tiny(), torch.arange(40).view(2, 20)
    layer = model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        plain = model(input_ids).logits
        taken.clear()
        if how == "a class of its own":
            layer.__class__ = Twice
        elif how == "a hook":
            layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        elif how == "a hook before":
            layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        else:
            layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
        assert not torch.allclose(model(input_ids).logits, plain)
    assert len(taken) == 3 * model.config.n_layer


@needs_onednn
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 compiles them as it does any product")
def test_a_compiled_model_takes_them_in_one_graph(monkeypatch):
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", True)
    model, input_ids, seen = tiny(), torch.arange(40).view(2, 20), []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "onednn_linear" in str(node.target))
        return graph

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=look)(input_ids, use_cache=False).logits
        torch.testing.assert_close(compiled, model(input_ids, use_cache=False).logits)
    assert len(seen) == 3 * model.config.n_layer + 1


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.99])
def test_a_dropout_mask_drops_its_rate_everywhere_and_nothing_in_step(rate):
    torch.manual_seed(0)
    stays = kernels.dropout_mask(torch.empty(250, 1003), rate)
    assert stays.shape == (250, 1003) and stays.dtype == torch.bool
    tolerance = 5 * (rate * (1 - rate) / 250_000) ** 0.5 + 2**-16
    assert abs(stays.double().mean() - (1 - rate)) <= tolerance
    flat = stays.flatten().double() - stays.double().mean()
    for apart in (1, 2, 3, 4, 1003):  # the numbers are cut in four
        assert abs((flat[:-apart] * flat[apart:]).mean()) <= tolerance
    torch.manual_seed(0)
    assert torch.equal(stays, kernels.dropout_mask(torch.empty(250, 1003), rate))
    assert rate in (0.0,) or not torch.equal(stays, kernels.dropout_mask(torch.empty(250, 1003), rate))


def test_dropout_keeps_the_mean_and_its_gradient_and_rests_when_it_should():
    torch.manual_seed(0)
    x, dropout = torch.ones(400, 500, requires_grad=True), kernels.Dropout(0.3)
    dropped = dropout(x)
    assert abs(dropped.mean() - 1) < 0.01
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.7]))
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(gradient, dropped.detach())
    assert dropout.eval()(x) is x or torch.equal(dropout(x), x)
    assert not kernels.Dropout(1.0)(x).any()


def test_a_model_with_dropout_compiles_into_one_graph():
    torch.manual_seed(0)
    config = GPTScratchConfig.preset("tiny", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)
    model, input_ids = GPTScratchForCausalLM(config).train(), torch.arange(40).view(2, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        losses = [compiled(input_ids, labels=input_ids).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
