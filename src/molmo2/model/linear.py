"""Products of matrices by the faster of the two libraries that torch has for them on the CPU; linear layers of them.

In float32 torch asks MKL, which uses half the width of the vector units of processors that are not Intel's, and one
thread for a single row. oneDNN, which torch asks for bfloat16, does neither: twice the speed for many rows and for
one, in the same precision (the last bits are rounded otherwise).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Unchanged since torch 2.0, though meant for compiled graphs; it has no derivative.
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
FEWEST_MULTIPLICATIONS = 2**18  # fewer do not repay the ten microseconds that a call takes longer
# oneDNN takes these up to half as long with the matrices in each other's place.
FEW_ROWS = range(4, 17)


class Linear(nn.Linear):
    """`nn.Linear` that asks oneDNN for float32 products on the CPU where no gradient is wanted.

    Not under autocast, not in compiled graphs, and not within `torch.backends.mkldnn.flags(enabled=False)`.
    """

    def forward(self, states: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        weight = self.weight
        if is_for_onednn(states, weight) and weight.is_contiguous():
            return product(states, weight, self.bias)
        return super().forward(states)


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`states @ weight.T + bias` by oneDNN, where `is_for_onednn` holds.

    Args:
        states: (..., in_features).
        weight: (out_features, in_features), contiguous or transposed; others take a thousand times longer.
        bias: (out_features,).
    Returns:
        (..., out_features).
    """
    rows = states.shape[:-1].numel()
    if rows not in FEW_ROWS:
        return _product(states, weight, bias, "none", [], "")
    turned = _product(weight, states.reshape(rows, -1), None, "none", [], "").t()
    result = turned.contiguous().view(*states.shape[:-1], -1)
    return result if bias is None else result + bias


def is_for_onednn(states: Tensor, weight: Tensor) -> bool:
    """Whether `product` can take these, (..., in_features) and (..., out_features, in_features), and is wanted."""
    return (
        not torch.compiler.is_compiling()
        and _product is not None
        and states.shape[:-1].numel() * weight.numel() >= FEWEST_MULTIPLICATIONS
        and states.shape[-1] == weight.shape[-1]
        and states.dtype is weight.dtype is torch.float32
        and states.device.type == weight.device.type == "cpu"
        and type(states) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )
