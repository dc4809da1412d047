"""Plans of videos without decoding them, to know the size of a request before it is made.

(plan_of,) = probe_videos(processor.video_processor, "clip.mp4")
plan, times = plan_of(num_frames=64, clip=(10, 20))
"""

from collections.abc import Callable
from typing import Any

from transformers.video_utils import VideoMetadata

from molmo2.image.geometry import VideoPlan
from molmo2.image.limits import MediaLimits, checked_limits
from molmo2.image.loading import is_encoded
from molmo2.video.decoding.backends import decode_video
from molmo2.video.decoding.timeline import VideoTimeline
from molmo2.video.loading import ReadingOptions, VideoItem, file_times, list_videos, read_video, video_source
from molmo2.video.processing import Molmo2VideoProcessor


def probe_videos(
    processor: Molmo2VideoProcessor, videos: Any, video_metadata: Any = None, limits: MediaLimits | None = None
) -> list[Callable[..., tuple[VideoPlan, list[float]]]]:
    """What `processor` would take of videos.

    Args:
        videos, video_metadata, limits: As for `preprocess`.
    Returns:
        For each video a function from options of `preprocess` to its plan and its sampled times in seconds.
    Raises:
        FileNotFoundError, TypeError, ValueError: As `preprocess`.
    """
    accepted = checked_limits(processor.limits if limits is None else limits)

    def probe(item: VideoItem) -> Callable[..., tuple[VideoPlan, list[float]]]:
        sampled_times = _sampled_times(item, accepted)

        def plan(**overrides: Any) -> tuple[VideoPlan, list[float]]:
            options = processor._options(overrides)
            times = sampled_times(options.reading)
            return options.plan(len(times)), times

        return plan

    return [probe(item) for item in list_videos(videos, video_metadata)]


def _sampled_times(item: VideoItem, limits: MediaLimits) -> Callable[[ReadingOptions], list[float]]:
    """The sampled times of a video for any options; of a file only the first frame is decoded, for its size."""
    if not is_encoded(item.video):
        return lambda options: read_video(item, options, lambda frames, count: None)[1].timestamps
    source = video_source(item, limits)
    timelines: dict[str, VideoTimeline] = {}

    def times(options: ReadingOptions) -> list[float]:
        key = repr(options.backend)
        if key not in timelines:
            with decode_video(source, lambda reader: reader, options.backend) as reader:
                timelines[key] = reader.timeline
        found = timelines[key]
        about = VideoMetadata(total_num_frames=found.num_frames, fps=found.fps, duration=found.duration_seconds)
        return file_times(item, found, about, options).tolist()

    return times
