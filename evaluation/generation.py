"""Text that a model writes."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from evaluation.isolation import NotFiniteError, bare_model, undisturbed


class RefuseNaN(LogitsProcessor):
    """Stops a generation whose next token would come out of broken numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The maximum of a row is NaN where any entry is, and infinite where no probability can be made of it.
        if not torch.isfinite(scores.amax(-1)).all():
            raise NotFiniteError(
                f"the model returned NaN or infinity after {input_ids.shape[1]:,} tokens: its weights are "
                "broken or overflow in this dtype"
            )
        return scores


def generate_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    accelerator: Accelerator | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    batch_size: int = 16,
) -> list[str]:
    """What the model writes after each prompt, without the prompt and special tokens.

    `model` may be compiled, wrapped or sharded. Every process generates the same texts, which a sharded model
    needs because its forward is collective. `temperature` 0 is greedy; `top_k` 0 is no limit. An empty prompt
    stands for the beginning of a document. The texts depend on the seed and the batches, not on any random
    state outside, and none of those is touched.

    Raises:
        ValueError: if a prompt with its new tokens is longer than the model's context.
        NotFiniteError: if the model returns NaN, of which a greedy choice would make token 0 and a draw an
            error of the device's.
    """
    causal_model = bare_model(model)
    config = causal_model.config
    device = accelerator.device if accelerator is not None else next(model.parameters()).device
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [tokenizer(prompt)["input_ids"] or [start_id] for prompt in prompts]
    context = getattr(config, "max_position_embeddings", None)
    for prompt, row in zip(prompts, rows, strict=True):
        if context is not None and len(row) + max_new_tokens > context:
            raise ValueError(
                f"a prompt of {len(row):,} tokens and max_new_tokens={max_new_tokens:,} do not fit "
                f"the context of {context:,} tokens; shorten one of them. The prompt: {prompt[:60]!r}"
            )

    sampling: dict[str, Any] = {"do_sample": temperature > 0, "repetition_penalty": repetition_penalty}
    if temperature > 0:
        sampling.update(temperature=temperature, top_k=top_k, top_p=top_p)
    # A vocabulary padded for tensor cores has rows that stand for no token.
    unused_ids = list(range(len(tokenizer), config.vocab_size))
    # Any id does as padding, for it is masked: a tokenizer without a pad token needs no special case.
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    texts = []
    with undisturbed(model):
        torch.manual_seed(seed)
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            width = max(len(row) for row in batch)
            input_ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in batch], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
            output = causal_model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_id,
                eos_token_id=tokenizer.eos_token_id,
                suppress_tokens=unused_ids or None,
                use_cache=True,
                logits_processor=LogitsProcessorList([RefuseNaN()]),
                **sampling,
            )
            texts += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts
