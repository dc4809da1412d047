"""Tables and plots from results: python -m benchmarks.report results.json [--readme] [--curves PNG]

`--readme` puts the table between the marks in README.md beside this file.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

README = Path(__file__).resolve().parent / "README.md"
START, END = "<!-- results -->", "<!-- end of results -->"
PANEL, MARGIN, MAX_COLUMNS = (360, 240), 50, 4
INKS = {"seconds": "#2471a3", "peak_bytes": "#c0392b"}


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def size(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _goal_text(goal: dict[str, Any]) -> str:
    """A goal and the measured figure: `0.12 of native (at most 0.15) ✓`."""
    limit, found = goal["limit"], goal["found"]
    mark = {None: "", True: " ✓", False: " ✗"}[goal["met"]]
    if goal["of"] == "over output":
        return f"peak less output {size(found)} (at most {size(limit)}){mark}"
    what = "peak of the output" if goal["of"] == "output" else f"of {goal['of']}"
    stated = "not known" if found is None else f"{found:.3g}"
    return f"{stated} {what} (at most {limit:g}){mark}"


def row_lines(found: dict[str, Any]) -> list[str]:
    """A row for the terminal."""
    lines = [f"{found['row']}: {found['title']}"]
    ours = found["sides"].get("ours", {}).get("seconds")
    for side, figures in found["sides"].items():
        if "seconds" not in figures:
            reason = figures.get("unavailable") or figures.get("error", "").strip().splitlines()[-1]
            lines.append(
                f"  {Path(side).name:12s} {'not available' if 'unavailable' in figures else 'FAILED'}: {reason}"
            )
            continue
        ratio = f"ours / this = {ours / figures['seconds']:.3f}" if ours and side != "ours" else ""
        lines.append(
            f"  {Path(side).name:12s} {duration(figures['seconds']):>9s}  peak {size(figures['peak_bytes']):>8s}  "
            f"output {size(figures['output_bytes']):>8s}  {ratio}"
        )
    return [*lines, *(f"  -> {_goal_text(goal)}" for goal in found["goals"])]


def curve_line(name: str, curve: dict[str, Any]) -> str:
    """A curve for the terminal, with the check that what should be linear is."""
    if "error" in curve:
        return f"curve {name}: FAILED: {curve['error'].strip().splitlines()[-1]}"
    parts = [f"curve {name}: {curve['points'][0]}..{curve['points'][-1]} {curve['unit']}"]
    for key, label in (("seconds", "time"), ("peak_bytes", "memory")):
        power = curve.get(f"{key}_exponent")
        if power is not None:
            wanted = " (should be at most linear)" if key in curve["linear"] else ""
            parts.append(f"{label} ~ n^{power:.2f}, linear fit {curve[f'{key}_fit']['explained']:.3f}{wanted}")
    return "; ".join(parts)


def table(results: dict[str, Any]) -> str:
    """All rows as Markdown."""
    others = list(dict.fromkeys(side for row in results["rows"] for side in row["sides"]))
    others = [side for side in others if side not in ("ours", "bound", "native", "one by one")]
    heads = [
        "row",
        "bound",
        "ours",
        "native",
        *(Path(side).name for side in others),
        "peak of ours",
        "of native",
        "goals",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in results["rows"]:
        sides = row["sides"]
        bound = sides.get("bound") or sides.get("one by one") or {}
        cells = [row["title"], duration(bound.get("seconds"))]
        cells += [duration(sides.get(side, {}).get("seconds")) for side in ("ours", "native", *others)]
        cells += [size(sides.get(side, {}).get("peak_bytes")) for side in ("ours", "native")]
        cells.append("; ".join(_goal_text(goal) for goal in row["goals"]) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_notes(results)])


def _notes(results: dict[str, Any]) -> list[str]:
    """Notes below the table: machine, bounds, reasons for missing figures, growth."""
    about = results["machine"]
    versions = ", ".join(
        f"{name} {about[name]}" for name in ("torch", "transformers", "av", "torchcodec") if about.get(name)
    )
    place = about["gpu"] or about["processor"]
    lines = [f"{place}, {about['cores']} cores, {results['threads']} threads, {versions}.", ""]
    bounds: dict[str, list[str]] = {}
    for row in results["rows"]:
        bounds.setdefault(row["bound"], []).append(row["row"])
    lines += [f"- Bound of {', '.join(names)}: {bound}." for bound, names in bounds.items() if bound != "none"]
    for row in results["rows"]:
        for side, figures in row["sides"].items():
            if "unavailable" in figures:
                lines.append(f"- {row['row']}, {Path(side).name}: {figures['unavailable']}")
            elif "error" in figures:
                lines.append(f"- {row['row']}, {Path(side).name}: failed, {figures['error'].strip().splitlines()[-1]}")
    return lines + [f"- {curve_line(name, curve)}" for name, curve in results["curves"].items()]


def draw(curves: dict[str, Any]) -> Image.Image:
    """One panel per curve: time and peak memory, each from 0 to its largest value, measured points marked."""
    shown = [curve for curve in curves.values() if "error" not in curve]
    width, height = PANEL
    columns, rows = min(len(shown), MAX_COLUMNS), -(-len(shown) // MAX_COLUMNS)
    plot = Image.new("RGB", ((width + MARGIN) * columns + MARGIN, (height + 3 * MARGIN) * rows), "white")
    pen, font = ImageDraw.Draw(plot), ImageFont.load_default(13)
    for number, curve in enumerate(shown):
        row, column = divmod(number, MAX_COLUMNS)
        left, top = MARGIN + column * (width + MARGIN), MARGIN + row * (height + 3 * MARGIN)
        pen.rectangle((left, top, left + width, top + height), outline="#999999")
        pen.text((left, top - 40), curve["title"], fill="black", font=font)
        last = curve["points"][-1]
        pen.text((left, top + height + 6), f"0 .. {last:,} {curve['unit']}", fill="black", font=font)
        for line, (key, ink) in enumerate(INKS.items()):
            values = curve.get(key)
            if not values:
                continue
            top_value = max(values) or 1.0
            scale = list(zip(curve["points"], values, strict=True))
            places = [(left + width * x / last, top + height * (1 - y / top_value)) for x, y in scale]
            pen.line(places, fill=ink, width=2)
            for x, y in places:
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
            label = (
                f"time, up to {duration(top_value)}" if key == "seconds" else f"peak memory, up to {size(top_value)}"
            )
            pen.text((left, top + height + 26 + 18 * line), label, fill=ink, font=font)
    return plot.quantize(32)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--curves", type=Path, metavar="PNG")
    arguments = parser.parse_args(given)
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    text = table(results)
    print(text)
    if arguments.readme:
        readme = README.read_text(encoding="utf-8")
        before, after = readme.split(START)[0], readme.split(END)[1]
        README.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    if arguments.curves:
        arguments.curves.parent.mkdir(parents=True, exist_ok=True)
        draw(results["curves"]).save(arguments.curves, optimize=True)


if __name__ == "__main__":
    main()
