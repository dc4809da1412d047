"""A cache whose keys and values are not copied at every token: they grow in memory that has room for more.

transformers' `DynamicCache` joins tensors, so each new token reads and writes all that is cached: with the tokens of
a long clip more than the weights. Its layers are exchanged for ones that write new tokens behind the old ones.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

LEAST_ROOM = 64  # tokens
SHARE_OF_ROOM = 8  # an eighth of what is cached


def with_room(length: int) -> int:
    """The tokens for which there is memory, if it is made for so many now."""
    return length + max(LEAST_ROOM, length // SHARE_OF_ROOM)


class _Room:
    """Memory for more tokens than there are, and how much of it is taken; twins of a layer share it.

    Attributes:
        taken: Tokens that some layer has written. Only a layer that holds exactly these may go on here: a cropped one,
            or the twin of one that went on before, would write over tokens that another still reads.
    """

    def __init__(self, keys: Tensor, values: Tensor, more: int):
        self.taken = keys.shape[2]
        length = with_room(self.taken + more)
        self.keys, self.values = (_longer(states, length) for states in (keys, values))

    def continues(self, keys: Tensor, more: int) -> bool:
        """Whether `keys` are all that is written here, and so many tokens fit behind them."""
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch forbids to write there
        return (
            keys.data_ptr() == self.keys.data_ptr()
            and len(keys) == len(self.keys)
            and keys.shape[2] == self.taken
            and self.taken + more <= self.keys.shape[2]
        )

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, heads, S, head_dim), views of the memory."""
        start, self.taken = self.taken, self.taken + keys.shape[2]
        for states, new in ((self.keys, keys), (self.values, values)):
            states[:, :, start : self.taken].copy_(new)
        return self.keys[:, :, : self.taken], self.values[:, :, : self.taken]


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, (B, heads, S, head_dim) each, views of memory with room behind them.

    Whatever else the library does to a layer (crop, reorder, repeat, move) gives it other tensors, or shorter ones;
    the next tokens then start new memory, as they do where gradients are recorded and in compiled graphs.
    """

    _room: _Room | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens, (B, heads, new, head_dim), and returns all."""
        if self.get_seq_length() == 0 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        more = key_states.shape[2]
        if self._room is None or not self._room.continues(self.keys, more):
            self._room = _Room(self.keys, self.values, more)
        self.keys, self.values = self._room.append(key_states, value_states)
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


def _longer(states: Tensor, length: int) -> Tensor:
    """(B, heads, length, head_dim) that begins with these states."""
    longer = states.new_empty((*states.shape[:2], length, states.shape[3]))
    longer[:, :, : states.shape[2]].copy_(states)
    return longer
