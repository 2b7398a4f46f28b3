"""PEFT's LoRA on our model: attached by name and by "all-linear", trained, saved, loaded again, merged."""

import pytest
import torch

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from modeling_gpt_scratch.convert_gpt2 import to_gpt2

peft = pytest.importorskip("peft", reason="peft is not installed")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def base_model():
    torch.manual_seed(0)
    return GPTScratchForCausalLM(GPTScratchConfig.preset("tiny"))


def ids():
    return torch.randint(0, 511, (2, 12), generator=torch.Generator().manual_seed(1))


def adapted(target_modules):
    config = peft.LoraConfig(r=4, target_modules=target_modules, task_type="CAUSAL_LM")
    return peft.get_peft_model(base_model(), config)


def train(model, steps=3):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (ATTENTION, set(ATTENTION)),
        ("all-linear", {*ATTENTION, "c_fc", "c_proj"}),
    ],
    ids=["two named", "attention", "all-linear"],
)
def test_lora_attaches_trains_only_itself_and_survives_saving(target_modules, expected, tmp_path):
    model = adapted(target_modules)
    # The head is tied to the embedding and must stay out of "all-linear".
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == expected
    assert len(model.targeted_module_names) == 2 * len(expected)  # two blocks
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}

    losses = train(model)
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], before) for name, before in frozen.items())

    base_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        GPTScratchForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    expected_logits = model.eval()(input_ids=ids()).logits
    torch.testing.assert_close(again.eval()(input_ids=ids()).logits, expected_logits, rtol=0, atol=0)

    merged = again.merge_and_unload()
    assert type(merged) is GPTScratchForCausalLM
    # x @ (W + BA) against x @ W + x @ BA, in float32.
    torch.testing.assert_close(merged(ids()).logits, expected_logits, rtol=1e-4, atol=1e-5)


def test_a_merged_model_is_an_ordinary_checkpoint_and_becomes_stock_gpt2(tmp_path):
    model = adapted("all-linear")
    train(model)
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    again = GPTScratchForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again.state_dict(), merged.state_dict(), rtol=0, atol=0)
    # Fused q, k, v sum in another order.
    torch.testing.assert_close(to_gpt2(again)(ids()).logits, merged(ids()).logits, rtol=1e-5, atol=1e-5)


def test_the_auto_class_finds_the_base_model_of_an_adapter(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = GPTScratchForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=ATTENTION, task_type="CAUSAL_LM"))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(again.get_base_model()) is GPTScratchForCausalLM
    expected = model.eval()(input_ids=ids()).logits
    torch.testing.assert_close(again.eval()(input_ids=ids()).logits, expected, rtol=0, atol=0)


def test_an_adapted_model_generates_and_checkpoints_its_activations():
    model = adapted("all-linear")
    train(model)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.eval().generate(input_ids=ids(), **settings)
    torch.testing.assert_close(cached, model.generate(input_ids=ids(), use_cache=False, **settings))

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()  # what trainers do for frozen embeddings
    # The same operations, run twice.
    torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)


def test_an_adapter_on_the_head_is_trained_and_not_bypassed():
    """The loss without logits multiplies by the head's weight; an adapter there must switch it off."""
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base_model(), config)
    losses = train(model)
    assert losses[-1] < losses[0]


def test_prompt_tuning_trains_its_virtual_tokens():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(base_model(), config)
    losses = train(model)
    assert losses[-1] < losses[0]
