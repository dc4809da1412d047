"""Lower bounds of a model: its matrix products alone, its attention alone, its weights read once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import fastest

PRODUCTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda rows, weight: torch.mm(rows, weight.t()),
    lambda rows, weight: torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], ""),
)


@dataclass(frozen=True)
class Products:
    """The matrix products of a forward pass: (rows, weight) per linear layer, shapes per attention call."""

    linear: tuple[tuple[int, Tensor], ...]
    attention: tuple[tuple[torch.Size, torch.Size], ...]

    @classmethod
    def from_forward(cls, model: nn.Module, forward: Callable[[], Any], attention: bool = True) -> "Products":
        """The products of one call of `forward`."""
        linear: list[tuple[int, Tensor]] = []
        calls: list[tuple[torch.Size, torch.Size]] = []
        original = F.scaled_dot_product_attention

        def record(module: nn.Linear, given: tuple[Tensor, ...], output: Tensor) -> None:
            linear.append((given[0].numel() // given[0].shape[-1], module.weight))

        def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
            calls.append((query.shape, key.shape))
            return original(query, key, value, *args, **options)

        hooks = [part.register_forward_hook(record) for part in model.modules() if isinstance(part, nn.Linear)]
        # Without oneDNN attention is torch's own function, which can be patched.
        with mock.patch.object(F, "scaled_dot_product_attention", attend), torch.backends.mkldnn.flags(enabled=False):
            forward()
        for hook in hooks:
            hook.remove()
        return cls(tuple(linear), tuple(calls) if attention else ())

    def work(self) -> Callable[[], None]:
        """A function that computes the same products of random inputs and drops the results.

        It uses the faster of torch's two libraries for them (MKL and oneDNN); each is tried once.
        """
        inputs: dict[tuple[int, int], Tensor] = {}
        for rows, weight in self.linear:
            if (rows, weight.shape[1]) not in inputs:
                inputs[rows, weight.shape[1]] = torch.randn(rows, weight.shape[1]).to(weight)
        heads = {shape: torch.randn(shape) for call in self.attention for shape in call}

        def multiply(product: Callable[[Tensor, Tensor], Tensor]) -> None:
            for rows, weight in self.linear:
                product(inputs[rows, weight.shape[1]], weight)

        device = self.linear[0][1].device.type
        product = fastest(PRODUCTS, multiply, (AttributeError, RuntimeError), device)

        def run() -> None:
            multiply(product)
            for queries, keys in self.attention:
                query, key = heads[queries], heads[keys]
                F.scaled_dot_product_attention(query, key, key, enable_gqa=query.shape[1] != key.shape[1])

        return run


def causal_attention(text_config: Any, length: int) -> Callable[[], None]:
    """Plain causal attention of every layer over `length` tokens."""
    return _attention(text_config, length, length, is_causal=True)


def attention_over_cache(text_config: Any, length: int, num_cached: int) -> Callable[[], None]:
    """Plain attention of every layer, of `length` tokens over `num_cached` earlier ones, all of which they see."""
    return _attention(text_config, length, num_cached, is_causal=False)


def _attention(text_config: Any, num_queries: int, num_keys: int, is_causal: bool) -> Callable[[], None]:
    query = torch.randn(1, text_config.num_attention_heads, num_queries, text_config.head_dim)
    key = torch.randn(1, text_config.num_key_value_heads, num_keys, text_config.head_dim)

    def run() -> None:
        for _ in range(text_config.num_hidden_layers):
            F.scaled_dot_product_attention(query, key, key, is_causal=is_causal, enable_gqa=True)

    return run


def weight_reads(model: nn.Module, times: int, cached: Sequence[Tensor] = ()) -> Callable[[], None]:
    """A function that reads the weights that a new token needs, `times` times: decoder layers and output matrix.

    It reads by the faster of a sum and a product with a zero vector; each is tried once.

    Args:
        cached: Keys and values to read as well, (..., head_dim) each.
    """
    weights = [
        tensor.detach().view(torch.float32)
        for name, tensor in model.named_parameters()
        if "embedding" not in name and "vision" not in name and tensor.dim() > 1
    ]
    weights += [states.flatten(0, -2).view(torch.float32) for states in cached]
    zeros = {weight.shape[1]: torch.zeros(weight.shape[1], device=weight.device) for weight in weights}

    def add_up(weight: Tensor) -> None:
        weight.sum()

    def multiply(weight: Tensor) -> None:
        torch.mv(weight, zeros[weight.shape[1]])

    def read_all(read: Callable[[Tensor], None]) -> None:
        for weight in weights:
            read(weight)

    read_all(add_up)  # the first pass brings files into memory
    read = fastest((add_up, multiply), read_all, (RuntimeError,), weights[0].device.type)

    def run() -> None:
        for _ in range(times):
            read_all(read)

    return run
