"""A model of a few thousand weights and its inputs, and what tests about saved objects leave out.

The ids of the visual tokens lie inside the vocabulary, where the suites take all ids from.
"""

import torch

from molmo2.configuration import Molmo2AdapterConfig, Molmo2Config, Molmo2TextConfig, Molmo2VitConfig

BOS, EOS, PAD = 0, 1, 2
IMAGE_START, IMAGE_END, PATCH, COLUMN, LOW_START, LOW, FRAME_START, FRAME_END = range(3, 11)
VISUAL = range(3, 11)
FIRST_WORD, VOCAB = 12, 99

GRID, PATCH_SIZE = 4, 4  # a crop has 4 x 4 patches of 4 x 4 pixels
PATCHES, VALUES = GRID**2, 3 * PATCH_SIZE**2
CROPS = 3  # of an image: the low-resolution view and two tiles
LOW_GRID, HIGH_GRID = (2, 2), (2, 3)  # pooled tokens


def make_config(**options):
    """Settings of the whole model; `options` go to the top level."""
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "hidden_size": 32}
    text = Molmo2TextConfig(
        **layers,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        additional_vocab_size=16,
        intermediate_size=37,
        max_position_embeddings=512,
        rope_theta=10000.0,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    vit = Molmo2VitConfig(
        **layers,
        num_key_value_heads=4,
        intermediate_size=37,
        image_default_input_size=(GRID * PATCH_SIZE,) * 2,
        image_patch_size=PATCH_SIZE,
    )
    adapter = Molmo2AdapterConfig(
        vit_layers=(-1, -2),
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=37,
        text_hidden_size=32,
    )
    return Molmo2Config(vit, adapter, text, image_start_token_id=IMAGE_START, **token_ids(), **options)


def token_ids():
    """Ids by their names in the configuration; the first is passed apart."""
    return {
        "image_end_token_id": IMAGE_END,
        "image_patch_id": PATCH,
        "image_col_id": COLUMN,
        "low_res_image_start_token_id": LOW_START,
        "image_low_res_id": LOW,
        "frame_start_token_id": FRAME_START,
        "frame_end_token_id": FRAME_END,
    }


def image_ids():
    """The tokens of one image: low-resolution view without, tiles with column tokens."""
    low_rows, low_columns = LOW_GRID
    rows, columns = HIGH_GRID
    low = [LOW_START, *[PATCH] * low_rows * low_columns, IMAGE_END]
    return [*low, IMAGE_START, *([PATCH] * columns + [COLUMN]) * rows, IMAGE_END]


def windows(first_patch, rows, columns):
    """(rows * columns, 4) patch indices of windows of two by two in one crop, row by row."""
    corner = torch.arange(rows)[:, None] * 2 * GRID + torch.arange(columns) * 2 % GRID
    offsets = torch.tensor([0, 1, GRID, GRID + 1])
    return first_patch + corner.reshape(-1, 1) + offsets


def image_inputs(count):
    """The flat tensors of `count` images; the last window of each has two patches only."""
    pooling = torch.cat([windows(0, *LOW_GRID), windows(PATCHES, *HIGH_GRID)])
    pooling[-1, 2:] = -1
    return {
        "pixel_values": torch.rand(count * CROPS, PATCHES, VALUES) * 2 - 1,
        "image_token_pooling": pooling.repeat(count, 1),
        "image_grids": torch.tensor([[*LOW_GRID, *HIGH_GRID]] * count),
        "image_num_crops": torch.tensor([CROPS] * count),
    }


def video_inputs(count, frames=2):
    """The flat tensors of `count` videos."""
    pooling = torch.cat([windows(frame * PATCHES, *LOW_GRID) for frame in range(frames)])
    return {
        "pixel_values_videos": torch.rand(count * frames, PATCHES, VALUES) * 2 - 1,
        "video_token_pooling": pooling.repeat(count, 1),
        "video_grids": torch.tensor([[frames, *LOW_GRID]] * count),
    }


class WithoutAutoMap:
    """Compares dictionaries without `auto_map`, which saving a class with remote code leaves behind."""

    def assertEqual(self, first, second, msg=None):
        if isinstance(first, dict) and isinstance(second, dict):
            first, second = (
                {name: value for name, value in own.items() if name != "auto_map"} for own in (first, second)
            )
        super().assertEqual(first, second, msg)  # noqa: PT009  # what it extends
