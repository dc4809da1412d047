"""Every image and video file there is, through messages: what comes out of it, or what is said about it.

Small files of the repository always run; those beside the checkout run where they are.
"""

import importlib
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from molmo2.video.decoding.backends import BACKENDS, VideoDecodeError
from support.golden_cases import EMBEDDED, FULL
from support.golden_processor import build_processor, decode

CLIPS = Path(__file__).resolve().parent.parent / "data" / "videos"
MEDIA = FULL.parent / "media"
IMAGE_SUFFIXES = (".jpg", ".png", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".mp3", ".gif")

# One frame of 98 pixels is 3 x 3 tokens; images are cut into at most 4 crops.
SMALL = {
    "image_processor_init": {"size": {"height": 98, "width": 98}, "overlap_margins": [2, 2], "max_crops": 4},
    "video_processor_init": {"size": {"height": 98, "width": 98}, "num_frames": 4},
}


def is_usable(backend):
    """Decoders bring native libraries, which may be missing although the package is there."""
    try:
        importlib.import_module({"decord": "decord", "torchcodec": "torchcodec.decoders", "pyav": "av"}[backend])
    except Exception:
        return False
    return True


USABLE = [backend for backend in BACKENDS if is_usable(backend)]


def files(suffixes, *folders):
    """All files of some kinds; of those with the same name the one of the first folder."""
    found = {}
    for folder in folders:
        for file in sorted(folder.iterdir() if folder.is_dir() else []):
            if file.suffix in suffixes:
                found.setdefault(file.name, file)
    return list(found.values())


IMAGES = files(IMAGE_SUFFIXES, MEDIA, FULL / "media", EMBEDDED / "media")
# Two different files are called vfr.mp4.
VIDEOS = files(VIDEO_SUFFIXES, CLIPS, EMBEDDED / "media", MEDIA, FULL / "media")
VIDEOS += [MEDIA / "vfr.mp4"] if MEDIA.is_dir() else []


def ask(kind, file, **options):
    part = {"type": kind, kind: str(file)}
    return build_processor(SMALL).apply_chat_template(
        [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


# --- images ----------------------------------------------------------------------------------------------------------

# Rows and columns of tokens of the crops, for images that do not become 5 x 5.
CROP_TOKENS = {
    "nasa_frame_palette.png": [4, 7],
    "nasa_frame_rgba.png": [4, 7],
    "strip_900x30.jpg": [4, 4],
    "tiny_5x3.png": [4, 4],
}


@pytest.mark.skipif(not IMAGES, reason="the reference data beside the checkout is not there")
@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_every_image_file(file):
    output = ask("image", file)
    assert output["image_grids"].tolist() == [[4, 4, *CROP_TOKENS.get(file.name, [5, 5])]]
    crops = output["image_num_crops"].item()
    assert output["pixel_values"].shape == (crops, 49, 588)
    assert output["pixel_values"].abs().max() <= 1
    assert len(output["image_token_pooling"]) == decode(output["input_ids"][0].tolist()).count("<im_patch>")


# --- videos ----------------------------------------------------------------------------------------------------------

# Times asked for and frames shown, with at most 4 frames and 2 per second.
SHOWN = {
    "anim.gif": ("0.0 0.3", [0, 2]),
    "av1_video.mkv": ("0.0 1.7 3.3 5.0", [0, 41, 83, 124]),
    "cfr1.mp4": ("0.0 2.0 4.0 6.0", [0, 2, 4, 5]),
    "cfr10.mp4": ("0.0 1.7 3.5 5.2", [0, 17, 34, 51]),
    "cfr23976.mp4": ("0.0 1.4 2.8 4.2", [0, 33, 67, 100]),
    "cfr2997.mp4": ("0.0 0.8 1.7 2.5", [0, 25, 50, 74]),
    "cfr30.mp4": ("0.0 1.1 2.1 3.2", [0, 31, 63, 94]),
    "flipping_a_pancake.mkv": ("0.0 3.4 6.9 10.3", [0, 103, 206, 309]),
    "h264_10bits.mp4": ("0.0 0.5 1.0", [0, 15, 29]),
    "h265_video.mp4": ("0.0 0.5 1.0", [0, 5, 9]),
    "long5.mp4": ("0.0 26.7 53.3 80.0", [0, 133, 266, 399]),
    "nasa_13013.mp4": ("0.0 4.3 8.7 13.0", [0, 130, 260, 389]),
    "odd_aspect_16x200.mp4": ("0.0 0.5 1.0", [0, 6, 11]),
    "odd_size.mp4": ("0.0 0.7 1.3 2.0", [0, 10, 20, 29]),
    "one_frame.mp4": ("0.0 0.0", [0, 0]),
    "single_frame.mp4": ("0.0 0.0", [0, 0]),
    "start_at_5s.mkv": ("0.0 1.3 2.7 4.0", [0, 40, 80, 120]),
    "start_offset.mp4": ("0.0 1.2 2.3 3.5", [0, 23, 46, 69]),
    "truncated_pancake.mkv": ("0.0 1.9 3.8 5.7", [0, 57, 114, 170]),
    "two_frames.mp4": ("0.0 0.1", [0, 1]),
    "unordered.mov": ("0.0 0.1", [0, 3]),
    "video_180.mov": ("0.0 0.1", [0, 2]),
    "video_270.mov": ("0.0 0.1", [0, 2]),
    "video_90.mov": ("0.0 0.1", [0, 2]),
}
SHOWN_BY_FOLDER = {
    ("videos", "vfr.mp4"): ("0.0 2.1 4.2 6.3", [0, 13, 27, 45]),
    ("media", "vfr.mp4"): ("0.0 2.2 4.3 6.5", [0, 35, 48, 59]),
}
# What each backend says of what it cannot read.
REFUSED = {
    "audio_only.mp4": {
        "decord": "cannot find video stream",
        "torchcodec": "no specified stream",
        "pyav": "it has no video track",
    },
    "corrupted.mp4": {  # decord's threads may report the damage while an earlier frame is waited for
        "decord": r"frame \d+ of 50 \([12]\.\d00 s\) cannot be decoded",
        "torchcodec": r"frame \d+ of 50 \(2\.\d00 s\) cannot be decoded",
        "pyav": r"frame \d+ of 50 \(2\.\d00 s\) cannot be decoded",
    },
    "nasa_audio_only.mp3": {
        "decord": "cannot find video stream",
        "torchcodec": "no specified stream",
        "pyav": "it has no video track",
    },
    "odd_aspect_16x200.mp4": {"decord": r"its frames have the shape \(200, 16, \d+\), expected \(height, width, 3\)"},
    "truncated_nasa.mp4": {
        "decord": "Error reading",
        "torchcodec": "Could not open input file",
        "pyav": "Invalid data found",
    },
}
ADVICE = "Check that the file is complete and has a video track"


def assert_shown(file, output, backend):
    seconds, frames = SHOWN_BY_FOLDER.get((file.parent.name, file.name)) or SHOWN[file.name]
    (metadata,) = output["video_metadata"]
    assert re.findall(r"(\d+\.\d) <frame_start>", decode(output["input_ids"][0].tolist())) == seconds.split()
    assert metadata.source_frame_indices == frames
    assert metadata.video_backend == backend
    assert output["video_grids"].tolist() == [[len(frames), 3, 3]]
    assert output["pixel_values_videos"].shape == (len(frames), 49, 588)
    assert torch.isfinite(output["pixel_values_videos"]).all()
    for place in range(1, len(frames)):
        if frames[place] == frames[place - 1]:
            assert torch.equal(*output["pixel_values_videos"][place - 1 : place + 1])


def names(file):
    return f"{file.parent.name}-{file.name}"


@pytest.mark.skipif(not USABLE, reason="no decoder can be loaded")
@pytest.mark.parametrize("file", VIDEOS, ids=names)
def test_every_video_file(file):
    """The first backend that can read the file does; if none can, the reasons of all are told."""
    reasons = REFUSED.get(file.name, {})
    able = [backend for backend in USABLE if backend not in reasons]
    if able:
        assert_shown(file, ask("video", file, return_metadata=True), backend=able[0])
        return
    with pytest.raises(VideoDecodeError) as error:
        ask("video", file)
    message = str(error.value)
    assert message.startswith(f"No video backend could read '{file}':\n")
    for backend in USABLE:
        assert re.search(f"\n  {backend}: .*{reasons[backend]}", message)
    assert ADVICE in message


ASKED_FOR = [
    file for file in VIDEOS if file.name in ("cfr30.mp4", "start_offset.mp4", *REFUSED)
]  # what differs between backends


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", ASKED_FOR, ids=names)
def test_a_backend_that_is_asked_for_is_the_only_one(file, backend):
    """That all files look alike to all backends is tested where they are decoded."""
    if backend not in USABLE:
        pytest.skip(f"{backend} cannot be loaded")
    reason = REFUSED.get(file.name, {}).get(backend)
    if reason is None:
        assert_shown(file, ask("video", file, video_backend=backend, return_metadata=True), backend)
        return
    with pytest.raises(VideoDecodeError) as error:
        ask("video", file, video_backend=backend)
    lines = str(error.value).splitlines()
    assert lines[0] == f"No video backend could read '{file}':"
    assert re.match(f"  {backend}: .*{reason}", lines[1])
    assert lines[2].startswith(ADVICE)


# --- the wrong kind of file ------------------------------------------------------------------------------------------


def test_a_video_is_no_image():
    file = EMBEDDED / "media" / "cfr30.mp4"
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'images[0]: the file {str(file)!r} cannot be decoded as an')}"
    ):
        ask("image", file)


def test_a_image_is_no_video(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "still.png")
    with pytest.raises(
        VideoDecodeError, match=r"still\.png' is an image \(PNG\), not a video\. Pass it as an image\."
    ):
        ask("video", tmp_path / "still.png")


def test_an_animation_is_both():
    """As an image it is its first frame."""
    file = EMBEDDED / "media" / "anim.gif"
    assert ask("image", file)["image_grids"].tolist() == [[4, 4, 4, 4]]
    assert ask("video", file)["video_grids"].tolist() == [[2, 3, 3]]


@pytest.mark.parametrize(("kind", "file"), [("image", "absent.png"), ("video", "absent.mp4")])
def test_files_that_are_not_there(kind, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=file):
        ask(kind, file)
