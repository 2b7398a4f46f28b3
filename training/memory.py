"""How much memory there is, how much was taken, and by what."""

import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

# Where Linux keeps the limits of containers and of a cluster's jobs, and which of them are this process's.
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# What torch's allocators, CUDA's libraries and the system say when memory ran out.
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")
# What we say of a run that would have too little.
DOES_NOT_FIT = "does not fit the memory"


def available_memory(device: torch.device) -> float:
    """Bytes that this process may have on the device, those that it has included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    own = _resident()
    # The processes of one machine share what is left of it, and what their job or container may have.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    limits = [psutil.virtual_memory().available / sharing + own]
    limits += [limit / sharing for limit in cgroup_limits(CGROUPS, OWN_CGROUPS)]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0] if resource else -1
    if soft >= 0:
        # Addresses are counted there, of which a process has more than memory.
        limits.append(soft - _status("VmSize") + own)
    return min(limits)


def cgroup_limits(root: Path, own: Path) -> list[float]:
    """Bytes that the control groups of this process may have, which it shares: the innermost, and each around
    it. `root` and `own` are Linux's files.
    """
    limits = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = base / group.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(base):
                break
            try:
                limits.append(float((folder / name).read_text()))
            except (OSError, ValueError):  # a container does not see its own group's folder; or "max"
                continue
    return limits


def data_limit() -> float:
    """A limit on a new process's data (RLIMIT_DATA) at which the memory of this machine is full; 0 unknown.

    Some data is asked for and never touched; this process has about as much of it as the new one.
    """
    data, resident = _status("VmData"), _status("RssAnon")
    available = available_memory(torch.device("cpu")) - _resident()
    return available + (data - resident) if data else 0.0


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has had on the device."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return float(torch.mps.driver_allocated_memory())
    return _status("VmHWM") or peak_without_proc()


def peak_without_proc() -> float:
    """The most bytes that this process has had, where there is no /proc: on macOS and Windows.

    On Linux it would include the peak of the process that started this one.
    """
    if resource is None:
        return float(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _resident() -> float:
    return float(psutil.Process().memory_info().rss)


def _status(name: str) -> float:
    """Of this process, in bytes; 0 where Linux does not say it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.0


def says_out_of_memory(text: str) -> bool:
    """Whether an error's text says that memory ran out; not that which processes share, as loaders do."""
    words = text.lower()
    return any(sign in words for sign in OUT_OF_MEMORY) and "shared memory" not in words


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
