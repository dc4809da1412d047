"""Linear layers that multiply with the faster of the two libraries that torch has for it on the CPU.

In float32 torch asks MKL, which uses half the width of the vector units of processors that are not Intel's, and one
thread for a single row. oneDNN, which torch asks for bfloat16, does neither: twice the speed for many rows and for
one, in the same precision (the last bits are rounded otherwise).
"""

import torch
from torch import Tensor, nn

# Unchanged since torch 2.0, though meant for compiled graphs; it has no derivative.
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class Linear(nn.Linear):
    """`nn.Linear` that asks oneDNN for float32 products on the CPU where no gradient is wanted.

    Not under autocast, not in compiled graphs, and not within `torch.backends.mkldnn.flags(enabled=False)`.
    """

    def forward(self, states: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if torch.compiler.is_compiling() or not _is_for_onednn(states, self.weight):
            return super().forward(states)
        return _product(states, self.weight, self.bias, "none", [], "")


def _is_for_onednn(states: Tensor, weight: Tensor) -> bool:
    return (
        _product is not None
        and states.dtype is weight.dtype is torch.float32
        and states.device.type == weight.device.type == "cpu"
        and type(states) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )
