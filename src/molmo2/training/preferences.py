"""Batches of preferred and rejected answers about images and videos, for TRL's `DPOTrainer`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from molmo2.model.loss import IGNORED
from molmo2.training.collator import DataCollator

ANSWERS = ("chosen", "rejected")
MEDIA = ("images", "image", "videos", "video")


@dataclass
class PreferenceCollator:
    """A data collator for preferences: TRL's own has images alone, this one clips and mixtures too.

    A row has `prompt`, messages with their images and videos in them or in columns (`images`, `videos`), and the
    messages `chosen` and `rejected`. Other columns are not read.

    Attributes:
        processor: A `Molmo2Processor`.
        pad_to_multiple_of, max_length, options: As of `DataCollator`.
    """

    processor: Any
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch with all chosen answers first, then all rejected ones, each after its prompt.

        Returns:
            (2 * rows, S) `input_ids`, `attention_mask`, `token_type_ids`, and `completion_mask` int64, 1 on answers;
            the media tensors, once for each of the two.
        Raises:
            ValueError: A row lacks one of the three keys.
        """
        missing = sorted({key for row in rows for key in ("prompt", *ANSWERS) if row.get(key) is None})
        if missing:
            raise ValueError(f"Rows of preferences have `prompt`, `chosen` and `rejected`; missing here: {missing}.")
        completed = [
            # No other column: `messages` of a row would be read instead, for both answers.
            {**{key: row[key] for key in ("prompt", *MEDIA) if key in row}, "completion": row[answer]}
            for answer in ANSWERS
            for row in rows
        ]
        collate = DataCollator(
            self.processor,
            pad_to_multiple_of=self.pad_to_multiple_of,
            max_length=self.max_length,
            options=self.options,
        )
        batch = collate(completed)
        is_answer = batch.pop("labels") != IGNORED
        return {**batch, "completion_mask": is_answer.long()}
