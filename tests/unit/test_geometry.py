"""How images are cut: recorded tables, drawings, and properties that hold for every size."""

import doctest
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2.image import geometry
from molmo2.image.geometry import (
    CropSettings,
    ImagePlan,
    VideoPlan,
    image_token_pooling,
    plan_image,
    video_token_pooling,
)
from support.golden_cases import HAS_FULL_SET, table

RELEASED = CropSettings(378, 378, 14, 2, 2, margin_before=4, margin_after=4)
SMALL = CropSettings(98, 98, 14, 2, 2, margin_before=1, margin_after=1)
# Crops of 5 x 5 patches of one pixel, one patch of margin, pooled 2 x 2: small enough to draw.
TOY = CropSettings(5, 5, 1, 2, 2, margin_before=1, margin_after=1)


# --- the tiling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "max_crops", "crops", "tiling"),
    [
        (1, 1, 8, RELEASED, (1, 1)),
        (378, 378, 8, RELEASED, (1, 1)),  # 1 x 1 fits exactly
        (379, 378, 8, RELEASED, (2, 1)),  # one pixel more: a second row
        (377, 379, 8, RELEASED, (1, 2)),
        (480, 640, 8, RELEASED, (2, 2)),
        (1080, 1920, 8, RELEASED, (2, 4)),  # nothing holds it: the tiling that shrinks it least
        (111, 500, 8, RELEASED, (1, 1)),  # shorter than the margins: one tile, whatever the width
        (500, 111, 8, RELEASED, (1, 1)),
        (112, 112, 8, RELEASED, (1, 1)),  # both sides as long as the margins: every scale is infinite
        (112, 2000, 8, RELEASED, (1, 8)),  # only the width decides
        (112, 2000, 1, RELEASED, (1, 1)),
        (112, 112, 8, SMALL, (2, 2)),
        (111, 500, 8, SMALL, (1, 6)),
    ],
)
def test_tiling(height, width, max_crops, crops, tiling):
    plan = plan_image(height, width, crops, max_crops)
    assert (plan.tile_rows, plan.tile_cols) == tiling


def test_tilings_equal_the_recorded_ones():
    rows = table("tiling")["rows"]
    assert len(rows) >= (624 if HAS_FULL_SET else 20)
    for height, width, max_crops, crop_size, margins, *expected in rows:
        plan = plan_image(height, width, CropSettings(crop_size, crop_size, 14, 2, 2, *margins), max_crops)
        assert [plan.tile_rows, plan.tile_cols] == expected, (height, width, max_crops, crop_size)


def test_layouts_equal_the_recorded_ones():
    """Where the original fails (more margin on one side than it expects), every patch still has its one place."""
    rows = table("image_layout")
    assert len(rows) >= (60 if HAS_FULL_SET else 5)
    for row in rows:
        crop_size = row["square_size"]
        crops = CropSettings(crop_size, crop_size, 14, *row["pooling_size"], *row["overlap_margins"])
        plan = plan_image(row["height"], row["width"], crops, row["max_crops"])
        pooling = image_token_pooling(plan)
        if "error" in row:
            assert_every_patch_once(plan)
            continue
        expected = row["ok"]
        assert list(plan.grid) == expected["grid"]
        assert plan.num_crops == expected["num_crops"]
        assert list(pooling.shape) == expected["pooling_shape"]
        assert hashlib.sha256(pooling.astype("<i8").tobytes()).hexdigest() == expected["pooling_sha256_int64"]


def test_one_layout_without_the_tables():
    """187 x 1060 pixels: four tiles side by side. The checksum is that of the original's indices."""
    plan = plan_image(187, 1060, RELEASED, 8)
    pooling = image_token_pooling(plan)
    assert (plan.tile_rows, plan.tile_cols) == (1, 4)
    assert (plan.canvas_height, plan.canvas_width) == (378, 4 * 266 + 112)
    assert plan.grid == (14, 14, 14, 42)
    assert plan.num_pooled_tokens == len(pooling) == 14 * 14 + 14 * 42
    assert pooling.dtype == np.int64
    assert pooling[:2].tolist() == [[0, 1, 27, 28], [2, 3, 29, 30]]
    checksum = "701f8f46261f09506985678c1db971387b2db5af6b3953bd635fbeed64fb3977"
    assert hashlib.sha256(pooling.astype("<i8").tobytes()).hexdigest() == checksum


# --- pooling, drawn --------------------------------------------------------------------------------------------------


def test_neighbouring_tiles_share_the_canvas():
    """Two tiles of 5 x 5 patches, windows of 3: the canvas is 5 x 8; each tile keeps its half of the overlap."""
    plan = ImagePlan(tile_rows=1, tile_cols=2, canvas_height=5, canvas_width=8, settings=TOY)
    assert drawing(plan) == [
        "aaaabbbb",
        "aaaabbbb",
        "aaaabbbb",
        "aaaabbbb",
        "aaaabbbb",
    ]


def test_unequal_margins_move_the_border():
    """Margins of (2, 0): a tile leaves its first two patches to its neighbour, and keeps all of its last ones."""
    crops = CropSettings(5, 5, 1, 1, 1, margin_before=2, margin_after=0)
    plan = ImagePlan(tile_rows=2, tile_cols=2, canvas_height=8, canvas_width=8, settings=crops)
    assert drawing(plan) == ["aaaaabbb"] * 5 + ["cccccddd"] * 3


def test_tiles_without_margins_lie_side_by_side():
    crops = CropSettings(2, 2, 1, 1, 1)
    plan = plan_image(4, 6, crops, max_crops=6)
    assert drawing(plan) == ["aabbcc", "aabbcc", "ddeeff", "ddeeff"]


def test_windows_are_padded_at_the_end_first():
    """5 x 5 patches in 2 x 2 windows: the missing sixth row and column come last."""
    plan = plan_image(5, 5, TOY, max_crops=1)
    low_res = image_token_pooling(plan)[:9]
    assert low_res.tolist() == [
        *([0, 1, 5, 6], [2, 3, 7, 8], [4, -1, 9, -1]),
        *([10, 11, 15, 16], [12, 13, 17, 18], [14, -1, 19, -1]),
        *([20, 21, -1, -1], [22, 23, -1, -1], [24, -1, -1, -1]),
    ]


def test_windows_are_padded_on_both_sides_when_two_are_missing():
    """4 patches in windows of 3 lack two: one goes in front, one behind."""
    crops = CropSettings(4, 4, 1, 1, 3)
    low_res = image_token_pooling(plan_image(4, 4, crops, max_crops=1))[:8]
    assert low_res[:2].tolist() == [[-1, 0, 1], [2, 3, -1]]


def test_tile_indices_start_behind_the_low_res_view():
    plan = plan_image(5, 5, TOY, max_crops=1)
    low_res, tile = np.split(image_token_pooling(plan), 2)
    assert np.array_equal(tile, np.where(low_res < 0, -1, low_res + TOY.patches_per_crop))


def test_crops_need_not_be_square():
    crops = CropSettings(4, 6, 2, 1, 1)
    plan = plan_image(4, 12, crops, max_crops=4)
    assert (plan.canvas_height, plan.canvas_width, plan.grid) == (4, 12, (2, 3, 2, 6))
    assert drawing(plan) == ["aaabbb", "aaabbb"]


# --- videos ----------------------------------------------------------------------------------------------------------


def test_video_frames_are_crops_one_after_the_other():
    crops = CropSettings(3, 3, 1, 2, 2)
    plan = VideoPlan(2, crops)
    assert (plan.grids, plan.num_pooled_tokens) == ([(2, 2, 2)], 8)
    pooling = video_token_pooling(plan)
    assert pooling.dtype == np.int64
    assert pooling.tolist() == [
        *([0, 1, 3, 4], [2, -1, 5, -1], [6, 7, -1, -1], [8, -1, -1, -1]),
        *([9, 10, 12, 13], [11, -1, 14, -1], [15, 16, -1, -1], [17, -1, -1, -1]),
    ]


def test_released_video_frame():
    plan = VideoPlan(3, CropSettings(378, 378, 14, 3, 3))
    pooling = video_token_pooling(plan)
    assert plan.grids == [(3, 9, 9)]
    assert pooling.shape == (3 * 81, 9)
    assert pooling.min() == 0
    assert pooling[81, 0] == 729


def test_a_frame_is_pooled_like_the_low_res_view_of_a_image():
    frame = video_token_pooling(VideoPlan(1, RELEASED))
    assert np.array_equal(frame, image_token_pooling(plan_image(300, 300, RELEASED, 8))[:196])


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def crop_settings(draw):
    patch_size = draw(st.integers(1, 14))
    before, after = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    rows = draw(st.integers(before + after + 1, before + after + 8))
    cols = draw(st.integers(before + after + 1, before + after + 8))
    pooling = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return CropSettings(rows * patch_size, cols * patch_size, patch_size, *pooling, before, after)


SIDES = st.one_of(st.integers(1, 40), st.integers(1, 5000))


@settings(max_examples=200)
@given(height=SIDES, width=SIDES, crops=crop_settings(), max_crops=st.integers(1, 12))
def test_plan_and_pooling_equal_brute_force(height, width, crops, max_crops):
    plan = plan_image(height, width, crops, max_crops)
    assert (plan.tile_rows, plan.tile_cols) == tiling_by_hand(height, width, crops, max_crops)
    pooling = image_token_pooling(plan)
    assert len(pooling) == plan.num_pooled_tokens
    low_res_tokens = np.prod(plan.grid[:2])
    canvas = unpooled(pooling[low_res_tokens:], plan.grid[2:], crops)
    assert crop_rows(canvas) == owners_by_hand(plan)
    low_res = unpooled(pooling[:low_res_tokens], plan.grid[:2], crops)
    patch_ids = np.arange(crops.patches_per_crop).reshape(crops.crop_patch_rows, -1)
    assert crop_rows(low_res) == patch_ids.tolist()
    assert_every_patch_once(plan)


@given(num_frames=st.integers(1, 9), crops=crop_settings())
def test_every_video_patch_is_pooled_once(num_frames, crops):
    plan = VideoPlan(num_frames, crops)
    pooling = video_token_pooling(plan)
    assert len(pooling) == plan.num_pooled_tokens
    assert sorted(pooling[pooling >= 0].tolist()) == list(range(num_frames * crops.patches_per_crop))


def tiling_by_hand(height, width, crops, max_crops):
    """The rule as a loop: smallest scale that enlarges, else the largest; the first of equal ones."""
    best = None
    tilings = [(r, c) for r in range(1, max_crops + 1) for c in range(1, max_crops + 1) if r * c <= max_crops]
    for rows, cols in sorted(tilings, key=lambda tiling: (tiling[0] * tiling[1], tiling[0])):
        scales = []
        for tiles, window, side in ((rows, crops.window_height, height), (cols, crops.window_width, width)):
            inside = np.float32(side - crops.margin_pixels)
            scales.append(np.float32(tiles * window) / inside if inside else np.float32(np.inf))
        scale = min(scales)
        enlarges = scale >= 1
        # what enlarges beats what shrinks; then less enlarging, or less shrinking, is better
        if (
            best is None
            or (enlarges and not best[0])
            or (enlarges == best[0] and (scale < best[1] if enlarges else scale > best[1]))
        ):
            best = enlarges, scale, (rows, cols)
    return best[2]


def owners_by_hand(plan):
    """The canvas as patch numbers (low-res view first): each patch from the one tile that keeps it."""
    crops = plan.settings

    def owner(position, tiles, crop_patches):
        window = crop_patches - crops.margin_before - crops.margin_after
        (kept_by,) = [
            (tile, position - tile * window)
            for tile in range(tiles)
            if (position - tile * window >= crops.margin_before or tile == 0)
            and (position - tile * window < crop_patches - crops.margin_after or tile == tiles - 1)
            and 0 <= position - tile * window < crop_patches
        ]
        return kept_by

    canvas = []
    for y in range(plan.canvas_height // crops.patch_size):
        tile_row, row = owner(y, plan.tile_rows, crops.crop_patch_rows)
        canvas.append([])
        for x in range(plan.canvas_width // crops.patch_size):
            tile_col, col = owner(x, plan.tile_cols, crops.crop_patch_cols)
            crop = 1 + tile_row * plan.tile_cols + tile_col
            canvas[-1].append(crop * crops.patches_per_crop + row * crops.crop_patch_cols + col)
    return canvas


def unpooled(tokens, grid, crops):
    """Puts the windows of a token grid back in their places."""
    windows = tokens.reshape(*grid, crops.pool_height, crops.pool_width)
    return windows.swapaxes(1, 2).reshape(grid[0] * crops.pool_height, grid[1] * crops.pool_width)


def crop_rows(padded):
    """A padded grid as lists, without its padding."""
    present = padded >= 0
    return [row[keep].tolist() for row, keep in zip(padded, present, strict=True) if keep.any()]


def drawing(plan):
    """One letter per canvas patch: the tile it is pooled from."""
    tokens = image_token_pooling(plan)[np.prod(plan.grid[:2]) :]
    canvas = crop_rows(unpooled(tokens, plan.grid[2:], plan.settings))
    return ["".join("abcdefghij"[patch // plan.settings.patches_per_crop - 1] for patch in row) for row in canvas]


def assert_every_patch_once(plan):
    pooling = image_token_pooling(plan)
    crops = plan.settings
    used = pooling[pooling >= 0]
    canvas_patches = (plan.canvas_height // crops.patch_size) * (plan.canvas_width // crops.patch_size)
    assert len(used) == crops.patches_per_crop + canvas_patches
    assert len(np.unique(used)) == len(used)
    assert used.max() < plan.num_crops * crops.patches_per_crop


# --- errors and examples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((384, 378, 14, 2, 2), "Crops of height 384 cannot be cut into patches of 14 x 14 pixels.*such as 392"),
        ((378, 13, 14, 2, 2), "Crops of width 13 cannot be cut into patches of 14 x 14 pixels.*such as 14"),
        ((378, 378, 14, 2, 2, 20, 7), "margins of 20 \\+ 7 patches leave nothing of a crop of 27 x 27 patches"),
        ((378, 378, 14, 2, 2, -1, 4), "margin_before is -1, but must be a whole number of at least 0"),
        ((378, 378, 14, 0, 2), "pool_height is 0, but must be a whole number of at least 1"),
        ((378, 378, 0, 2, 2), "patch_size is 0, but must be a whole number of at least 1"),
        ((378.0, 378, 14, 2, 2), "crop_height is 378.0, but must be a whole number"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        CropSettings(*arguments)


@pytest.mark.parametrize(
    ("height", "width", "max_crops", "message"),
    [
        (0, 5, 8, "height is 0, but must be a whole number of at least 1. An empty image cannot be cut."),
        (5, 0, 8, "width is 0, but must be a whole number of at least 1. An empty image cannot be cut."),
        (5, 5, 0, "max_crops is 0, but must be a whole number of at least 1. 1 gives one tile"),
        (5, 5, True, "max_crops is True, but must be a whole number"),
        (5.5, 5, 8, "height is 5.5, but must be a whole number"),
    ],
)
def test_impossible_images(height, width, max_crops, message):
    with pytest.raises(ValueError, match=message):
        plan_image(height, width, RELEASED, max_crops)


def test_a_video_needs_a_frame():
    with pytest.raises(ValueError, match="num_frames is 0, but must be a whole number of at least 1"):
        VideoPlan(0, RELEASED)


def test_examples_in_the_documentation():
    results = doctest.testmod(geometry)
    assert results.attempted > 3
    assert results.failed == 0


def test_a_plan_that_pools_alike_is_the_plain_one():
    settings, coarse = CropSettings(28, 28, 14, 1, 1), CropSettings(28, 28, 14, 2, 2)
    assert VideoPlan(4, settings, coarse, np.int64(1)) == VideoPlan(4, settings)
    assert VideoPlan(4, settings, coarse, 2) != VideoPlan(4, settings)
