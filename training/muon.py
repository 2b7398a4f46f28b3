"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) beside AdamW, in one optimizer.

A matrix moves along its momentum with all singular values brought near one: directions that plain gradients
hardly use learn as fast as the dominant ones. torch's own `Muon` takes one matrix at a time, heeds no flag
that a step is to be skipped (training/guard.py), and leaves the other parameters to a second optimizer.
"""

from collections import defaultdict
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from training.device import choose_precision

# Quintic iteration with the steepest start that still ends between 0.7 and 1.2 (Jordan et al. 2024).
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPSILON = 1e-7


class MuonAndAdamW(torch.optim.AdamW):
    """Muon for one group of matrices, torch's fused AdamW for the others.

    `muon` is a parameter group with `params` (each 2-D), `weight_decay` and `momentum`; `adamw_groups` and
    the keywords are AdamW's. Like the fused AdamW it leaves weights and state untouched where its `found_inf`
    is 1.0. Sharded matrices (FSDP2) are gathered for their update, and every process computes it.
    """

    def __init__(self, muon: dict[str, Any], adamw_groups: list[dict[str, Any]], **adamw: Any):
        not_matrices = [tuple(p.shape) for p in muon["params"] if p.dim() != 2]
        if not_matrices:
            raise ValueError(f"Muon updates matrices; shapes given: {not_matrices[:5]}")
        super().__init__([{**muon, "is_muon": True}, *adamw_groups], fused=True, **adamw)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update. `closure` is AdamW's."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("is_muon")]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("is_muon"):
                self._step_muon(group)
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        found_inf = getattr(self, "found_inf", None)
        goes = 1.0 if found_inf is None else 1.0 - found_inf  # 0.0: everything stays as it is
        directions = defaultdict(list)  # by shape: equal ones are orthogonalised together
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradient, momentum = _local(parameter.grad), _local(state["momentum_buffer"])
            if found_inf is not None:  # 0 x NaN would be NaN
                gradient = torch.where(found_inf > 0, torch.zeros_like(gradient), gradient)
            momentum.add_((gradient - momentum) * ((1.0 - group["momentum"]) * goes))
            look_ahead = torch.lerp(gradient, momentum, group["momentum"])  # Nesterov's
            directions[parameter.shape].append((parameter, _whole_like(look_ahead, parameter)))
        for (rows, columns), members in directions.items():
            parameters, matrices = zip(*members, strict=True)
            # Rows that read few columns get a larger share of the update's norm.
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            updates = orthogonalised(torch.stack(matrices))
            for parameter, update in zip(parameters, updates, strict=True):
                own = _local(parameter)
                own.mul_(1.0 - group["lr"] * group["weight_decay"] * goes)
                own.sub_(_local_part(update, parameter).to(own.dtype) * (rate * goes))


def orthogonalised(matrices: Tensor) -> Tensor:
    """Each of `matrices` (N, rows, columns) with its singular values near 1: U S V' becomes about U V'.

    Newton-Schulz: matrix products only, in bfloat16 where the run itself would compute in it: the result is a
    rough one, and more digits do not improve it.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if is_tall else matrices  # (N, m, n) with m <= n: the products below are (m, m)
    # Norms in float32: bfloat16 sums of a million squares lose the small ones.
    x = (x / x.float().norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)).to(_product_dtype(x.device))
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


@cache
def _product_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if choose_precision(device, "auto").value == "bf16" else torch.float32


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole_like(local: Tensor, parameter: Tensor) -> Tensor:
    """The whole matrix of which `local` is this process's part, cut as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()


def _local_part(whole: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    # Every process has the whole update: each keeps its part, and nothing is sent.
    return distribute_tensor(
        whole.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None
    ).to_local()
