"""Batches for training: rows of any length, with any images and videos, packed or not, padded on either side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from molmo2.configuration import PAD_SLOT
from molmo2.media_features import warn_about_library_model
from molmo2.model.loss import IGNORED
from molmo2.model.vision import normalize_on_device
from molmo2.training.examples import example_from_feature
from molmo2.training.weighting import TokenWeighting

# Values on padding; `input_ids` are padded with the tokenizer's own.
PADDING_VALUES: dict[str, float | int | bool] = {
    "labels": IGNORED,
    "token_type_ids": False,
    "loss_weights": 0.0,
    "attention_mask": 0,
    "example_ids": -1,
    "branch_ids": 0,
}
DTYPES = {"token_type_ids": torch.bool, "loss_weights": torch.float32}
PIXELS = ("pixel_values", "pixel_values_videos")
POOLING_TABLES = ("image_token_pooling", "video_token_pooling")


@dataclass
class DataCollator:
    """A data collator for training examples, for `Trainer`, TRL or a `DataLoader`.

    A feature is what `build_training_example` returns, or a dataset row that becomes one (see `messages_from_row`), or
    a list of either (a `Pack`, for instance): the examples of a list are packed into one row and do not attend to each
    other.

    Attributes:
        processor: A `Molmo2Processor`.
        padding_side: "right" or "left"; the loss is the same.
        pad_to_multiple_of: Round the length of rows up to a multiple of this.
        max_length, weighting, options: Of `build_training_example`, for dataset rows.
    """

    processor: Any
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    weighting: TokenWeighting | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor]:
        """A batch with one row per feature.

        Returns:
            (B, S) `input_ids`, `attention_mask`, `labels` int64, `token_type_ids` bool; where a feature has them
            `loss_weights` float32 and `branch_ids` int64; with packed rows `example_ids` int64, -1 on padding. The
            media tensors of all examples, concatenated row by row; uint8 pixels next to normalized ones are
            normalized as the model does it.
        Raises:
            ValueError: For other features, and another `padding_side`.
        """
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` is {self.padding_side!r}; expected 'left' or 'right'.")
        settings = {"weighting": self.weighting, "max_length": self.max_length, **self.options}
        rows = [
            [example_from_feature(self.processor, example, **settings) for example in _examples(feature)]
            for feature in features
        ]
        examples = [example for row in rows for example in row]
        names = [name for name in ("loss_weights", "branch_ids") if any(name in example for example in examples)]
        if all("token_type_ids" in example for example in examples):
            names.append("token_type_ids")
        columns = [_token_columns(row, names) for row in rows]
        if all(len(row) == 1 for row in rows):
            columns = [{name: value for name, value in row.items() if name != "example_ids"} for row in columns]
        batch = {**self._pad(columns), **_concatenate_media(examples, self._media_names())}
        warn_about_library_model(batch)
        return batch

    def _media_names(self) -> list[str]:
        return [*self.processor.image_processor.model_input_names, *self.processor.video_processor.model_input_names]

    def _pad(self, columns: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in columns)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        padding_values = {**PADDING_VALUES, "input_ids": self.processor.tokenizer.pad_token_id}

        def padded(name: str, values: Tensor) -> Tensor:
            missing = length - len(values)
            sides = (missing, 0) if self.padding_side == "left" else (0, missing)
            return nn.functional.pad(values, sides, value=padding_values[name])

        return {name: torch.stack([padded(name, row[name]) for row in columns]) for name in columns[0]}


def _examples(feature: Any) -> Sequence[Any]:
    """The examples of a feature: one, or those of a list or a pack."""
    examples = getattr(feature, "examples", feature)
    return examples if isinstance(examples, (list, tuple)) else [examples]


def _token_columns(row: Sequence[Mapping[str, Any]], names: list[str]) -> dict[str, Tensor]:
    """The per-token values of a row, (S,) each."""
    parts = []
    for number, example in enumerate(row):
        labels = torch.as_tensor(example["labels"])
        known = {
            "input_ids": torch.as_tensor(example["input_ids"]),
            "attention_mask": torch.ones_like(labels),
            "labels": labels,
            "example_ids": torch.full_like(labels, number),
            "branch_ids": torch.zeros_like(labels),
            "loss_weights": (labels != IGNORED).float(),
        }
        own = {name: torch.as_tensor(example[name], dtype=DTYPES.get(name)) for name in names if name in example}
        order = ["input_ids", "attention_mask", "labels", "example_ids", *names]
        parts.append({name: {**known, **own}[name] for name in order})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _same_dtype(pixels: Sequence[Tensor]) -> list[Tensor]:
    """Pixels of one dtype: uint8 where all are, otherwise normalized. Datasets return uint8 as lists of integers."""
    is_normalized = [values.is_floating_point() for values in pixels]
    if not any(is_normalized):
        return [values.to(torch.uint8) for values in pixels]
    return [values if own else normalize_on_device(values) for values, own in zip(pixels, is_normalized)]


def _concatenate_media(examples: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Tensor]:
    """The media tensors of all examples; narrow pooling tables are padded with `PAD_SLOT`."""
    joined = {}
    for name in names:
        values = [torch.as_tensor(example[name]) for example in examples if name in example]
        if name in PIXELS:
            values = _same_dtype(values)
        if name in POOLING_TABLES and values:
            window = max(value.shape[1] for value in values)
            values = [nn.functional.pad(value, (0, window - value.shape[1]), value=PAD_SLOT) for value in values]
        if values:
            joined[name] = torch.cat(values)
    return joined
