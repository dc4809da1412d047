"""Targets of next-token prediction, and the weighted loss over them."""

import torch
from torch import Tensor, nn

from molmo2.model.packing import PackedRows

IGNORED = -100


def shift_labels(labels: Tensor, packed: PackedRows | None = None) -> Tensor:
    """The target of each token: the label of the next one.

    The first token of an example (or row) is never a target. The first token of a branch follows the end of its
    prefix, which is not the token before it in the row, so it may have no label.

    Args:
        labels: (B, S) int64, -100 where there is nothing to predict.
    Returns:
        (B, S) int64.
    Raises:
        ValueError: If the first token of a branch has a label.
    """
    if packed is not None:
        starts = packed.branch_starts().to(labels.device) & packed.is_real.to(labels.device)
        labelled = (starts & (labels != IGNORED)).any(-1)
        if bool(labelled.any()):
            raise ValueError(
                f"Row(s) {labelled.nonzero()[:, 0].tolist()[:8]} have a label at the first token of a branch, which "
                "is not predicted from the token before it. Begin the branch one token earlier: move the prefix's "
                "last token into every branch, with label -100."
            )
        labels = labels.masked_fill(packed.example_starts().to(labels.device), IGNORED)
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def kept_label_fraction(targets: Tensor, labels: Tensor) -> Tensor:
    """The fraction of (B, S) `labels` that (B, S) `targets` still has, first tokens aside; 0-d.

    A trainer counts labels before the model sees them, including ids without logits.
    """
    counted, kept = ((entries[:, 1:] != IGNORED).sum() for entries in (labels, targets))
    return torch.where(kept > 0, kept / counted.clamp(min=1), 1.0)  # no target, no loss: any divisor will do


def weighted_loss(
    logits: Tensor, targets: Tensor, weights: Tensor, num_items_in_batch: Tensor | float | None = None
) -> Tensor:
    """`sum(weight * cross entropy) / sum(weight)` over the tokens that have a target, in float32.

    Args:
        logits: (B, S, vocab_size).
        targets: (B, S) int64 from `shift_labels`; -100 is ignored.
        weights: (B, S) float, those of the targets.
        num_items_in_batch: Divide by this instead: the sum of weights over all batches of an accumulated step.
    Raises:
        ValueError: For negative weights.
    """
    counted = targets.to(logits.device) != IGNORED
    targets = targets.to(logits.device)[counted]
    weights = weights.to(logits.device, torch.float32)[counted]
    if bool((weights < 0).any()):
        raise ValueError("`loss_weights` has negative entries: use 0 for tokens without loss.")
    entropies = nn.functional.cross_entropy(logits[counted].float(), targets, reduction="none")
    total = (weights * entropies).sum()
    if num_items_in_batch is None:
        return total / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
