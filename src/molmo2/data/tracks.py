"""Rows with tracks: VideoTrack, and the academic sets that were published anew in one form. Coordinates are pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

from molmo2.data.media import MediaReference
from molmo2.data.pointing import OUTSIDE
from molmo2.data.queries import Draw, Family, Item, Query, Row, Settings, label_problem, records
from molmo2.data.styles import draw_prompt, draw_track_prompt
from molmo2.grounding.format import format_points, format_tracks

PER_FRAME, START_END, SINGLE = (
    "video_point_track_per_frame",
    "video_point_track_start_end",
    "video_single_point_track_start_end",
)
TASKS = ("track", "ground", "single_point_track")

Track = dict[float, tuple[float, float]]  # seconds -> (x, y) in pixels


def frame_step(fps: float, sampling_fps: float) -> int | None:
    """Frames from one sampled frame to the next; None if the sampling rate does not divide the frame rate."""
    step = round(fps / sampling_fps)
    return step if step >= 1 and abs(step * sampling_fps - fps) < 1e-6 else None


def sampled_tracks(row: Row, sampling_fps: float) -> dict[int, Track]:
    """The tracks of a row of VideoTrack by the place of their object in `mask_id`; hidden objects are left out."""
    step = frame_step(row["fps"], sampling_fps) or 1
    by_object = {entry["object_id"]: entry["points"] for entry in records(row["points"], "object_id", "points")}
    return {
        number: {
            frame / row["fps"]: (at[0], at[1])
            for frame, at in enumerate(by_object.get(name, ()))
            if frame % step == 0 and at is not None
        }
        for number, name in enumerate(row["mask_id"])
    }


def sampled_trajectories(row: Row, sampling_fps: float) -> dict[int, Track]:
    """The tracks of a row of an academic set by id; hidden (occluded) objects are left out of a frame."""
    step = frame_step(row["fps"], sampling_fps) or 1
    tracks: dict[int, Track] = {}
    for entry in records(row["frame_trajectories"], "frame", "time", "points"):
        for point in records(entry["points"], "id", "point"):
            if entry["frame"] % step == 0 and not point.get("occluded"):
                tracks.setdefault(point["id"], {})[entry["time"]] = (point["point"][0], point["point"][1])
    return tracks


def _lie_inside(tracks: Mapping[int, Track], size: tuple[float, float]) -> bool:
    return all(0 <= x <= size[0] and 0 <= y <= size[1] for track in tracks.values() for x, y in track.values())


def first_and_last(tracks: Mapping[int, Track]) -> dict[int, Track]:
    """Of each object the first and the last position."""
    return {
        number: {time: track[time] for time in (min(track), max(track))} for number, track in tracks.items() if track
    }


def _options(row: Row, settings: Settings) -> dict[str, Any]:
    return {"frame_sample_mode": "fps", "sampling_fps": _rate(row, settings)}


def _rate(row: Row, settings: Settings) -> float:
    """The rate of a row: its own, or that of the settings."""
    return row.get("sampling_fps") or settings.sampling_fps


# --- VideoTrack ------------------------------------------------------------------------------------------------------


def _video(row: Row) -> list[MediaReference]:
    return [MediaReference("video", row.get("clip") or row["video"], None, row)]


def _problem(row: Row, settings: Settings) -> str | None:
    if frame_step(row["fps"], settings.sampling_fps) is None:
        return f"{settings.sampling_fps:g} FPS do not divide the frame rate"
    tracks = sampled_tracks(row, settings.sampling_fps)
    return label_problem(row["exp"]) if _lie_inside(tracks, (row["w"], row["h"])) else OUTSIDE


def _read_video_tracks(rows: Sequence[Row], draw: Draw) -> Item:
    (row,) = rows
    fps, label = draw.settings.sampling_fps, " ".join(row["exp"].split())
    answer = format_tracks(sampled_tracks(row, fps), label, size=(row["w"], row["h"]))
    return Item([[Query(PER_FRAME, draw_track_prompt(label.rstrip("."), fps, draw.rng), answer)]])


# --- academic sets ---------------------------------------------------------------------------------------------------


def _academic_video(row: Row) -> list[MediaReference]:
    name = row.get("clip") or row.get("video_path") or row["video"]  # of molmo2-track-instruction, of TrackAny, of all
    return [MediaReference("video", name, None, row)]


def _academic_problem(row: Row, settings: Settings) -> str | None:
    if row["task"] not in TASKS:
        return f"the task is none of {', '.join(TASKS)}"
    if frame_step(row["fps"], _rate(row, settings)) is None:
        return "the sampling rate does not divide the frame rate"
    tracks = sampled_trajectories(row, _rate(row, settings))
    if row["task"] == "single_point_track" and sum(map(bool, tracks.values())) != 1:
        return "there is not one object to track from a point"
    return label_problem(row["expression"]) if _lie_inside(tracks, (row["width"], row["height"])) else OUTSIDE


def _read_academic_tracks(rows: Sequence[Row], draw: Draw) -> Item:
    (row,) = rows
    fps, label = _rate(row, draw.settings), " ".join(row["expression"].split())
    size = (row["width"], row["height"])
    tracks, prompt_label = sampled_trajectories(row, fps), label.rstrip(".")
    if row["task"] == "ground":
        style, question = START_END, draw_prompt(START_END, draw.rng, label=prompt_label)
        tracks = first_and_last(tracks)
    elif row["task"] == "single_point_track":
        (track,) = (track for track in tracks.values() if track)
        first = min(track)
        points = format_points({float(first): [track[first]]}, label, sizes=size)
        style, question = SINGLE, draw_prompt(SINGLE, draw.rng, points=points)
    else:
        style, question = PER_FRAME, draw_track_prompt(prompt_label, fps, draw.rng)
    return Item([[Query(style, question, format_tracks(tracks, label, size=size))]])


VIDEO_TRACKS = Family(_read_video_tracks, _video, (), _problem, _options)
ACADEMIC_TRACKS = Family(_read_academic_tracks, _academic_video, (), _academic_problem, _options)
