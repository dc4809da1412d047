"""Long videos: tracks and counts over hours with exact truth, and what reading them takes.

    python -m benchmarks.long_video stitching [--hours 1 3]      # perfect and noisy answers about windows, stitched
    python -m benchmarks.long_video miniature [--seconds 180]    # the miniature's answers
    python -m benchmarks.long_video reading [--minutes 10 60]    # CPU time and memory of reading the windows of a file

The scenes are of the miniature's world. Red circles enter at an edge, wander, leave, and return near the place where
they left; after a while others come in their place. Blue squares do the same and are not asked about.

`HOTA` is that of points within an object's radius of its place, at every sample; `count` is the number of different
objects. `whole` asks about the whole clip at once, `windows` is `count_long`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molmo2 import ask
from molmo2.evaluate import hota
from molmo2.grounding.format import format_tracks
from molmo2.grounding.prompts import track as track_prompt
from molmo2.long_video import (
    Clip,
    CountTask,
    Cutting,
    JoinSettings,
    LiveVideo,
    LongTrack,
    LongVideo,
    Reply,
    TrackPoint,
    WindowTrack,
    WindowTracks,
    model_call,
    run_windows,
)
from molmo2.long_video.tasks import window_tracks

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "examples"))

from miniature.world import CLIP_FPS, Thing, draw, make_clip  # noqa: E402

RADIUS = 0.1
WHAT = "red circles"
GREEDY: dict[str, Any] = {"max_new_tokens": 400, "do_sample": False}
SIDE = 96  # of frames, in pixels
WINDOWS = {"window": 3.0, "overlap": 1.0, "fps": 2.0}  # clips of 2.5 s, as the miniature was trained on
JOINS = JoinSettings(max_distance=0.15)
MAX_WHOLE_SECONDS = 120.0  # up to which the miniature is asked about the whole clip too
Place = tuple[float, float]


# --- scenes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walker:
    """An object: (time, x, y) of each visit, between which it moves evenly; away between visits."""

    number: int
    colour: str
    kind: str
    visits: tuple[tuple[tuple[float, float, float], ...], ...]

    def at(self, seconds: float) -> Place | None:
        """Its place, which may be outside the frame; None between visits."""
        for visit in self.visits:
            if visit[0][0] <= seconds <= visit[-1][0]:
                times, xs, ys = zip(*visit)
                return float(np.interp(seconds, times, xs)), float(np.interp(seconds, times, ys))
        return None


def _edge(rng: np.random.Generator) -> tuple[int, float]:
    return int(rng.integers(4)), float(rng.uniform(0.2, 0.8))


def _outside(edge: tuple[int, float]) -> Place:
    """A place beyond an edge, where nothing of the object is seen."""
    side, along = edge
    beyond = 1.2 * RADIUS
    return ((-beyond, along), (1 + beyond, along), (along, -beyond), (along, 1 + beyond))[side]


def _visit(rng: np.random.Generator, start: float, enters: tuple[int, float], leaves: tuple[int, float]) -> Any:
    inside = [tuple(rng.uniform(0.2, 0.8, 2)) for _ in range(int(rng.integers(1, 3)))]
    places, row, now = [_outside(enters), *inside, _outside(leaves)], [], start
    for number, place in enumerate(places):
        if number:
            now += float(np.hypot(*np.subtract(place, places[number - 1]))) / rng.uniform(0.1, 0.25)
        row.append((now, float(place[0]), float(place[1])))
    return tuple(row)


def walkers(rng: np.random.Generator, seconds: float, colour: str, kind: str) -> Iterator[Walker]:
    """Objects that come one after the other: each leaves and returns up to twice, near the place where it left."""
    now = float(rng.uniform(0, 2))
    while now < seconds:
        visits, edge = [], _edge(rng)
        for _ in range(int(rng.integers(1, 4))):
            leaves = _edge(rng)
            visits.append(_visit(rng, now, edge, leaves))
            edge = leaves[0], float(np.clip(leaves[1] + rng.uniform(-0.05, 0.05), 0.2, 0.8))
            now = visits[-1][-1][0] + float(rng.uniform(1, 5))
        yield Walker(-1, colour, kind, tuple(visits))
        now += float(rng.uniform(5, 15))


@dataclass(frozen=True)
class Scene:
    """Objects on a ground; the red circles are asked about."""

    seconds: float
    things: tuple[Walker, ...]
    ground: np.ndarray

    @classmethod
    def from_seed(cls, seed: int, seconds: float) -> "Scene":
        rng = np.random.default_rng([seed, 99])
        lanes = [("red", "circle"), ("red", "circle"), ("blue", "square")]
        drawn = [walker for lane in lanes for walker in walkers(rng, seconds, *lane)]
        things = [replace(walker, number=number) for number, walker in enumerate(drawn)]
        ground = np.asarray(make_clip(rng).ground)
        rows, columns = (np.arange(SIDE) * side // SIDE for side in ground.shape[:2])
        return cls(seconds, tuple(things), ground[rows][:, columns])

    def frame(self, seconds: float) -> np.ndarray:
        """(H, W, 3) uint8."""
        placed = [(thing, thing.at(seconds)) for thing in self._near(seconds)]
        return draw(
            self.ground, [Thing(own.colour, own.kind, *place, RADIUS) for own, place in placed if place is not None]
        )

    def seen_at(self, seconds: float) -> dict[int, Place]:
        """By number, the places of red circles whose centre is inside the frame."""
        places = {thing.number: thing.at(seconds) for thing in self._near(seconds) if thing.colour == "red"}
        return {number: at for number, at in places.items() if at is not None and 0 <= min(at) <= max(at) <= 1}

    def _near(self, seconds: float) -> list[Walker]:
        return self._by_minute.get(int(seconds // 60), [])

    @cached_property
    def _by_minute(self) -> dict[int, list[Walker]]:
        found: dict[int, list[Walker]] = {}
        for thing in self.things:
            first, last = thing.visits[0][0][0], thing.visits[-1][-1][0]
            for minute in range(int(first // 60), int(last // 60) + 1):
                found.setdefault(minute, []).append(thing)
        return found


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """By sample the places of the objects."""

    samples: tuple[dict[int, Place], ...]

    @classmethod
    def of_scene(cls, scene: Scene, cutting: Cutting) -> "Truth":
        return cls(tuple(scene.seen_at(cutting.seconds(n)) for n in range(cutting.num_samples(scene.seconds))))

    @property
    def count(self) -> int:
        return len({number for places in self.samples for number in places})

    def score(self, tracks: Sequence[LongTrack | WindowTrack], cutting: Cutting, first: int = 0) -> dict[str, float]:
        """hota, deta and assa, from sample `first` on as far as these are the samples of a window."""
        own: list[dict[int, TrackPoint]] = [{} for _ in self.samples]
        for number, track in enumerate(tracks):
            for point in track.points:
                sample = round(point.time * cutting.fps) - first
                if sample < len(own):
                    own[sample][number] = point
        rows = []
        for true, found in zip(self.samples, own):
            near = [[float(np.hypot(x - p.x, y - p.y) <= RADIUS) for p in found.values()] for x, y in true.values()]
            rows.append((list(true), list(found), near))
        return {name: values[0] for name, values in hota(rows, [0.5]).items()}

    def score_of_window(self, window: WindowTracks, cutting: Cutting) -> float:
        """hota of the tracks of one window by themselves."""
        first, last = (round(time * cutting.fps) for time in (window.start, window.end))
        return Truth(self.samples[first : last + 1]).score(window.tracks, cutting, first)["hota"]


def windows_row(scene: Scene, video: LongVideo | LiveVideo, call: Any) -> dict[str, Any]:
    """Scores and times of `count_long`."""
    started = time.perf_counter()
    partials = run_windows(video, CountTask(WHAT, joins=JOINS), call)
    records, results = zip(*((partial.record, partial.result) for partial in partials))
    seconds, result = time.perf_counter() - started, results[-1]
    truth = Truth.of_scene(scene, video.cutting)
    alone = float(np.mean([truth.score_of_window(window_tracks(record), video.cutting) for record in records]))
    score = truth.score(result.tracks, video.cutting)
    return {"count": result.count, "true": truth.count, **score, "alone": alone, "took": seconds}


# --- answers that are known ------------------------------------------------------------------------------------------


def oracle(scene: Scene, noise: float, missing: float, seed: int = 0) -> Callable[[Any, Clip | None], Reply]:
    """True answers about windows, with new numbers in each; places are off by `noise`, points missing by chance."""
    rng = np.random.default_rng(seed)

    def asked(prompt: Any, clip: Clip | None) -> Reply:
        if clip is None:
            raise ValueError("Only windows are asked about.")
        tracks: dict[int, dict[float, Place]] = {}
        for number in clip.times:
            for name, (x, y) in scene.seen_at(number).items():
                if rng.random() >= missing:
                    off = rng.normal(0, noise, 2) if noise else (0.0, 0.0)
                    place = float(np.clip(x + off[0], 0, 1)), float(np.clip(y + off[1], 0, 1))
                    tracks.setdefault(name, {})[round(number - clip.start, 1)] = place
        numbers = rng.permutation(len(tracks)) + 1
        return Reply(format_tracks({int(new): tracks[old] for new, old in zip(numbers, tracks)}, WHAT))

    return asked


def blank_frames(seconds: float) -> Iterator[tuple[float, np.ndarray]]:
    frame = np.zeros((2, 2, 3), np.uint8)
    for number in range(round(seconds * WINDOWS["fps"])):
        yield number / WINDOWS["fps"], frame


def stitching(hours: Sequence[float]) -> None:
    print("| answers about windows | length | objects | counted | HOTA of windows | HOTA | DetA | AssA | stitching |")
    print("|---|---|---|---|---|---|---|---|---|")
    kinds = {"exact": (0.0, 0.0), "off by 3 %": (0.03, 0.0), "off by 3 %, 5 % missing": (0.03, 0.05)}
    for length in hours:
        scene = Scene.from_seed(0, length * 3600)
        for name, (noise, missing) in kinds.items():
            row = windows_row(scene, LiveVideo(blank_frames(scene.seconds), **WINDOWS), oracle(scene, noise, missing))
            print(
                f"| {name} | {length:g} h | {row['true']} | {row['count']} | {row['alone']:.3f} | {row['hota']:.3f} "
                f"| {row['deta']:.3f} | {row['assa']:.3f} | {row['took']:.1f} s |",
                flush=True,
            )


# --- the miniature ---------------------------------------------------------------------------------------------------


def write_scene(scene: Scene, path: Path) -> Path:
    """H.264 in full colour, at the rate of the miniature's clips."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=CLIP_FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.options = "yuv444p", {"preset": "ultrafast", "g": "20", "crf": "8"}
        for number in range(round(scene.seconds * CLIP_FPS)):
            frame = av.VideoFrame.from_ndarray(scene.frame(number / CLIP_FPS), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def batched(model: Any, processor: Any, video: LongVideo, batch_size: int = 16) -> Callable[[Any, Clip | None], Reply]:
    """A model that has answered about all windows already, several at a time: on a CPU that is faster."""
    replies: dict[int, Reply] = {}
    for start in range(0, len(video), batch_size):
        clips = [video.clip(index) for index in range(start, min(start + batch_size, len(video)))]
        videos = [(list(clip.frames), clip.metadata) for clip in clips]
        for clip, answer in zip(
            clips, ask(model, processor, [track_prompt(WHAT)] * len(clips), videos=videos, **GREEDY)
        ):
            replies[clip.window.index] = Reply(answer.text, answer.truncated)
    return lambda prompt, clip: replies[clip.window.index]


def whole_row(scene: Scene, video: LongVideo, call: Any, num_frames: int | None) -> dict[str, Any]:
    """Scores of one answer about the whole clip, from `num_frames` frames; None for every sample."""
    cutting = video.cutting
    every = cutting.num_samples(scene.seconds)
    fps = cutting.fps if num_frames is None else num_frames / scene.seconds
    video.cutting = Cutting(window=scene.seconds, overlap=0.0, fps=fps)
    started = time.perf_counter()
    clip = video.clip(0)
    reply = call(track_prompt(WHAT), clip)
    took = time.perf_counter() - started
    video.cutting = cutting
    grounding = track_prompt(WHAT).parse(reply.text, clip.media)
    tracks = [
        LongTrack(
            number,
            track.label,
            tuple(
                TrackPoint(clip.times[point.frame.sampled_index], point.x_norm, point.y_norm)
                for point in track.points
                if point.frame is not None
            ),
        )
        for number, track in enumerate(grounding.tracks)
    ]
    truth = Truth.of_scene(scene, cutting)
    score = truth.score(tracks, cutting)
    return {"count": len(tracks), "true": truth.count, **score, "took": took, "frames": num_frames or every}


def miniature(seconds: float, seeds: Sequence[int]) -> None:
    from miniature import native
    from miniature.evaluate import load

    model, processor = load(native.CHECKPOINT)
    torch.set_num_threads(1)
    call = model_call(model, processor, {}, GREEDY)
    print("| scene | asked | objects | counted | HOTA of windows | HOTA | DetA | AssA | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in seeds:
        scene = Scene.from_seed(seed, seconds)
        with tempfile.TemporaryDirectory() as folder:
            path = write_scene(scene, Path(folder) / "scene.mp4")
            with LongVideo(path, **WINDOWS) as video:
                started = time.perf_counter()
                answered = batched(model, processor, video)
                took = time.perf_counter() - started
                row = windows_row(scene, video, answered)
                rows = {f"{len(video)} windows": {**row, "took": row["took"] + took}}
                if seconds <= MAX_WHOLE_SECONDS:
                    rows["whole, 6 frames"] = whole_row(scene, video, call, 6)
                    rows["whole, every sample"] = whole_row(scene, video, call, None)
                rows["true answers"] = windows_row(scene, video, oracle(scene, 0.0, 0.0))
        for name, row in rows.items():
            print(
                f"| {seed}, {seconds:g} s | {name} | {row['true']} | {row['count']} "
                f"| {row.get('alone', float('nan')):.3f} | {row['hota']:.3f} "
                f"| {row['deta']:.3f} | {row['assa']:.3f} | {row['took']:.1f} s |",
                flush=True,
            )


# --- reading ---------------------------------------------------------------------------------------------------------

HEIGHT, WIDTH, FILE_FPS, GROUP = 120, 160, 25, 50
READING = ("windows", "wanted", "opened anew")
MAX_ANEW_MINUTES = 10.0  # up to which each window is also read by a video of its own


def write_long(path: Path, minutes: float, fps: int = FILE_FPS, height: int = HEIGHT, width: int = WIDTH) -> Path:
    """Half a minute of a moving view over noise, its packets repeated."""
    import av

    seconds = 30
    view = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8 + 100, 3), dtype=np.uint8)
    view = view.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": str(GROUP), "tune": "zerolatency", "crf": "30"}
        packets = []
        for number in range(seconds * fps):
            pixels = np.ascontiguousarray(view[:, number : number + width])
            packets += stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
        packets += stream.encode(None)
        kept = [(bytes(packet), packet.pts, packet.dts, packet.time_base, packet.is_keyframe) for packet in packets]
        for repeat in range(round(minutes * 60 / seconds)):
            for content, pts, dts, time_base, is_keyframe in kept:
                packet: Any = av.Packet(content)
                shift = round(Fraction(repeat * seconds) / time_base)
                packet.stream, packet.time_base, packet.is_keyframe = stream, time_base, is_keyframe
                packet.pts, packet.dts = pts + shift, dts + shift
                container.mux(packet)
    return path


def read(path: Path, how: str, fps: float) -> dict[str, float]:
    """What one process takes to read the frames of all windows: CPU seconds of all threads, and peak bytes."""
    from molmo2.video.decoding.opening import open_video

    cutting = Cutting(fps=fps)
    started = time.process_time()
    opened = started
    if how == "windows":
        with LongVideo(path, fps=fps) as video:
            opened = time.process_time()
            frames = sum(1 for clip in video.clips() for _ in clip.frames)
    elif how == "wanted":
        with open_video(path, "pyav") as reader:
            opened = time.process_time()
            times = np.arange(cutting.num_samples(reader.timeline.duration_seconds)) / fps
            frames = sum(1 for _ in reader.frames(reader.timeline.frames_at(times)))
    else:
        with open_video(path, "pyav") as reader:
            num_windows = cutting.num_windows(cutting.num_samples(reader.timeline.duration_seconds))
        frames = 0
        for index in range(num_windows):
            with LongVideo(path, fps=fps) as video:
                frames += sum(1 for _ in video.clip(index).frames)
    ended = time.process_time()
    # The kernel's own mark: what `getrusage` tells includes the process from which this one was started.
    status = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    peak = float(status.group(1)) * 1024 if status else float("nan")
    return {"seconds": ended - started, "opening": opened - started, "peak": peak, "frames": float(frames)}


def reading(minutes: Sequence[float], fps: float, rounds: int, file_fps: int = FILE_FPS) -> None:
    print("| length | read | opening | CPU time | of the wanted frames | peak |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for length in minutes:
            path = write_long(Path(folder) / "long.mp4", length, file_fps)
            found: dict[str, list[dict[str, float]]] = {}
            for _ in range(rounds):
                for how in READING if length <= MAX_ANEW_MINUTES else READING[:2]:
                    command = [sys.executable, "-m", "benchmarks.long_video", "read", str(path), how, str(fps)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
                    found.setdefault(how, []).append(json.loads(done.stdout))
            best = {how: min(rows, key=lambda row: row["seconds"]) for how, rows in found.items()}
            for how, row in best.items():
                print(
                    f"| {length:g} min | {how} | {row['opening']:.2f} s | {row['seconds']:.2f} s "
                    f"| {row['seconds'] / best['wanted']['seconds']:.2f} | {row['peak'] / 1e6:.0f} MB |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("stitching")
    own.add_argument("--hours", type=float, nargs="+", default=[1.0, 3.0])
    own = commands.add_parser("miniature")
    own.add_argument("--seconds", type=float, default=60.0)
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    own = commands.add_parser("reading")
    own.add_argument("--minutes", type=float, nargs="+", default=[10.0, 60.0])
    own.add_argument("--fps", type=float, default=2.0, help="samples a second")
    own.add_argument("--file-fps", type=int, default=FILE_FPS, help="frames a second of the file")
    own.add_argument("--rounds", type=int, default=2)
    own = commands.add_parser("read", help="one process of `reading`")
    own.add_argument("path", type=Path)
    own.add_argument("how", choices=READING)
    own.add_argument("fps", type=float)
    given = parser.parse_args()
    if given.command == "stitching":
        stitching(given.hours)
    elif given.command == "miniature":
        miniature(given.seconds, given.seeds)
    elif given.command == "reading":
        reading(given.minutes, given.fps, given.rounds, given.file_fps)
    else:
        print(json.dumps(read(given.path, given.how, given.fps)))


if __name__ == "__main__":
    main()
