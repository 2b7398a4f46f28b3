"""How much memory there is, how much was taken, and by what."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

# Where Linux keeps the limit of a container, version 2 and 1.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_memory(device: torch.device) -> float:
    """Bytes that this process may have on the device, those that it has included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    own = _status("VmRSS")
    # The processes of one machine share what is left.
    limits = [_meminfo("MemAvailable") / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + own]
    for path in CGROUP_LIMITS:
        try:
            limits.append(float(Path(path).read_text()))
        except (OSError, ValueError):  # no such version, or "max"
            continue
    soft = resource.getrlimit(resource.RLIMIT_AS)[0] if resource else -1
    if soft >= 0:
        # Addresses are counted there, of which a process has more than memory.
        limits.append(soft - _status("VmSize") + own)
    return min(limits)


def data_limit() -> float:
    """A limit on a new process's data (RLIMIT_DATA) at which the memory of this machine is full; 0 unknown.

    Some data is asked for and never touched; this process has about as much of it as the new one.
    """
    data, resident = _status("VmData"), _status("RssAnon")
    available = available_memory(torch.device("cpu")) - _status("VmRSS")
    return available + (data - resident) if data else 0.0


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has had on the device; 0 where nobody counts them."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return float(torch.mps.driver_allocated_memory())
    return _status("VmHWM")


def _status(name: str) -> float:
    """Of this process, in bytes. getrusage's own peak would include that of the process that started it."""
    return _kilobytes("/proc/self/status", name) * 1024


def _meminfo(name: str) -> float:
    return _kilobytes("/proc/meminfo", name) * 1024 or float("inf")


def _kilobytes(path: str, name: str) -> float:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(name + ":"):
                return float(line.split()[1])
    except OSError:  # not Linux
        pass
    return 0.0


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is entered and still alive: `now`, and the `peak`.

    What a kernel takes and gives back within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                self._add(leaf)
        return result

    def ignore(self, tensors: Any) -> None:
        """Storages that were there before: views of them are nothing new."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._known.add(local.untyped_storage()._cdata)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def local_bytes(tensors: Any) -> int:
    """Bytes that this process holds of tensors, sharded or not."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
