"""Whether a model keeps texts apart that share a row."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Logits in float32 of the same computation in another order; what leaks moves them a hundred times as much.
TOLERANCE = 1e-3


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
    device = next(model.parameters()).device
    ids, positions = (block[name][:end][None].to(device) for name in ("input_ids", "position_ids"))
    was_training = model.training
    model.eval()
    try:
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, start:]
        alone = model(input_ids=ids[:, start:], use_cache=False).logits[0]
    except TypeError:  # takes no position_ids
        return False
    finally:
        model.train(was_training)
    return torch.allclose(together.float(), alone.float(), atol=TOLERANCE, rtol=TOLERANCE)
