"""Auxiliary linear heads that predict the object at each patch. They are used in training only.

With answers as the only supervision, a vision transformer takes hours to learn that images have positions. These heads
predict for every patch, and for each patch of every pooled token: whether it has the centre of an object, its colour
and kind, and two digits each of x and y.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import EMPTY, NO_TARGET
from .world import COLOURS, KINDS

SIZES = (1, len(COLOURS), len(KINDS), 10, 10, 10, 10)
NAMES = ("there", "colour", "kind", "x1", "x2", "y1", "y2")


class DenseHeads(nn.Module):
    """Heads on patch features, on image tokens of 2x2 patches and on frame tokens of 3x3."""

    def __init__(self, feature_size: int, hidden_size: int):
        super().__init__()
        self.patch = nn.Linear(feature_size, sum(SIZES))
        self.pooled = nn.ModuleDict({str(window): nn.Linear(hidden_size, window * sum(SIZES)) for window in (4, 9)})

    def forward(self, features: Tensor, tokens: Tensor, pooling: Tensor, targets: Tensor) -> tuple[Tensor, dict]:
        """Loss and fractions of right guesses.

        Args:
            features: (C * P, F) of the vision transformer.
            tokens: (T, D) vectors of the pooled tokens.
            pooling: (T, K) flat patch numbers, -1 for none.
            targets: (C, P, 7); see `batches.dense_targets`.
        """
        flat = targets.flatten(0, 1)
        window = pooling.shape[1]
        per_slot = self.pooled[str(window)](tokens).unflatten(-1, (window, -1)).flatten(0, 1)
        slot_targets = flat[pooling.clamp(min=0)].masked_fill((pooling < 0)[..., None], NO_TARGET).flatten(0, 1)
        patch_loss, scores = slot_loss(self.patch(features), flat)
        token_loss, token_scores = slot_loss(per_slot, slot_targets)
        names = {f"patch_{name}": value for name, value in scores.items()}
        return patch_loss + token_loss, {**names, **{f"token_{name}": value for name, value in token_scores.items()}}


def slot_loss(guesses: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Presence on all slots, everything else where something is.

    Args:
        guesses: (N, sum of `SIZES`).
        targets: (N, 7).
    """
    asked = targets[:, 0] != NO_TARGET
    guesses, targets = guesses[asked].float(), targets[asked]
    parts = guesses.split(SIZES, dim=-1)
    there = (targets[:, 0] > EMPTY).float()
    loss = 4 * functional.binary_cross_entropy_with_logits(parts[0][:, 0], there)
    full = there > 0
    scores = {"there": float(((parts[0][:, 0] > 0) == full)[full].float().mean())}
    for column, (name, part) in enumerate(zip(NAMES, parts)):
        if column == 0 or not bool(full.any()):
            continue
        weight = 0.5 if name in ("x2", "y2") else 1.0
        loss = loss + weight * functional.cross_entropy(part[full], targets[full, column])
        scores[name] = float((part[full].argmax(-1) == targets[full, column]).float().mean())
    return loss, scores


def look_loss(query: Tensor, key: Tensor, scaling: float, allowed: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
    """Loss of one attention head that should attend to given tokens, and the attention weight that they get.

    Args:
        query, key: (B, S, head_dim) of the head.
        allowed: (B, S, S) bool; dim 1 is the query.
        wanted: (B, S, S) bool; queries that want nothing are not asked.
    """
    row, position = wanted.any(-1).nonzero(as_tuple=True)
    scores = (query @ key.transpose(1, 2))[row, position].float() * scaling
    shares = scores.masked_fill(~allowed[row, position], -torch.inf).log_softmax(-1)
    targets = wanted[row, position].float()
    distance = -(shares.masked_fill(targets == 0, 0.0) * targets).sum(-1) / targets.sum(-1)
    return distance.mean(), float((shares.detach().exp() * targets).sum(-1).mean())
