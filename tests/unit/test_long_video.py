"""Long videos as windows: files opened once, live frames, journals that survive a kill, merged answers."""

import errno
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from molmo2 import LiveVideo, LongVideo, ask_long, count_long, localize_long, stream_long, track_long
from molmo2.batch.journal import OutputError
from molmo2.grounding.format import format_tracks
from molmo2.image.limits import MediaLimitError, MediaLimits
from molmo2.long_video import (
    AskTask,
    Cutting,
    JoinSettings,
    LocalizeTask,
    Reply,
    TrackTask,
    fit_windows,
    run,
    run_windows,
)
from molmo2.video.decoding import readers
from molmo2.video.decoding.timeline import VideoDecodeError
from support.checkpoints import build_model
from support.model_inputs import processor
from support.scripted_model import ScriptedModel

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FPS, GROUP = 10, 10  # of the files here: frames a second, frames from key frame to key frame
CUT = {"window": 4.0, "overlap": 1.0, "fps": 2.0}  # 8 samples, 6 apart


def grey(number):
    return np.full((48, 64, 3), 20 + 4 * (number % 50), np.uint8)


def number_on(frame):
    """Number of a frame, modulo 50."""
    return round((float(np.asarray(frame).mean()) - 20) / 4)


def write_video(path, seconds, repeats=1):
    """Frames whose grey level is their number; `repeats` plays them again and again."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": str(GROUP), "tune": "zerolatency", "crf": "10"}
        packets = []
        for number in range(seconds * FPS):
            packets += stream.encode(av.VideoFrame.from_ndarray(grey(number), format="rgb24"))
        packets += stream.encode(None)
        kept = [(bytes(packet), packet.pts, packet.dts, packet.time_base, packet.is_keyframe) for packet in packets]
        for repeat in range(repeats):
            for content, pts, dts, time_base, is_keyframe in kept:
                packet, shift = av.Packet(content), round(repeat * seconds / time_base)
                packet.stream, packet.time_base, packet.is_keyframe = stream, time_base, is_keyframe
                packet.pts, packet.dts = pts + shift, dts + shift
                container.mux(packet)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """20 s: samples 0..39, windows of samples 0..7, 6..13, ..., 36..39."""
    return write_video(tmp_path_factory.mktemp("long") / "video.mp4", 20)


def dog_at(time):
    """Where the dog is; it is away from 7 to 11 s."""
    return None if 7 <= time < 11 else (0.2 + 0.02 * time, 0.5)


def says(clip, what="dog", at=dog_at):
    """The true answer about a window, times counted from its start."""
    places = {round(time - clip.start, 1): at(time) for time in clip.times}
    return format_tracks({3: {time: place for time, place in places.items() if place}}, what)


def oracle(prompt, clip):
    return Reply(says(clip))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(monkeypatch):
    """Counts of what was done: tables of packets, frames decoded, frames converted to RGB."""
    counts = {"indexed": 0, "decoded": 0, "converted": 0}

    def counted(name, function):
        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return call

    table = readers._PacketTable.from_packets
    monkeypatch.setattr(readers._PacketTable, "from_packets", counted("indexed", table))
    monkeypatch.setattr(readers._PyavReader, "_to_rgb", counted("converted", readers._PyavReader._to_rgb))
    decoded_from = readers._PyavReader._decoded_from

    def decoded(self, place):
        for frame in decoded_from(self, place):
            counts["decoded"] += 1
            yield frame

    monkeypatch.setattr(readers._PyavReader, "_decoded_from", decoded)
    return counts


def test_windows_have_the_frames_on_display(path):
    with LongVideo(path, **CUT) as video:
        assert (video.num_samples, video.num_windows, len(video), video.size) == (40, 7, 7, (64, 48))
        clips = list(video.clips())
        for clip in clips:
            assert [number_on(frame) for frame in clip.frames] == [round(time * FPS) % 50 for time in clip.times]
            assert clip.metadata.timestamps == [time - clip.times[0] for time in clip.times]
            assert clip.metadata.source_frame_indices == [round(time * FPS) for time in clip.times]
        assert [(clip.start, clip.end) for clip in clips] == [
            *((start, start + 3.5) for start in (0.0, 3.0, 6.0, 9.0, 12.0, 15.0)),
            (18.0, 19.5),
        ]
        with pytest.raises(IndexError, match="windows 0 to 6"):
            video.clip(7)


def test_a_file_is_indexed_once_and_each_wanted_frame_converted_once(path, work):
    with LongVideo(path, **CUT) as video:
        at_opening = dict(work)
        for clip in video.clips():
            for frame in clip.frames:
                assert frame.shape == (48, 64, 3)
    assert work["indexed"] == 1
    assert work["converted"] - at_opening["converted"] == 40  # samples; those that two windows show are kept
    assert work["decoded"] - at_opening["decoded"] <= 20 * FPS


def test_starting_late_decodes_only_what_follows(path, work):
    """Window 5 begins at frame 150, a key frame; its last sample is frame 185."""
    with LongVideo(path, **CUT) as video:
        before = dict(work)
        assert [number_on(frame) for frame in video.clip(5).frames] == [0, 5, 10, 15, 20, 25, 30, 35]
        assert work["decoded"] - before["decoded"] == 36
        assert work["converted"] - before["converted"] == 8


def test_frames_far_apart_are_reached_by_seeking(tmp_path, work):
    """Samples 40 s apart: of each the group from its key frame on, not all that lies between."""
    long = write_video(tmp_path / "long.mp4", 10, repeats=24)  # 4 minutes
    with LongVideo(long, window=120.0, overlap=0.0, fps=0.025) as video:
        assert video.num_samples == 6
        before = work["decoded"]
        assert [number_on(frame) for clip in video.clips() for frame in clip.frames] == [0] * 6
    assert work["decoded"] - before <= 6 * GROUP


def test_a_window_may_be_read_again(path):
    with LongVideo(path, **CUT) as video:
        second = video.clip(1)
        once = [number_on(frame) for frame in second.frames]
        assert [number_on(frame) for frame in second.frames] == once == [30, 35, 40, 45, 0, 5, 10, 15]
        assert number_on(second.frames[-1]) == 15
        assert [number_on(frame) for frame in second.frames[1:3]] == [35, 40]


def test_few_frames_are_in_memory(path):
    """Those that the next window shows."""
    with LongVideo(path, **CUT) as video:
        max_kept = 0
        for clip in video.clips():
            for _ in clip.frames:
                max_kept = max(max_kept, len(video._store._kept))
        assert max_kept == video.cutting.shared == 2


def test_decoders_that_cannot_seek_are_refused(path):
    with pytest.raises(ValueError, match="'decord'; long videos need a decoder that seeks"):
        LongVideo(path, video_backend="decord")
    with pytest.raises(FileNotFoundError):
        LongVideo(path.with_name("nothing.mp4"))


def test_what_no_decoder_reads_is_told_once(tmp_path):
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"\0video" * 100)
    with pytest.raises(VideoDecodeError) as caught:
        LongVideo(damaged)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines if line.startswith("  ")] == ["pyav", "torchcodec"]
    assert sum("No video backend could read" in line for line in lines) == 1
    assert sum("Check that the file is complete" in line for line in lines) == 1


# --- live ------------------------------------------------------------------------------------------------------------


def live_frames(seconds, origin=1000.0, rate=FPS):
    for number in range(round(seconds * rate)):
        yield origin + number / rate, grey(number)


def test_live_frames_are_the_windows_of_a_file(path):
    with LongVideo(path, **CUT) as video:
        of_file = [[number_on(frame) for frame in clip.frames] for clip in video.clips()]
    live = list(LiveVideo(live_frames(20), **CUT).clips())
    assert [[number_on(frame) for frame in clip.frames] for clip in live] == of_file
    assert live[1].times == tuple(1003.0 + number / 2 for number in range(8))
    assert live[1].metadata.timestamps == [number / 2 for number in range(8)]


def test_a_live_window_is_there_when_its_last_sample_is_over():
    taken = []

    def frames():
        for time, frame in live_frames(60):
            taken.append(time - 1000)
            yield time, frame

    clips = LiveVideo(frames(), **CUT).clips()
    assert [next(clips).window.index, taken[-1]] == [0, pytest.approx(3.6)]
    assert [next(clips).window.index, taken[-1]] == [1, pytest.approx(6.6)]


def test_live_frames_that_come_irregularly():
    """At 0, 0.4, 0.6 and 2.1 s: samples at 0, 0.5, 1, 1.5 and 2 show the frames that had come by then."""
    frames = [(time, grey(number)) for number, time in enumerate([0, 0.4, 0.6, 2.1])]
    (clip,) = LiveVideo(iter(frames), **CUT).clips()
    assert [number_on(frame) for frame in clip.frames] == [0, 1, 2, 2, 2]


def test_live_frames_that_make_no_sense():
    frames = [(0.0, None), (1.0, None), (0.5, None)]
    with pytest.raises(ValueError, match=r"Frame 2 of the live video is at 0\.5 s, after one at 1 s"):
        list(LiveVideo(frames, **CUT).clips())
    with pytest.raises(ValueError, match="before its first frame"):
        list(LiveVideo([], **CUT).clips())
    video = LiveVideo(live_frames(1), **CUT)
    list(video.clips())
    with pytest.raises(ValueError, match="were read before"):
        list(video.clips())


# --- runs ------------------------------------------------------------------------------------------------------------


def final(partials):
    return list(partials)[-1].result


def test_tracks_in_times_of_the_whole_video(path):
    """One dog, that goes and comes back: one track, with all its times and no other."""
    with LongVideo(path, **CUT) as video:
        partials = list(run_windows(video, TrackTask("dog"), oracle))
    assert [partial.num_windows for partial in partials] == [7] * 7
    (track,) = partials[-1].result.tracks
    assert [point.time for point in track.points] == [n / 2 for n in range(40) if not 7 <= n / 2 < 11]
    for point in track.points:
        assert (point.x, point.y) == pytest.approx(dog_at(point.time), abs=0.0006)  # thousandths
    (gap,) = [join for join in track.joins if join.kind == "gap"]
    assert (gap.start, gap.end, gap.confidence) == (6.5, 11.0, pytest.approx(1 - 4.5 / 15, abs=0.01))
    assert len(partials[0].result.tracks[0].points) == 8  # of the first window alone


def test_a_live_source_gives_the_same_tracks(path):
    with LongVideo(path, **CUT) as video:
        of_file = final(run_windows(video, TrackTask("dog"), oracle))

    def asked(prompt, clip):
        return Reply(says(clip, at=lambda time: dog_at(time - 1000)))

    live = final(run_windows(LiveVideo(live_frames(20), **CUT), TrackTask("dog"), asked))
    assert [[(p.time - 1000, p.x, p.y) for p in track.points] for track in live.tracks] == [
        [tuple(point) for point in track.points] for track in of_file.tracks
    ]


@pytest.fixture(scope="module")
def finished(path, tmp_path_factory):
    """The journal of a whole run, and its result."""
    journal = tmp_path_factory.mktemp("journal") / "dog.jsonl"
    with LongVideo(path, **CUT) as video:
        result = final(run_windows(video, TrackTask("dog"), oracle, journal=journal))
    return journal, result


def test_a_run_that_ended_at_any_byte_continues(path, finished, tmp_path):
    """Cut off anywhere in the last line, and after each line: the same result, and no window is asked twice."""
    journal, result = finished
    content = journal.read_bytes()
    starts = [0, *(place + 1 for place, byte in enumerate(content) if byte == ord("\n"))]
    lengths = sorted({*range(starts[6], starts[7], 2), starts[7] - 1, *starts})
    with LongVideo(path, **CUT) as video:
        for length in lengths:
            folder = tmp_path / str(length)
            folder.mkdir()
            shutil.copy(journal.with_name("dog.jsonl.run.json"), folder)
            (folder / "dog.jsonl.journal").write_bytes(content[:length])
            asked = []

            def noted(prompt, clip, asked=asked):
                asked.append(clip.window.index)
                return oracle(prompt, clip)

            assert final(run_windows(video, TrackTask("dog"), noted, journal=folder / "dog.jsonl")) == result
            num_whole = sum(start <= length for start in starts[1:])
            assert asked == list(range(num_whole, 7))
            assert (folder / "dog.jsonl").read_bytes() == content
            shutil.rmtree(folder)


def test_a_bar_counts_windows(path, capsys):
    with LongVideo(path, **CUT) as video:
        final(run_windows(video, TrackTask("dog"), oracle))
        assert capsys.readouterr().err == ""
        final(run_windows(video, TrackTask("dog"), oracle, progress=True))
        assert "7/7" in capsys.readouterr().err


def test_a_finished_journal_needs_no_model(path, finished):
    journal, result = finished
    with LongVideo(path, **CUT) as video:
        partials = list(run_windows(video, TrackTask("dog"), None, journal=journal))
        assert partials[-1].result == result
        assert len(partials) == 7
        strict = TrackTask("dog", joins=JoinSettings(max_gap_seconds=1.0))
        assert len(final(run_windows(video, strict, None, journal=journal)).tracks) == 2  # merged anew, otherwise


def test_a_run_that_is_left_early_continues(path, tmp_path, finished):
    journal = tmp_path / "dog.jsonl"
    with LongVideo(path, **CUT) as video:
        partials = run_windows(video, TrackTask("dog"), oracle, journal=journal)
        first = list(itertools.islice(partials, 3))
        partials.close()
        again = list(run_windows(video, TrackTask("dog"), oracle, journal=journal))
    assert [partial.record for partial in again[:3]] == [partial.record for partial in first]
    assert again[-1].result == finished[1]


def test_a_journal_of_another_run_is_refused(path, finished):
    with LongVideo(path, **CUT) as video, pytest.raises(OutputError, match=r"other settings .*\(task\)"):
        list(run_windows(video, TrackTask("cat"), oracle, journal=finished[0]))
    with LongVideo(path, window=5.0) as video, pytest.raises(OutputError, match=r"\(video\)"):
        list(run_windows(video, TrackTask("dog"), oracle, journal=finished[0]))


def test_a_journal_that_would_lose_windows_is_refused(path, tmp_path):
    """A table has the columns of a batch: no times, no tracks."""
    with (
        LongVideo(path, **CUT) as video,
        pytest.raises(OutputError, match=r"dog\.parquet', .*ends with \.jsonl or \.ndjson"),
    ):
        next(run_windows(video, TrackTask("dog"), None, journal=tmp_path / "dog.parquet"))
    assert not list(tmp_path.iterdir())


def test_an_error_keeps_what_was_answered(path, tmp_path, finished):
    journal = tmp_path / "dog.jsonl"

    def fails(prompt, clip):
        if clip.window.index == 4:
            raise RuntimeError("out of memory")
        return oracle(prompt, clip)

    with LongVideo(path, **CUT) as video:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(run_windows(video, TrackTask("dog"), fails, journal=journal))
        lines = (tmp_path / "dog.jsonl.journal").read_text().splitlines()
        assert [json.loads(line)["row"] for line in lines] == [0, 1, 2, 3]
        assert final(run_windows(video, TrackTask("dog"), oracle, journal=journal)) == finished[1]


def test_a_live_run_continues_with_the_frames_that_it_had(tmp_path):
    """Windows that are in the journal are read past."""
    journal = tmp_path / "dog.jsonl"
    partials = run_windows(LiveVideo(live_frames(20, 0.0), **CUT), TrackTask("dog"), oracle, journal=journal)
    list(itertools.islice(partials, 3))
    partials.close()
    again = final(run_windows(LiveVideo(live_frames(20, 0.0), **CUT), TrackTask("dog"), oracle, journal=journal))
    assert again == final(run_windows(LiveVideo(live_frames(20, 0.0), **CUT), TrackTask("dog"), oracle))
    with pytest.raises(OutputError, match="video"):
        list(run_windows(LiveVideo(live_frames(20, 5.0), **CUT), TrackTask("dog"), oracle, journal=journal))


def test_answers_that_were_cut_off_are_named(path):
    def cut(prompt, clip):
        return Reply(says(clip), truncated=clip.window.index == 1)

    with LongVideo(path, **CUT) as video:
        assert final(run_windows(video, TrackTask("dog"), cut)).problems == (
            "0:00:03 to 0:00:06: the answer was cut off by the limit of tokens",
        )


def test_points_at_no_sample_are_left_out_and_named(path):
    """Of 0.4, 0.5 and 0.6 s the nearest to the sample counts, 3.9 s belongs to the last one, 4.0 s to none."""
    text = '<tracks coords="0.4 1 150 150\t0.6 1 100 100\t0.5 1 200 200\t3.9 1 300 300\t4.0 1 400 400">dog</tracks>'
    with LongVideo(path, **CUT) as video:
        first = next(run_windows(video, TrackTask("dog"), lambda prompt, clip: Reply(text)))
    assert first.record["tracks"] == [{"label": "dog", "points": [[0.5, 0.2, 0.2], [3.5, 0.3, 0.3]]}]
    assert first.result.problems == ("0:00:00 to 0:00:03: 1 point(s) are at times outside the window",)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("There are none.", []),
        ('<tracks coords="0.0 1 150 150">dog</tracks>', []),
        ('<points coords="0.0 1 150 150 2 300 300">dog</points>', ["2 point(s) belong to no track"]),
        ("A dog runs.", ["the answer has neither tracks nor says that there are none: 'A dog runs.'"]),
        ('<tracks coords="0.0 1 150 150\t0.5 1 2', ["a tag of the answer is cut off"]),
        ("<tracks", ["a tag of the answer is cut off"]),
    ],
)
def test_what_is_no_track_is_named(path, text, problems):
    with LongVideo(path, **CUT) as video:
        first = next(run_windows(video, TrackTask("dog"), lambda prompt, clip: Reply(text)))
    assert first.result.problems == tuple(f"0:00:00 to 0:00:03: {problem}" for problem in problems)


def test_the_rate_of_positions_is_in_the_prompt(path):
    asked = []
    with LongVideo(path, **CUT) as video:
        next(run_windows(video, TrackTask("dog", fps=1), lambda prompt, clip: asked.append(str(prompt)) or Reply("")))
    assert asked == ["Track dog at 1 FPS"]


def test_events_in_times_of_the_whole_video(path):
    """Rain from 2 to 8 s, told by three windows; and one that is said to begin after its window."""

    def asked(prompt, clip):
        start, end = max(2.0, clip.start) - clip.start, min(8.0, clip.end) - clip.start
        events = [{"start": start, "end": end, "description": "Rain"}] if end >= start else []
        if clip.window.index == 6:
            events = [{"start": 50, "end": 60, "description": "Snow"}]
        return Reply(json.dumps({"events": events}))

    with LongVideo(path, **CUT) as video:
        found = final(run_windows(video, LocalizeTask(), asked))
    assert [(event.start, event.end, event.description, event.windows) for event in found.events] == [
        (2.0, 8.0, "Rain", 3)
    ]
    assert found.problems == ("0:00:18 to 0:00:19: 'Snow' begins at 50 s of a window of 1.5 s",)


@pytest.mark.parametrize("fps", [2.0, 3.0])
def test_what_happens_after_the_last_sample_happens_at_it(path, fps):
    """At 2 fps samples are at 0, ..., 4.5 s: 4.5 stands for all up to 5.0, but not for what is later."""
    said = [(3.9, 9), (4.8, 4.9), (5.0, 6.0), (5.1, 6.0)]
    events = [{"start": start, "end": end, "description": f"{start}"} for start, end in said]
    with LongVideo(path, window=5.0, overlap=0.0, fps=fps) as video:
        reply = Reply(json.dumps({"events": events}))
        *_, last = run_windows(video, LocalizeTask(), lambda prompt, clip: reply)
    end = 20 - 1 / fps
    assert [(start, until) for start, until, _ in last.record["events"]] == [
        (pytest.approx(18.9), pytest.approx(end)),
        *[(pytest.approx(end), pytest.approx(end))] * 2,
    ]
    assert last.record["problems"] == [f"'5.1' begins at 5.1 s of a window of {5 - 1 / fps:g} s"]


def test_a_running_summary_of_a_clock_of_the_world():
    """The model is told seconds since the start, not since 1970."""
    told = []

    def asked(prompt, clip):
        if clip is None:
            told.append(prompt)
        return Reply("note")

    list(run_windows(LiveVideo(live_frames(6, 1.76e9), **CUT), AskTask("What happens?"), asked))
    assert [prompt.splitlines()[1:3] for prompt in told] == [
        ["From 0:00:00 to 0:00:03: note", "From 0:00:03 to 0:00:05: note"]
    ]


def test_a_running_summary(path):
    """Each window is asked; then its note and the summary so far become the next summary, in text alone."""
    prompts = []

    def asked(prompt, clip):
        if clip is not None:
            return Reply(f"note {clip.window.index}")
        prompts.append(prompt)
        return Reply(f"summary {len(prompts)}")

    with LongVideo(path, **CUT) as video:
        answer = final(run_windows(video, AskTask("What happens?"), asked))
    assert answer.text == "summary 6"
    assert [(note.start, note.end, note.text) for note in answer.notes][1] == (3.0, 6.5, "note 1")
    assert "From 0:00:00 to 0:00:03: note 0\nFrom 0:00:03 to 0:00:06: note 1\n" in prompts[0]
    assert "From 0:00:00 to 0:00:06: summary 1\nFrom 0:00:06 to 0:00:09: note 2\n" in prompts[1]
    assert all("What happens?" in prompt for prompt in prompts)


# --- with a model ----------------------------------------------------------------------------------------------------


class Watcher:
    """A scripted model that looks at the frames: it answers by the times that the prompt prints."""

    def __init__(self):
        self.seen = []
        self.model = ScriptedModel(processor(), self.answer)

    def answer(self, prompt):
        self.seen.append(prompt)
        if "events" in prompt:
            return '{"events": [{"start": "0:00", "end": "0:01", "description": "A dog"}]}'
        if "What" in prompt:
            return f"said {len(self.seen)}"
        return '<tracks coords="0.0 1 200 500\t0.5 1 200 500\t3.0 1 200 500\t3.5 1 200 500">dog</tracks>'


def test_from_a_file_to_each_kind_of_result(path, tmp_path):
    """Through the processor: windows print times from 0 on, results are in times of the whole video."""
    watcher = Watcher()
    with LongVideo(path, **CUT) as video:
        journal = tmp_path / "dog.jsonl"
        found = track_long(watcher.model, processor(), video, "dog", journal=journal)
        assert len(watcher.seen) == 7
        assert "0.0" in watcher.seen[3]
        assert "9.0" not in watcher.seen[3]
        (track,) = found.tracks
        assert [point.time for point in track.points[:7]] == [0.0, 0.5, 3.0, 3.5, 6.0, 6.5, 9.0]
        count = count_long(watcher.model, processor(), video, "dog", journal=journal)  # asks what is in the journal
        assert (count.count, count.at_least, count.tracks, len(watcher.seen)) == (1, 1, found.tracks, 7)
        events = localize_long(watcher.model, processor(), video, "a dog").events
        assert [(event.start, event.windows) for event in events] == [(s, 1) for s in (0, 3, 6, 9, 12, 15, 18)]
        answer = ask_long(watcher.model, processor(), video, "What happens?")
        assert len(answer.notes) == 7
        assert answer.text.startswith("said")
        named = next(stream_long(watcher.model, processor(), video, TrackTask("dog")))
        assert (named.record["row"], named.record["end"]) == (0, 3.5)
    with pytest.raises(ValueError, match=r"\['num_frames'\], but the windows decide"):
        track_long(watcher.model, processor(), path, "dog", processor_kwargs={"num_frames": 3})


@pytest.mark.parametrize("name", ["num_frames", "max_fps", "frame_sample_mode", "clip"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_sampling_is_refused_in_one_way(path, name, nested):
    options = {"videos_kwargs": {name: 1}} if nested else {name: 1}
    message = rf"have \['{name}'\], but the windows decide"
    with LongVideo(path, **CUT) as video:
        with pytest.raises(ValueError, match=message):
            fit_windows(video, processor(), "Track the dog.", **options)
        with pytest.raises(ValueError, match=message):
            track_long(None, processor(), video, "dog", processor_kwargs=options)


def test_limits_hold_when_a_path_is_opened(path, monkeypatch):
    limits = MediaLimits(video_frames=199)
    for options in ({"limits": limits}, {"videos_kwargs": {"limits": limits}}):
        with pytest.raises(MediaLimitError, match="199"):
            track_long(None, processor(), path, "dog", processor_kwargs=options)
    monkeypatch.setattr(processor().video_processor, "limits", limits)
    with pytest.raises(MediaLimitError, match="199"):
        track_long(None, processor(), path, "dog")


def test_settings_of_a_journal_are_the_same_in_each_process():
    """Functions have addresses, which differ from process to process: their type alone is kept."""

    def settings(**options):
        return run._journal_settings(None, {}, options)

    stop = settings(stopping_criteria=[lambda ids, scores: False], temperature=0.5, eos_token_id=(1, 2))
    assert stop == settings(stopping_criteria=[lambda ids, scores: True], temperature=0.5, eos_token_id=[1, 2])
    assert stop == {"model": "None", "stopping_criteria": ["function"], "temperature": 0.5, "eos_token_id": [1, 2]}
    assert settings(a={(1, 2): 3}, b=math.nan, c=torch.float32) == {
        "model": "None",
        "a": "dict",
        "b": "float",
        "c": "dtype",
    }
    short, long = (settings(generation_config=GenerationConfig(max_new_tokens=length)) for length in (5, 6))
    assert short["generation_config"]["max_new_tokens"] == 5
    assert short != long
    assert json.loads(json.dumps(short)) == short


def test_a_path_alone_is_opened_and_closed(path, monkeypatch):
    closed = []
    monkeypatch.setattr(LongVideo, "close", lambda self: closed.append(self.num_windows))
    assert track_long(Watcher().model, processor(), path, "dog").tracks
    assert closed == [1]


@torch.no_grad()
@pytest.mark.parametrize("slow_fast", [{}, {"key_frame_interval": 4}], ids=["plain", "slow-fast"])
def test_the_frames_of_a_window_reach_a_real_model(path, slow_fast):
    """The same answers as for the frames in memory, at the same times."""
    model = build_model("qwen3").eval()
    options = {"max_new_tokens": 3, "do_sample": False}
    with LongVideo(path, window=12.0, overlap=2.0, fps=0.5) as video:
        partials = list(
            stream_long(model, processor(), video, AskTask("What?"), processor_kwargs=slow_fast, **options)
        )
        clip = video.clip(1)
        inputs = processor().apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": list(clip.frames)}, {"type": "text", "text": "What?"}],
                }
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            video_metadata=[{"timestamps": [0.0, 2.0, 4.0, 6.0, 8.0]}],
            **slow_fast,
        )
        output = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert partials[1].record["text"] == processor().decode(output, skip_special_tokens=True).strip()
    assert partials[1].record["start"] == 10.0


def test_windows_are_thinned_to_a_budget(path):
    """As many samples as the plan of a window allows, in windows of the same length."""
    with LongVideo(path, **CUT) as video:
        whole = fit_windows(video, processor(), "Track the dog.")
        assert (whole.num_frames, video.cutting) == ((8,), Cutting(**CUT))
        plan = fit_windows(video, processor(), "Track the dog.", max_tokens=whole.num_tokens - 1)
        assert plan.num_tokens < whole.num_tokens
        assert plan.reduced
        assert video.cutting.size <= plan.num_frames[0] < 8
        assert video.cutting.window == 4.0
        prompts = []
        track_long(ScriptedModel(processor(), lambda text: prompts.append(text) or "none"), processor(), video, "dog")
        tokens = [len(processor().tokenizer.encode(prompt, add_special_tokens=False)) for prompt in prompts]
        assert max(tokens) < whole.num_tokens
        with pytest.raises(ValueError, match="at least"):
            fit_windows(video, processor(), "Track the dog.", max_tokens=5)


@pytest.mark.parametrize("num_frames", range(2, 8))
def test_thinned_windows_never_have_more_samples(num_frames):
    """Three samples a window that shares half: 1.5 and 1.5, both of which round to 2."""
    thinned = run._thinned(Cutting(window=4.0, overlap=2.0, fps=2.0), num_frames)
    assert num_frames // 2 <= thinned.size <= num_frames
    assert (thinned.window, thinned.overlap) == (4.0, 2.0)


# --- growth ----------------------------------------------------------------------------------------------------------

# The kernel's own mark: what `getrusage` tells includes the process from which this one was started.
PEAK = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
from molmo2.long_video import LongVideo, Reply, TrackTask, run_windows
text = '<tracks coords="' + "\\t".join(f"{n}.0 1 500 500" for n in range(30)) + '">dog</tracks>'
def asked(prompt, clip):
    for frame in clip.frames:
        pass
    return Reply(text)
with LongVideo(sys.argv[2], fps=1.0) as video:
    for partial in run_windows(video, TrackTask("dog"), asked):
        pass
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
print(json.dumps([peak, len(partial.result.tracks[0].points)]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_hours(tmp_path):
    """The peak of a process that reads 10 minutes, and of one that reads 3 hours: within 5 %, results included."""
    peaks = []
    for name, minutes in (("minutes.mp4", 10), ("hours.mp4", 180)):
        path = write_video(tmp_path / name, 30, repeats=2 * minutes)
        command = [sys.executable, "-c", PEAK, str(REPOSITORY / "src"), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, num_points = json.loads(done.stdout)
        assert num_points == minutes * 60
        peaks.append(peak)
    print(peaks)
    assert peaks[1] <= 1.05 * peaks[0]


# --- on the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def command(path, monkeypatch):
    """Runs `molmo2 long` over the video; every window has a dog in its middle."""
    from molmo2.cli import main, models

    def script(prompt):
        if "Track" in prompt:
            return format_tracks({1: dict.fromkeys((0.0, 0.5, 3.0, 3.5), (0.5, 0.5))}, "dog")
        return "It sleeps."

    monkeypatch.setattr(models, "load_model", lambda *given: (ScriptedModel(processor(), script), processor()))
    monkeypatch.setenv("MOLMO2_MODEL", "some/model")
    cut = [part for name, value in CUT.items() for part in (f"--{name}", str(value))]

    def call(kind, *given):
        return main(["long", kind, *given[:1], str(path), *cut, *given[1:]])

    return call


def test_tracks_on_the_command_line(command, path, tmp_path, capsys):
    table, journal = tmp_path / "dog.csv", tmp_path / "dog.jsonl"
    assert command("track", "dog", "--journal", str(journal), "--format", "csv", "-o", str(table)) == 0
    lines = table.read_text().splitlines()
    assert lines[:2] == ["label,id,time,x,y,frame,confidence,start,end,text", "dog,1,0.0,32.0,24.0,0,1.0,,,"]
    assert len(journal.read_text().splitlines()) == 7
    capsys.readouterr()
    assert command("count", "dog", "--unique", "--draw", str(tmp_path / "marked")) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "dog: 1 (at least 1, at most 1)"
    assert out.splitlines()[1].startswith("dog 1: 0:00:00 to 0:00:")
    drawn = tmp_path / "marked" / "video_points.mp4"
    assert drawn.stat().st_size > 1000
    missing = "incomplete: 0:00:18 to 0:00:19: 2 point(s) are at times outside the window"
    assert err.splitlines() == [f"wrote {drawn}", missing]


def test_answers_on_the_command_line(command, path, capsys):
    assert command("ask", "What does the dog do?", "--format", "json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["video"], record["text"], record["problems"]) == (str(path), "It sleeps.", [])
    assert record["notes"][1] == {"start": 3.0, "end": 6.5, "text": "It sleeps."}
    assert command("ask", "What?") == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["It sleeps.", "  0:00:00 to 0:00:03: It sleeps."]


def test_what_the_command_line_refuses(command, path, tmp_path, capsys, monkeypatch):
    from molmo2.cli import main

    assert main(["long", "track", "dog", "nowhere.mp4"]) == 1
    assert "nowhere.mp4" in capsys.readouterr().err
    assert command("ask", " ") == 2
    assert main(["long", "ask", "What?", str(path), "--overlap", "40"]) == 2
    assert "overlap" in capsys.readouterr().err
    journal = str(tmp_path / "dog.jsonl")
    assert command("track", "dog", "--journal", journal) == 0
    assert command("track", "cat", "--journal", journal) == 2
    assert "overwrite" in capsys.readouterr().err
    monkeypatch.delenv("MOLMO2_MODEL")
    capsys.readouterr()
    assert command("ask", "What?") == 2
    said = capsys.readouterr().err
    assert "Pass --model" in said
    assert "--server" not in said


def test_what_the_command_line_refuses_before_the_model_is_loaded(command, tmp_path, capsys, monkeypatch):
    from molmo2.cli import main, models

    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert command("track", "dog", "-o", str(tmp_path / "missing" / "dog.csv")) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["long", "track", "dog", "https://example.com/day.mp4", "--draw", str(tmp_path)]) == 2
    assert "download it first" in " ".join(capsys.readouterr().err.split())


def test_errors_on_the_command_line_name_what_failed(command, path, capsys, monkeypatch):
    def failing(error):
        def stream(*_, **__):
            raise error
            yield

        return stream

    for error, name in ((ValueError("the prompt is too long"), ""), (VideoDecodeError("frame 7"), f"{path}: ")):
        monkeypatch.setattr("molmo2.long_video.stream_long", failing(error))
        assert command("ask", "What?") == 1
        assert capsys.readouterr().err.strip() == f"Error: {name}{error}"


def test_an_output_that_fails_and_one_that_is_closed(command, tmp_path, capsys, monkeypatch):
    from molmo2.cli import long

    echo = long.click.echo
    for error, code, said in (
        (OSError(errno.ENOSPC, "no space left"), 1, f"Error: '{tmp_path / 'dog.txt'}' cannot be written: "),
        (BrokenPipeError(errno.EPIPE, "closed"), 0, ""),
    ):

        def fail(text, file=None, err=False, error=error):
            if err or file is None or file.name != str(tmp_path / "dog.txt"):
                return echo(text, file=file, err=err)
            raise error

        monkeypatch.setattr(long.click, "echo", fail)
        assert command("ask", "What?", "-o", str(tmp_path / "dog.txt")) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(said) if said else err == ""
