"""Which image belongs where, on hand-made rows of ids."""

from types import SimpleNamespace

import pytest
import torch

from molmo2.model.vision_inputs import TokenGroup, flat_pooling, prompt_order, require_grids, token_groups
from support.model_inputs import owners_of

# p patch, l low-res patch, c column, e image end, f frame end, s image start, o low-res start, . text
IDS = {letter: number for number, letter in enumerate(".plcefso")}
CONFIG = SimpleNamespace(
    image_patch_id=IDS["p"],
    image_low_res_id=IDS["l"],
    image_end_token_id=IDS["e"],
    frame_end_token_id=IDS["f"],
    low_res_image_start_token_id=IDS["o"],
)


def groups_of(*rows: str) -> list[list[TokenGroup]]:
    ids = torch.tensor([[IDS[letter] for letter in row] for row in rows])
    return token_groups(ids, CONFIG)


def sizes(groups: list[list[TokenGroup]]) -> list[list[int]]:
    return [[size for size, _ in row] for row in groups]


def test_groups_are_closed_by_end_tokens():
    assert sizes(groups_of("oppesppppe..", "............")) == [[2, 4], []]
    assert sizes(groups_of(".sppf.sppf..")) == [[2, 2]]


def test_column_and_low_res_tokens():
    assert sizes(groups_of("olceopcpce..")) == [[1, 2]]
    assert [kinds for _, kinds in groups_of("oppesppppe")[0]] == [("image",), ("video",)]


def test_end_tokens_typed_as_text_close_nothing():
    assert sizes(groups_of("e..oppe.espe")) == [[2, 1]]


def test_images_and_videos_of_a_batch():
    rows = groups_of("oppesppppe..........", "....................", "oppesppppe.sppe.sppe")
    found = owners_of(rows, [[1, 2, 2, 2], [1, 2, 1, 4]], [[2, 1, 2]])
    assert found == [[("image", 0)], [], [("image", 1), ("video", 0)]]


def test_a_video_may_stand_before_an_image():
    rows = groups_of("sppe.sppe.oppesppppe")
    assert owners_of(rows, [[1, 2, 2, 2]], [[2, 1, 2]]) == [[("video", 0), ("image", 0)]]


def test_equal_groups_are_told_apart_by_the_low_res_start():
    # Frames of two tokens, and an image whose view and crops have two tokens too.
    rows = groups_of("sppe.sppe.oppesppe")
    assert owners_of(rows, [[1, 2, 1, 2]], [[2, 1, 2]]) == [[("video", 0), ("image", 0)]]


def test_without_a_low_res_start_images_come_first():
    rows = groups_of("sppesppe.sppe.sppe")
    assert owners_of(rows, [[1, 2, 1, 2]], [[2, 1, 2]]) == [[("image", 0), ("video", 0)]]


def test_frames_with_their_own_end_token_are_never_images():
    rows = groups_of("sppf.sppf..", "sppesppe...")
    assert owners_of(rows, [[1, 2, 1, 2]], [[2, 1, 2]]) == [[("video", 0)], [("image", 0)]]


def test_several_videos_in_a_row():
    rows = groups_of("sppe.sppe.sppppe")
    assert owners_of(rows, videos=[[2, 1, 2], [1, 2, 2]]) == [[("video", 0), ("video", 1)]]


def test_images_that_do_not_fit_the_prompt():
    message = r"Row 0 of the prompt has groups of patch tokens \[2, 4\] where image 0 of 1 or video 0 of 0"
    with pytest.raises(ValueError, match=message):
        owners_of(groups_of("oppesppppe"), [[1, 2, 2, 3]])


def test_images_without_a_place():
    with pytest.raises(ValueError, match=r"The prompts place 1 image\(s\), but 2 were passed"):
        owners_of(groups_of("oppesppppe"), [[1, 2, 2, 2], [1, 2, 2, 2]])


def test_flat_pooling_shifts_each_item_past_the_crops_before_it():
    pooling = torch.tensor([[0, 5], [-1, 3], [0, 1], [2, -1]])
    shifted = flat_pooling(pooling, tokens=torch.tensor([2, 2]), crops=torch.tensor([3, 1]), patches_per_crop=10)
    assert shifted.tolist() == [[0, 5], [-1, 3], [30, 31], [32, -1]]


def test_prompt_order_interleaves_images_and_videos():
    rows = groups_of("opespe.spppe", "opesppe.....")
    # Features lie as image 0 (2), image 1 (3), video 0 (3).
    order = prompt_order(rows, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 2]]), torch.tensor([[1, 1, 3]]))
    assert order.tolist() == [0, 1, 5, 6, 7, 2, 3, 4]


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("image", (2, 3), r"`image_grids` has the shape \(2, 3\), expected \(images, 4\)"),
        ("video", (3,), r"`video_grids` has the shape \(3,\), expected \(videos, 3\)"),
    ],
)
def test_grids_of_another_shape(kind, shape, message):
    with pytest.raises(ValueError, match=message):
        require_grids(kind, torch.ones(shape, dtype=torch.int64))
