"""Rotary position embeddings: float32 tables, scaled on some layers and plain on the others."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig

from molmo2.model.compat import scaled_rope


def plain_inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """`theta ** (-2i / head_dim)` for i = 0 .. head_dim / 2 - 1, float32 (Su et al. 2021, RoFormer)."""
    with torch.device("cpu"):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (theta**exponents)


def rotate(states: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of `states`, of all heads in two kernels.

    Args:
        states: (B, S, heads, head_dim).
        table: (B, S, 2, 2, head_dim / 2) rotation matrices [[cos, -sin], [sin, cos]], one for each pair.
    """
    halves = states.unflatten(-1, (1, 2, -1))
    from_first, from_second = (halves * table[:, :, None]).unbind(-2)
    return (from_first + from_second).flatten(-2)


class Molmo2RotaryEmbedding(nn.Module):
    """Computes the rotation matrices for every layer of the text model.

    With `rope_scaling_layers`, the layers it names use the scaled frequencies (and, for yarn, the factor on cos and
    sin), the rest the plain ones of the same theta; without it every layer is scaled. The tables are not stored in
    checkpoints: `restore` recomputes them after anything that may have left them empty or rounded, because loaders
    build modules without memory and `.to(dtype)` would cast them.
    """

    inv_freq: Tensor
    scaled_inv_freq: Tensor | None

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config
        is_scaled = config.rope_parameters["rope_type"] != "default"
        every_layer = range(config.num_hidden_layers)
        chosen = every_layer if config.rope_scaling_layers is None else config.rope_scaling_layers
        self.scaled_layers = frozenset(chosen) if is_scaled else frozenset()
        self.scaling_factor = 1.0
        self.register_buffer("inv_freq", None, persistent=False)
        self.register_buffer("scaled_inv_freq", None, persistent=False)
        self.restore()

    def restore(self) -> None:
        """Recompute the tables, on the device where they were."""
        device = torch.device("cpu") if self.inv_freq is None else self.inv_freq.device
        if device.type == "meta":
            device = torch.device("cpu")
        self.inv_freq = plain_inverse_frequencies(self.config.head_dim, self.config.rope_theta).to(device)
        if self.scaled_layers:
            scaled, self.scaling_factor = scaled_rope(self.config)
            self.scaled_inv_freq = scaled.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Molmo2RotaryEmbedding":
        super()._apply(fn, recurse)
        if self.inv_freq.device.type != "meta":
            self.restore()
        return self

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """A table for each layer, (B, S, 2, 2, head_dim / 2) in `dtype`; layers with equal ones share it.

        Args:
            position_ids: (B, S) or (1, S) integers.
        """
        plain = self._table(position_ids, self.inv_freq, 1.0, dtype)
        if self.scaled_inv_freq is None:
            return [plain] * self.config.num_hidden_layers
        scaled = self._table(position_ids, self.scaled_inv_freq, self.scaling_factor, dtype)
        return [scaled if layer in self.scaled_layers else plain for layer in range(self.config.num_hidden_layers)]

    @staticmethod
    def _table(position_ids: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
        inv_freq = inv_freq.to(position_ids.device)
        # An outer product by broadcasting: exact in float32 also under autocast.
        angles = position_ids[..., None].float() * inv_freq
        cos, sin = angles.cos(), angles.sin()
        matrices = torch.stack((cos, -sin, sin, cos), dim=-2)
        return (matrices if factor == 1.0 else matrices * factor).to(dtype).unflatten(-2, (2, 2))
