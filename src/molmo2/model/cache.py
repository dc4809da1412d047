"""Cache layers that append new tokens in place, in memory that is allocated ahead.

`DynamicCache` concatenates, so each new token copies everything that is cached: after a long clip more bytes than the
weights have. `StaticCache`, which does not copy, needs the final length in advance and attends to all of it. The
layers here grow by an eighth when they are full.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

MIN_SPARE_TOKENS = 64
SPARE_FRACTION = 8  # an eighth of what is cached


def capacity_for(length: int) -> int:
    """The number of tokens that memory is allocated for when `length` tokens have to fit."""
    return length + max(MIN_SPARE_TOKENS, length // SPARE_FRACTION)


@dataclass
class _Buffer:
    """The memory behind the keys and values of a layer; copies of the layer share it.

    Only the keys and values themselves keep the memory alive.

    Attributes:
        pointers: Addresses of the first key and the first value.
        capacity: Tokens that fit.
        written: Tokens that some layer has written. Only a layer that holds exactly these may append here: a cropped
            one, or a copy of one that has appended since, would overwrite tokens that another layer still reads.
    """

    pointers: tuple[int, int]
    capacity: int
    written: int

    def can_append(self, keys: Tensor, values: Tensor, count: int) -> bool:
        """Whether these are all that is written here, and `count` tokens may be written behind them."""
        is_locked = keys.is_inference() and not torch.is_inference_mode_enabled()  # torch forbids in-place updates
        is_stored = all(
            _is_stored_at(states, place, self.capacity) for states, place in zip((keys, values), self.pointers)
        )
        return is_stored and not is_locked and keys.shape[2] == self.written and self.written + count <= self.capacity


def _is_stored_at(states: Tensor, pointer: int, capacity: int) -> bool:
    """Whether states, (B, heads, S, head_dim), are the beginning of a buffer of `capacity` tokens at this address."""
    _, heads, _, head_dim = states.shape
    strides = (heads * capacity * head_dim, capacity * head_dim, head_dim, 1)
    steps = zip(states.shape, states.stride(), strides)
    return states.data_ptr() == pointer and all(size == 1 or stride == expected for size, stride, expected in steps)


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer, (B, heads, S, head_dim) each, as views of memory with spare capacity.

    Whatever else is done to a layer (crop, reorder, repeat, move) gives it other tensors, or shorter ones; the next
    tokens then allocate a new buffer. Where gradients are recorded, in compiled and traced graphs, and for tokens of
    another batch size or dtype, `DynamicLayer` does the work. Earlier keys and values are views of the memory that is
    written to: copy them before recording gradients of them.
    """

    keys: Any  # tensors, once tokens are cached
    values: Any
    _buffer: _Buffer | None = None

    @classmethod
    def from_layer(cls, layer: DynamicLayer) -> "PreallocatedLayer":
        """A layer with the content of another."""
        own = cls()
        vars(own).update(vars(layer))
        return own

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends tokens, (B, heads, new, head_dim), and returns all."""
        length, count = self.get_seq_length(), key_states.shape[2]
        if length == 0 or _is_recorded() or not self._matches(key_states, value_states):
            self._buffer = None
            return super().update(key_states, value_states, *args, **kwargs)
        if self._buffer is None or not self._buffer.can_append(self.keys, self.values, count):
            capacity = capacity_for(length + count)
            self.keys = _copy_to_buffer(self.keys, capacity)
            self.values = _copy_to_buffer(self.values, capacity)
            self._buffer = _Buffer((self.keys.data_ptr(), self.values.data_ptr()), capacity, length)
        self._buffer.written += count
        self.keys = _append(self.keys, key_states)
        self.values = _append(self.values, value_states)
        return self.keys, self.values

    def _matches(self, *new: Tensor) -> bool:
        """Whether new keys and values have the batch size, heads, dtype and device of the cached ones."""
        return all(
            type(states) is Tensor  # not distributed over devices, nor otherwise without memory of its own
            and (states.dtype, states.device) == (cached.dtype, cached.device)
            and (*states.shape[:2], states.shape[3]) == (*cached.shape[:2], cached.shape[3])
            for states, cached in zip(new, (self.keys, self.values), strict=True)
        )


def _is_recorded() -> bool:
    """Whether operations are being recorded (autograd, compiler, tracer), which would miss in-place updates."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()


def use_preallocated_layers(cache: Any) -> Any:
    """The same cache; a plain `DynamicCache` has `PreallocatedLayer`s from here on, others stay as they are.

    So do caches that are made in compiled graphs, which would break at it.
    """
    if type(cache) is DynamicCache and not cache.offloading and not torch.compiler.is_compiling():
        cache.layers = [
            PreallocatedLayer.from_layer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = PreallocatedLayer
    return cache


def _copy_to_buffer(states: Tensor, capacity: int) -> Tensor:
    """States, (B, heads, S, head_dim), at the beginning of new memory for `capacity` tokens."""
    memory = states.new_empty((*states.shape[:2], capacity, states.shape[3]))
    return memory[:, :, : states.shape[2]].copy_(states)


def _append(states: Tensor, new: Tensor) -> Tensor:
    """States with new ones written behind them, (B, heads, S + new, head_dim), in the same memory."""
    length = states.shape[2]
    longer = states.as_strided((*states.shape[:2], length + new.shape[2], states.shape[3]), states.stride())
    longer[:, :, length:].copy_(new)
    return longer
