"""Decoders in a process that is ended at a deadline: the same frames, and an end whatever the decoder does."""

import os
from pathlib import Path

import numpy as np
import pytest

from molmo2.image.limits import MediaLimitError, MediaLimits
from molmo2.video.decoding import decord_process
from molmo2.video.decoding.backends import VideoDecodeError, open_video
from molmo2.video.decoding.isolation import IsolatedProcess, call_isolated
from molmo2.video.processing import load_video
from support.hostile_media import CONTAINERS, clip, mutated

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
    with open_video(clip(), "pyav", MediaLimits(decode_seconds=1)) as reader:
        frames = reader.frames([0, 1, 2])
        assert next(frames).shape == (48, 64, 3)
        with pytest.raises(MediaLimitError, match="decode_seconds"):
            next(frames)
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
    before = os.times()
    with pytest.raises(MediaLimitError, match=r"not decoded in time"):
        call_isolated(wait_for_ever, seconds=0.5)
    after = os.times()
    assert after.children_user - before.children_user < 60  # it was ended, and waited for


def test_a_program_without_a_deadline_starts_no_process(monkeypatch):
    monkeypatch.setattr(IsolatedProcess, "borrow", None)
    assert len(load_video(clip(), num_frames=3)[0]) == 3
