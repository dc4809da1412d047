"""What preprocessing holds besides its output: of images counted in allocations, of videos in resident memory.

Decoders allocate by themselves, which no counter in Python sees: videos are read in a process of their own, whose
high-water mark the kernel keeps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from molmo2.image.processing import Molmo2ImageProcessor
from support.all_allocations import AllAllocations

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# Prints the peak over what was resident before, and the size of the output. A clip of one frame comes first, so that
# libraries are loaded by then.
READ = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import conftest, torch
from benchmarks.memory import PeakMemory, held_bytes
from molmo2.video.processing import Molmo2VideoProcessor
torch.set_num_threads(1)
path, num_frames, backend = sys.argv[3], int(sys.argv[4]), sys.argv[5]
processor = Molmo2VideoProcessor(video_backend=backend, num_frames=num_frames, max_fps=1000)
processor(sys.argv[6], return_tensors="pt")
memory = PeakMemory("cpu")
output = processor(path, return_tensors="pt")
print(json.dumps([memory.peak_bytes(), held_bytes(dict(output)), len(output["pixel_values_videos"])]))
"""


# Prints the peak of fetching an image, what is held afterwards, and the peak of loading it. A small one comes first.
FETCH = """
import io, json, sys
sys.path[:0] = sys.argv[1:2]
from PIL import Image
from benchmarks.memory import PeakMemory, _status
from molmo2.image.loading import fetch_images, load_images
kind, side = sys.argv[2], int(sys.argv[3])
first, file = io.BytesIO(), io.BytesIO()
Image.linear_gradient("L").convert("RGB").save(first, kind)
Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, kind)
load_images(first.getvalue())
content, memory = file.getvalue(), PeakMemory("cpu")
image = fetch_images(content)
found = [memory.peak_bytes(), _status("VmRSS") - memory._before]
del image
memory = PeakMemory("cpu")
load_images(content)
print(json.dumps([*found, memory.peak_bytes()]))
"""


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_peak(photos: list[np.ndarray], max_crops: int) -> tuple[int, int]:
    """Bytes held at most, and bytes of the output."""
    processor = Molmo2ImageProcessor()
    with AllAllocations() as counted:
        output = processor(photos, max_crops=max_crops, return_tensors="pt")
    return counted.total_peak, sum(tensor.nbytes for tensor in output.values())


def test_the_count_sees_numpy_and_torch():
    import torch

    with AllAllocations() as counted:
        array = np.zeros(1_000_000, dtype=np.uint8)
        tensor = torch.zeros(2_000_000, dtype=torch.uint8)
        del array, tensor
    assert 3_000_000 <= counted.total_peak < 3_200_000


@pytest.mark.parametrize("number", [16, 32])
def test_many_photos_need_little_besides_their_output(number):
    peak, output = image_peak([photo(480, 640)] * number, 8)
    assert peak < 1.5 * output


@pytest.mark.parametrize("max_crops", [8, 24])
def test_a_large_photo_needs_little_besides_its_output(max_crops):
    """Neither the photo nor its canvas is ever there as floating point."""
    peak, output = image_peak([photo(1080, 1920)], max_crops)
    assert peak < 1.5 * output


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is the Linux kernel's")
@pytest.mark.parametrize(
    ("kind", "maximum", "held"),
    [("PNG", 10, 4), ("WEBP", 16, 4)],  # bytes a pixel, as SECURITY.md has them; 8 of WebP's are libwebp's canvases
)
def test_images_of_a_decoder_with_canvases_are_held_without_them(kind, maximum, held):
    side = 2048
    command = [sys.executable, "-c", FETCH, str(REPOSITORY), kind, str(side)]
    # Memory that is freed goes back to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    fetching, holding, loading = (number / side**2 for number in json.loads(done.stdout))
    assert 0.95 * held < holding < 1.1 * held
    assert max(fetching, loading) < 1.1 * maximum


def write_clip(path: Path, height: int, width: int, frames: int) -> Path:
    """H.264, 30 frames a second, a view that moves over noise."""
    av = pytest.importorskip("av")
    view = photo(height // 8, width // 8 + frames % 97 + 97).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": "30"}
        for number in range(frames):
            shown = np.ascontiguousarray(view[:, number % 97 : number % 97 + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is the Linux kernel's")
def test_clips_need_little_besides_their_output(tmp_path):
    """Decoded as a whole, the long clip would take 640 MB, and the wanted frames of the large one 300 MB.

    With PyAV, which reads long and large clips by default; decord decodes ahead of its reader.
    """
    first = write_clip(tmp_path / "first.mp4", 96, 128, 4)
    extra = {}
    for name, height, width, frames in (("short", 360, 640, 60), ("long", 360, 640, 900), ("large", 1080, 1920, 60)):
        clip = write_clip(tmp_path / f"{name}.mp4", height, width, frames)
        command = [sys.executable, "-c", READ, str(REPOSITORY), str(REPOSITORY / "tests"), str(clip), "48", "pyav"]
        done = subprocess.run([*command, str(first)], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        peak, output, found = json.loads(done.stdout)
        assert found == 48
        extra[name] = peak - output
    assert all(over < 200e6 for over in extra.values()), extra
    assert abs(extra["long"] - extra["short"]) < 20e6, extra
