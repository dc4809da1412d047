"""Hours of video: windows that overlap, asked one by one, and merged into one result.

    from molmo2 import LongVideo, track_long

    with LongVideo("day.mp4", window=30.0, overlap=4.0, fps=2.0) as video:
        found = track_long(model, processor, video, "dog", journal="dog.jsonl", progress=True)

`stitch` and `merge_events` are pure functions of what windows say.
"""

from molmo2.long_video.events import EventMerger, LongEvent, MergeSettings, WindowEvents, merge_events
from molmo2.long_video.run import (
    Partial,
    ask_long,
    count_long,
    fit_windows,
    localize_long,
    model_call,
    run_windows,
    stream_long,
    track_long,
)
from molmo2.long_video.source import Clip, LiveVideo, LongVideo
from molmo2.long_video.tasks import (
    AskTask,
    CountTask,
    LocalizeTask,
    LongAnswer,
    LongCount,
    LongEvents,
    LongTracks,
    Note,
    Reply,
    Task,
    TrackTask,
)
from molmo2.long_video.tracks import (
    Join,
    JoinSettings,
    LongTrack,
    Stitcher,
    TrackPoint,
    WindowTrack,
    WindowTracks,
    as_grounding,
    stitch,
)
from molmo2.long_video.windows import Cutting, Window

__all__ = [
    "AskTask",
    "Clip",
    "CountTask",
    "Cutting",
    "EventMerger",
    "Join",
    "JoinSettings",
    "LiveVideo",
    "LocalizeTask",
    "LongAnswer",
    "LongCount",
    "LongEvent",
    "LongEvents",
    "LongTrack",
    "LongTracks",
    "LongVideo",
    "MergeSettings",
    "Note",
    "Partial",
    "Reply",
    "Stitcher",
    "Task",
    "TrackPoint",
    "TrackTask",
    "Window",
    "WindowEvents",
    "WindowTrack",
    "WindowTracks",
    "as_grounding",
    "ask_long",
    "count_long",
    "fit_windows",
    "localize_long",
    "merge_events",
    "model_call",
    "run_windows",
    "stitch",
    "stream_long",
    "track_long",
]
