"""Files that are either whole or absent, also after a power cut."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

# Written and hashed piece by piece; both let other threads run meanwhile.
PIECE_BYTES = 4 * 2**20

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write and flush a new file; returns its `bytes` and `sha256`."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), PIECE_BYTES):
                part = view[start : start + PIECE_BYTES]
                file.write(part)
                digest.update(part)
                size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Write contiguous CPU tensors as a safetensors file; returns its `bytes` and `sha256`.

    The library's own writer holds Python's lock while it writes, which would stop the training thread, and
    copies every byte first. The format is a length, a JSON header and the tensors' bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    bodies = (t.reshape(-1).view(torch.uint8).numpy().data for t in tensors.values() if t.numel())
    return write_file(path, (len(head).to_bytes(8, "little"), head, *bodies))


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one motion: a reader sees the old file or the new one."""
    temporary = path.with_name(temporary_name(path.name))
    temporary.unlink(missing_ok=True)
    write_file(temporary, [content])
    os.replace(temporary, path)
    flush_folder(path.parent)


def temporary_name(name: str) -> str:
    """What a file is called while `replace_file` writes it."""
    return f".{name}.tmp"


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, which other libraries wrote without doing so."""
    for root, _, names in os.walk(folder):
        for name in names:
            flush_folder(Path(root) / name)  # fsync of a descriptor does not care what it is
        flush_folder(Path(root))


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def explain_write_error(error: OSError, what: str, folder: Path) -> str:
    """What went wrong while writing `what` into `folder`, and what its owner can do."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = f"{free / 2**20:,.0f} MiB are free there; make room (or raise the limit) and run it again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "make the folder writable or choose another --run_dir"
    else:
        advice = "see to it and run the same command again"
    return f"{what} could not be written to {folder}: {reason}. {advice}."
