"""What windows say, made one: tracks and events, by cases that were worked out by hand."""

import math

import pytest

from molmo2.grounding.files import to_mot
from molmo2.grounding.parse import SampledFrame
from molmo2.long_video.events import EventMerger, LongEvent, MergeSettings, WindowEvents, merge_events
from molmo2.long_video.tracks import (
    GAP,
    OVERLAP,
    Join,
    JoinSettings,
    Stitcher,
    TrackPoint,
    WindowTrack,
    WindowTracks,
    as_grounding,
    stitch,
)
from molmo2.long_video.windows import Cutting, Window, clock


def moving(times, x, y=0.5, dx=0.0, dy=0.0, label="ring"):
    """A track that is at (x, y) at second 0 and moves by (dx, dy) per second."""
    return WindowTrack(label, tuple(TrackPoint(float(t), x + t * dx, y + t * dy) for t in times))


def window(start, end, *tracks):
    return WindowTracks(float(start), float(end), tracks)


def times_of(track):
    return [point.time for point in track.points]


# --- windows ---------------------------------------------------------------------------------------------------------


def test_windows_share_samples_and_cover_everything():
    cutting = Cutting(window=6, overlap=2, fps=1)
    assert (cutting.size, cutting.step, cutting.shared) == (6, 4, 2)
    assert cutting.num_samples(10.0) == 10
    assert [cutting.window_at(index, 10) for index in range(cutting.num_windows(10))] == [
        Window(0, 0, 5),
        Window(1, 4, 9),
    ]
    for num_samples in range(1, 40):
        windows = [cutting.window_at(index, num_samples) for index in range(cutting.num_windows(num_samples))]
        seen = {sample for own in windows for sample in range(own.first, own.last + 1)}
        assert seen == set(range(num_samples))
        lasts = [own.last for own in windows]
        assert lasts == sorted(set(lasts))  # none without a sample of its own


def test_a_duration_is_sampled_up_to_its_end():
    assert [Cutting(fps=2).num_samples(seconds) for seconds in (0.0, 0.4, 0.5, 0.6, 30.0)] == [1, 1, 1, 2, 60]
    assert Cutting(fps=3).num_samples(1 / 3) == 1  # though 1 / 3 * 3 may be a little more


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "`window` is 0"),
        ({"fps": math.inf}, "`fps` is inf"),
        ({"window": 4, "overlap": 4}, "shorter than a window"),
        ({"overlap": -1}, "0 or more"),
        ({"window": 5, "overlap": 4.9}, "less than one sample"),
    ],
)
def test_impossible_windows_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Cutting(**options)


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.9, 3725)] == ["0:00:00", "0:00:59", "1:02:05"]


# --- tracks ----------------------------------------------------------------------------------------------------------


def test_a_track_continues_through_the_overlap():
    """It is 0.02 beside at both shared times: 1 - 0.02 / 0.1 = 0.8."""
    (track,) = stitch([window(0, 5, moving(range(6), 0.3)), window(4, 9, moving(range(4, 10), 0.32))])
    assert times_of(track) == [float(time) for time in range(10)]
    assert track.joins == (Join(OVERLAP, 4.0, 5.0, pytest.approx(0.8)),)
    assert track.confidence == pytest.approx(0.8)
    # The middle of the overlap is 4.5: up to there the first window counts, then the second.
    assert [point.x for point in track.points[4:6]] == [0.3, 0.32]


def test_a_time_that_only_one_window_has_counts_against_a_join():
    """Shared times 4, 5 (closeness 1 at 4 only; 5 has no point in the second window): 1 / 2."""
    (track,) = stitch([window(0, 5, moving(range(6), 0.3)), window(4, 9, moving([4, 6, 7], 0.3))])
    assert track.joins[0].confidence == pytest.approx(0.5)
    assert times_of(track) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_two_that_cross_in_the_overlap_keep_their_ids():
    """They are at the same place at 4.5; at 4, 5 and around it they are 0.05 apart, less than `max_distance`."""
    right = {"x": -0.4, "dx": 0.2}  # 0.4 at 4, 0.5 at 4.5, 0.6 at 5
    left = {"x": 1.4, "dx": -0.2}
    first = [moving([3, 3.5, 4, 4.5, 5], **right), moving([3, 3.5, 4, 4.5, 5], **left)]
    second = [moving([4, 4.5, 5, 5.5, 6], **left), moving([4, 4.5, 5, 5.5, 6], **right)]  # in the other order
    one, other = stitch([window(3, 5, *first), window(4, 6, *second)])
    assert [point.x for point in one.points] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert [point.x for point in other.points] == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    assert one.confidence == other.confidence == pytest.approx(1.0)


def test_the_best_pairs_together_not_the_nearest_first():
    """Old at 0.50 and 0.54, new at 0.47 and 0.515; nearest first would join 0.50 to 0.515 and leave a bad rest.

    Closeness: 0.50-0.47 0.7, 0.50-0.515 0.85, 0.54-0.47 0.3, 0.54-0.515 0.75; 0.7 + 0.75 beats 0.85 + 0.3.
    """
    first = window(0, 5, moving([4, 5], 0.5), moving([4, 5], 0.54))
    ids = Stitcher()
    ids.add(first)
    assert ids.add(window(4, 9, moving([4, 5], 0.515), moving([4, 5], 0.47))) == {0: 2, 1: 1}


def test_far_apart_in_the_overlap_are_two_objects():
    tracks = stitch([window(0, 5, moving(range(6), 0.3)), window(4, 9, moving(range(4, 10), 0.7))])
    assert [(track.id, len(track.points)) for track in tracks] == [(1, 6), (2, 6)]
    assert [track.joins for track in tracks] == [(), ()]


def test_a_return_is_joined_by_place_and_time():
    """Away from 3 to 8, back 0.05 beside: (1 - 0.05 / 0.25) * (1 - 5 / 15) = 8 / 15."""
    (track,) = stitch([window(0, 5, moving(range(4), 0.3)), window(4, 9, moving([8, 9], 0.35))])
    assert track.joins == (Join(GAP, 3.0, 8.0, pytest.approx(8 / 15)),)
    assert track.spans(1.0) == [(0.0, 3.0), (8.0, 9.0)]


def test_a_return_where_its_motion_would_have_led():
    """It left to the right at 0.2 a second: at the edge, 1.0, it is expected; it is back at 0.95, of 0.25 allowed."""
    leaving = moving([0, 1, 2, 3], 0.1, dx=0.2)  # 0.7 at 3
    (track,) = stitch([window(0, 5, leaving), window(4, 9, moving([6, 7], 0.95))])
    assert track.joins[0].confidence == pytest.approx((1 - 0.05 / 0.25) * (1 - 3 / 15))


@pytest.mark.parametrize(
    "late", [{"times": [19, 20], "x": 0.3}, {"times": [8, 9], "x": 0.9}], ids=["late", "elsewhere"]
)
def test_a_return_too_late_or_elsewhere_is_another_object(late):
    windows = [window(0, 5, moving(range(4), 0.3)), window(4, 9), window(8, 25)]
    place = 1 if late["times"][0] < 10 else 2
    windows[place] = window(windows[place].start, windows[place].end, moving(**late))
    assert len(stitch(windows)) == 2
    (track,) = stitch(windows, JoinSettings(unique=True))
    assert (track.joins[0].kind, track.confidence) == (GAP, 0.5)


def test_something_unique_is_not_joined_to_another_that_is_there():
    """Two at once show that it is not unique; the second begins while the first is seen."""
    both = window(0, 5, moving(range(6), 0.1), moving([4, 5], 0.9))
    assert len(stitch([both], JoinSettings(unique=True))) == 2


def test_what_begins_while_another_is_there_is_not_its_return():
    """0.05 beside it, and at the same time."""
    assert len(stitch([window(0, 5, moving(range(6), 0.3), moving([3, 4], 0.35))])) == 2


def test_what_returns_beside_another_is_not_the_only_one():
    """One that ended, one that stays; what begins far from both is neither, for all that it should be unique."""
    tracks = [moving([0, 1], 0.1), moving(range(10), 0.5), moving([6, 7], 0.95)]
    assert len(stitch([window(0, 9, *tracks)], JoinSettings(unique=True))) == 3


@pytest.mark.parametrize(
    ("first", "second", "joins"),
    [
        (window(0, 30, moving(range(20, 28), 0.3)), window(26, 56, moving([26, 27], 0.3)), {"max_gap_seconds": 1.0}),
        (window(0, 60, moving(range(30, 45), 0.3)), window(40, 100, moving(range(40, 45), 0.3)), {}),
    ],
    ids=["short gap", "long overlap"],
)
def test_what_ends_in_the_overlap_is_still_known_there(first, second, joins):
    """It ended longer than the gap before the end of the window, but both windows see it."""
    (track,) = stitch([first, second], JoinSettings(**joins))
    assert track.joins == (Join(OVERLAP, second.start, first.end, 1.0),)
    assert track.points == first.tracks[0].points


def test_a_return_in_the_overlap_after_nearly_the_longest_gap():
    """Away from 2 to 5 of at most 4 s, when the first window, which does not see it, ends at 6.5."""
    settings = JoinSettings(max_gap_seconds=4.0)
    (track,) = stitch([window(0, 6.5, moving([1, 2], 0.3)), window(4, 10, moving([5, 6, 7], 0.3))], settings)
    assert track.joins == (Join(GAP, 2.0, 5.0, pytest.approx(1 - 3 / 4)),)


def test_no_return_without_a_gap_that_is_allowed():
    windows = [window(0, 5, moving(range(4), 0.3)), window(4, 9, moving([8, 9], 0.3))]
    assert len(stitch(windows, JoinSettings(max_gap_seconds=0.0))) == 2


def test_duplicates_in_the_overlap_are_one_object():
    """Three windows of the same object, and one that passes: two objects, not four."""
    windows = [window(s, s + 5, moving(range(s, s + 6), 0.3)) for s in (0, 4, 8)]
    windows[1] = window(4, 9, *windows[1].tracks, moving([6, 7], 0.8))
    tracks = stitch(windows)
    assert [times_of(track) for track in tracks] == [[float(time) for time in range(14)], [6.0, 7.0]]


def test_labels_are_kept_apart():
    tracks = stitch(
        [window(0, 5, moving(range(6), 0.3)), window(4, 9, moving(range(4, 10), 0.3, label="cross"))],
    )
    assert [track.label for track in tracks] == ["ring", "cross"]


def test_a_return_within_a_window_is_joined_too():
    """The model gave it a new number."""
    (track,) = stitch([window(0, 9, moving([0, 1], 0.3), moving([4, 5], 0.3))])
    assert track.joins == (Join(GAP, 1.0, 4.0, pytest.approx(1 - 3 / 15)),)


def test_ids_do_not_change_while_windows_arrive():
    windows = [window(s, s + 5, moving(range(s, s + 6), 0.1 * (s % 3)), moving([s + 2], 0.9)) for s in (0, 4, 8, 12)]
    stitcher, seen = Stitcher(JoinSettings(max_gap_seconds=0.5)), {}
    for number, own in enumerate(windows):
        stitcher.add(own)
        for track in stitcher.tracks():
            begin = track.points[0]
            assert seen.setdefault(track.id, begin) == begin
        assert stitcher.tracks() == stitch(windows[: number + 1], stitcher.settings)
    assert list(seen) == list(range(1, len(seen) + 1))


def test_the_most_at_one_time():
    stitcher = Stitcher()
    stitcher.add(window(0, 5, moving([0, 1, 2], 0.1), moving([2, 3], 0.5), moving([4, 5], 0.9)))
    assert stitcher.most_at_once == 2
    stitcher.add(window(4, 9, moving([4, 5], 0.9), moving([5], 0.2), moving([5, 6], 0.6)))
    assert stitcher.most_at_once == 3


def test_one_that_two_windows_place_apart_is_not_two_at_one_time():
    """0.15 apart, more than 0.1: two tracks, and each window has one."""
    stitcher = Stitcher()
    stitcher.add(window(0, 5, moving(range(6), 0.3)))
    stitcher.add(window(4, 9, moving(range(4, 10), 0.45)))
    assert (len(stitcher.tracks()), stitcher.most_at_once) == (2, 1)


def test_nothing_and_empty_windows():
    assert stitch([]) == ()
    assert stitch([window(0, 5), window(4, 9, WindowTrack("ring", ()))]) == ()


def test_tracks_as_an_answer_are_written_to_files():
    class Video:
        size = (200, 100)

        @staticmethod
        def sampled_frame(time):
            return SampledFrame(time, int(time), int(time) * 10)

    tracks = stitch([window(0, 5, moving([0, 1], 0.25), moving([1], 0.75))])
    lines = [line.split(",") for line in to_mot(as_grounding(tracks, Video)).splitlines()]
    assert [(int(frame), int(number), float(left)) for frame, number, left, *_ in lines] == [
        (1, 1, 51.0),
        (11, 1, 51.0),
        (11, 2, 151.0),
    ]
    assert as_grounding(tracks).points[0].x is None


# --- events ----------------------------------------------------------------------------------------------------------


def test_an_event_that_two_windows_cut_is_one():
    """Words in common: a, car, passes; in either also slowly: 3 / 4."""
    events = merge_events(
        [
            WindowEvents(0, 30, ((3.0, 5.0, "A dog barks"), (25.0, 30.0, "A car passes"))),
            WindowEvents(26, 56, ((26.0, 34.0, "A car passes slowly"), (40.0, 41.0, "A dog barks"))),
        ]
    )
    assert events == (
        LongEvent(3.0, 5.0, "A dog barks"),
        LongEvent(25.0, 34.0, "A car passes slowly", 2, 0.75),
        LongEvent(40.0, 41.0, "A dog barks"),
    )


def test_events_that_are_not_one():
    first = WindowEvents(0, 30, ((28.0, 30.0, "A car passes"), (10.0, 12.0, "Rain")))
    elsewhere = WindowEvents(26, 56, ((28.0, 30.0, "Two birds fight loudly"), (33.0, 34.0, "A car passes")))
    assert len(merge_events([first, elsewhere])) == 4  # other words; 3 s between them
    before_the_seam = WindowEvents(26, 56, ((26.0, 27.0, "Rain"),))
    assert len(merge_events([first, before_the_seam])) == 3
    twice = WindowEvents(0, 30, ((1.0, 2.0, "A goal"), (2.0, 3.0, "A goal")))
    assert len(merge_events([twice])) == 2


def test_occurrences_of_one_kind_need_no_words_in_common():
    windows = [WindowEvents(0, 30, ((29.0, 30.0, "Goal"),)), WindowEvents(26, 56, ((29.0, 31.0, "He scores"),))]
    assert len(merge_events(windows)) == 2
    assert merge_events(windows, MergeSettings(same_kind=True)) == (LongEvent(29.0, 31.0, "He scores", 2, 0.5),)


def test_an_event_over_many_windows():
    merger = EventMerger()
    for start in range(0, 100, 26):
        merger.add(WindowEvents(start, start + 30, ((start + 0.0, start + 30.0, "Rain"),)))
    assert merger.events() == (LongEvent(0.0, 108.0, "Rain", 4, 1.0),)
