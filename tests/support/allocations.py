"""Counts the bytes of tensors as they come and go, on any device and without a clock."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Within `with Allocations() as counted:`, every tensor that an operation makes.

    Attributes:
        largest: Elements of the largest tensor; views without memory of their own count for nothing.
        peak_bytes: Most bytes of memory made inside that were alive at one time.
    """

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.peak_bytes = 0
        self._live_bytes = 0
        self._holders: dict[int, int] = {}  # storage -> tensors that share it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        given = {leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, given)
        return result

    def _count(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given and key not in self._holders:
            return  # a view of memory from outside
        if key not in self._holders:
            self._holders[key] = 0
            self._live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)
            self.largest = max(self.largest, size // tensor.element_size())
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._live_bytes -= size
