"""Other people's trainers: transformers.Trainer and TRL's SFTTrainer take our model as they take any."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM

TEXTS = [
    "The torch burns low and the corridor turns north.",
    "A dragon sleeps on a heap of copper coins.",
    "Water drips from the vault into a black pool.",
    "Behind the door of iron somebody is singing.",
] * 4


def model_with(**overrides):
    torch.manual_seed(0)
    return GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", **overrides))


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def rows(count, tokens=16):
    ids = torch.randint(0, 511, (count, tokens), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def arguments(folder, **overrides):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        **overrides,
    }
    return settings


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trainer_learns_evaluates_and_saves(tmp_path):
    seen = []

    def next_token_accuracy(prediction):
        seen.append(prediction.predictions.shape)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(right.mean())}

    model, examples = model_with(), rows(4)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path, max_steps=8)),
        train_dataset=examples,
        eval_dataset=examples,
        compute_metrics=next_token_accuracy,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 1

    metrics = trainer.evaluate()
    # Metrics see logits, and nothing else that the model returns (no cache).
    assert seen == [(4, 16, 512)]
    ids = torch.stack([row["input_ids"] for row in examples])
    with torch.no_grad():
        logits = model.eval()(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    # The same float32 sums in another order.
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    accuracy = (logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    assert metrics["eval_accuracy"] == pytest.approx(float(accuracy))

    trainer.save_model(tmp_path / "saved")
    again = GPTScratchForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_trainer_accumulates_uneven_micro_batches_to_the_step_of_the_whole_batch(tmp_path):
    """Trainer hands over the targets of the whole step; a mean of means would weigh the short rows more."""
    examples = rows(4)
    for row, targets in zip(examples, (15, 3, 9, 1), strict=True):
        row["labels"][targets + 1 :] = -100

    def weights_after_one_step(micro_batch):
        model = model_with()
        Trainer(
            model=model,
            args=TrainingArguments(
                **arguments(
                    tmp_path,
                    max_steps=1,
                    optim="sgd",
                    learning_rate=1.0,
                    lr_scheduler_type="constant",
                    max_grad_norm=0.0,
                    per_device_train_batch_size=micro_batch,
                    gradient_accumulation_steps=4 // micro_batch,
                )
            ),
            train_dataset=examples,
        ).train()
        return model.state_dict()

    # Gradients of order 0.1 summed in another order.
    torch.testing.assert_close(weights_after_one_step(1), weights_after_one_step(4), rtol=1e-5, atol=1e-6)


def test_trainer_resumes_a_run_with_activation_checkpointing(tmp_path):
    def run(steps, resume):
        trainer = Trainer(
            model=model_with(),
            args=TrainingArguments(
                **arguments(
                    tmp_path,
                    max_steps=steps,
                    save_strategy="steps",
                    save_steps=2,
                    gradient_checkpointing=True,
                    lr_scheduler_type="constant",
                )
            ),
            train_dataset=rows(4),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    unbroken = run(4, None)
    resumed = run(4, str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(resumed, unbroken, rtol=0, atol=0)


def test_label_smoothing_in_trainer_predicts_the_next_token(tmp_path):
    """Trainer shifts labels only for classes on a list of names; it would teach another model to copy."""
    model, examples = model_with(), rows(4)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.1)),
        eval_dataset=examples,
    )
    ids = torch.stack([row["input_ids"] for row in examples])
    with torch.no_grad():
        logits = model.eval()(ids).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1, reduction="mean"
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_learns_and_evaluates(packing, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    model = model_with(vocab_size=len(tokenizer))
    dataset = Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(tmp_path, max_steps=6, max_length=64, packing=packing, bf16=False)),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    assert 0 < metrics["eval_mean_token_accuracy"] <= 1


def test_sft_trainer_reports_the_loss_of_the_model(tokenizer, tmp_path):
    """TRL takes hidden states and head apart and computes a loss of its own; ours must be the same number."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    model = model_with(vocab_size=len(tokenizer))
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(tmp_path, max_length=64, per_device_eval_batch_size=16, bf16=False)),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        eval_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        expected = model.eval()(**batch).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_sft_trainer_packs_documents_without_leaks(tokenizer, tmp_path):
    """Packed rows reach the model as restarting positions: the loss is that of the documents one by one."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    model = model_with(vocab_size=len(tokenizer))
    model.config.initializer_range = 0.1
    model.init_weights()  # larger weights, so that a leak between documents would show

    def evaluation_loss(packing):
        # Packed evaluation works on one row of 128 tokens; unpacked pads each document.
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                **arguments(
                    tmp_path,
                    max_length=128,
                    packing=packing,
                    packing_strategy="bfd",
                    padding_free=packing,
                    per_device_eval_batch_size=16,
                    bf16=False,
                )
            ),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            eval_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
        )
        return trainer.evaluate()["eval_loss"]

    assert evaluation_loss(True) == pytest.approx(evaluation_loss(False), rel=1e-5)


def test_sft_trainer_trains_an_adapter(tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    trainer = trl.SFTTrainer(
        model=model_with(vocab_size=len(tokenizer)),
        args=trl.SFTConfig(**arguments(tmp_path, max_steps=6, learning_rate=1e-2, max_length=64, bf16=False)),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_dpo_trainer_learns_to_prefer(tokenizer, tmp_path):
    """Its reference model is loaded from the folder that the policy came from, by Auto class."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    model_with(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "start")
    model = GPTScratchForCausalLM.from_pretrained(tmp_path / "start")
    pairs = {
        "prompt": ["The corridor"] * 8,
        "chosen": [" turns north."] * 8,
        "rejected": [" is singing."] * 8,
    }
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**arguments(tmp_path, max_steps=4, max_length=64, bf16=False)),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.state.log_history[-2]["rewards/margins"] > 0
