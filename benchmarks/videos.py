"""Clips: what the video processor costs beside decoding the frames that it takes."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Goal, Side, Work, fastest, row
from benchmarks.media import FRAMES_PER_SECOND, clip
from benchmarks.sides import video_processor

BOUND = "the wanted frames decoded to RGB by whichever of decord, torchcodec and PyAV is fastest"
REACH = (Goal(1.25, "bound"), Goal(200e6, "over output", "peak"))


def _decord(path: str, wanted: np.ndarray) -> None:
    """One frame at a time, those between skipped: nothing is converted that is not wanted."""
    import decord

    reader, place = decord.VideoReader(path), 0
    for index in wanted.tolist():
        if index > place:
            reader.skip_frames(index - place)
        reader.next().asnumpy()
        place = index + 1


def _torchcodec(path: str, wanted: np.ndarray) -> None:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, seek_mode="approximate", num_ffmpeg_threads=0)
    for index in wanted.tolist():
        decoder.get_frame_at(index)


def _pyav(path: str, wanted: np.ndarray) -> None:
    import av

    remaining = set(wanted.tolist())
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index in remaining:
                frame.to_ndarray(format="rgb24")


DECODERS = (_decord, _torchcodec, _pyav)
# Not installed, or without the libraries that it needs.
NO_DECODER = (ImportError, OSError, RuntimeError)


def _fastest(path: str, wanted: np.ndarray) -> Work:
    """The fastest decoder here."""
    decode = fastest(DECODERS, lambda decode: decode(path, wanted), NO_DECODER)
    return lambda: decode(path, wanted)


def _native_with_pyav(processor: Any, path: str, num_frames: int) -> Work:
    """The native processor with frames that the library's own loader reads by PyAV."""
    from transformers.video_utils import load_video

    def work() -> dict[str, Any]:
        frames, metadata = load_video(path, num_frames=num_frames, backend="pyav")
        output = processor([frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
        return {name: value for name, value in output.items() if name != "video_metadata"}

    return work


def _preprocessing(side: Side, path: Path, num_frames: int, seconds: int) -> Work:
    if side.is_bound:
        return _fastest(str(path), np.linspace(0, seconds * FRAMES_PER_SECOND - 1, num_frames).round().astype(int))
    processor: Any = video_processor(side)
    options = {"num_frames": num_frames, "max_fps": -(-num_frames // seconds), "return_tensors": "pt"}
    try:
        warm_up = clip(side, 96, 128, seconds=2)
        processor(str(warm_up), **{**options, "num_frames": 2})
    except ImportError:  # torchcodec, the only decoder it takes by itself, does not load beside every torch
        return _native_with_pyav(processor, str(path), num_frames)
    return lambda: dict(processor(str(path), **options))


def _register(name: str, height: int, width: int, num_frames: int) -> None:
    @row(f"clip-{name}-{num_frames}", f"64 s clip of {name}, {num_frames} frames", bound=BOUND, goals=REACH)
    def prepare(side: Side) -> Work:
        seconds = side.pick(64, 8)
        return _preprocessing(
            side, clip(side, height, width, seconds), side.pick(num_frames, num_frames // 8), seconds
        )


for _name, _height, _width in (("720p", 720, 1280), ("1080p", 1080, 1920)):
    for _num_frames in (128, 384):
        _register(_name, _height, _width, _num_frames)
