"""One HTML page of training examples as the model gets them: pixels, tokens, labels, weights, branches, mask, points.

    view([build_training_example(processor, row["messages"]) for row in rows[:5]], processor, "examples.html")

For a look at every data set before it is trained on. The page holds everything in one file and runs no scripts.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from molmo2.configuration import CHANNELS
from molmo2.grounding.parse import Point, parse_grounding
from molmo2.model.attention.mask import AttentionSpec, mask_mod
from molmo2.tools.draw import DrawingStyle

IGNORED = -100
MAX_MASK_PIXELS = 256
PRINTED_TIME = re.compile(r"(\d+\.\d)\s*\Z")
JPEG_QUALITY = 85
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
section {{ border-top: 2px solid #888; margin-top: 2em }}
figure {{ display: inline-block; margin: 0 .5em .5em 0; position: relative }}
figure img {{ width: {side}px; display: block }}
figure svg {{ position: absolute; left: 0; top: 0; width: {side}px; height: {side}px }}
figcaption {{ font-size: 12px; color: #555 }}
.tokens {{ font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
.tokens span {{ border-radius: 3px; background: #eee; margin-right: 1px }}
.tokens .visual {{ background: #d6e4f5; padding: 0 .4em }}
.tokens .target {{ background: #bfe5bf; border-bottom: 2px solid #2a7d2a }}
.branch {{ border-left: 4px solid #c70; padding-left: .6em; margin: .4em 0 }}
.mask {{ image-rendering: pixelated; width: 256px; height: 256px; border: 1px solid #888 }}
</style></head><body><h1>{title}</h1>
<p>Green: tokens with a label, darker where they weigh more. Blue: visual tokens. A bar on the left: a branch of the
tree. Hover a token for its position, id, branch and weight. Mask: rows attend to columns where it is dark.</p>
{sections}</body></html>
"""


@dataclass(frozen=True)
class _Crop:
    """A crop or a frame of an example.

    Attributes:
        pixels: (P, patch * patch * 3), uint8 or normalised.
        image_index: Of the image that it is a low-resolution view of; None for other crops and frames.
        time: Seconds of a frame as printed in the prompt.
    """

    caption: str
    pixels: Tensor
    image_index: int | None = None
    time: float | None = None


def view(
    examples: Any, processor: Any, path: str | Path, *, max_crops: int = 48, side: int = 240, title: str = "Examples"
) -> Path:
    """Write the page of `render` to a file.

    Returns:
        The path.
    """
    path = Path(path)
    path.write_text(render(examples, processor, max_crops=max_crops, side=side, title=title), encoding="utf-8")
    return path


def render(examples: Any, processor: Any, *, max_crops: int = 48, side: int = 240, title: str = "Examples") -> str:
    """An HTML page about built training examples.

    Args:
        examples: What `build_training_example` returns, or a list of such examples and of packs of them.
        processor: The `Molmo2Processor` that built them.
        max_crops: Maximum number of crops and frames to show of an example; the page says if there are more.
        side: Size of a crop on the page, in pixels.
    Raises:
        ValueError: An example is not built, or `max_crops` is not above 0.
    """
    if max_crops < 1:
        raise ValueError(f"`max_crops` is {max_crops}; expected 1 or more.")
    flat = list(_flat(examples))
    sections = [
        _section(f"{number}", _checked(example, number), processor, max_crops)
        for number, example in enumerate(flat, 1)
    ]
    return PAGE.format(title=html.escape(title), side=int(side), sections="\n".join(sections))


def _flat(examples: Any) -> Iterator[Any]:
    examples = getattr(examples, "examples", examples)  # a `Pack`
    if isinstance(examples, Mapping) or not isinstance(examples, Iterable):
        yield examples
    else:
        for example in examples:
            yield from _flat(example)


def _checked(example: Any, number: int) -> dict[str, Any]:
    """The example with tensors.

    Raises:
        ValueError: It has no tokens or labels.
    """
    if not isinstance(example, Mapping) or example.get("input_ids") is None or example.get("labels") is None:
        found = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(
            f"Example {number} has {found}; expected `input_ids` and `labels`. Build rows with "
            "`molmo2.training.build_training_example` first."
        )
    return {name: torch.as_tensor(value) for name, value in example.items() if value is not None}


def _section(name: str, example: dict[str, Any], processor: Any, max_crops: int) -> str:
    tokenizer = processor.tokenizer
    is_target = example["labels"] != IGNORED
    is_visual = example.get("token_type_ids", torch.zeros_like(is_target)).bool()
    weights = example.get("loss_weights", is_target.float())
    branches = example.get("branch_ids", torch.zeros_like(example["labels"]))
    points = _points(tokenizer, example["input_ids"], is_target, branches)
    crops = _crops(tokenizer, example, is_visual)
    shown = sorted({round(place) for place in np.linspace(0, len(crops) - 1, min(max_crops, len(crops)))})
    figures = [_figure(crops[place], points, processor) for place in shown]
    if len(shown) < len(crops):
        figures.append(f"<p>{len(shown)} of {len(crops)} crops and frames are shown.</p>")
    facts = [
        f"{len(is_target)} tokens",
        f"{int(is_visual.sum())} visual",
        f"{int(is_target.sum())} with a label",
        f"sum of weights {float(weights[is_target].sum()):.3f}",
        f"{max(1, int(branches.max()))} branch(es)",
        f"{len(crops)} crops and frames",
        f"{len(points)} points",
    ]
    mask = _mask_image(is_visual, branches)
    tokens = _tokens(tokenizer, example["input_ids"], is_visual, is_target, weights, branches)
    return (
        f'<section id="example-{name}"><h2>Example {name}</h2><p class="facts">{", ".join(facts)}</p>'
        f'<div class="crops">{"".join(figures)}</div>'
        f'<div class="tokens">{tokens}</div>'
        f'<p><img class="mask" alt="attention mask" src="{_data_url(mask, "PNG")}"></p></section>'
    )


# --- pixels ----------------------------------------------------------------------------------------------------------


def _crops(tokenizer: Any, example: Mapping[str, Any], is_visual: Tensor) -> list[_Crop]:
    """The crops of the images, the low-resolution view of each first, then the frames of the videos."""
    crops: list[_Crop] = []
    images, frames = example.get("pixel_values", ()), example.get("pixel_values_videos", ())
    start = 0
    for image, number in enumerate(example.get("image_num_crops", torch.zeros(0)).tolist()):
        for crop in range(int(number)):
            caption = f"image {image + 1}, " + ("low resolution" if crop == 0 else f"crop {crop}")
            crops.append(_Crop(caption, images[start + crop], image if crop == 0 else None))
        start += int(number)
    times = _printed_times(tokenizer, example["input_ids"], is_visual, len(frames))
    for number, (frame, time) in enumerate(zip(frames, times)):
        crops.append(_Crop(f"frame {number}" + ("" if time is None else f", {time:.1f} s"), frame, None, time))
    return crops


def _printed_times(tokenizer: Any, ids: Tensor, is_visual: Tensor, num_frames: int) -> Sequence[float | None]:
    """The time before the tokens of each frame, the last runs of visual tokens; None where it cannot be read."""
    starts = torch.nonzero(is_visual & ~torch.cat([is_visual.new_zeros(1), is_visual[:-1]]))[:, 0].tolist()
    times: list[float | None] = []
    for start in starts[len(starts) - num_frames :] if num_frames else []:
        found = PRINTED_TIME.search(tokenizer.decode(ids[max(0, start - 12) : start].tolist()))
        times.append(float(found[1]) if found else None)
    return [*times, *[None] * (num_frames - len(times))]


def _figure(crop: _Crop, points: Sequence[Point], processor: Any) -> str:
    style = DrawingStyle()
    discs = []
    for point in points:
        is_here = point.image_index == crop.image_index if crop.time is None else point.time == crop.time
        if is_here and (crop.time is not None or crop.image_index is not None):
            color = "rgb({},{},{})".format(*style.color(point.label, point.id))
            text = html.escape(f"{point.label} {point.id}")
            discs.append(
                f'<circle cx="{point.x_norm * 1000:.0f}" cy="{point.y_norm * 1000:.0f}" r="18" fill="{color}" '
                f'stroke="#fff" stroke-width="5"><title>{text}</title></circle>'
            )
    overlay = f'<svg viewBox="0 0 1000 1000">{"".join(discs)}</svg>' if discs else ""
    pixels = _pixels(crop.pixels, processor.image_processor)
    return (
        f'<figure><img alt="{crop.caption}" src="{_data_url(Image.fromarray(pixels), "JPEG")}">{overlay}'
        f"<figcaption>{crop.caption}</figcaption></figure>"
    )


def _pixels(patches: Tensor, image_processor: Any) -> np.ndarray:
    """(H, W, 3) uint8 of the patches of a square crop."""
    count, size = patches.shape
    side, patch = math.isqrt(count), math.isqrt(size // CHANNELS)
    values = patches.reshape(side, side, patch, patch, CHANNELS).transpose(1, 2)
    values = values.reshape(side * patch, side * patch, CHANNELS)
    if values.is_floating_point():
        mean, std = (torch.tensor(getattr(image_processor, name)) for name in ("image_mean", "image_std"))
        values = (values.float() * std + mean).clamp(0, 1) * 255
    return values.round().to(torch.uint8).numpy() if values.is_floating_point() else values.to(torch.uint8).numpy()


def _data_url(image: Image.Image, form: str) -> str:
    file = io.BytesIO()
    image.save(file, form, quality=JPEG_QUALITY)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _mask_image(is_visual: Tensor, branches: Tensor) -> Image.Image:
    """Who attends to whom, of long examples at evenly spaced tokens."""
    length = len(is_visual)
    places = torch.linspace(0, length - 1, min(length, MAX_MASK_PIXELS)).round().long()
    spec = AttentionSpec(is_visual=is_visual[None], branch_ids=branches[None])
    zero = torch.zeros(1, dtype=torch.long)
    allowed = mask_mod(spec)(zero, zero, places[:, None], places[None])
    return Image.fromarray(np.where(allowed.numpy(), 40, 240).astype(np.uint8))


# --- tokens ----------------------------------------------------------------------------------------------------------


def _points(tokenizer: Any, ids: Tensor, is_target: Tensor, branches: Tensor) -> list[Point]:
    """The points of all answers: of each run of tokens with labels in one branch."""
    runs = groupby(range(len(ids)), key=lambda place: (bool(is_target[place]), int(branches[place])))
    answers = [list(places) for (target, _), places in runs if target]
    return [point for places in answers for point in parse_grounding(tokenizer.decode(ids[places].tolist())).points]


def _tokens(
    tokenizer: Any, ids: Tensor, is_visual: Tensor, is_target: Tensor, weights: Tensor, branches: Tensor
) -> str:
    heaviest = float(weights.max()) or 1.0
    kinds = list(zip(is_visual.tolist(), branches.tolist(), ids.tolist(), is_target.tolist(), weights.tolist()))
    pieces = []
    for branch, places in groupby(range(len(ids)), key=lambda place: kinds[place][1]):
        spans: list[str] = []
        for (visual, token), run in groupby(places, key=lambda place: (kinds[place][0], kinds[place][2])):
            spans += _spans(tokenizer, token, visual, list(run), (kinds, heaviest))
        text = "".join(spans)
        pieces.append(f'<div class="branch" title="branch {branch}">{text}</div>' if branch else f"<div>{text}</div>")
    return "".join(pieces)


def _spans(
    tokenizer: Any, token: int, visual: bool, places: list[int], about: tuple[list[Any], float]
) -> Iterator[str]:
    """The spans of equal tokens that follow each other; visual ones are one span."""
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:  # a part of a character
        text = str(tokenizer.convert_ids_to_tokens(token))
    text = html.escape(text)
    if visual:
        times = f" x {len(places)}" if len(places) > 1 else ""
        yield f'<span class="visual" title="{places[0]}: id {token}">{text}{times}</span>'
        return
    kinds, heaviest = about
    for place in places:
        *_, branch, _, target, weight = kinds[place]
        title = f"{place}: id {token}, branch {branch}" + (f", weight {weight:.4g}" if target else "")
        shade = f' style="opacity:{0.35 + 0.65 * weight / heaviest:.2f}"' if target else ""
        yield f'<span{" class=target" if target else ""} title="{title}"{shade}>{text}</span>'
