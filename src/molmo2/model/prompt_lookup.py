"""Prompt lookup that suits coordinates: an answer goes on as it last did after the same tokens.

Tracks repeat themselves from frame to frame: the next place of an object is near its latest one, and most of its
digits are the same. The search of transformers takes the first match, which is where the object was at the start.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator


class LatestMatchLookup(PromptLookupCandidateGenerator):
    """Drafts what followed the latest occurrence of the last tokens; the model keeps what it would have said itself.

    Args:
        lookup: the generator that transformers made of the generation config.
    """

    def __init__(self, lookup: PromptLookupCandidateGenerator):
        super().__init__(
            eos_token_id=lookup.eos_token_id,
            num_output_tokens=lookup.num_output_tokens,
            max_matching_ngram_size=lookup.max_matching_ngram_size,
            max_length=lookup.max_length,
            logits_processor=lookup.logits_processor,
            vocab_size=lookup.vocab_size,
        )

    # Arguments and annotations of the method differ between releases.
    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore
        """(1, S) ids to (1, S + drafted) ids, drafted <= `num_output_tokens`, and None for logits that it has not.

        A draft stops before the end of an answer and before visual tokens, which have no logits.
        """
        room = self.max_length - input_ids.shape[1] - 1  # the model adds a token of its own
        draft = draft_after(input_ids[0].tolist(), self.max_matching_ngram_size, min(self.num_output_tokens, room))
        ends = () if self.eos_token_id is None else torch.as_tensor(self.eos_token_id).flatten().tolist()
        vocab_size = float("inf") if self.vocab_size is None else self.vocab_size
        unsayable = (place for place, token in enumerate(draft) if token in ends or token >= vocab_size)
        draft = draft[: next(unsayable, None)]
        if not draft:
            return input_ids, None
        return torch.cat((input_ids, input_ids.new_tensor([draft])), dim=1), None


def draft_after(ids: list[int], longest: int, count: int) -> list[int]:
    """Up to `count` tokens that followed the latest earlier occurrence of the last tokens, the longest that occur.

    Args:
        longest: Most tokens to look for.
    """
    size = len(ids)
    for length in range(min(longest, size - 1), 0, -1):
        pattern = ids[size - length :]
        for start in range(size - length - 1, -1, -1):
            if ids[start] == pattern[0] and ids[start : start + length] == pattern:
                return ids[start + length : start + length + max(0, count)]
    return []
