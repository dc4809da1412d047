"""What limits, checks and plain text cost: preprocessing beside itself without them, in turns.

    git worktree add /tmp/before 4be40e6^            # the last commit without limits on media
    python -m benchmarks.hardening --before /tmp/before/src

Each side is a process that is kept; rounds go from one to the other and back. Times are the least of all rounds, and
the ratio is that of these; the median of the ratios of single rounds stands beside it, which moves with whatever else
the machine does. Times are
CPU time where a process works alone, time on the clock where a decoder works in a child. Goals: at most 1.03 of the
commit before, 1.02 for text that stays text, and 1.1 for videos in a process with a deadline.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
QUESTION = "Point to every boat, and say how many people are in each of them. " * 4
# Row -> the two sides, the goal, and whether the clock counts (else CPU time).
ROWS: dict[str, tuple[str, str, float, bool]] = {
    "1080p JPEG file": ("before", "now", 1.03, False),
    "1080p PNG bytes": ("before", "now", 1.03, False),
    "8 photos of 640x480": ("before", "now", 1.03, False),
    "question and photo, whole prompt": ("before", "now", 1.03, False),
    "360p clip, 32 frames, PyAV": ("before", "now", 1.03, True),
    "360p clip, 32 frames, decord": ("before", "now", 1.1, True),
    "question and photo, plain text": ("special tokens allowed", "now", 1.02, False),
    "360p clip, 32 frames, PyAV, isolated": ("now", "isolated", 1.1, True),
    "720p clip, 32 frames, PyAV, isolated": ("now", "isolated", 1.1, True),
}


def works(side: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """What a side runs, by row."""
    from transformers import AutoTokenizer

    from molmo2.image.processing import Molmo2ImageProcessor
    from molmo2.processing.processor import Molmo2Processor
    from molmo2.video.processing import Molmo2VideoProcessor

    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "tests" / "data" / "golden" / "tokenizer")
    template = (REPOSITORY / "chat_template.jinja").read_text(encoding="utf-8")
    images, videos = Molmo2ImageProcessor(), Molmo2VideoProcessor()
    processor = Molmo2Processor(images, videos, tokenizer, chat_template=template)
    if side == "isolated":
        from molmo2 import MediaLimits

        videos.limits = MediaLimits(decode_seconds=600)
    photo, content = str(folder / "photo.jpg"), (folder / "photo.png").read_bytes()
    small = [str(folder / f"small_{number}.jpg") for number in range(8)]
    parts = [{"type": "image", "image": photo}, {"type": "text", "text": QUESTION}]
    options = {"allow_special_tokens": True} if side == "special tokens allowed" else {}

    def prompt() -> Any:
        return processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            **options,
        )

    def clip(name: str, backend: str) -> Callable[[], Any]:
        videos_of_backend = Molmo2VideoProcessor(video_backend=backend)
        if side == "isolated":
            videos_of_backend.limits = videos.limits
        return lambda: videos_of_backend(str(folder / name), num_frames=32)

    return {
        "1080p JPEG file": lambda: images(photo),
        "1080p PNG bytes": lambda: images(content),
        "8 photos of 640x480": lambda: images(small),
        "question and photo, whole prompt": prompt,
        "question and photo, plain text": prompt,
        "360p clip, 32 frames, PyAV": clip("640x360.mp4", "pyav"),
        "360p clip, 32 frames, decord": clip("640x360.mp4", "decord"),
        "360p clip, 32 frames, PyAV, isolated": clip("640x360.mp4", "pyav"),
        "720p clip, 32 frames, PyAV, isolated": clip("1280x720.mp4", "pyav"),
    }


def serve(side: str, folder: Path) -> None:
    """What a child runs: a row for each line, answered by its seconds on the clock and of CPU."""
    by_row = works(side, folder)
    for line in sys.stdin:
        started, spent = time.perf_counter(), time.process_time()
        by_row[line.strip()]()
        print(json.dumps([time.perf_counter() - started, time.process_time() - spent]), flush=True)


def make_media(folder: Path) -> None:
    from benchmarks.media import _write_clip, photo

    photo(1080, 1920).save(folder / "photo.jpg", quality=90)
    file = io.BytesIO()
    photo(1080, 1920).save(file, "PNG", compress_level=1)
    (folder / "photo.png").write_bytes(file.getvalue())
    for number in range(8):
        photo(480, 640, number).save(folder / f"small_{number}.jpg", quality=90)
    for height, width in ((360, 640), (720, 1280)):
        _write_clip(folder / f"{width}x{height}.mp4", height, width, seconds=8)


class Child:
    """The process of a side."""

    def __init__(self, side: str, source: Path, folder: Path) -> None:
        code = (
            f"import sys; sys.path[:0] = [{str(source)!r}, {str(REPOSITORY)!r}]\n"
            f"from pathlib import Path\nfrom benchmarks.hardening import serve\nserve({side!r}, Path({str(folder)!r}))"
        )
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)

    def run(self, row: str) -> tuple[float, float]:
        """Seconds on the clock and of CPU."""
        print(row, file=self.process.stdin, flush=True)
        wall, cpu = json.loads(self.process.stdout.readline())
        return wall, cpu

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="the folder `src` of the commit before; without it, fewer rows")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_media(folder)
        children: dict[str, Child] = {}
        print("| row | beside | now | ratio | of rounds | goal |\n|---|---|---|---|---|---|")
        for row, (other, ours, goal, by_clock) in ROWS.items():
            if other == "before" and given.before is None:
                continue
            for side in (other, ours):
                if side not in children:
                    source = given.before if side == "before" else REPOSITORY / "src"
                    children[side] = Child(side, source, folder)
            pairs = []
            for number in range(given.rounds + 2):  # the first two are for imports and caches
                order = (other, ours) if number % 2 else (ours, other)
                found = {side: children[side].run(row)[0 if by_clock else 1] for side in order}
                pairs.append((found[other], found[ours]))
            beside, now = (1000 * min(seconds) for seconds in zip(*pairs[2:]))
            of_rounds = statistics.median(ours / other for other, ours in pairs[2:])
            mark = "✓" if now / beside <= goal else "✗"
            ratios = f"{now / beside:.3f} | {of_rounds:.3f}"
            print(
                f"| {row} | {other}: {beside:.1f} ms | {ours}: {now:.1f} ms | {ratios} | {goal} {mark} |",
                flush=True,
            )
        for child in children.values():
            child.end()


if __name__ == "__main__":
    main()
