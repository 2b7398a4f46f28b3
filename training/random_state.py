"""Random states of every process as tensors.

Python's, NumPy's, PyTorch's on the CPU and on an accelerator.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


def own_random_state(device: torch.device) -> dict[str, Tensor]:
    """This process's random states by kind; of accelerators that of `device`, for others are not touched."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        # A pair of normal numbers is drawn at once, and the second kept: NaN where there is none.
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray([*keys, position, has_gauss], dtype=np.int64)),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def all_random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """Those of all processes, as "00003/torch". Every process calls this."""
    states_here = own_random_state(accelerator.device)
    own = [{f"{accelerator.process_index:05d}/{kind}": state for kind, state in states_here.items()}]
    everyone: list[Any] = gather_object(own) if accelerator.num_processes > 1 else own
    return {name: state for states in everyone for name, state in states.items()}


def restore_random_state(saved: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Give this process its own states back."""
    mine = f"{accelerator.process_index:05d}/"
    states = {name.removeprefix(mine): state for name, state in saved.items() if name.startswith(mine)}
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].item()
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    device = accelerator.device
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if "mps" in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
