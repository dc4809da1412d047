"""The vision backbone lets features go: what is held at a time does not grow with the number of crops."""

import copy

import pytest
import torch

from molmo2.model.vision import pooling_schedule
from support.allocations import Allocations
from support.checkpoints import build_model

PATCHES = 49  # of a crop of the tiny models
FEATURE_BYTES = PATCHES * 2 * 32 * 4  # of one crop: two layers of the vision tower, 32 wide, float32


def schedule(rows: list[list[int]], chunk_ends: list[int]) -> tuple[list[int], list[int], list[int]]:
    """With 10 patches per crop."""
    order, ready, first_crop = pooling_schedule(torch.tensor(rows).reshape(-1, 2), 10, chunk_ends)
    return order.tolist(), ready, first_crop


def test_frames_are_pooled_as_they_are_encoded():
    rows = [[0, 9], [10, -1], [20, 21], [30, 39]]
    assert schedule(rows, [2, 4]) == ([0, 1, 2, 3], [2, 4], [2, 4])


def test_tokens_across_two_crops_wait_for_the_second():
    # Token 0 needs crops 0 and 2, token 1 crop 0 alone, token 2 crops 1 and 2.
    rows = [[5, 25], [0, 1], [19, 20]]
    assert schedule(rows, [1, 2, 3]) == ([1, 0, 2], [1, 1, 3], [0, 0, 3])


def test_crops_that_no_token_needs():
    assert schedule([[0, 1]], [1, 2, 3]) == ([0], [1, 1, 1], [1, 2, 3])
    assert schedule([[20, 21]], [1, 3]) == ([0], [0, 1], [1, 3])
    assert schedule([], [2, 3]) == ([], [0, 0], [2, 3])


@pytest.fixture(scope="module")
def backbone():
    return copy.deepcopy(build_model("qwen3").vision_backbone)


def peak_bytes(backbone, crops: int, across: bool = False) -> int:
    """One token per crop, of all its patches; or of the last half and the first half of the next one."""
    pixels = torch.zeros(crops, PATCHES, 588)
    pooling = torch.arange(crops * PATCHES).reshape(crops, PATCHES)
    if across:
        pooling = (pooling + PATCHES // 2)[:-1]
    with torch.no_grad(), Allocations() as counted:
        backbone(pixels, pooling)
    return counted.peak_bytes


@pytest.mark.parametrize("across", [False, True])
def test_memory_does_not_grow_with_the_features(backbone, across):
    backbone.crops_per_chunk, backbone.tokens_per_chunk = 4, 4
    growth = (peak_bytes(backbone, 96, across) - peak_bytes(backbone, 32, across)) / 64
    assert growth < 0.4 * FEATURE_BYTES  # the pooling table and the vectors themselves


def test_the_count_notices_features_that_are_held(backbone):
    backbone.crops_per_chunk, backbone.tokens_per_chunk = None, 4
    growth = (peak_bytes(backbone, 96) - peak_bytes(backbone, 32)) / 64
    assert growth > FEATURE_BYTES


@torch.no_grad()
def test_crops_without_tokens_give_no_vectors(backbone):
    backbone.crops_per_chunk, backbone.tokens_per_chunk = 2, 4
    empty = torch.full((3, 9), -1)
    assert backbone(torch.zeros(3, PATCHES, 588), empty).shape == (0, 40)
