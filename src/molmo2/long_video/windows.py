"""How a long video is cut: windows of samples that overlap, as numbers.

Sample n is taken n / fps seconds after the first frame, whatever the window: the samples that two windows share have
the same times, so that what both say about them can be compared.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A part of a video: `index` counts windows from 0, `first` and `last` are the numbers of its samples."""

    index: int
    first: int
    last: int


@dataclass(frozen=True)
class Cutting:
    """The windows of a video.

    Example: 10 s at 1 sample a second in windows of 6 s that share 2 s are samples 0..5 and 4..9.

    Attributes:
        window: Length of a window in seconds.
        overlap: Seconds that a window shares with the one before it.
        fps: Samples a second.

    Raises:
        ValueError: The numbers make no windows; the message says why.
    """

    window: float = 30.0
    overlap: float = 4.0
    fps: float = 2.0

    def __post_init__(self) -> None:
        for name in ("window", "fps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value!r}, but it has to be a positive number.")
        if not 0 <= self.overlap < self.window:
            raise ValueError(
                f"`overlap` is {self.overlap!r} s of windows of {self.window!r} s. It has to be 0 or more, and "
                "shorter than a window."
            )
        if self.step < 1:
            raise ValueError(
                f"Windows would begin {self.window - self.overlap:g} s apart, less than one sample at {self.fps:g} "
                "per second. Pass longer windows, a shorter `overlap` or a higher `fps`."
            )

    @property
    def step(self) -> int:
        """Samples from the start of a window to that of the next."""
        return round((self.window - self.overlap) * self.fps)

    @property
    def shared(self) -> int:
        """Samples that a window shares with the one before it."""
        return round(self.overlap * self.fps)

    @property
    def size(self) -> int:
        """Samples of a whole window."""
        return self.step + self.shared

    def seconds(self, sample: int) -> float:
        """Seconds from the first frame to a sample."""
        return sample / self.fps

    def num_samples(self, duration_seconds: float) -> int:
        """Samples of a video of this length: those before its end, one at least."""
        return max(1, math.ceil(duration_seconds * self.fps - 1e-6))

    def num_windows(self, num_samples: int) -> int:
        """Number of windows that cover `num_samples`; each has at least one that the window before it lacks."""
        return 1 + math.ceil(max(0, num_samples - self.size) / self.step)

    def window_at(self, index: int, num_samples: int | None = None) -> Window:
        """The window with this number; the end of the video cuts it off if `num_samples` is known."""
        first = index * self.step
        last = first + self.size - 1
        return Window(index, first, last if num_samples is None else min(last, num_samples - 1))


def clock(seconds: float) -> str:
    """`h:mm:ss` of a time, the fraction cut off."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
