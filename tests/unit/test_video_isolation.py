"""Decoders in a process that is ended at a deadline: the same frames, and an end whatever the decoder does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import GifImagePlugin

from molmo2.image.limits import MediaLimitError, MediaLimits
from molmo2.video.decoding import decord_process
from molmo2.video.decoding.isolation import IsolatedProcess, call_isolated
from molmo2.video.decoding.opening import open_video
from molmo2.video.decoding.readers import Source
from molmo2.video.decoding.timeline import VideoDecodeError
from support.clips import load_video
from support.hostile_media import CONTAINERS, clip, gif_of_size, image_bytes, mutated

pytest.importorskip("av")

ISOLATED = MediaLimits(decode_seconds=120)
SHORT = MediaLimits(decode_seconds=0.2)


@pytest.fixture(autouse=True)
def quick_watch(monkeypatch):
    monkeypatch.setattr(decord_process, "WATCH_SECONDS", 0.02)


@pytest.fixture
def stuck(monkeypatch):
    """Children whose decoder never comes to its end; gives those that were started."""
    started = []

    def replace(statement):
        own = IsolatedProcess._code

        def code(process):
            started.append(process)
            return f"import time\nfrom molmo2.video.decoding import isolation\n{statement}\n{own(process)}"

        monkeypatch.setattr(IsolatedProcess, "_code", code)
        monkeypatch.setattr(IsolatedProcess, "_idle", [])
        return started

    return replace


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_frames_and_times_are_those_of_the_decoder(kind, backend):
    if backend == "decord":
        pytest.importorskip("decord")
    with open_video(clip(kind), backend) as plain, open_video(clip(kind), backend, ISOLATED) as isolated:
        assert isolated.backend == backend
        for name, value in vars(plain.timeline).items():
            np.testing.assert_array_equal(getattr(isolated.timeline, name), value)
        for indices in ([7, 3, 3], range(plain.timeline.num_frames)):
            found = list(isolated.frames(indices))
            np.testing.assert_array_equal(found, list(plain.frames(indices)))


def test_refusals_are_those_of_the_decoder(tmp_path):
    file = tmp_path / "clip.mp4"
    for seed in range(12):
        file.write_bytes(mutated(clip(), np.random.default_rng(seed)))
        results = []
        for limits in (MediaLimits(), ISOLATED):
            try:
                results.append(load_video(file, num_frames=4, limits=limits)[0].tolist())
            except VideoDecodeError as error:
                results.append(str(error))
        assert results[0] == results[1]
    with pytest.raises(MediaLimitError, match="over the limit video_frames=11"):
        open_video(clip(), "pyav", MediaLimits(decode_seconds=60, video_frames=11))


def test_one_child_is_kept_and_replaced_when_it_dies():
    load_video(clip(), limits=ISOLATED)
    child = IsolatedProcess.borrow()
    child.give_back()
    with open_video(clip(), "pyav", ISOLATED) as reader:
        assert reader._process is child
        next(iter(reader.frames([0, 5])))  # not read to its end: what follows has a child of its own
        assert len(list(reader.frames(range(12)))) == 12
        assert child._child.poll() is not None


def test_a_child_needs_neither_torch_nor_transformers():
    """They take two seconds and 0.3 GB, in each child of a server."""
    code = (
        "import sys\nfrom molmo2.video.decoding import isolation\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_a_decoder_that_never_opens_a_file(stuck):
    started = stuck("isolation.READERS = dict.fromkeys(isolation.READERS, lambda *_, **__: time.sleep(1000))")
    with pytest.raises(MediaLimitError, match=r"not decoded in time, over the limit decode_seconds=0\.2\."):
        open_video(clip(), None, SHORT)
    assert [process._child.poll() is not None for process in started] == [True]  # no other decoder has its turn


def test_a_decoder_that_never_gives_its_next_frame(stuck):
    started = stuck(
        "import numpy\nfrom molmo2.video.decoding import readers\n"
        "def endless(self, indices):\n"
        "    yield numpy.zeros((48, 64, 3), 'uint8')\n"
        "    time.sleep(1000)\n"
        "readers._PyavReader._decode = endless"
    )
    with open_video(clip(), "pyav", ISOLATED) as reader:
        frames = reader.frames([0, 1, 2])
        assert next(frames).shape == (48, 64, 3)
        started[0].seconds_left = 0.5  # opening the file, and the first frame, may take as long as they do
        with pytest.raises(MediaLimitError, match="decode_seconds"):
            next(frames)
    assert started[0]._child.poll() is not None


def test_a_decoder_that_stops_within_a_frame(stuck):
    started = stuck(
        "def half(reader, indices, send):\n"
        "    send({'shape': [48, 64, 3]})\n"
        "    time.sleep(1000)\n"
        "isolation._send_frames = half"
    )
    with open_video(clip(), "pyav", ISOLATED) as reader:
        started[0].seconds_left = 1.0
        with pytest.raises(MediaLimitError, match="decode_seconds"):
            next(reader.frames([0]))
    assert started[0]._child.poll() is not None


def wait_for_ever():
    while True:
        pass


def write_number(path, number):
    Path(path).write_text(str(number), encoding="utf-8")


def test_calls_of_functions(tmp_path):
    call_isolated(write_number, tmp_path / "number", 5, seconds=60)
    assert (tmp_path / "number").read_text(encoding="utf-8") == "5"
    with pytest.raises(VideoDecodeError, match="No such file"):
        call_isolated(write_number, tmp_path / "no" / "folder", 5, seconds=60)


def test_a_call_without_end_names_itself_not_the_video_before(tmp_path):
    file = tmp_path / "private.mp4"
    file.write_bytes(clip())
    load_video(file, num_frames=2, limits=ISOLATED)
    process = IsolatedProcess._idle[-1]  # the next to be used
    with pytest.raises(MediaLimitError) as caught:
        call_isolated(wait_for_ever, seconds=0.5)
    late = "wait_for_ever did not end within 0.5 seconds and was ended. Allow it more `seconds`."
    assert str(caught.value) == late
    assert process._child.poll() is not None


def test_an_idle_child_holds_no_video(tmp_path):
    file = tmp_path / "clip.mp4"
    file.write_bytes(clip())
    with open_video(file, "pyav", ISOLATED) as reader:
        assert list(reader.frames([0])) != []
        process = reader._process
        assert str(file) in files_open_in(process)
    assert process in IsolatedProcess._idle
    assert str(file) not in files_open_in(process)


def files_open_in(process):
    folder = Path(f"/proc/{process._child.pid}/fd")
    if not folder.is_dir():
        pytest.skip("open files of a process are listed on Linux only")
    return [os.readlink(entry) for entry in folder.iterdir()]


def test_an_answer_after_the_deadline_is_late_too(monkeypatch):
    monkeypatch.setattr(decord_process, "WATCH_SECONDS", 1000)  # the clock is never read
    with pytest.raises(MediaLimitError, match=r"not decoded in time, over the limit decode_seconds=0\."):
        open_video(clip(), "pyav", MediaLimits(decode_seconds=0))


def test_an_interrupt_does_not_end_a_child():
    process = IsolatedProcess.borrow()
    process._child.send_signal(signal.SIGINT)
    process.call(abs, (1,))  # an interrupted child would not answer
    process.give_back()


def long_gif(folder):
    file = folder / "long.gif"
    file.write_bytes(gif_of_size(4, 4, 20_000))
    return file


def test_pillow_looks_at_animations_in_the_child(monkeypatch, tmp_path):
    file = long_gif(tmp_path)
    monkeypatch.setattr(Source, "open_animation", lambda _: pytest.fail("opened in this process"))
    assert Source.from_input(file, ISOLATED).image_format == "GIF"
    with pytest.raises(VideoDecodeError, match=r"is an image \(PNG\), not a video"):
        Source.from_input(image_bytes("PNG"), ISOLATED)


def test_no_walk_through_an_animation_without_a_count(monkeypatch, tmp_path):
    file = long_gif(tmp_path)
    walked = []
    own = GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile, "_seek", lambda image, *place: walked.append(place) or own(image, *place)
    )
    assert Source.from_input(file, MediaLimits()).image_format == "GIF"
    assert len(walked) < 5
    with pytest.raises(MediaLimitError, match="over the limit video_frames=100"):
        open_video(file, None, MediaLimits(video_frames=100))


def test_a_pillow_without_end(stuck):
    stuck("from molmo2.video.decoding.readers import Source\nSource.open_animation = lambda _: time.sleep(1000)")
    with pytest.raises(MediaLimitError, match=r"not decoded in time, over the limit decode_seconds=0\.2\."):
        open_video(gif_of_size(4, 4, 2), None, SHORT)


def test_a_program_without_a_deadline_starts_no_process(monkeypatch):
    monkeypatch.setattr(IsolatedProcess, "borrow", None)
    assert len(load_video(clip(), num_frames=3)[0]) == 3
