"""Draws a run's log as curves: python -m miniature.curves RUN/log.jsonl curves.png"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Curve = Sequence[tuple[float, float]]  # (minutes, value)
INKS = ("#c0392b", "#2471a3", "#229954", "#b9770e", "#7d3c98", "#566573")
PANELS = {
    "First lesson: share of right guesses per patch": (
        ("patch_there", "patch_colour", "patch_kind", "patch_x1", "patch_x2"),
        (0, 1),
    ),
    "Second lesson: loss per answer token": (("images_loss", "clips_loss"), (0, 2)),
    "Second lesson: attention on what is asked about": (
        ("images_named", "images_written", "clips_named", "clips_written"),
        (0, 1),
    ),
    "Held-out answers": (("pointing", "count", "colour", "what", "none", "track error"), (0, 1)),
}
SMOOTHED = 5  # neighbouring entries whose mean is drawn; held-out scores are drawn as they are


@dataclass(frozen=True)
class Panel:
    """Where one set of curves is drawn, in pixels, and which values its edges mean."""

    left: int
    top: int
    width: int
    height: int
    minutes: float
    low: float
    high: float

    def place(self, minutes: float, value: float) -> tuple[float, float]:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.left + self.width * minutes / self.minutes, self.top + self.height * (1 - share)


def read_curves(log: Path) -> dict[str, Curve]:
    """Every number of the log over minutes, less what was lost when a run was resumed from a checkpoint."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("resumed"):
            curves = {name: [point for point in own if point[0] <= row["minutes"]] for name, own in curves.items()}
        for name, value in row.items():
            if name not in ("step", "minutes") and not isinstance(value, bool):
                curves.setdefault(name, []).append((row["minutes"], value))
    return curves


def smooth(curve: Curve) -> Curve:
    """Means of `SMOOTHED` neighbours."""
    window = range(len(curve))
    return [
        (curve[i][0], sum(value for _, value in part) / len(part))
        for i in window
        for part in [curve[max(0, i - SMOOTHED // 2) : i + SMOOTHED // 2 + 1]]
    ]


def draw_panel(canvas: ImageDraw.ImageDraw, panel: Panel, title: str, curves: dict[str, Curve]) -> None:
    """Frame, scale, curves and their names."""
    font = ImageFont.load_default(15)
    right, bottom = panel.left + panel.width, panel.top + panel.height
    canvas.text((panel.left, panel.top - 24), title, fill="black", font=font)
    for step in range(5):
        value = panel.low + (panel.high - panel.low) * step / 4
        y = panel.place(0, value)[1]
        canvas.line((panel.left, y, right, y), fill="#dddddd")
        canvas.text((panel.left - 8, y), f"{value:g}", fill="black", font=font, anchor="rm")
        minutes = panel.minutes * step / 4
        canvas.text((panel.place(minutes, 0)[0], bottom + 4), f"{minutes:.0f}", fill="black", font=font, anchor="ma")
    canvas.rectangle((panel.left, panel.top, right, bottom), outline="black")
    for number, (name, curve) in enumerate(curves.items()):
        points = [panel.place(*point) for point in curve]
        if len(points) > 1:
            canvas.line(points, fill=INKS[number], width=2)
        canvas.text((right + 8, panel.top + 20 * number), name.replace("_", " "), fill=INKS[number], font=font)


def draw(log: Path, target: Path) -> None:
    """Write the curves of a log as a PNG file."""
    curves = read_curves(log)
    if not curves:
        raise ValueError(f"{log} holds no losses or scores yet: train for longer, they are written every few steps.")
    minutes = max(point[0] for curve in curves.values() for point in curve)
    image = Image.new("RGB", (1320, 700), "white")
    canvas = ImageDraw.Draw(image)
    for number, (title, (names, (low, high))) in enumerate(PANELS.items()):
        left, top = 60 + 660 * (number % 2), 45 + 345 * (number // 2)
        panel = Panel(left, top, 450, 260, max(minutes, 1e-6), low, high)
        wanted = {name: curves[name] for name in names if name in curves}
        held_out = number == len(PANELS) - 1
        draw_panel(
            canvas, panel, title, {name: curve if held_out else smooth(curve) for name, curve in wanted.items()}
        )
    canvas.text((60, 680), "minutes of training", fill="black", font=ImageFont.load_default(15))
    image.save(target, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
