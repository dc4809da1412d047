"""Annotated videos: every frame at its own time, marks where the answer puts them, sound kept."""

import itertools
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")

from molmo2.grounding.parse import parse_grounding  # noqa: E402
from molmo2.tools.draw import DrawingStyle  # noqa: E402
from molmo2.tools.draw_video import MarksOverTime, annotate_video  # noqa: E402
from molmo2.video.processing import Molmo2VideoProcessor  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SHARED = REPOSITORY.parent / "shared" / "media"
BIG = DrawingStyle(radius=12, show_ids=False, show_labels=False, trail_seconds=0)


def write_clip(
    path,
    milliseconds,
    *,
    size=(160, 96),
    sound=None,
    rate=30,
    sound_rate=16000,
    ticks=1000,
    milliseconds_shown=None,
    prepare=None,
    image=None,
):
    """A grey clip whose frames are shown at these times.

    Args:
        ticks: per second.
        milliseconds_shown: {time: how long the frame of that time is shown}; None leaves it to the encoder.
        prepare: called with the stream before it is opened.
        image: a frame to show instead of grey.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, ticks)
        if prepare is not None:
            prepare(stream)
        voice = None if sound is None else container.add_stream(sound, rate=sound_rate)
        packets = []
        for time in milliseconds:
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 90, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p") if image is None else image
            frame.pts, frame.time_base = time * ticks // 1000, Fraction(1, ticks)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode(None)]:
            if milliseconds_shown is not None:
                packet.duration = milliseconds_shown[packet.pts]
            container.mux(packet)
        if voice is not None:
            tone = (10000 * np.sin(np.arange(1024) / 10)).astype(np.int16)[None]
            for number in range(30):
                frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
                frame.sample_rate, frame.pts = sound_rate, number * 1024
                container.mux(voice.encode(frame))
            container.mux(voice.encode(None))
    return path


def no_b_frames(stream):
    stream.options = {"bf": "0"}


def track(metadata, places, label="ball", kind="tracks"):
    """An answer with these (x, y) in thousandths at the sampled frames; None where nothing is to be seen."""
    groups = [
        f"{time:.1f} 1 {place[0]:03d} {place[1]:03d}"
        for time, place in zip(metadata.timestamps, places, strict=True)
        if place is not None
    ]
    coords = "\t".join(groups)
    return parse_grounding(f'<{kind} coords="{coords}">{label}</{kind}>', metadata)


def sampled(path, num_frames):
    output = Molmo2VideoProcessor(num_frames=num_frames, max_fps=None)(path, return_metadata=True)
    return output["video_metadata"][0]


def frames_of(path):
    """(seconds since the first frame, (H, W, 3) uint8) of every frame."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        frames = [
            (frame.pts * stream.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)
        ]
    return [(float(time - frames[0][0]), image) for time, image in frames]


def centre(image):
    """(x, y) of what is no longer grey, as shares; None if nothing is."""
    marked = np.abs(image.astype(int) - 90).max(axis=2) > 60
    if not marked.any():
        return None
    y, x = np.argwhere(marked).mean(axis=0)
    return (x + 0.5) / image.shape[1], (y + 0.5) / image.shape[0]


CLIPS = {
    "constant rate": [round(number * 1000 / 30) for number in range(60)],
    "29.97": [round(number * 1001 / 30) for number in range(60)],
    "variable rate": list(itertools.accumulate([20, 100, 40, 15, 200, 33] * 8, initial=0)),
    "late start": [5000 + 40 * number for number in range(50)],
}


@pytest.mark.parametrize("name", CLIPS)
def test_marks_follow_the_presentation_times(tmp_path, name):
    source = write_clip(tmp_path / "clip.mkv", CLIPS[name])
    metadata = sampled(source, 5)
    places = [(200, 500), (400, 300), (600, 500), (700, 700), (800, 500)]
    result = annotate_video(source, track(metadata, places), tmp_path / "out.mkv", BIG)
    before, after = frames_of(source), frames_of(tmp_path / "out.mkv")
    assert [time for time, _ in after] == [time for time, _ in before]
    assert (result.num_frames, result.num_marked_frames, result.audio) == (len(before), len(before), "none")
    known = np.array(metadata.source_timestamps)
    for time, image in after:
        at = min(time, known[-1])
        expected = [np.interp(at, known, [place[axis] / 1000 for place in places]) for axis in (0, 1)]
        assert centre(image) == pytest.approx(expected, abs=0.012), time


def test_the_file_starts_as_late_as_the_source(tmp_path):
    source = write_clip(tmp_path / "clip.mkv", CLIPS["late start"])
    annotate_video(source, track(sampled(source, 3), [(500, 500)] * 3), tmp_path / "out.mkv", BIG)
    with av.open(str(tmp_path / "out.mkv")) as container:
        first = next(container.decode(video=0))
    assert float(first.pts * first.time_base) == 5.0


def test_what_one_sampled_frame_shows_stays_for_half_the_way(tmp_path):
    source = write_clip(tmp_path / "clip.mkv", range(0, 2000, 50))
    metadata = sampled(source, 5)  # about every half second
    annotate_video(source, track(metadata, [(200, 500), None, (600, 500), None, None]), tmp_path / "out.mkv", BIG)
    times = metadata.source_timestamps
    middles = [(times[0] + times[1]) / 2, (times[1] + times[2]) / 2, (times[2] + times[3]) / 2]
    for time, image in frames_of(tmp_path / "out.mkv"):
        if time < middles[0]:
            assert centre(image) == pytest.approx((0.2, 0.5), abs=0.012)
        elif middles[1] <= time < middles[2]:
            assert centre(image) == pytest.approx((0.6, 0.5), abs=0.012)
        else:
            assert centre(image) is None


def test_points_do_not_move_between_frames():
    """Equal numbers in a pointing answer are not the same object."""
    about = {"fps": 1.0, "frames_indices": [0, 1, 2], "width": 100, "height": 100}
    text = '<points coords="0.0 1 200 200\t1.0 1 800 800">bird</points>'
    marks_at = MarksOverTime(parse_grounding(text, about), BIG)
    assert [(mark.x, mark.y) for mark in marks_at(0.4)] == [(0.2, 0.2)]
    assert [(mark.x, mark.y) for mark in marks_at(0.6)] == [(0.8, 0.8)]
    assert marks_at(1.6) == []


HALVES = {"fps": 2.0, "frames_indices": list(range(9)), "width": 100, "height": 100}  # sampled at 0.0, 0.5 ... 4.0 s


def seen_at(tracks, times):
    """x of the marks in hundredths at each time; the answer places its objects at {id: {seconds: x}}."""
    keys = sorted({key for places in tracks.values() for key in places})
    groups = [
        " ".join(
            [f"{key:.1f}", *(f"{number} {tracks[number][key]:03d} 500" for number in tracks if key in tracks[number])]
        )
        for key in keys
    ]
    coords = "\t".join(groups)
    marks_at = MarksOverTime(parse_grounding(f'<tracks coords="{coords}">bird</tracks>', HALVES), BIG)
    return [[round(100 * mark.x) for mark in marks_at(time)] for time in times]


@pytest.mark.parametrize(
    ("tracks", "times", "seen"),
    {
        "every other frame": (
            {1: {0.0: 100, 1.0: 300, 2.0: 500, 3.0: 100, 4.0: 100}},
            (0.0, 0.25, 0.5, 0.75, 1.5, 2.0, 2.5, 3.9),
            [[10], [15], [20], [25], [40], [50], [30], [10]],
        ),
        "up to an uneven end": ({1: {0.0: 100, 1.5: 400, 3.0: 700, 4.0: 900}}, (0.5, 2.0, 3.5), [[20], [50], [80]]),
        "a missing step": (
            {1: {0.0: 100, 1.0: 300, 3.0: 700, 4.0: 900}},
            (0.5, 1.4, 1.6, 2.4, 2.6),
            [[20], [30], [], [], [70]],
        ),
        "what others have": (
            {1: {0.0: 100, 2.0: 500, 3.0: 700}, 2: {0.0: 900, 1.0: 900, 2.0: 900, 3.0: 900}},
            (0.4, 0.6, 1.4, 1.6, 2.5),
            [[10, 90], [90], [90], [50, 90], [60, 90]],
        ),
        "behind the last": ({1: {0.0: 100, 1.0: 200, 2.0: 300}}, (2.4, 2.6), [[30], []]),
        "missing at the full rate": (
            {1: {0.0: 100, 0.5: 200, 1.5: 400, 2.0: 500}},
            (0.7, 0.8, 1.2, 1.3),
            [[20], [], [], [40]],
        ),
        "twice in one frame": (
            {1: {0.0: 100, 0.3: 900, 0.5: 300, 0.7: 900, 1.0: 400}},
            (0.0, 0.5, 1.0),
            [[10], [30], [40]],
        ),
    }.values(),
)
def test_tracks_move_at_the_rate_they_are_written_at(tracks, times, seen):
    """A sampled frame that the answer skips is not one that hides the object."""
    assert seen_at(tracks, times) == seen


def test_trails_reach_back_as_far_as_they_may():
    about = {"fps": 1.0, "frames_indices": [0, 1, 2, 3], "width": 100, "height": 100}
    text = '<tracks coords="0.0 1 100 500\t1.0 1 200 500\t2.0 1 300 500\t3.0 1 400 500">bird</tracks>'
    grounding = parse_grounding(text, about)
    (mark,) = MarksOverTime(grounding, DrawingStyle(trail_seconds=1.8))(2.5)
    assert mark.trail == ((0.2, 0.5), (0.3, 0.5))
    assert mark.x == pytest.approx(0.35)
    (mark,) = MarksOverTime(grounding, DrawingStyle(trail_seconds=0))(2.5)
    assert mark.trail == ()


def sound_of(path):
    """The packets, and the decoded sound, (samples,) float."""
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=16000)
        pieces = [piece for frame in container.decode(audio=0) for piece in resampler.resample(frame)]
    return packets, np.concatenate([piece.to_ndarray()[0] for piece in pieces])


def test_sound_is_copied_where_the_file_can_hold_it(tmp_path):
    source = write_clip(tmp_path / "clip.mp4", range(0, 2000, 40), sound="aac")
    result = annotate_video(source, track(sampled(source, 3), [(500, 500)] * 3), tmp_path / "out.mp4", BIG)
    assert result.audio == "copied"
    assert sound_of(tmp_path / "out.mp4")[0] == sound_of(source)[0]


def test_other_sound_is_encoded_anew(tmp_path):
    source = write_clip(tmp_path / "clip.mp4", range(0, 2000, 40), sound="aac")
    result = annotate_video(source, track(sampled(source, 3), [(500, 500)] * 3), tmp_path / "out.webm", BIG)
    assert result.audio == "encoded"
    before, after = sound_of(source)[1], sound_of(tmp_path / "out.webm")[1]
    assert abs(len(before) - len(after)) < 3000
    assert np.sqrt((after**2).mean()) == pytest.approx(np.sqrt((before**2).mean()), rel=0.1)


@pytest.mark.parametrize(
    ("codec", "rate", "suffixes", "new_rate"),
    [
        ("aac", 44100, "mp4 webm", 48000),
        ("aac", 22050, "mp4 webm", 48000),
        ("aac", 11025, "mp4 webm", 48000),
        ("pcm_s16le", 96000, "mov webm", 48000),
        ("adpcm_ms", 192000, "avi mp4", 96000),
        ("adpcm_ms", 22050, "avi mp4", 22050),
    ],
)
def test_sound_of_any_rate_is_encoded_anew(tmp_path, codec, rate, suffixes, new_rate):
    """Files with Opus name 48000, whatever the rate inside."""
    source, target = (tmp_path / f"clip.{suffix}" for suffix in suffixes.split())
    target = target.with_stem("out")
    write_clip(source, range(0, 400, 40), sound=codec, sound_rate=rate)
    assert annotated(source, target).audio == "encoded"
    with av.open(str(target)) as container:
        assert container.streams.audio[0].rate == new_rate
    before, after = sound_of(source)[1], sound_of(target)[1]
    assert abs(len(before) - len(after)) < 3000
    assert np.sqrt((after**2).mean()) == pytest.approx(np.sqrt((before**2).mean()), rel=0.15)


def annotated(source, target):
    return annotate_video(source, track(sampled(source, 2), [(500, 500)] * 2), target, BIG)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("new_suffix", ["mp4", "mkv", "webm"])
def test_every_frame_is_shown_as_long_as_in_the_source(tmp_path, suffix, new_suffix):
    """The last one too, which no other follows."""
    shown = {0: 100, 100: 400, 500: 500, 1000: 2000}
    source, target = tmp_path / f"clip.{suffix}", tmp_path / f"out.{new_suffix}"
    write_clip(source, shown, milliseconds_shown=shown, prepare=no_b_frames)
    annotated(source, target)
    for path in (source, target):
        with av.open(str(path)) as container:
            assert container.duration == 3_000_000
            ends = [(frame.pts + frame.duration) * frame.time_base for frame in container.decode(video=0)]
        assert [float(end) for end in ends] == [0.1, 0.5, 1.0, 3.0]


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_keep_their_shape(tmp_path, turned):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    source = write_clip(tmp_path / "clip.mp4", range(0, 200, 40), prepare=prepare)
    if turned:
        source = turn(source)
    annotated(source, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        shape = (stream.width, stream.height, stream.sample_aspect_ratio)
    assert shape == ((96, 160, Fraction(3, 4)) if turned else (160, 96, Fraction(4, 3)))


def turn(path):
    """The same file with the matrix of a phone that was held upright."""
    content = path.read_bytes()
    upright, turned = ((1, 0, 0, 0, 1, 0), (0, 1, 0, -1, 0, 0))
    box = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of flags, times and layers
    before, after = (struct.pack(">6i", *(number << 16 for number in matrix)) for matrix in (upright, turned))
    assert content[box : box + 24] == before
    path.write_bytes(content[:box] + after + content[box + 24 :])
    return path


# Matrix, primaries, transfer and range of ffmpeg, and Y, U, V of one colour in them.
COLORS = {
    "unspecified": ((2, 2, 2, 0), (100, 110, 180)),
    "BT.709": ((1, 1, 1, 1), (100, 110, 180)),
    "BT.601": ((5, 5, 6, 1), (100, 110, 180)),
    "BT.2020": ((9, 9, 14, 1), (100, 110, 180)),
    "full range": ((1, 1, 1, 2), (100, 110, 180)),
}


@pytest.mark.parametrize("name", COLORS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_colours_stay_what_they_are(tmp_path, name, suffix):
    (matrix, primaries, transfer, extent), levels = COLORS[name]

    def prepare(stream):
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, extent
        context.color_primaries, context.color_trc = primaries, transfer

    frame = av.VideoFrame(160, 96, "yuv420p")
    for plane, level in zip(frame.planes, levels, strict=True):
        plane.update(bytes([level]) * plane.buffer_size)
    source, target = tmp_path / "clip.mp4", tmp_path / f"out.{suffix}"
    write_clip(source, range(0, 200, 40), prepare=prepare, image=frame)
    annotated(source, target)
    with av.open(str(target)) as container:
        context = container.streams.video[0].codec_context
        shown = next(container.decode(video=0))
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
    assert tags == (matrix, primaries, transfer, min(extent, 1))
    if extent == 2:  # 0..255 becomes 16..235, and 1..255 around 128 becomes 16..240
        levels = [16 + levels[0] * 219 / 255, *(128 + (level - 128) * 224 / 255 for level in levels[1:])]
    for plane, level in zip(shown.planes, levels, strict=True):
        assert np.frombuffer(plane, np.uint8)[0] == pytest.approx(level, abs=2)


def test_raw_streams_are_shown_at_their_rate(tmp_path):
    source = write_clip(tmp_path / "clip.h264", range(0, 1200, 40), rate=25)
    annotate_video(source, track(sampled(source, 3), [(200, 500), (500, 500), (800, 500)]), tmp_path / "out.mp4", BIG)
    after = frames_of(tmp_path / "out.mp4")
    assert [time for time, _ in after] == pytest.approx([number / 25 for number in range(30)], abs=1e-3)
    assert centre(after[0][1])[0] == pytest.approx(0.2, abs=0.012)
    assert centre(after[-1][1])[0] == pytest.approx(0.8, abs=0.012)


def test_frames_of_avi_are_shown_in_order(tmp_path):
    """With B-frames, whose order on the screen this container does not store."""
    source = tmp_path / "clip.avi"
    write_clip(source, range(0, 1000, 50), rate=20, ticks=20)
    with av.open(str(source)) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert stamps != sorted(stamps)
    annotated(source, tmp_path / "out.mp4")
    times = [time for time, _ in frames_of(tmp_path / "out.mp4")]
    assert times == pytest.approx([number / 20 for number in range(20)], abs=1e-3)


def test_times_that_do_not_rise_are_refused(tmp_path):
    source, repeated = (
        write_clip(tmp_path / "clip.mkv", range(0, 400, 40), prepare=no_b_frames),
        tmp_path / "repeated.mkv",
    )
    grounding = track(sampled(source, 2), [(500, 500)] * 2)
    with av.open(str(source)) as reading, av.open(str(repeated), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for packet in reading.demux(video=0):
            if packet.size:
                packet.pts = packet.dts = 0 if packet.pts < 80 else packet.pts
                packet.stream = stream
                writing.mux(packet)
    with pytest.raises(ValueError, match=r"do not increase: frame 1 is at 0\.000 s"):
        annotate_video(repeated, grounding, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("size", [(33, 21), (2, 2)])
def test_odd_sizes_are_filled_up(tmp_path, size):
    source = REPOSITORY / "examples" / "data" / "nasa_clip.mp4"
    if size == (33, 21):
        with av.open(str(tmp_path / "odd.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = 33, 21, "bgr0"
            for _ in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((21, 33, 3), 90, np.uint8), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="bgr0")))
            container.mux(stream.encode(None))
        source = tmp_path / "odd.mkv"
    else:
        source = write_clip(tmp_path / "small.mp4", range(0, 400, 40), size=(16, 16))
    metadata = sampled(source, 2)
    annotate_video(source, track(metadata, [(500, 500)] * 2), tmp_path / "out.mp4", BIG)
    image = frames_of(tmp_path / "out.mp4")[0][1]
    assert image.shape == ((22, 34, 3) if size == (33, 21) else (16, 16, 3))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared media are not here")
@pytest.mark.parametrize("name", ["vfr.mp4", "start_at_5s.mkv", "video_90.mov", "flipping_a_pancake.mkv"])
def test_real_files(tmp_path, name):
    source = SHARED / name
    metadata = sampled(source, 3)
    result = annotate_video(source, track(metadata, [(500, 500)] * 3), tmp_path / "out.mp4", BIG)
    before, after = frames_of(source), frames_of(tmp_path / "out.mp4")
    assert len(before) == len(after) == result.num_frames
    np.testing.assert_allclose([time for time, _ in after], [time for time, _ in before], rtol=0, atol=1e-3)
    assert after[0][1].shape[:2] == tuple(side + side % 2 for side in (metadata.height, metadata.width))
    assert (result.audio == "copied") is (name == "flipping_a_pancake.mkv")


def test_nothing_is_left_behind_where_it_fails(tmp_path):
    source = write_clip(tmp_path / "clip.mp4", range(0, 400, 40))
    grounding = track(sampled(source, 2), [(500, 500)] * 2)
    (tmp_path / "out.mp4").write_bytes(b"before")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(av.error.FFmpegError):
        annotate_video(broken, grounding, tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.mp4", "clip.mp4", "out.mp4"]
    with pytest.raises(FileNotFoundError, match="no video file"):
        annotate_video(tmp_path / "none.mp4", grounding, tmp_path / "x.mp4")
    with pytest.raises(ValueError, match="is the source itself"):
        annotate_video(source, grounding, source)
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*none' to write 'x.mp4' to"):
        annotate_video(source, grounding, tmp_path / "none" / "x.mp4")
    with pytest.raises(TypeError, match="Points are drawn from a `Grounding`"):
        annotate_video(source, "cup", tmp_path / "x.mp4")
    with pytest.raises(TypeError, match="Points are drawn from a `Grounding`, after the image or video; found 'str'"):
        annotate_video(source, str(tmp_path / "x.mp4"), grounding)
    about_images = parse_grounding('<points coords="1 1 500 500">cup</points>', [(10, 10)])
    with pytest.raises(ValueError, match="about images, not a video"):
        annotate_video(source, about_images, tmp_path / "x.mp4")


def test_shown_in_notebooks(tmp_path):
    source = write_clip(tmp_path / "clip.mp4", range(0, 400, 40))
    result = annotate_video(source, track(sampled(source, 2), [(500, 500)] * 2), tmp_path / "out.mp4")
    assert result._repr_html_().startswith('<video controls loop width="640" src="data:video/mp4;base64,AAAA')


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        annotate_video(tmp_path / "clip.mp4", parse_grounding("There are none."), tmp_path / "out.mp4")
