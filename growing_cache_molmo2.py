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
        place: Where the keys begin.
        length: Tokens for which there is memory.
        taken: Tokens that some layer has written. Only a layer that holds exactly these may go on here: a cropped one,
            or the twin of one that went on before, would write over tokens that another still reads.
    """

    place: int
    length: int
    taken: int

    def fits(self, keys: Tensor, more: int) -> bool:
        """Whether `keys` are all that is written here, and so many tokens may be written behind them."""
        is_locked = keys.is_inference() and not torch.is_inference_mode_enabled()  # torch forbids it
        is_here = keys.data_ptr() == self.place and keys.stride(1) == self.length * keys.shape[3]
        return is_here and not is_locked and keys.shape[2] == self.taken and self.taken + more <= self.length


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, (B, heads, S, head_dim) each, views of memory with room behind them.

    Whatever else the library does to a layer (crop, reorder, repeat, move) gives it other tensors, or shorter ones;
    the next tokens then start new memory, as they do where gradients are recorded and in compiled graphs.
    """

    _room: _Room | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens, (B, heads, new, head_dim), and returns all."""
        length, more = self.get_seq_length(), key_states.shape[2]
        is_plain = type(key_states) is Tensor  # not spread over devices, nor otherwise without memory of its own
        if length == 0 or not is_plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        if self._room is None or not self._room.fits(self.keys, more):
            capacity = with_room(length + more)
            self.keys = _moved(self.keys, capacity)
            self.values = _moved(self.values, capacity)
            self._room = _Room(self.keys.data_ptr(), capacity, length)
        self._room.taken += more
        self.keys = _continued(self.keys, key_states)
        self.values = _continued(self.values, value_states)
        return self.keys, self.values


def let_grow(cache: Any) -> Any:
    """The same cache; the layers of a plain `DynamicCache` grow in place from here on, others stay as they are."""
    if type(cache) is DynamicCache and not cache.offloading:
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
