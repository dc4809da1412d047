"""Slow-fast clips: key frames pooled as always, the frames between them more coarsely."""

import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from molmo2.image.geometry import CropSettings, VideoPlan, stack_pooling, video_token_pooling
from molmo2.processing.prompt_tokens import timed_grids
from molmo2.video.processing import Molmo2VideoProcessor
from support.checkpoints import build_model
from support.model_inputs import batch, clip, processor

FINE, COARSE = CropSettings(6, 6, 1, 2, 2), CropSettings(6, 6, 1, 3, 3)
SLOW_FAST = {"key_frame_interval": 3, "between_pooling_size": 7}  # the tiny frames are 7 x 7 patches


@pytest.mark.parametrize(
    ("frames", "interval", "drawing"),
    [
        (1, 4, "K"),
        (2, 4, "KK"),
        (5, 1, "KKKKK"),
        (6, 2, "K.K.KK"),
        (7, 3, "K..K..K"),
        (8, 4, "K...K..K"),
        (3, 9, "K.K"),
    ],
)
def test_key_frames_come_at_their_interval_and_last(frames, interval, drawing):
    runs = VideoPlan(frames, FINE, COARSE, interval).runs
    assert "".join(("K" if run.settings is FINE else ".") * run.num_frames for run in runs) == drawing
    assert all(a.settings is not b.settings for a, b in pairwise(runs))


def test_every_patch_of_every_frame_is_pooled_once_with_its_own_window():
    plan = VideoPlan(7, FINE, COARSE, 3)
    assert plan.grids == [(1, 3, 3), (2, 2, 2), (1, 3, 3), (2, 2, 2), (1, 3, 3)]
    pooling = video_token_pooling(plan)
    assert pooling.shape == (plan.num_pooled_tokens, 9)
    place = 0
    for run in plan.runs:
        ((frames, rows, cols),) = run.grids
        own = pooling[place : place + frames * rows * cols]
        place += len(own)
        assert np.sort(own[own >= 0]).tolist() == list(range(frames * 36))  # counted within the run
        window = run.settings.pool_height * run.settings.pool_width
        assert (own[:, window:] == -2).all()
        assert (own[:, :window] >= -1).all()
    assert place == len(pooling)


def test_tables_are_stacked_at_the_width_of_the_widest():
    assert stack_pooling([np.array([[1, -1]]), np.array([[3]])]).tolist() == [[1, -1], [3, -2]]
    assert stack_pooling([], 4).shape == (0, 4)


@pytest.mark.parametrize("as_rows", [list, np.array, torch.tensor])
def test_runs_are_given_back_to_their_videos(as_rows):
    plans = [VideoPlan(5, FINE), VideoPlan(7, FINE, COARSE, 3), VideoPlan(1, FINE)]
    grids = as_rows([grid for plan in plans for grid in plan.grids])
    videos = [SimpleNamespace(timestamps=list(range(plan.num_frames))) for plan in plans]
    assert timed_grids(grids, videos) == [
        ([list(grid) for grid in plan.grids], video.timestamps) for plan, video in zip(plans, videos)
    ]
    assert timed_grids([], []) == []


@pytest.mark.parametrize("frame_counts", [[3], [5, 2], [2, 4], [7], []])
def test_runs_of_other_videos_are_refused(frame_counts):
    with pytest.raises(ValueError, match=r"runs of \[1, 2, 3\] frames, which do not add up to videos of "):
        timed_grids([(1, 2, 2), (2, 1, 1), (3, 2, 2)], [SimpleNamespace(timestamps=[0] * n) for n in frame_counts])


def test_prompt_pixels_and_counts_follow_from_the_same_plan():
    arguments = {"text": "<|video|>What?", "videos": [clip(8)], "video_metadata": [{"fps": 2.0}]}
    arguments["do_sample_frames"] = False
    inputs = processor()(**arguments, **SLOW_FAST)
    plan = processor().video_processor.plan(8, **SLOW_FAST)
    assert inputs["video_grids"].tolist() == [list(grid) for grid in plan.grids]
    assert plan.grids == [(1, 3, 3), (2, 1, 1), (1, 3, 3), (2, 1, 1), (2, 3, 3)]
    patch_id = processor().tokenizer.convert_tokens_to_ids("<im_patch>")
    assert inputs["input_ids"][0].count(patch_id) == plan.num_pooled_tokens == 4 * 9 + 4
    assert len(inputs["video_token_pooling"]) == plan.num_pooled_tokens
    assert len(inputs["pixel_values_videos"]) == 8
    plain = processor()(**arguments)
    np.testing.assert_array_equal(inputs["pixel_values_videos"], plain["pixel_values_videos"])
    times = re.findall(r"\d\.\d", processor().decode(inputs["input_ids"][0]))
    assert [float(time) for time in times] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


def test_slow_fast_and_plain_videos_share_a_batch():
    videos = [clip(5), clip(3)]
    inputs = processor()(
        text=["<|video|>A?", "<|video|>B?"],
        videos=videos,
        video_metadata=[{"fps": 2.0}] * 2,
        per_video_options=[SLOW_FAST, {}],
        padding=True,
        return_tensors="pt",
    )
    assert inputs["video_grids"].tolist() == [[1, 3, 3], [2, 1, 1], [2, 3, 3], [3, 3, 3]]
    model = build_model("qwen3")
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, (video, options) in enumerate(zip(videos, (SLOW_FAST, {}), strict=True)):
            alone = processor()(
                text=["<|video|>A?", "<|video|>B?"][row],
                videos=[video],
                video_metadata=[{"fps": 2.0}],
                return_tensors="pt",
                **options,
            )
            expected = model(**alone).logits[0]
            torch.testing.assert_close(logits[row, -len(expected) :], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("masks_missing", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_each_window_is_pooled_as_if_it_were_alone(masks_missing, implementation):
    """Fill-up behind small windows changes nothing, whether missing patches are masked or count as zeros."""
    pooler = build_model("qwen3").model.vision_backbone.image_pooling_2d
    pooler.config._attn_implementation_internal = implementation
    pooler.masks_missing = masks_missing
    features = torch.randn(40, pooler.wq.in_features, generator=torch.Generator().manual_seed(1))
    small, wide = torch.tensor([[0, 5, -1, -1], [7, 8, 9, -1]]), torch.tensor([[20, 21, 22, 23, 24, 25, 26, -1, -1]])
    mixed = pooler(features, torch.from_numpy(stack_pooling([small.numpy(), wide.numpy()])))
    torch.testing.assert_close(mixed[:2], pooler(features, small), rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[2:], pooler(features, wide), rtol=0, atol=1e-6)


@torch.no_grad()
def test_same_pooling_between_changes_nothing():
    arguments = {"text": "<|video|>What?", "videos": [clip(5)], "video_metadata": [{"fps": 2.0}]}
    plain = processor()(**arguments, return_tensors="pt")
    runs = processor()(**arguments, return_tensors="pt", key_frame_interval=2, between_pooling_size=3)
    assert len(runs["video_grids"]) == 5
    model = build_model("qwen3")
    torch.testing.assert_close(model(**runs).logits, model(**plain).logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_generation_with_copies():
    inputs = processor()(
        text="<|video|>What?", videos=[clip(5)], video_metadata=[{"fps": 2.0}], return_tensors="pt", **SLOW_FAST
    )
    model = build_model("qwen3")
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    copies = model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(copies, greedy.expand(3, -1))


def test_saved_only_when_switched_on(tmp_path):
    assert "key_frame_interval" not in Molmo2VideoProcessor().to_dict()
    Molmo2VideoProcessor(key_frame_interval=4, between_pooling_size=9).save_pretrained(tmp_path)
    loaded = Molmo2VideoProcessor.from_pretrained(tmp_path)
    assert (loaded.key_frame_interval, loaded.between_pooling_size) == (4, [9, 9])


def test_impossible_intervals_are_refused():
    with pytest.raises(ValueError, match="key_frame_interval is 0, but must be a whole number of at least 1"):
        batch("video", key_frame_interval=0)
