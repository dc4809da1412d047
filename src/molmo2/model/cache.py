"""A cache whose keys and values are not copied at every token: they grow in memory that has room for more.

transformers' `DynamicCache` joins tensors, so each new token reads and writes all that is cached: with the tokens of
a long clip more than the weights. Its layers are exchanged for ones that write new tokens behind the old ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

LEAST_ROOM = 64  # tokens
SHARE_OF_ROOM = 8  # an eighth of what is cached


def with_room(length: int) -> int:
    """The tokens for which there is memory, if it is made for so many now."""
    return length + max(LEAST_ROOM, length // SHARE_OF_ROOM)


@dataclass
class _Room:
    """How much of the memory behind the keys and values of a layer is taken; twins of the layer share this.

    The memory itself is held by the keys and values alone, and goes with them.

    Attributes:
        places: Where the keys and the values begin.
        length: Tokens for which there is memory.
        taken: Tokens that some layer has written. Only a layer that holds exactly these may go on here: a cropped one,
            or the twin of one that went on before, would write over tokens that another still reads.
    """

    places: tuple[int, int]
    length: int
    taken: int

    def fits(self, keys: Tensor, values: Tensor, more: int) -> bool:
        """Whether these are all that is written here, and so many tokens may be written behind them."""
        is_locked = keys.is_inference() and not torch.is_inference_mode_enabled()  # torch forbids it
        are_here = all(_lies_at(states, place, self.length) for states, place in zip((keys, values), self.places))
        return are_here and not is_locked and keys.shape[2] == self.taken and self.taken + more <= self.length


def _lies_at(states: Tensor, place: int, length: int) -> bool:
    """Whether states, (B, heads, S, head_dim), are the beginning of memory for so many tokens at this place."""
    _, heads, _, head_dim = states.shape
    strides = (heads * length * head_dim, length * head_dim, head_dim, 1)
    steps = zip(states.shape, states.stride(), strides)
    return states.data_ptr() == place and all(size == 1 or stride == wanted for size, stride, wanted in steps)


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, (B, heads, S, head_dim) each, views of memory with room behind them.

    Whatever else the library does to a layer (crop, reorder, repeat, move) gives it other tensors, or shorter ones;
    the next tokens then start new memory. Where gradients are recorded, in compiled and traced graphs, and for tokens
    of other rows or another dtype, the library's own layer does the work. Tokens are written into memory that earlier
    keys and values are views of: whoever records gradients of these should take a copy.
    """

    _room: _Room | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens, (B, heads, new, head_dim), and returns all."""
        length, more = self.get_seq_length(), key_states.shape[2]
        if length == 0 or _is_recorded() or not self._goes_on_with(key_states, value_states):
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        if self._room is None or not self._room.fits(self.keys, self.values, more):
            capacity = with_room(length + more)
            self.keys = _moved(self.keys, capacity)
            self.values = _moved(self.values, capacity)
            self._room = _Room((self.keys.data_ptr(), self.values.data_ptr()), capacity, length)
        self._room.taken += more
        self.keys = _continued(self.keys, key_states)
        self.values = _continued(self.values, value_states)
        return self.keys, self.values

    def _goes_on_with(self, *new: Tensor) -> bool:
        """Whether new keys and values are of the same rows and heads, and of the same kind."""
        return all(
            type(states) is Tensor  # not spread over devices, nor otherwise without memory of its own
            and (states.dtype, states.device) == (cached.dtype, cached.device)
            and (*states.shape[:2], states.shape[3]) == (*cached.shape[:2], cached.shape[3])
            for states, cached in zip(new, (self.keys, self.values), strict=True)
        )


def _is_recorded() -> bool:
    """Whether somebody keeps track of what is computed, who would not see it written in place."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()


def let_grow(cache: Any) -> Any:
    """The same cache; the layers of a plain `DynamicCache` grow in place from here on, others stay as they are.

    Compiled graphs would break at it, and have no use for it.
    """
    if type(cache) is DynamicCache and not cache.offloading and not torch.compiler.is_compiling():
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = GrowingLayer
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = GrowingLayer
    return cache


def _moved(states: Tensor, capacity: int) -> Tensor:
    """The same states, (B, heads, S, head_dim), at the beginning of memory for so many tokens."""
    memory = states.new_empty((*states.shape[:2], capacity, states.shape[3]))
    return memory[:, :, : states.shape[2]].copy_(states)


def _continued(states: Tensor, new: Tensor) -> Tensor:
    """States with new ones written behind them, (B, heads, S + new, head_dim), in the same memory."""
    length = states.shape[2]
    longer = states.as_strided((*states.shape[:2], length + new.shape[2], states.shape[3]), states.stride())
    longer[:, :, length:].copy_(new)
    return longer
