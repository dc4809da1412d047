"""Several examples in one row, several branches under one prefix: reading their ids, checks and positions.

    row       a a a a a | b b b b        two packed examples
    branch    0 0 1 1 2 | 0 0 1 1        the first one: a shared prefix of two tokens, then two branches
    position  0 1 2 3 2 | 0 1 2 3        every branch continues where its prefix ends

A branch sees its prefix and itself, so each branch with its prefix gives the same logits as in a row of its own.
Pure functions of ids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRows:
    """The examples and branches of a batch; padding belongs to those of the token before it.

    Attributes:
        example_ids: (B, S) int64: one value for all tokens of an example.
        branches: (B, S) int64: 0 in the prefix that the branches of an example share.
        is_real: (B, S) bool, False on padding.
    """

    example_ids: Tensor
    branches: Tensor
    is_real: Tensor

    def example_starts(self) -> Tensor:
        """(B, S) bool: first tokens of examples."""
        return changes(self.example_ids)

    def examples(self) -> Tensor:
        """(B, S) int64: number of the example within its row, from 0."""
        return self.example_starts().long().cumsum(-1) - 1

    def branch_starts(self) -> Tensor:
        """(B, S) bool: first tokens of branches, prefixes not among them."""
        return (self.example_starts() | changes(self.branches)) & (self.branches != 0)

    def positions(self) -> Tensor:
        """(B, S) int64: positions within each example; a branch continues after the prefix; padding gets 0 or more."""
        place = torch.arange(self.branches.shape[1], device=self.branches.device)
        counted = self.is_real.long()
        prefix = counted * (self.branches == 0)
        example_start = torch.where(self.example_starts(), place, 0).cummax(-1).values
        segment_start = torch.where(self.example_starts() | self.branch_starts(), place, 0).cummax(-1).values
        in_prefix = _count_since(prefix, example_start)
        in_branch = _count_since(counted, segment_start) * (self.branches != 0)
        return (in_prefix + in_branch - 1).clamp(min=0)


def changes(ids: Tensor) -> Tensor:
    """(B, S) bool: entries that differ from the one before, and the first ones."""
    first = torch.ones_like(ids[:, :1], dtype=torch.bool)
    return torch.cat((first, ids[:, 1:] != ids[:, :-1]), dim=1)


def _count_since(counted: Tensor, start: Tensor) -> Tensor:
    """Sum of `counted` from the column `start` of each entry up to the entry itself."""
    total = counted.cumsum(-1)
    return total - (total - counted).gather(-1, start)


def _fill_padding(ids: Tensor, is_real: Tensor) -> Tensor:
    """Padding takes the id of the real token before it, at the start of a row that of the first one."""
    place = torch.arange(ids.shape[1], device=ids.device)
    last_real = torch.where(is_real, place, -1).cummax(-1).values
    first_real = is_real.long().argmax(-1, keepdim=True)
    return ids.gather(-1, torch.where(last_real < 0, first_real, last_real))


def packed_rows(
    attention_mask: Tensor | None, example_ids: Tensor | None, branch_ids: Tensor | None, shape: tuple[int, ...]
) -> PackedRows | None:
    """The examples and branches that ids describe; None when there are no ids.

    Args:
        attention_mask: (B, S), 0 on padding.
        example_ids: (B, S) int64, one value for all tokens of an example; without it a row is one example.
        branch_ids: (B, S) int64, 0 in shared prefixes; without it there are no branches.
        shape: (B, S) of the tokens.
    Raises:
        ValueError: For tensors of another shape.
    """
    ids = example_ids if example_ids is not None else branch_ids
    if ids is None:
        return None
    require_token_shape(shape, attention_mask=attention_mask, example_ids=example_ids, branch_ids=branch_ids)
    is_real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(ids.device) != 0
    examples = torch.zeros_like(ids) if example_ids is None else _fill_padding(example_ids, is_real)
    branches = torch.zeros_like(ids) if branch_ids is None else _fill_padding(branch_ids.to(ids.device), is_real)
    return PackedRows(examples, branches.long(), is_real)


def require_token_shape(shape: tuple[int, ...], **given: Tensor | None) -> None:
    """ValueError unless all that is given has the shape of the tokens, (B, S)."""
    for name, tensor in given.items():
        if tensor is not None and tuple(getattr(tensor, "shape", ())) != tuple(shape):
            raise ValueError(
                f"`{name}` is {tuple(getattr(tensor, 'shape', ()))}, but the tokens are {tuple(shape)}. Examples and "
                "branches are told apart token by token, in a pass without cached tokens."
            )


def _has_split_groups(ids: Tensor) -> Tensor:
    """(B,) bool: the row has an id in several runs."""
    ordered = ids.sort(-1).values
    return changes(ids).sum(-1) > changes(ordered).sum(-1)


def require_packed_layout(rows: PackedRows, is_visual: Tensor | None = None) -> None:
    """Refuses ids that do not describe examples of one prefix and its branches.

    Args:
        is_visual: (B, S) bool.
    Raises:
        ValueError: An example or a branch in several pieces, a prefix after its branches, negative branch numbers, or
            visual tokens in a branch, with the rows concerned and what to do.
    """
    pairs = rows.examples() * (rows.branches.max() + 1) + rows.branches
    late_prefix = changes(rows.branches) & ~rows.example_starts() & (rows.branches == 0)
    visual_in_branch = torch.zeros_like(rows.is_real)
    if is_visual is not None:
        visual_in_branch = is_visual.to(rows.is_real.device).bool() & (rows.branches != 0) & rows.is_real
    problems = {
        "`example_ids` has an example in several pieces: put the tokens of each example side by side": (
            _has_split_groups(rows.example_ids)
        ),
        "`branch_ids` has negative numbers: use 0 for the shared prefix and 1, 2, ... for branches": (
            rows.branches < 0
        ).any(-1),
        "`branch_ids` has a shared prefix (0) after a branch of the same example: put the prefix first": (
            late_prefix.any(-1)
        ),
        "`branch_ids` has a branch in several pieces: put the tokens of each branch side by side": _has_split_groups(
            pairs
        ),
        "there are visual tokens in a branch: put images and videos into the shared prefix (`branch_ids` 0), because "
        "in a row of its own a branch's image would be seen by those of the prefix": visual_in_branch.any(-1),
    }
    found = torch.stack(list(problems.values())).tolist()
    for problem, row_flags in zip(problems, found):
        if any(row_flags):
            affected = [row for row, is_affected in enumerate(row_flags) if is_affected]
            raise ValueError(f"In row(s) {affected[:8]} {problem}.")
