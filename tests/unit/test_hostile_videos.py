"""Videos made to end, stop or mislead a decoder: the process lives, and backends agree or refuse."""

import base64
import inspect
import io
import os
import re
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo2.image.limits import MediaLimitError, MediaLimits
from molmo2.image.loading import load_images
from molmo2.video.decoding import decord_process, readers
from molmo2.video.decoding.decord_process import DecordProcess
from molmo2.video.decoding.opening import open_video
from molmo2.video.decoding.timeline import VideoDecodeError
from molmo2.video.processing import Molmo2VideoProcessor
from support.clips import load_video
from support.hostile_media import (
    ROTATIONS,
    clip,
    mutated,
    patched,
    with_far_offset,
    with_frame_count,
    with_matrix,
)

pytest.importorskip("decord")
GIVEN = Path(__file__).resolve().parents[3] / "shared" / "hostile" / "media"
# Given file -> number of its frames and their duration by every backend that reads it, or what is said instead.
GIVEN_VIDEOS = {
    "decord_abort.avi": (9, 0.9),
    # decord's thread may meet the damage before the first frame was asked for, then the file does not open.
    "decord_memory.mkv": "cannot be decoded|decord: DECORDError: Check failed: avcodec_send_packet",
    "flash.flv": (16, 1.6),
    "gif_bomb_frames.gif": "video_frame_pixels=36,000,000",
    "gif_screen.gif": "video_frame_pixels=36,000,000",
    "h264.ts": (16, 1.6),
    "hflip.mp4": (75, 3.0),
    "multi.webp": (6, 0.6),
    "png_170mpx_1bit.png": "video_frame_pixels=36,000,000",
    "png_empty_170.png": "video_frame_pixels=36,000,000",
    "postscript_as_picture.png": "is a text, not a video",
    "sizes.ts": (24, 2.4),
    "stco_far.mp4": "No video backend could read",
    "stts_2e9.mp4": (16, 1.6),
    "tiff_bomb.tiff": "video_frame_pixels=36,000,000",
    "tkhd_flip.mp4": (16, 1.6),
    "tkhd_matrix0.mp4": (16, 1.6),
    "transp.mp4": (75, 3.0),
    "ts_restart.ts": "its time stamps restart at frame|its frame times are unusable",
    "vflip.mp4": (75, 3.0),
    "webp_16383.webp": "video_frame_pixels=36,000,000",
}
GIVEN_BOMBS = ("gif_screen.gif", "png_170mpx_1bit.png", "png_empty_170.png", "tiff_bomb.tiff", "webp_16383.webp")


def ways_in(content, tmp_path):
    """A path, bytes, an open file and a data URL."""
    file = tmp_path / "clip"
    file.write_bytes(content)
    return file, content, io.BytesIO(content), "data:video/mp4;base64," + base64.b64encode(content).decode()


def all_frames(content, backend):
    with open_video(content, backend) as reader:
        return list(reader.frames(range(reader.timeline.num_frames))), reader.timeline


@pytest.mark.parametrize("name", GIVEN_VIDEOS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_given_files(name):
    """By path and as bytes: what a backend reads, all read alike, and what none reads is refused by its reason."""
    if not GIVEN.is_dir():
        pytest.skip("shared/hostile is not beside this checkout")
    file, expected, shown, said = GIVEN / name, GIVEN_VIDEOS[name], [], []
    for source in (file, file.read_bytes()):
        for backend in ("decord", "pyav", None):
            try:
                frames, timeline = all_frames(source, backend)
            except (VideoDecodeError, MediaLimitError) as error:
                said.append(str(error))
                continue
            assert (timeline.num_frames, round(timeline.duration_seconds, 3)) == expected
            shown.append(np.stack(frames))
    assert shown or all(re.search(expected, message) for message in said)
    for frames in shown[1:]:
        np.testing.assert_array_equal(frames, shown[0])


@pytest.mark.parametrize("name", [*GIVEN_BOMBS, "postscript_as_picture.png"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_given_files_as_images(name):
    if not GIVEN.is_dir():
        pytest.skip("shared/hostile is not beside this checkout")
    said = "image_pixels=100,000,000" if name in GIVEN_BOMBS else "one of the formats PNG, JPEG"
    with pytest.raises(ValueError, match=said):
        load_images(GIVEN / name)


def test_every_given_file_has_its_row():
    if not GIVEN.is_dir():
        pytest.skip("shared/hostile is not beside this checkout")
    assert {path.name for path in GIVEN.iterdir()} == GIVEN_VIDEOS.keys()


@pytest.mark.parametrize("content", [with_frame_count(clip(kind), 2**31 - 1) for kind in ("mp4", "avi")])
def test_a_frame_count_that_ends_decord(content, tmp_path):
    with pytest.raises(VideoDecodeError, match="decord: decord's process ended with signal 6"):
        open_video(content, "decord")
    expected = all_frames(content, "pyav")[0]
    for way in ways_in(content, tmp_path)[:2]:
        frames, metadata = load_video(way, num_frames=12, max_fps=None)
        assert metadata.video_backend != "decord"
        np.testing.assert_array_equal(frames, np.stack(expected)[metadata.source_frame_indices])


def test_an_offset_past_the_end(tmp_path):
    for way in ways_in(with_far_offset(clip()), tmp_path):
        with pytest.raises(VideoDecodeError, match="No video backend could read"):
            load_video(way)


def test_every_way_in_gives_the_same_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for backend in ("decord", "pyav"):
        first, *others = [load_video(way, video_backend=backend)[0] for way in ways_in(clip(), tmp_path)]
        for other in others:
            np.testing.assert_array_equal(first, other)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_dead_or_silent_child_is_replaced(monkeypatch):
    expected = all_frames(clip(), "pyav")[0]
    np.testing.assert_array_equal(all_frames(clip(), "decord")[0], expected)
    child = DecordProcess.borrow()
    child.give_back()
    assert DecordProcess.borrow() is child  # kept
    child.give_back()
    os.kill(child._child.pid, signal.SIGKILL)
    child._child.wait()
    np.testing.assert_array_equal(all_frames(clip(), "decord")[0], expected)
    assert child._child.stdin.closed
    assert child._ended.is_set()  # its thread ends too
    monkeypatch.setattr(decord_process, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(decord_process, "WATCH_SECONDS", 0.05)
    child = DecordProcess()
    os.kill(child._child.pid, signal.SIGSTOP)
    with pytest.raises(VideoDecodeError, match="stopped answering"):
        child.open(str(__file__), MediaLimits(), "The video")


@pytest.mark.parametrize(
    ("last_words", "use"),
    [
        ('{"count": 2, "fps": 1.0, "shape": [4, 4, 3]}', lambda child: child.open(__file__, MediaLimits(), "It")),
        ('{"index": 0, "shape": [4, 4, 3]}', lambda child: next(child.decode([0], 1))),
        ("", lambda child: next(child.decode(list(range(500_000)), 500_000))),  # more than a pipe holds
    ],
    ids=["times", "pixels", "request"],
)
def test_a_child_that_stops_between_line_and_data(last_words, use, monkeypatch):
    monkeypatch.setattr(decord_process, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(decord_process, "WATCH_SECONDS", 0.05)
    code = f"import time\nprint('{{\"ready\": true}}\\n{last_words}', flush=True)\ntime.sleep(1000)"
    monkeypatch.setattr(DecordProcess, "_code", lambda child: code)
    child = DecordProcess()
    with pytest.raises(VideoDecodeError, match="stopped answering"):
        use(child)
    assert child._child.poll() is not None


def test_a_child_ends_with_its_parent():
    """Though its input stays open and it never comes back to it."""
    stubs = (
        "import sys\nfrom types import SimpleNamespace\n"
        "logging = SimpleNamespace(INFO=32, set_level=lambda level: None)\n"
        "sys.modules.update(numpy=SimpleNamespace(), decord=SimpleNamespace(logging=logging))"
    )
    functions = map(inspect.getsource, (decord_process.prepare_child, decord_process._serve_decord))
    code = "\n".join([stubs, decord_process.CHILD_IMPORTS, *functions, "_serve_decord(prepare_child(1 << 40))"])
    parent = (
        f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {code!r}], stdout=subprocess.PIPE)\n"
        "assert b'ready' in child.stdout.readline()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        # The child holds the other end of this pipe as long as it lives.
        assert select.select([process.stderr], [], [], 30)[0]
        assert process.stderr.read(1000) == b""


def test_the_limit_on_frames_comes_before_work_for_each(monkeypatch, tmp_path):
    child = DecordProcess.borrow()
    read = []
    monkeypatch.setattr(child, "_read_into", read.append)
    (tmp_path / "clip.mp4").write_bytes(clip())
    with pytest.raises(MediaLimitError, match=r"The video has 12 frames, over the limit video_frames=11\."):
        child.open(str(tmp_path / "clip.mp4"), MediaLimits(video_frames=11), "The video")
    assert read == []
    assert not child.is_busy
    monkeypatch.undo()
    child.give_back()
    assert len(all_frames(clip(), "decord")[0]) == 12


def test_threads_and_readers_that_were_left_early(tmp_path):
    expected = all_frames(clip(), "pyav")[0]
    results = []
    threads = [threading.Thread(target=lambda: results.append(all_frames(clip(), "decord")[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    with open_video(clip(), "decord") as reader:
        next(iter(reader.frames([3, 5])))  # not read to its end
        results.append(list(reader.frames(range(12))))
    for frames in results:
        np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize("matrix", ROTATIONS)
def test_display_matrices_are_obeyed_as_by_ffmpeg(matrix):
    plain = clip(num_frames=3, size=(64, 128))
    expected = [ROTATIONS[matrix](frame) for frame in all_frames(plain, "pyav")[0]]
    content = with_matrix(plain, matrix)
    np.testing.assert_array_equal(all_frames(content, "pyav")[0], expected)
    np.testing.assert_array_equal(all_frames(content, None)[0], expected)
    if matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0:
        with pytest.raises(VideoDecodeError, match="display matrix mirrors it"):
            open_video(content, "decord")
    else:
        np.testing.assert_array_equal(all_frames(content, "decord")[0], expected)


def test_a_matrix_that_turns_by_other_angles_is_refused():
    content = with_matrix(clip(), (0.8, 0.6, -0.6, 0.8))
    with pytest.raises(VideoDecodeError, match=r"turns it by 37 degrees, which is no multiple of 90"):
        load_video(content)


def test_the_last_frame_of_flv_lasts_as_long_as_the_one_before():
    durations = {backend: all_frames(clip("flv"), backend)[1].duration_seconds for backend in ("decord", "pyav")}
    assert durations == pytest.approx({"decord": 1.2, "pyav": 1.2})


def test_joined_recordings_are_refused():
    joined = clip("ts", num_frames=8) + clip("ts", num_frames=8)
    with pytest.raises(VideoDecodeError, match=r"pyav: its time stamps restart at frame 8 of 16 .*join them anew"):
        load_video(joined)


def test_a_change_of_size_is_scaled_away():
    parts = [clip("ts", num_frames=4), clip("ts", num_frames=4, size=(96, 128), first=4)]
    content = b"".join([*parts, clip("ts", num_frames=4, size=(32, 32), first=8)])
    frames = [np.stack(all_frames(content, backend)[0]) for backend in ("decord", "pyav")]
    np.testing.assert_array_equal(*frames)
    assert load_video(content)[0].shape[1:] == frames[0].shape[1:]
    assert Molmo2VideoProcessor()(content)["video_grids"].tolist() == [[4, 9, 9]]


def test_texts_are_named():
    for text in (b"#EXTM3U\n#EXTINF:1,\n/etc/a.ts\n", b"ffconcat version 1.0\nfile a.mp4\n", b"<MPD></MPD>", b"words"):
        for way in (text, io.BytesIO(text)):
            with pytest.raises(VideoDecodeError, match="is a text, not a video"):
                load_video(way)


def test_animated_webp_is_a_video():
    """Each frame is on display for as long as the file says, or for 0.1 s where it says 0."""
    file = io.BytesIO()
    images = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue", "lime")]
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], duration=[200, 300, 0], lossless=True)
    with open_video(file) as reader:
        timeline, shown = reader.timeline, list(reader.frames([2, 0, 1, 1]))
    assert (timeline.start_seconds.tolist(), timeline.duration_seconds) == ([0.0, 0.2, 0.5], pytest.approx(0.6))
    assert [frame[20, 30].tolist() for frame in shown] == [[0, 255, 0], [255, 0, 0], [0, 0, 255], [0, 0, 255]]
    assert Molmo2VideoProcessor()(file)["video_grids"].tolist() == [[3, 9, 9]]
    with pytest.raises(VideoDecodeError, match=r"Animated WebP is read by Pillow: leave the backend out"):
        open_video(file, "pyav")


@pytest.mark.parametrize("kind", ["mp4", "avi", "mkv", "flv", "ts", "gif"])
def test_damaged_files_decode_or_are_refused(kind):
    rng = np.random.default_rng(0)
    for _ in range(6):
        content = mutated(clip(kind), rng)
        try:
            frames, metadata = load_video(content, num_frames=4)
        except ValueError:
            continue
        assert len(frames) == len(metadata.timestamps)


def test_boxes_that_lead_nowhere_end():
    content = patched(clip(), b"moov", 0, bytes(8))  # a box without length
    with pytest.raises(ValueError, match="could read"):
        load_video(content)


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_damaged_frames_of_mpeg4_look_alike_every_time(backend):
    """What threads that work on several frames make of them depends on chance."""
    start = clip("avi").index(b"movi")
    rng = np.random.default_rng(4)
    for _ in range(6):
        damaged = bytearray(clip("avi"))
        for place in rng.integers(start + 200, len(damaged) - 400, 12):
            damaged[place] ^= 1 << int(rng.integers(8))
        shown = set()
        for _ in range(12):
            try:
                shown.add(b"".join(frame.tobytes() for frame in all_frames(bytes(damaged), backend)[0]))
            except VideoDecodeError as error:
                shown.add(type(error))
        assert len(shown) == 1


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_damaged_frames_look_alike_whatever_decodes_them(kind, monkeypatch):
    """How H.264 is concealed depends on threads: the first damaged frame and all after it are decoded by one."""
    rng = np.random.default_rng(3)
    whole, num_read = clip(kind, num_frames=24, size=(96, 128)), 0
    for _ in range(12):
        damaged = bytearray(whole)
        for place in rng.integers(int(0.3 * len(whole)), int(0.9 * len(whole)), 3):
            damaged[place] ^= int(rng.integers(1, 255))
        shown = []
        for backend, threads in (("decord", 0), ("pyav", 1), ("pyav", 2), ("pyav", 7)):
            monkeypatch.setattr(readers, "MAX_THREADS", threads)
            monkeypatch.setattr(readers, "THREADS_PER_CORE", threads)
            with suppress(VideoDecodeError):
                shown.append(np.stack(all_frames(bytes(damaged), backend)[0]))
        num_read += len(shown) == 4
        for frames in shown[1:]:
            np.testing.assert_array_equal(frames, shown[0])
    assert num_read > 6


def test_frames_that_are_not_in_the_order_of_their_times():
    """A damaged time stamp would exchange two frames with one decoder, and not with the other."""
    content = bytearray(clip("flv"))
    place, stamps = 13, []
    while place + 15 <= len(content):  # tags: kind, size, time stamp in milliseconds, its highest byte
        size = int.from_bytes(content[place + 1 : place + 4], "big")
        if content[place] == 9 and size > 5:
            stamps.append(place + 4)
        place += 11 + size + 4
    content[stamps[6] : stamps[6] + 3] = (767).to_bytes(3, "big")
    message = "pyav cannot read .*: its time stamps are not in the order of its frames"
    with open_video(bytes(content), "pyav") as reader, pytest.raises(VideoDecodeError, match=message):
        list(reader.frames([0, 7, 11]))
