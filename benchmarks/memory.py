"""Memory of this process and of what it returned.

Of a process on Linux, resident bytes and their high-water mark, which can be set back; on CUDA what torch allocated.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status(field: str) -> int | None:
    """Bytes that the kernel states under this name; None where there is no such kernel."""
    if not STATUS.exists():
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    return int(found.group(1)) * 1024 if found else None


class PeakMemory:
    """Most bytes in use at one time since the object was made, over those in use then.

    Args:
        device: "cpu" counts resident memory, "cuda" what torch allocated.
    """

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
            return
        try:
            CLEAR.write_text("5")  # sets the high-water mark to what is resident now
        except OSError:
            self._before = None
            return
        self._before = _status("VmRSS")

    def peak_bytes(self) -> int | None:
        """None where it cannot be known."""
        if self._before is None:
            return None
        after = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")
        return None if after is None else max(after - self._before, 0)


def held_bytes(value: Any) -> int:
    """Bytes of the arrays, tensors and parameters in a result; memory that several of them share counts once."""
    return sum(_storages(value).values())


def _storages(value: Any) -> dict[int, int]:
    """Address and size of each piece of memory."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if isinstance(value, np.ndarray):
        return {value.ctypes.data: value.nbytes}
    if isinstance(value, nn.Module):
        return _storages(value.state_dict())
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if not isinstance(value, (list, tuple)):
        return {}
    return {address: size for entry in value for address, size in _storages(entry).items()}
