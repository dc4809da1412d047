"""Frame sampling: the recorded tables, and what holds for any video."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from molmo2.video.sampling import SamplingSettings, require_fps, sample_indices, sample_times
from support.golden_cases import table

MODES = ("uniform_last_frame", "fps")


def settings_of(row):
    return SamplingSettings(row["num_frames"], row["frame_sample_mode"], row["max_fps"], row["sampling_fps"])


def assert_recorded(actual, recorded):
    """Long lists are recorded by their ends, their sum and every 7th entry."""
    if isinstance(recorded, list):
        assert actual.tolist() == recorded
        return
    assert len(actual) == recorded["len"]
    assert actual[:12].tolist() == recorded["head"]
    assert actual[-12:].tolist() == recorded["tail"]
    assert actual[::7][:40].tolist() == recorded["every_7th"]
    assert math.fsum(actual) == pytest.approx(recorded["sum"], rel=1e-12)


# --- the recorded tables ---------------------------------------------------------------------------------------------


def test_every_recorded_row_is_reproduced():
    rows = table("frame_sampling")
    compared = 0
    for row in rows:
        total, fps, settings = row["total_num_frames"], row["fps"], settings_of(row)
        indices = sample_indices(total, fps, settings)
        times = sample_times(total / fps, fps, settings)
        if "ok" in row["array_sampling"]:
            assert_recorded(indices, row["array_sampling"]["ok"]["indices"])
            assert_recorded(indices / fps, row["array_sampling"]["ok"]["timestamps"])
            compared += 1
        if "ok" in row["file_sampling_times"]:
            assert_recorded(times, row["file_sampling_times"]["ok"])
            compared += 1
    assert compared > len(rows)  # most rows have both


def test_rows_that_the_original_refuses_give_a_steady_rate():
    refused = [row for row in table("frame_sampling") if "error" in row["array_sampling"]]
    assert refused
    for row in refused:
        total, fps, settings = row["total_num_frames"], row["fps"], settings_of(row)
        for shown in (sample_indices(total, fps, settings), sample_times(total / fps, fps, settings)):
            assert 1 <= len(shown) <= settings.num_frames
            assert shown[0] == 0
            gaps = np.diff(shown)
            assert np.all(gaps > 0)
            assert gaps.size == 0 or gaps.max() - gaps.min() <= 1  # frames are whole, so indices may differ by one


# --- what the rules say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "duration_seconds", "expected"),
    [
        (SamplingSettings(384, max_fps=2.0), 1.2, [0.0, 0.5, 1.0, 1.2]),
        (SamplingSettings(384, max_fps=2.0), 1.0, [0.0, 0.5, 1.0]),
        (SamplingSettings(3, max_fps=2.0), 9.0, [0.0, 4.5, 9.0]),
        (SamplingSettings(3, max_fps=None), 0.5, [0.0, 0.25, 0.5]),
        (SamplingSettings(1, max_fps=2.0), 9.0, [0.0]),
        (SamplingSettings(8, max_fps=None), 0.0, [0.0]),
        (SamplingSettings(8, "fps", sampling_fps=2), 1.2, [0.0, 0.5, 1.0]),
        (SamplingSettings(2, "fps", sampling_fps=2), 1.2, [0.0, 0.5]),
        (SamplingSettings(8, "fps", sampling_fps=0.5), 6.0, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        (SamplingSettings(8, "fps", sampling_fps=10), 0.25, [0.0, 0.1, 0.2]),
        (SamplingSettings(8, "fps", sampling_fps=2), 0.0, [0.0]),
    ],
)
def test_times(settings, duration_seconds, expected):
    np.testing.assert_allclose(sample_times(duration_seconds, 10.0, settings), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("fps", "num_frames", "expected"),
    [
        (30.0, 8, [0, 15, 30, 45]),
        (29.97, 8, [0, 15, 30, 45]),  # counts as 30
        (30000 / 1001, 16, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55]),  # 6 per second fit
        (23.976, 8, [0, 12, 24, 36, 48]),  # counts as 24
        (25.0, 8, [0, 12, 25, 37, 50]),  # no multiple of 2 divides 25: the frame on display every half second
        (7.5, 32, [0, 3, 7, 11, 15, 18, 22, 26, 30, 33, 37, 41, 45, 48, 52, 56]),
        (1.0, 4, [0, 1, 2, 3]),  # slower than sampling_fps: every frame
        (0.5, 4, [0, 1, 2, 3]),
    ],
)
def test_indices_of_fps_mode_for_any_frame_rate(fps, num_frames, expected):
    assert sample_indices(60, fps, SamplingSettings(num_frames, "fps", sampling_fps=2)).tolist() == expected


@pytest.mark.parametrize(
    ("total", "fps", "num_frames", "expected"),
    [
        # 24 fps: candidates 2, 4, 6, 8 with steps 12, 6, 4, 3
        (1, 24.0, 8, [0]),  # counts 0, 0, 0, 0: every candidate is taken, the step is 3
        (3, 24.0, 8, [0]),  # 0, 0, 0, 1
        (4, 24.0, 8, [0]),  # 0, 0, 1, 1: 8 per second gives no more, the step stays 4
        (5, 24.0, 8, [0, 4]),  # 0, 0, 1, 1
        (6, 24.0, 8, [0, 3]),  # 0, 1, 1, 2: 6 per second gives no more than 4, but 8 does
        (8, 24.0, 8, [0, 4]),  # 0, 1, 2, 2
        (9, 24.0, 8, [0, 3, 6]),  # 0, 1, 2, 3
        (12, 24.0, 8, [0, 3, 6, 9]),  # 1, 2, 3, 4
        (12, 24.0, 3, [0, 4, 8]),  # 4 do not fit
        (14, 24.0, 4, [0, 3, 6, 9]),  # 1, 2, 3, 4: counted in whole steps 4 fit, and the fifth index is dropped
        (48, 24.0, 2, [0, 12]),  # 4, 8, 12, 16: not even the lowest fits
        # 6 fps: candidates 2, 6 with steps 3, 1
        (2, 6.0, 1, [0]),  # 0, 2: from 0 the next is taken even if it does not fit
        (2, 6.0, 8, [0, 1]),
        (3, 6.0, 2, [0]),  # 1, 3: 3 do not fit
    ],
)
def test_in_fps_mode_a_higher_rate_has_to_give_more_frames(total, fps, num_frames, expected):
    assert sample_indices(total, fps, SamplingSettings(num_frames, "fps", sampling_fps=2)).tolist() == expected


@given(
    total=st.integers(1, 400),
    whole_fps=st.integers(1, 120),
    num_frames=st.integers(1, 40),
    sampling_fps=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_indices_of_fps_mode_follow_the_rule_word_for_word(total, whole_fps, num_frames, sampling_fps):
    """The rule as it is written down, with integers alone, where the frame rate is a multiple of the sampling rate."""
    candidates = [rate for rate in range(sampling_fps, 9, sampling_fps) if whole_fps % rate == 0]
    if not candidates:
        return
    steps = [whole_fps // rate for rate in candidates]
    chosen = 0
    for number in range(1, len(steps)):
        has, would_have = total // steps[chosen], total // steps[number]
        if has == 0 or (would_have > has and would_have <= num_frames):
            chosen = number
    expected = list(range(0, total, steps[chosen]))[:num_frames]
    assert (
        sample_indices(total, float(whole_fps), SamplingSettings(num_frames, "fps", None, sampling_fps)).tolist()
        == expected
    )


def test_uniform_indices_keep_the_last_frame():
    assert sample_indices(37, 10.0, SamplingSettings(384, max_fps=2.0)).tolist() == [0, 5, 10, 15, 20, 25, 30, 35, 36]
    assert sample_indices(37, 10.0, SamplingSettings(3, max_fps=2.0)).tolist() == [0, 18, 36]


def test_two_frames_are_cut_down_if_only_one_is_wanted():
    assert sample_indices(2, 10.0, SamplingSettings(2, max_fps=2.0)).tolist() == [0, 1]
    assert sample_indices(2, 10.0, SamplingSettings(1, max_fps=2.0)).tolist() == [0]


# --- what holds for any video ----------------------------------------------------------------------------------------

any_settings = st.builds(
    SamplingSettings,
    num_frames=st.integers(1, 400),
    frame_sample_mode=st.sampled_from(MODES),
    max_fps=st.none() | st.floats(0.1, 70),
    sampling_fps=st.integers(1, 12) | st.floats(0.1, 12),
)


@given(duration_seconds=st.floats(0, 20000), fps=st.floats(0.05, 240), settings=any_settings)
@example(duration_seconds=383 / 3, fps=30.0, settings=SamplingSettings(384, max_fps=3.0))  # arange gives one too many
@example(duration_seconds=5.2, fps=10.0, settings=SamplingSettings(384, max_fps=10.0))
def test_sampled_times_lie_in_the_video(duration_seconds, fps, settings):
    times = sample_times(duration_seconds, fps, settings)
    assert times.dtype == np.float64
    assert 1 <= len(times) <= settings.num_frames
    assert times[0] == 0
    assert np.all(np.diff(times) >= 0)
    assert times[-1] <= duration_seconds
    if settings.frame_sample_mode == "uniform_last_frame" and settings.num_frames > 1:
        assert times[-1] == duration_seconds


@given(total=st.integers(1, 3000), fps=st.floats(0.05, 240), settings=any_settings)
def test_sampled_indices_lie_in_the_video(total, fps, settings):
    indices = sample_indices(total, fps, settings)
    assert indices.dtype == np.int64
    assert 1 <= len(indices) <= settings.num_frames
    assert indices[0] == 0
    assert np.all(np.diff(indices) >= 0)
    assert indices[-1] <= total - 1
    if settings.frame_sample_mode == "uniform_last_frame" and settings.num_frames > 1:
        assert indices[-1] == total - 1


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0, .* 1 or more"),
        ({"num_frames": 2.5}, r"num_frames is 2\.5"),
        ({"num_frames": True}, "num_frames is True"),
        ({"frame_sample_mode": "uniform"}, "Unknown frame_sample_mode 'uniform'. Use one of uniform_last_frame, fps"),
        ({"max_fps": 0}, "max_fps is 0, .* max_fps=None for no limit"),
        ({"max_fps": -1.0}, "max_fps is -1.0"),
        ({"max_fps": math.nan}, "max_fps is nan"),
        ({"sampling_fps": 0}, "sampling_fps is 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**{"num_frames": 8, "max_fps": 2.0, **options})


@pytest.mark.parametrize("fps", [None, 0, -30.0, math.nan, math.inf])
def test_missing_frame_rate(fps):
    message = 'no usable frame rate .*video_metadata={"fps": 30.0}.*timestamps'
    with pytest.raises(ValueError, match=message):
        require_fps(fps)
    with pytest.raises(ValueError, match=message):
        sample_indices(8, fps, SamplingSettings(8))
    with pytest.raises(ValueError, match=message):
        sample_times(1.0, fps, SamplingSettings(8, "fps"))


@pytest.mark.parametrize("duration_seconds", [math.nan, math.inf, -0.1])
def test_impossible_duration(duration_seconds):
    with pytest.raises(ValueError, match=r"duration of the video is .* finite number >= 0"):
        sample_times(duration_seconds, 10.0, SamplingSettings(8))


def test_no_frames():
    with pytest.raises(ValueError, match="has 0 frames; expected at least one"):
        sample_indices(0, 10.0, SamplingSettings(8))
