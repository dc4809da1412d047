"""Decoding: the same frames at the same times from every backend, fallback, and what is refused."""

import importlib
import io
import json
import re
import shutil
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from molmo2.image.limits import MediaLimits
from molmo2.video.decoding import backends as decoding
from molmo2.video.decoding import decord_process
from molmo2.video.decoding import readers as readers_module
from molmo2.video.decoding.opening import open_video
from molmo2.video.decoding.orientation import mp4_tracks
from molmo2.video.decoding.readers import BACKENDS, Source, VideoReader
from molmo2.video.decoding.timeline import VideoDecodeError, VideoTimeline, make_timeline, undo_rounding
from support.golden_cases import GOLDEN
from support.paths import SHARED

CLIPS = Path(__file__).resolve().parent.parent / "data" / "videos"
EXPECTED = json.loads((CLIPS / "expected.json").read_text(encoding="utf-8"))
MEDIA = SHARED / "media"

# The measured difference between backends is 0; one grey level is left for other builds of ffmpeg.
PIXEL_TOLERANCE = 1


def loadable(backend):
    try:
        importlib.import_module({"decord": "decord", "torchcodec": "torchcodec.decoders", "pyav": "av"}[backend])
    except Exception:  # torchcodec raises OSError or RuntimeError where ffmpeg is missing
        return False
    return True


LOADABLE = [backend for backend in BACKENDS if loadable(backend)]
each_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=pytest.mark.skipif(b not in LOADABLE, reason=f"{b} cannot be loaded")) for b in BACKENDS],
)
needs_pyav = pytest.mark.skipif("pyav" not in LOADABLE, reason="needs PyAV")
needs_decord = pytest.mark.skipif("decord" not in LOADABLE, reason="needs decord")

# What a backend cannot read, with the reason it gives; everything else is read by all of them.
REFUSED = {
    ("odd_aspect_16x200.mp4", "decord"): r"shape \(200, 16, \d+\), expected \(height, width, 3\)",
    ("corrupted.mp4", "decord"): r"frame \d+ of 50",
    ("corrupted.mp4", "torchcodec"): r"frame 28 of 50 \(2\.800 s\) cannot be decoded",
    ("corrupted.mp4", "pyav"): r"frame 28 of 50 \(2\.800 s\) cannot be decoded",
    ("audio_only.mp4", "decord"): "cannot find video stream",
    ("audio_only.mp4", "torchcodec"): "no specified stream",
    ("audio_only.mp4", "pyav"): "no video track",
    ("nasa_audio_only.mp3", "decord"): "cannot find video stream",
    ("nasa_audio_only.mp3", "torchcodec"): "no specified stream",
    ("nasa_audio_only.mp3", "pyav"): "no video track",
    ("truncated_nasa.mp4", "decord"): "Error reading",
    ("truncated_nasa.mp4", "torchcodec"): "Could not open input file",
    ("truncated_nasa.mp4", "pyav"): "Invalid data found",
}


def read_all(source, backend=None):
    """Timeline and all frames; (N,) list of images."""
    with open_video(source, backend) as reader:
        return reader.timeline, list(reader.frames(range(reader.timeline.num_frames)))


def decode_video(source, read, backend=None):
    def read_and_close(reader):
        with reader:
            return read(reader)

    return decoding.decode_video(Source.from_input(source, MediaLimits()), read_and_close, backend)


def largest_difference(frames, others):
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(frames, others, strict=True))


def assert_same_video(actual, expected):
    (timeline, frames), (other_timeline, other_frames) = actual, expected
    assert timeline.start_seconds.tolist() == other_timeline.start_seconds.tolist()
    for name in ("duration_seconds", "fps", "height", "width"):
        assert getattr(timeline, name) == getattr(other_timeline, name), name
    assert largest_difference(frames, other_frames) <= PIXEL_TOLERANCE


# --- clips in the repository -----------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("name", EXPECTED)
def test_recorded_clip(name, backend):
    if (name, backend) in REFUSED:
        with pytest.raises(VideoDecodeError, match=REFUSED[name, backend]):
            read_all(CLIPS / name, backend)
        return
    timeline, frames = read_all(CLIPS / name, backend)
    expected = EXPECTED[name]
    assert timeline.start_seconds.dtype == np.float64
    np.testing.assert_allclose(timeline.start_seconds, expected["start_seconds"], rtol=0, atol=1e-12)
    assert timeline.duration_seconds == pytest.approx(expected["duration_seconds"], abs=1e-12)
    for rgb in frames:
        assert rgb.dtype == np.uint8
        assert rgb.shape == (expected["height"], expected["width"], 3) == (timeline.height, timeline.width, 3)
    means = [rgb.mean(axis=(0, 1)) for rgb in frames]
    np.testing.assert_allclose(means, expected["mean_rgb"], rtol=0, atol=0.5)


@pytest.mark.parametrize("name", EXPECTED)
def test_some_backend_reads_every_clip(name):
    timeline, frames = read_all(CLIPS / name)
    assert len(frames) == timeline.num_frames == len(EXPECTED[name]["mean_rgb"])


@each_backend
@pytest.mark.parametrize("name", ["h265_video.mp4", "vfr.mp4", "unordered.mov"])
def test_any_frames_in_any_order(name, backend):
    with open_video(CLIPS / name, backend) as reader:
        count = reader.timeline.num_frames
        frames = list(reader.frames(range(count)))
        for indices in ([count - 1], [0, count - 1], [2, 2, 3, 3, 3], [3, 0, 2, 0], list(range(count))[::-1], []):
            got = list(reader.frames(indices))
            assert len(got) == len(indices)
            for rgb, index in zip(got, indices, strict=True):
                np.testing.assert_array_equal(rgb, frames[index])


@each_backend
def test_sources(backend, tmp_path):
    file = CLIPS / "start_offset.mp4"
    expected = read_all(file, backend)
    assert_same_video(read_all(str(file), backend), expected)
    assert_same_video(read_all(file.read_bytes(), backend), expected)
    with file.open("rb") as opened:
        opened.read(10)  # not at its beginning
        assert_same_video(read_all(opened, backend), expected)
    odd_name = tmp_path / "http:a b#%20ü.mp4"
    shutil.copy(file, odd_name)
    assert_same_video(read_all(odd_name, backend), expected)


def write_avi(path, codec, b_frames):
    """20 frames of 64 x 64 pixels, each by 12 grey levels brighter than the one before."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=20, options={"bf": b_frames, "g": "12", "b_strategy": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt, stream.bit_rate = "yuv420p", 1_000_000
        for index in range(20):
            image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 12 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.has_b_frames == (b_frames != "0")


@each_backend
@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_b_frames_in_avi(backend, tmp_path, codec, b_frames):
    """The container does not store their order on the screen; ffmpeg derives it for MPEG-4, not for H.264."""
    path = tmp_path / "clip.avi"
    write_avi(path, codec, b_frames)
    refused = {
        "decord": (codec, b_frames) != ("mpeg4", "0") and "shows no frames|frame times are unusable",
        "torchcodec": codec == "libx264" and "does not store the order of B-frames",
    }.get(backend)
    if refused:
        with pytest.raises(VideoDecodeError, match=refused):
            read_all(path, backend)
        return
    timeline, frames = read_all(path, backend)
    np.testing.assert_allclose(timeline.start_seconds, np.arange(20) / 20, rtol=0, atol=1e-9)
    grey_levels = np.array([frame.mean() for frame in frames])
    assert np.abs(grey_levels - 12 * np.arange(20)).max() < 6  # half of a step; the rest is lost in encoding
    with open_video(path, backend) as reader:
        for indices in ([19], [3, 17], [8, 2]):
            for index, frame in zip(indices, reader.frames(indices), strict=True):
                np.testing.assert_array_equal(frame, frames[index])


@needs_pyav
def test_counted_frames_are_all_there(tmp_path):
    """Those after a missing frame would have the times of others."""
    import av

    whole, cut = tmp_path / "whole.avi", tmp_path / "cut.avi"
    write_avi(whole, "libx264", "2")
    with av.open(str(whole)) as reading, av.open(str(cut), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for packet in list(reading.demux(video=0))[1:]:  # without the first key frame
            if packet.size:
                packet.stream = stream
                writing.mux(packet)
    with pytest.raises(VideoDecodeError, match=r"\d+ of 19 frames can be decoded, and nothing tells which"):
        read_all(cut, "pyav")


@each_backend
def test_late_start_is_told_where_known(backend):
    with open_video(CLIPS / "start_offset.mp4", backend) as reader:
        assert reader.timeline.start_seconds[0] == 0
        assert reader.timeline.first_timestamp_seconds == (None if backend == "decord" else 1.5)


@each_backend
def test_frame_outside_the_video(backend):
    with open_video(CLIPS / "unordered.mov", backend) as reader:
        for index in (4, -1):
            with pytest.raises(IndexError, match=rf"Frame {index} of '.*unordered.mov' .* has frames 0 to 3"):
                list(reader.frames([0, index]))


# --- timelines -------------------------------------------------------------------------------------------------------


def test_the_frame_on_display_is_the_last_one_that_has_begun():
    timeline = VideoTimeline(np.array([0.0, 0.1, 0.3]), duration_seconds=0.4, fps=7.5, height=2, width=2)
    indices = timeline.frames_at([0.0, 0.0999999999, 0.1, 0.2, 0.3, 0.4, 9.0])
    assert indices.dtype == np.int64
    assert indices.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert timeline.num_frames == 3


def test_constant_rate_undoes_rounding():
    exact = np.arange(76) * 1001 / 30000
    rounded = exact.astype(np.float32).astype(np.float64)
    assert np.any(rounded != exact)
    timeline = make_timeline(rounded[:-1].copy(), float(rounded[-1]), 29.97002997, (2, 2))
    assert timeline.start_seconds.tolist() == exact[:-1].tolist()
    assert timeline.duration_seconds == exact[-1]
    held = make_timeline(rounded[:-1].copy(), 9.0, 29.97002997, (2, 2))  # the last frame stays on
    assert held.start_seconds.tolist() == exact[:-1].tolist()
    assert held.duration_seconds == 9.0


def test_variable_rate_keeps_its_times_and_averages_its_rate():
    starts = np.array([0.0, 0.033, 0.067, 0.5])
    timeline = make_timeline(starts.copy(), 0.8, 2000.0, (2, 2))
    assert timeline.start_seconds.tolist() == starts.tolist()
    assert timeline.fps == pytest.approx(4 / 0.8)


def test_ticks_of_containers_are_restored():
    for ticks_per_second, ticks in ((1000, [0, 33, 67, 5700]), (16000, [0, 1440, 11040, 101264])):
        exact = np.array(ticks) / ticks_per_second
        assert undo_rounding(exact.astype(np.float32).astype(np.float64)).tolist() == exact.tolist()
    off_ticks = np.array([0.0, 0.1234567])
    assert undo_rounding(off_ticks).tolist() == off_ticks.tolist()


@pytest.mark.parametrize(
    ("starts", "end"), [([0.0, 0.2, 0.1], 0.3), ([0.0, np.nan], 0.3), ([0.1, 0.2], 0.3), ([0.0, 0.2], 0.1)]
)
def test_impossible_times_are_refused(starts, end):
    with pytest.raises(VideoDecodeError, match="frame times are unusable"):
        make_timeline(np.array(starts), end, 10.0, (2, 2))


# --- files that are hard to read -------------------------------------------------------------------------------------


def numbered_frames(count, height=96, width=128):
    """Images that show their number in binary, as eight black or white squares in the first row."""
    for number in range(count):
        rgb = np.full((height, width, 3), (number * 7 % 200, 90, 60), np.uint8)
        for bit in range(8):
            rgb[:16, bit * 16 : (bit + 1) * 16] = 255 * (number >> bit & 1)
        yield rgb


def number_on(rgb):
    return sum(int(rgb[4:12, bit * 16 + 4 : bit * 16 + 12].mean() > 127) << bit for bit in range(8))


def encode(path, codec, *, count=48, fps=10, options=None, container=None, cut_seconds=0):
    """Writes `count` numbered images; `cut_seconds` of them lie before the beginning, behind an edit list."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=container or {}) as output:
        try:
            stream = output.add_stream(codec, rate=fps, options=options or {})
        except ValueError:
            pytest.skip(f"this build of PyAV has no encoder {codec}")
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        packets = []
        for number, rgb in enumerate(numbered_frames(count)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            packets += stream.encode(frame)
        for packet in packets + stream.encode(None):
            shift = int(cut_seconds / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            output.mux(packet)
    return path


OPEN_GROUPS = "open-gop=1:bframes=3:scenecut=0"
HARD_FILES = {
    "open_groups.mp4": {"codec": "libx264", "options": {"g": "12", "x264-params": OPEN_GROUPS}},
    "transport_stream.ts": {"codec": "libx264", "options": {"g": "12"}, "fps": 25},
    "fragmented.mp4": {
        "codec": "libx264",
        "options": {"g": "12"},
        "container": {"movflags": "frag_keyframe+empty_moov"},
    },
    "edit_list.mp4": {
        "codec": "libx264",
        "options": {"g": "10"},
        "container": {"avoid_negative_ts": "disabled", "use_editlist": "1"},
        "cut_seconds": 1.3,
    },
    "b_frames.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "program_stream.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}, "fps": 25},
    "no_time_stamps.h264": {"codec": "libx264", "options": {"g": "12"}},
    "milliseconds.mkv": {"codec": "mpeg4", "options": {"g": "12"}, "fps": 30},
}


@needs_pyav
@pytest.mark.parametrize("name", HARD_FILES)
def test_hard_files_give_every_frame_or_an_error(name, tmp_path):
    file = encode(tmp_path / name, **HARD_FILES[name])
    first = 13 if name == "edit_list.mp4" else 0
    timeline, frames = read_all(file, "pyav")
    assert [number_on(rgb) for rgb in frames] == list(range(first, 48))
    sparse = [1, 20, timeline.num_frames - 1]
    with open_video(file, "pyav") as reader:
        assert [number_on(rgb) for rgb in reader.frames(sparse)] == [first + index for index in sparse]

    for backend in set(LOADABLE) - {"pyav"}:
        try:
            other = read_all(file, backend)
        except VideoDecodeError:
            continue  # refused, which is what the fallback is for; what is not refused has to be right
        assert_same_video(other, (timeline, frames))

    def numbers(reader):
        return [number_on(rgb) for rgb in reader.frames(range(reader.timeline.num_frames))]

    assert decode_video(file, numbers) == list(range(first, 48))


@needs_pyav
def test_pyav_jumps_over_long_gaps(tmp_path, monkeypatch):
    file = encode(tmp_path / "long.mp4", "libx264", count=240, options={"g": "12", "x264-params": OPEN_GROUPS})
    decoded = []
    to_start = readers_module._PyavReader._packets_from

    def watched(self, place):
        for packet in to_start(self, place):
            decoded.append(packet.pts)
            yield packet

    with open_video(file, "pyav") as reader:
        monkeypatch.setattr(readers_module._PyavReader, "_packets_from", watched)
        assert [number_on(rgb) for rgb in reader.frames([5, 100, 101, 230])] == [5, 100, 101, 230]
    assert len(decoded) < 140  # of 240; decoders read ahead


@needs_pyav
def test_pyav_starts_again_where_a_key_frame_was_none(tmp_path, monkeypatch):
    file = encode(tmp_path / "long.mp4", "libx264", count=96, options={"g": "48"})
    with open_video(file, "pyav") as reader:
        wrong = reader._packets.place_of(reader._packets.stamp_of(80)) + 2  # a packet that cannot be decoded by itself
        monkeypatch.setattr(readers_module._PacketTable, "key_before", lambda self, index: wrong if index > 70 else 0)
        assert [number_on(rgb) for rgb in reader.frames([3, 80])] == [3, 80]


# --- the table of packets --------------------------------------------------------------------------------------------


def packet_table(shown_at, decoded_at=None, hidden=(), tick=Fraction(1, 12800)):
    """The table of packets with these time stamps in file order, every tenth of them a key frame."""
    stream = SimpleNamespace(time_base=tick, average_rate=None)
    packets = (
        SimpleNamespace(
            size=1, pts=pts, dts=dts, is_keyframe=place % 10 == 0, is_discard=place in hidden, duration=512
        )
        for place, (pts, dts) in enumerate(zip(shown_at, decoded_at or shown_at, strict=True))
    )
    return readers_module._PacketTable.from_packets(stream, packets)


@pytest.mark.parametrize("origin", [0, -1024, 1 << 40, -(1 << 62)])
@pytest.mark.parametrize("step", [512, 1 << 28], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 3, 1, 2]], ids=["as shown", "as decoded"])
@pytest.mark.parametrize("hidden", [(), (0, 1, 5)], ids=["all", "cut"])
def test_packets_are_found_by_their_time_stamps(origin, step, order, hidden):
    shown_at = [origin + step * (group + place) for group in range(0, 200, 4) for place in order]
    table = packet_table(shown_at, sorted(shown_at), hidden)
    assert table.file_stamps.dtype == (np.int32 if step == 512 else np.int64)
    assert [table.place_of(stamp) for stamp in shown_at] == list(range(200))
    assert [table.stamp_at(place) for place in range(200)] == shown_at
    strangers = (None, origin - 1, origin + 1, shown_at[-1] + 2 * step, -(1 << 63), (1 << 63) - 1)
    assert [table.place_of(stamp) for stamp in strangers] == [-1] * len(strangers)
    visible = sorted(stamp for place, stamp in enumerate(shown_at) if place not in hidden)
    assert [table.stamp_of(index) for index in range(len(visible))] == visible
    assert [table.num_until(stamp) for stamp in (visible[0] - 1, visible[7], visible[-1])] == [0, 8, len(visible)]
    for index in (0, 3, 50, len(visible) - 1):
        earlier = [
            p for p in range(0, 200, 10) if p <= shown_at.index(visible[index]) and shown_at[p] <= visible[index]
        ]
        assert table.key_before(index) == max(earlier, default=0)
    starts = table.timeline((2, 2)).start_seconds
    np.testing.assert_allclose(starts, [(stamp - visible[0]) / 12800 for stamp in visible], rtol=1e-12)


def test_of_two_packets_with_one_time_stamp_the_first_is_found():
    table = packet_table([0, 1024, 512, 512, 1536], [0, 1, 2, 3, 4])
    assert (table.place_of(512), table.num_until(1536)) == (2, 4)


@pytest.mark.parametrize(
    ("decoded_at", "problem"),
    [
        ([0, 512, None, 0, 512], "restart at frame 3 of 5 \\(0.000 s after 0.040 s\\)"),  # frames hide each other
        ([0, 51200, 50000, None, 0], "restart at frame 4 of 5 \\(0.000 s after 3.906 s\\)"),
        ([0, 51200, 50000, 50512, 51024], None),  # less than a second back, and no frame is lost
    ],
)
def test_joined_recordings_show_in_their_time_stamps(decoded_at, problem):
    shown_at = [0, 512, 1024, 512, 1536] if decoded_at[1] == 512 else [0, 512, 1024, 1536, 2048]
    if problem is None:
        assert packet_table(shown_at, decoded_at).num_until(2048) == 5
    else:
        with pytest.raises(VideoDecodeError, match=problem):
            packet_table(shown_at, decoded_at)


def test_a_table_of_hours_takes_few_bytes_a_frame():
    """Twelve stay and few more for a moment; FFmpeg's own table has three times as many."""
    count = 100_000
    tracemalloc.start()
    try:
        table = packet_table(range(0, 512 * count, 512))
        timeline = table.timeline((2, 2))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert timeline.num_frames == count
    assert timeline.start_seconds[-1] == (count - 1) / 25
    assert kept / count < 14
    assert peak / count < 24


# --- fallback --------------------------------------------------------------------------------------------------------


class FakeReader(VideoReader):
    """Reads four grey frames; fails where its class says."""

    opening_error = None
    first_bad_frame = 99

    def __init__(self, source, only_choice):
        super().__init__(source)
        if self.opening_error is not None:
            raise self._error(self.opening_error)
        self.timeline = VideoTimeline(np.arange(4) / 10, 0.4, 10.0, 2, 2)

    def close(self):
        pass

    def _decode(self, indices):
        for index in indices:
            if index >= self.first_bad_frame:
                raise self._frame_error(index, "damaged")
            yield np.full((2, 2, 3), index, np.uint8)


@pytest.fixture
def fake_backends(monkeypatch):
    def install(**behaviours):
        readers = {name: type(name, (FakeReader,), {"backend": name, **behaviours.get(name, {})}) for name in BACKENDS}
        monkeypatch.setattr(decoding, "READERS", readers)

    return install


def backend_and_numbers(reader):
    return reader.backend, [int(rgb[0, 0, 0]) for rgb in reader.frames([0, 1, 3])]


def test_backends_are_tried_in_order(fake_backends):
    fake_backends()
    assert BACKENDS == ("decord", "torchcodec", "pyav")
    assert decode_video(b"\0video", backend_and_numbers) == ("decord", [0, 1, 3])
    assert decode_video(b"\0video", backend_and_numbers, backend="pyav") == ("pyav", [0, 1, 3])


def test_failures_at_opening_and_on_the_way_move_on(fake_backends):
    fake_backends(decord={"opening_error": "no"}, torchcodec={"first_bad_frame": 3})
    assert decode_video(b"\0video", backend_and_numbers) == ("pyav", [0, 1, 3])
    assert open_video(b"\0video").backend == "torchcodec"


def test_all_reasons_are_listed(fake_backends):
    fake_backends(
        decord={"opening_error": "no such thing"}, torchcodec={"first_bad_frame": 1}, pyav={"first_bad_frame": 3}
    )
    with pytest.raises(VideoDecodeError) as caught:
        decode_video(b"\0video", backend_and_numbers)
    assert str(caught.value).splitlines()[:4] == [
        "No video backend could read a video of 6 bytes:",
        "  decord: no such thing",
        "  torchcodec: frame 1 of 4 (0.100 s) cannot be decoded: damaged",
        "  pyav: frame 3 of 4 (0.300 s) cannot be decoded: damaged",
    ]
    assert "decord2, torchcodec, av" in str(caught.value)


def test_a_forced_backend_is_the_only_one(fake_backends):
    fake_backends(decord={"opening_error": "no"})
    with pytest.raises(VideoDecodeError, match="decord: no") as caught:
        decode_video(b"\0video", backend_and_numbers, backend="decord")
    assert "pyav:" not in str(caught.value)


def test_errors_of_the_caller_pass_through(fake_backends):
    fake_backends()
    with pytest.raises(ZeroDivisionError):
        decode_video(b"\0video", lambda reader: 1 / 0)


@pytest.mark.parametrize("backend", ["opencv", "", 3, [], ["pyav", "opencv"], [["pyav"]], [None]], ids=repr)
def test_unknown_backend(backend):
    message = rf"Unknown video backend {re.escape(repr(backend))}\. Use one of decord, torchcodec, pyav"
    with pytest.raises(ValueError, match=message):
        open_video(CLIPS / "vfr.mp4", backend)


INSTALLED = "It is installed, but does not start: fix the error that is named here, or uninstall it."


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ModuleNotFoundError("No module named", name="{package}"), "Install it with `pip install {package}`."),
        (ModuleNotFoundError("No module named 'numpy'", name="numpy"), INSTALLED),
        (ImportError("gone"), INSTALLED),
        (OSError("libavutil.so.60"), INSTALLED),
        (RuntimeError("no ffmpeg"), INSTALLED),
    ],
    ids=["absent", "without another package", "import", "library", "ffmpeg"],
)
def test_a_backend_that_cannot_be_loaded_is_passed_over(error, advice, monkeypatch):
    """The advice fits: what is installed and does not start is not to be installed again."""

    def fail(name):
        if getattr(error, "name", None) == "{package}":
            raise ModuleNotFoundError("No module named", name=name.partition(".")[0])
        raise error

    monkeypatch.setattr(readers_module.importlib, "import_module", fail)
    monkeypatch.setattr(decord_process.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(decord_process.DecordProcess, "_idle", [])
    with pytest.raises(VideoDecodeError) as caught:
        open_video(CLIPS / "vfr.mp4")
    assert "decord cannot be loaded (there is no such package). Install it with `pip install decord2`." in str(
        caught.value
    )
    for backend, package in (("torchcodec", "torchcodec"), ("pyav", "av")):
        reason = f"{backend}: {backend} cannot be loaded ({type(error).__name__}: {error}). "
        assert reason + advice.format(package=package) in str(caught.value)


def test_decord_that_does_not_start_is_not_to_be_installed(tmp_path, monkeypatch):
    (tmp_path / "decord.py").write_text("raise OSError('libdecord.so: no such file')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(decord_process.DecordProcess, "_idle", [])
    with pytest.raises(VideoDecodeError) as caught:
        open_video(CLIPS / "vfr.mp4", "decord")
    assert f"decord cannot be loaded (OSError: libdecord.so: no such file). {INSTALLED}" in str(caught.value)


@needs_decord
def test_decord_leaves_large_clips_to_others(monkeypatch):
    monkeypatch.setattr(readers_module, "MAX_DECORD_PIXELS", 3)
    file = CLIPS / "unordered.mov"
    if len(LOADABLE) > 1:
        with open_video(file) as reader:
            assert reader.backend != "decord"
    with open_video(file, "decord") as reader:  # unless told to
        assert reader.backend == "decord"
    monkeypatch.setattr(readers_module, "_others_usable", lambda: False)
    with open_video(file) as reader:  # or alone
        assert reader.backend == "decord"


def box(kind, *content, is_large=False):
    inner = b"".join(content)
    if is_large:
        return struct.pack(">I4sQ", 1, kind, len(inner) + 16) + inner
    return struct.pack(">I4s", len(inner) + 8, kind) + inner


def mp4_track(num_frames, size=(100, 50), *, version=0, sizes=b"stsz", handlers=(b"vide",), turn=(1, 0, 0, 1)):
    """A track of an MP4 file, as far as it is read: `size` is (width, height)."""
    a, b, c, d = (value << 16 for value in turn)
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    ends = struct.pack(">2I", *(value << 16 for value in size))
    header = box(b"tkhd", bytes([version]), bytes(51 if version else 39), matrix, ends)
    table = box(b"stbl", box(b"stsd", bytes(8)), box(sizes, bytes(8), struct.pack(">I", num_frames)))
    media = [box(b"hdlr", bytes(8), handler) for handler in handlers]
    return box(b"trak", header, box(b"mdia", *media, box(b"minf", box(b"vmhd"), table)))


@pytest.mark.parametrize(
    ("tracks", "num_pixels"),
    [
        ([mp4_track(3)], [15_000]),
        ([mp4_track(3, version=1)], [15_000]),
        ([mp4_track(3, sizes=b"stz2")], [15_000]),
        ([mp4_track(2**32 - 1, (65_535, 65_535))], [(2**32 - 1) * 65_535**2]),
        ([mp4_track(7, handlers=(b"soun",)), mp4_track(2), mp4_track(4, (10, 10))], [10_000, 400]),
        ([mp4_track(3, handlers=(b"vide", b"mdta"))], [15_000]),
        ([mp4_track(0)], [0]),  # fragmented: the fragments have the frames
        ([mp4_track(3)[:60]], []),  # cut off
    ],
)
@pytest.mark.parametrize("is_large", [False, True])
def test_what_an_mp4_file_says_of_its_tracks(tmp_path, tracks, num_pixels, is_large):
    file = tmp_path / "a.mp4"
    file.write_bytes(box(b"ftyp", b"isom") + box(b"moov", *tracks, is_large=is_large))
    assert [track.num_pixels for track in mp4_tracks(str(file))] == pytest.approx(num_pixels)


def test_mirrored_tracks_and_boxes_in_boxes(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_bytes(box(b"ftyp", b"isom") + box(b"moov", mp4_track(1, turn=(-1, 0, 0, 1))))
    assert [track.matrix for track in mp4_tracks(str(file))] == [(-1, 0, 0, 1)]
    nested = b""
    for _ in range(3000):
        nested = box(b"stbl", nested)
    trak = box(b"trak", box(b"mdia", box(b"hdlr", bytes(8), b"vide"), box(b"minf", nested)))
    file.write_bytes(box(b"ftyp", b"isom") + box(b"moov", trak))
    assert mp4_tracks(str(file)) == []


@needs_decord
def test_no_process_is_started_for_a_long_mp4(monkeypatch):
    if LOADABLE == ["decord"]:
        pytest.skip("needs a second backend")
    monkeypatch.setattr(readers_module, "MAX_DECORD_PIXELS", 3)
    monkeypatch.setattr(readers_module.DecordProcess, "borrow", lambda: pytest.fail("decord was asked"))
    with open_video(CLIPS / "unordered.mov") as reader:
        assert reader.backend != "decord"


@needs_decord
def test_narrow_video_is_read_by_another_backend():
    if LOADABLE == ["decord"]:
        pytest.skip("needs a second backend")
    with open_video(CLIPS / "odd_aspect_16x200.mp4") as reader:
        assert reader.backend != "decord"
        assert next(iter(reader.frames([0]))).shape == (200, 16, 3)


# --- what is no video ------------------------------------------------------------------------------------------------


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no video file '.*gone\.mp4'\. Check the path"):
        open_video(tmp_path / "gone.mp4")
    with pytest.raises(IsADirectoryError, match=r"is a directory\. Pass a video file, or a list"):
        open_video(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "empty.mp4").touch()
    for source in (tmp_path / "empty.mp4", b"", io.BytesIO()):
        with pytest.raises(VideoDecodeError, match=r"is empty \(0 bytes\)"):
            open_video(source)


def test_not_a_source():
    with pytest.raises(TypeError, match="A video is a path, bytes or a file object, not int"):
        open_video(3)


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.gif"])
def test_images_are_refused(name, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / name)
    with pytest.raises(VideoDecodeError, match=rf"{name}' is an image \((PNG|JPEG|GIF)\), not a video"):
        open_video(tmp_path / name)


@each_backend
def test_animated_gif_is_a_video(backend):
    timeline, frames = read_all(GOLDEN / "media" / "anim.gif", backend)
    assert timeline.num_frames == len(frames) == 3
    assert timeline.duration_seconds == pytest.approx(0.3)


def test_garbage(tmp_path):
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(VideoDecodeError, match=r"No video backend could read '.*noise.mp4':\n  decord: "):
        open_video(tmp_path / "noise.mp4")


# --- the larger collection beside the checkout -----------------------------------------------------------------------


def collection():
    folders = (MEDIA, GOLDEN / "media")
    suffixes = (".mp4", ".mkv", ".mov", ".mp3", ".gif")
    return sorted(
        file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.suffix in suffixes
    )


@pytest.mark.parametrize("file", collection(), ids=lambda file: file.name)
def test_collection_is_the_same_on_every_backend(file):
    """All frames in one go, and single ones, for which a backend may have to seek."""
    expected = None
    for backend in reversed(LOADABLE):
        if (file.name, backend) in REFUSED:
            with pytest.raises(VideoDecodeError, match=REFUSED[file.name, backend]):
                read_all(file, backend)
            continue
        video = read_all(file, backend)
        expected = video if expected is None else expected
        assert_same_video(video, expected)
        timeline, frames = video
        few = np.linspace(0, timeline.num_frames - 1, 4).astype(int).tolist()
        with open_video(file, backend) as reader:
            for index, rgb in zip(few, reader.frames(few), strict=True):
                np.testing.assert_array_equal(rgb, frames[index])


@pytest.mark.skipif(not MEDIA.is_dir(), reason="the reference data beside the checkout is not there")
def test_frames_before_the_damage_can_be_had():
    frames = decode_video(MEDIA / "corrupted.mp4", lambda reader: list(reader.frames([0, 27])))
    assert [frame.shape for frame in frames] == [(720, 1280, 3)] * 2
    with pytest.raises(VideoDecodeError, match=r"(?s)corrupted.mp4.*pyav: frame 28 of 50 "):
        decode_video(MEDIA / "corrupted.mp4", lambda reader: list(reader.frames([0, 49])))
