"""Products of matrices by the faster of the two libraries that torch has for them on the CPU; linear layers of them.

In float32 torch asks MKL, which uses half the width of the vector units of processors that are not Intel's, and one
thread for a single row. oneDNN, which torch asks for bfloat16, does neither: twice the speed for many rows and for
one, in the same precision (the last bits are rounded otherwise).
"""

from typing import Any

import torch
from torch import Tensor, nn

# Unchanged since torch 2.0, though meant for compiled graphs; it has no derivative.
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class Linear(nn.Linear):
    """`nn.Linear` that asks oneDNN for float32 products on the CPU where no gradient is wanted.

    Not under autocast, not in compiled graphs, and not within `torch.backends.mkldnn.flags(enabled=False)`.
    """

    def forward(self, states: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        weight = self.weight
        if torch.compiler.is_compiling() or not is_for_onednn(states, weight) or not weight.is_contiguous():
            return super().forward(states)
        return product(states, weight, self.bias)


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`states @ weight.T + bias` by oneDNN, where `is_for_onednn` holds.

    Args:
        states: (..., in_features).
        weight: (out_features, in_features), contiguous or transposed; others take a thousand times longer.
        bias: (out_features,).
    Returns:
        (..., out_features).
    """
    return _product(states, weight, bias, "none", [], "")


def is_for_onednn(states: Tensor, weight: Tensor) -> bool:
    """Whether `product` can take these, and is wanted."""
    return (
        _product is not None
        and states.dtype is weight.dtype is torch.float32
        and states.device.type == weight.device.type == "cpu"
        and type(states) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )
