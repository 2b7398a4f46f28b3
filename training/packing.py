"""Whether a model keeps texts apart that share a row."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Difference of logits, as a share of their size, between two computations of the same thing: rounding stays
# below, and what leaks from another text is above. In the half types rounding alone is up to a hundredth.
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2


@torch.no_grad()
def keeps_texts_apart(model: Any, block: Mapping[str, Tensor]) -> bool:
    """Whether the second text of a packed row is read as if it stood alone.

    `block` holds `input_ids` and `position_ids`, int64 (T,), that restart where a text begins. Models that
    keep a state (Mamba, RWKV) or count positions by themselves do not heed them.
    """
    starts = (block["position_ids"] == 0).nonzero().flatten().tolist()
    if len(starts) < 2:
        return True
    start, end = starts[1], [*starts, len(block["input_ids"])][2]
    weight = next(model.parameters())
    ids, positions = (block[name][:end][None].to(weight.device) for name in ("input_ids", "position_ids"))
    was_training = model.training
    model.eval()
    try:
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, start:]
        alone = model(input_ids=ids[:, start:], use_cache=False).logits[0]
    except TypeError:  # takes no position_ids
        return False
    finally:
        model.train(was_training)
    # What all words of a position have in common changes no probability, and would hide what differs.
    together, alone = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (together, alone))
    tolerance = TOLERANCE if weight.dtype == torch.float32 else HALF_TOLERANCE
    return bool((together - alone).norm() <= tolerance * alone.norm())
