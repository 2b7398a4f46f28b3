"""The loss that never holds the whole logits is the plain loss, in value and in gradient."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM, linear_cross_entropy
from modeling_gpt_scratch.kernels_gpt_scratch import LOSS_CHUNK_ROWS

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")),
    reason="torch.compile for the CPU needs a C++ compiler, and this machine has none",
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPTScratchForCausalLM(GPTScratchConfig.preset("tiny")).train()


def batch(rows=3, tokens=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, 512, (rows, tokens), generator=generator)
    labels = input_ids.clone()
    labels[0, : tokens // 2] = -100
    return input_ids, labels


def inputs(n_rows, width=32, vocabulary=300, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n_rows)
    hidden = torch.randn(n_rows, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (n_rows,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


def error_against(reference, value):
    return ((value.double() - reference).norm() / reference.norm()).item()


# One row, less than a chunk, several chunks, a last chunk that is short.
@pytest.mark.parametrize("n_rows", [1, 100, 3 * LOSS_CHUNK_ROWS, 9 * LOSS_CHUNK_ROWS + 17])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_as_good_as_the_plain_ones(n_rows, autocast):
    hidden, weight, targets = inputs(n_rows)
    targets[0] = 5
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    F.cross_entropy(exact_hidden @ exact_weight.T, targets).backward()

    errors = {}
    for name in ("plain", "ours"):
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if name == "plain":
                loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
            else:
                loss = linear_cross_entropy(hidden, weight, targets)
        loss.backward()
        assert loss.dtype == torch.float32
        errors[name] = (
            error_against(exact_hidden.grad, hidden.grad),
            error_against(exact_weight.grad, weight.grad),
        )
    # Both round the same products to the same type; a quarter more leaves room for another order of sums.
    # The floor is float32's own rounding over some hundred additions.
    for ours, plain in zip(errors["ours"], errors["plain"], strict=True):
        assert ours <= 1.25 * plain + 1e-6, errors


def test_loss_is_float32_to_the_last_digit_under_autocast():
    """bfloat16 has three digits: a loss rounded to it would be off by up to 0.03 near 10."""
    hidden, weight, targets = inputs(700, vocabulary=3000)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_float16_keeps_its_gradients_in_range_with_a_loss_scaler():
    hidden, weight, targets = inputs(600, dtype=torch.float16)
    (linear_cross_entropy(hidden, weight, targets, num_items_in_batch=600) * 2.0**14).backward()
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    counted = (targets != -100).sum()
    (F.cross_entropy(exact_hidden @ exact_weight.T, targets) * counted / 600 * 2.0**14).backward()
    # float16 has eleven bits; sums of a few hundred rounded products stay within some hundredths.
    assert error_against(exact_hidden.grad, hidden.grad) < 0.02
    assert error_against(exact_weight.grad, weight.grad) < 0.02


def test_num_items_in_batch_divides_the_sum_as_number_or_tensor():
    hidden, weight, targets = inputs(40)
    total = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    for items in (1000, torch.tensor(1000)):
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, items), total / 1000)


def test_frozen_weight_and_frozen_states_get_no_gradient():
    hidden, weight, targets = inputs(40)
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None and weight.grad is None
    hidden.grad = None
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert hidden.grad is None and weight.grad is not None


def test_a_second_backward_gives_the_same_gradients_again():
    hidden, weight, targets = inputs(40)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_a_label_outside_the_vocabulary_is_an_error_and_not_token_zero():
    hidden, weight, targets = inputs(10)
    targets[3] = -1
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(hidden, weight, targets)


def test_training_returns_the_loss_and_no_logits_evaluation_both(model):
    input_ids, labels = batch()
    trained = model(input_ids, labels=labels)
    assert trained.logits is None
    model.eval()
    evaluated = model(input_ids, labels=labels)
    assert evaluated.logits.shape == (3, 50, 512)
    torch.testing.assert_close(trained.loss, evaluated.loss)
    torch.testing.assert_close(model(input_ids, labels=labels, skip_logits=True).loss, evaluated.loss)


def test_skip_logits_is_obeyed_both_ways_and_refused_without_labels(model):
    input_ids, labels = batch()
    assert model(input_ids, labels=labels, skip_logits=False).logits is not None
    with pytest.raises(ValueError, match="labels"):
        model(input_ids, skip_logits=True)


def test_the_model_shifts_labels_once(model):
    input_ids, labels = batch()
    logits = model(input_ids).logits
    by_hand = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(input_ids, labels=labels).loss, by_hand)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(input_ids, shift_labels=shifted).loss, by_hand)


def test_two_micro_batches_with_num_items_take_the_gradient_of_the_whole(model):
    input_ids, labels = batch(rows=4)
    model(input_ids, labels=labels).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    items = (labels[:, 1:] != -100).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        model(input_ids[rows], labels=labels[rows], num_items_in_batch=items).loss.backward()
    for name, p in model.named_parameters():
        # Sums of at most 200 float32 numbers in another order.
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kept", [1, 7, torch.tensor([3, 10, 49])])
def test_logits_to_keep_keeps_those_logits_and_their_loss(model, kept):
    input_ids, labels = batch()
    model.eval()
    full = model(input_ids).logits
    expected = full[:, -kept:] if isinstance(kept, int) else full[:, kept]
    torch.testing.assert_close(model(input_ids, logits_to_keep=kept).logits, expected)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    targets = targets[:, -kept:] if isinstance(kept, int) else targets[:, kept]
    plain = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum") / 9
    for skip in (True, False):
        out = model(input_ids, labels=labels, logits_to_keep=kept, num_items_in_batch=9, skip_logits=skip)
        torch.testing.assert_close(out.loss, plain)


def test_a_head_that_is_wrapped_is_called_and_not_bypassed(model):
    input_ids, labels = batch()
    without = model(input_ids, labels=labels).loss
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * 0)
    wrapped = model(input_ids, labels=labels)
    handle.remove()
    assert wrapped.logits is None
    torch.testing.assert_close(wrapped.loss.item(), float(torch.tensor(512.0).log()), rtol=1e-5, atol=1e-5)
    assert without != wrapped.loss


def test_a_loss_function_that_the_user_sets_is_used(model):
    input_ids, labels = batch()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 42
    assert model(input_ids, labels=labels).loss == 42


@needs_compiler
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_training_step_is_one_graph_and_takes_the_eager_gradient(autocast):
    torch.manual_seed(0)
    model = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", n_layer=1)).train()
    input_ids, labels = batch(rows=8, tokens=100)  # 800 rows: more than one chunk
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            forward(input_ids, labels=labels, num_items_in_batch=torch.tensor(700)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # Fused kernels round less often: bfloat16 steps are 2^-8 wide, float32's sums differ by their order.
    assert error_against(gradients[0].double(), gradients[1]) < (0.02 if autocast else 1e-5)


def test_the_training_forward_traces_on_the_meta_device():
    with torch.device("meta"):
        model = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny")).train()
        input_ids = torch.zeros(2, 20, dtype=torch.long)
    assert model(input_ids, labels=input_ids).loss.shape == ()


def test_untied_head_gets_its_own_gradient():
    model = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", tie_word_embeddings=False)).train()
    input_ids, labels = batch()
    model(input_ids, labels=labels).loss.backward()
    assert model.lm_head.weight.grad is not model.transformer.wte.weight.grad
    assert model.lm_head.weight.grad.abs().sum() > 0
