"""Reads the golden cases: inputs and outputs recorded from the original Molmo2 code, stored as data only.

The full set lies beside the checkout (`../shared/golden`); a telling subset of it is part of the repository
(`tests/data/golden`), so that the same tests prove something anywhere. Both have the same layout:

    tokenizer/          a tiny tokenizer and the default processor settings of all cases
    processor/<case>/   case.json (the call) + expected.safetensors (its result)
    models/<name>/      tiny checkpoints with cases/<case>/ (full set only)
    tables/             tables for single functions
    media/              images and videos
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

TESTS = Path(__file__).resolve().parent.parent
FULL = TESTS.parent.parent / "shared" / "golden"
EMBEDDED = TESTS / "data" / "golden"
HAS_FULL_SET = FULL.is_dir()
GOLDEN = FULL if HAS_FULL_SET else EMBEDDED

GREY_LEVEL = 1 / 255
DECODER_GREY_LEVELS = 4  # decoders differ in their YUV conversion
MAX_SHARE_OF_TIES = 0.01  # values exactly half-way round either way, depending on the resize kernel
FLOAT_TOLERANCE = 1e-5


# --- media -----------------------------------------------------------------------------------------------------------


def pattern(spec: dict[str, Any]) -> Any:
    """The deterministic test image (`"kind": "pattern"`) or video (`"pattern_video"`) that a media spec describes.

    Returns:
        A numpy array, torch tensor, PIL image or list of PIL images, as `spec["as"]` says; by default a uint8 array
        (height, width, channels), for a video (frames, height, width, channels).
    """
    size = spec["height"], spec["width"], spec.get("channels", 3)
    seed = spec.get("seed", 0)
    if spec["kind"] == "pattern":
        values = _pattern_image(*size, seed, t=0)
    else:
        values = np.stack([_pattern_image(*size, seed, t) for t in range(spec["frames"])])

    if "scale" in spec:
        values = values * np.float64(spec["scale"])
    values = values.astype(spec.get("dtype", "uint8"))
    layout = spec.get("layout", "hwc")
    if layout == "chw":
        values = np.ascontiguousarray(np.moveaxis(values, -1, -3))
    elif layout == "hw":
        values = values[..., 0]

    wanted = spec.get("as", "numpy")
    if wanted == "torch":
        return torch.from_numpy(values)
    if wanted == "pil":
        return Image.fromarray(values)
    if wanted == "pil_list":
        return [Image.fromarray(frame) for frame in values]
    return values


def _pattern_image(height: int, width: int, channels: int, seed: int, t: int) -> np.ndarray:
    """Image number `t`, (height, width, channels) int64 in 0..255."""
    y, x, c = np.meshgrid(*(np.arange(n, dtype=np.int64) for n in (height, width, channels)), indexing="ij")
    x = x + 3 * t
    s = seed + 101 * t
    base = (x * (seed % 7 + 1) + y * (seed % 5 + 2) + 37 * c + 11 * s) // 3
    wave = ((x // (8 + seed % 5)) ^ (y // (6 + seed % 7))) * (29 + 13 * c)
    m = ((x * 73856093) ^ (y * 19349663) ^ ((c + 1) * 83492791) ^ (s * 2654435761)) & 0xFFFFFFFF
    noise = (((m * 1103515245 + 12345) & 0xFFFFFFFF) >> 16) & 63
    return (base + wave + noise) & 255


def load_media(spec: dict[str, Any], root: Path) -> Any:
    """The object that a media spec stands for: a generated image or video, an opened PIL image, or a path."""
    if spec["kind"] in ("pattern", "pattern_video"):
        return pattern(spec)
    path = root / spec["path"]
    if spec["kind"] == "video_file" or spec.get("load") == "path":
        return str(path)
    return Image.open(path)


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GoldenCase:
    """One recorded call.

    `json` is its case.json, `folder` where it lies, `root` the golden folder that media paths start from.
    """

    name: str
    json: dict[str, Any]
    folder: Path
    root: Path

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The recorded tensors; empty if the original raised an error."""
        file = self.folder / "expected.safetensors"
        return load_file(file) if file.exists() else {}

    @property
    def expected(self) -> dict[str, Any]:
        """Shapes, dtypes and metadata of the recorded result; empty if the original raised an error."""
        return self.json.get("expected", {})

    @property
    def checkpoint(self) -> Path:
        """The checkpoint folder that a model case belongs to."""
        return self.folder.parent.parent

    @property
    def is_chat(self) -> bool:
        """True if the call was `apply_chat_template(messages, ...)`, False if it was `processor(text=..., ...)`."""
        return "messages" in self.json

    def media(self, kind: str) -> list[Any]:
        """The objects listed under `kind`, "images" or "videos", freshly made."""
        return [load_media(spec, self.root) for spec in self.json.get(kind, [])]

    def messages(self) -> list[Any]:
        """The conversation(s) with the media put in."""
        return self._resolve(self.json["messages"])

    def call_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the recorded call, media put in, defaults of the recording spelled out."""
        kwargs = dict(self.json.get("kwargs", {}))
        if self.is_chat:
            return {"conversation": self.messages(), "tokenize": True, "return_dict": True, **kwargs}
        arguments = {"text": self.json["text"]}
        for kind in ("images", "videos"):
            if f"{kind}_arg" in self.json:
                arguments[kind] = self._resolve(self.json[f"{kind}_arg"])
            elif kind in self.json:
                arguments[kind] = self.media(kind)
        return {**arguments, **kwargs}

    def call(self, processor: Any, **overrides: Any) -> Any:
        """Repeats the recorded call on `processor`; `overrides` replace or add keyword arguments."""
        arguments = {**self.call_arguments(), **overrides}
        return processor.apply_chat_template(**arguments) if self.is_chat else processor(**arguments)

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._resolve(item) for item in value]
        if isinstance(value, str) and value.startswith("media/"):
            return str(self.root / value)
        if not isinstance(value, dict):
            return value
        for key, kind in (("$image", "images"), ("$video", "videos")):
            if key in value:
                return load_media(self.json[kind][value[key]], self.root)
        return {key: self._resolve(item) for key, item in value.items()}


def processor_cases(prefix: str | None = None) -> list[GoldenCase]:
    """The recorded processor calls in order of their names; with `prefix`, those whose name starts so."""
    return [case for case in _cases(GOLDEN / "processor") if case.name.startswith(prefix or "")]


def model_cases() -> list[GoldenCase]:
    """The recorded model calls of all checkpoints, named "<checkpoint>/<case>"; none in the embedded subset."""
    checkpoints = sorted((GOLDEN / "models").glob("*"))
    return [case for folder in checkpoints for case in _cases(folder / "cases", name_prefix=f"{folder.name}/")]


def table(name: str) -> Any:
    """The table for a single function, as it lies in tables/<name>.json."""
    return json.loads((GOLDEN / "tables" / f"{name}.json").read_text(encoding="utf-8"))


def default_settings(name: str) -> dict[str, Any]:
    """Default constructor arguments of all cases: "preprocessor", "video_preprocessor" or "processor" config."""
    settings = json.loads((GOLDEN / "tokenizer" / f"{name}_config.json").read_text(encoding="utf-8"))
    loader_keys = ("auto_map", "processor_class", "image_processor_type", "video_processor_type")
    return {key: value for key, value in settings.items() if key not in loader_keys}


def _cases(folder: Path, name_prefix: str = "") -> list[GoldenCase]:
    return [
        GoldenCase(name_prefix + file.parent.name, json.loads(file.read_text(encoding="utf-8")), file.parent, GOLDEN)
        for file in sorted(folder.glob("*/case.json"))
    ]


# --- comparison ------------------------------------------------------------------------------------------------------


def to_numpy(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def pixel_std(case: GoldenCase, key: str) -> np.ndarray:
    """The standard deviations (per channel) that the recorded call divided by."""
    kind = "video" if key.endswith("_videos") else "image"
    init = case.json.get(f"{kind}_processor_init", {})
    std = case.json.get("kwargs", {}).get("image_std", init.get("image_std", [0.5, 0.5, 0.5]))
    return np.broadcast_to(np.asarray(std, dtype=np.float64), (3,))


def assert_pixels_close(
    actual: Any, case: GoldenCase, key: str, kind: str, crops: Sequence[bool] | np.ndarray | None = None
) -> None:
    """Compares pixels with everything recorded of them: shape, a strided sample, mean of each crop, extremes.

    Args:
        actual: pixel values (crops, patches, patch pixels), float32.
        key: "pixel_values" or "pixel_values_videos".
        kind: what the pixels come from. "uint8" (resized values are rounded: one grey level for at most 1% of the
            values), "float" (no rounding) or "decoded" (video files: about four grey levels).
        crops: which crops (frames) to compare; all by default. A selection leaves out the extremes.
    """
    pixels = to_numpy(actual)
    recorded = case.expected[key]
    assert list(pixels.shape) == recorded["shape"]
    assert pixels.dtype == recorded["dtype"]
    chosen = np.ones(len(pixels), bool) if crops is None else np.asarray(crops, bool)
    assert chosen.shape == (len(pixels),)
    assert chosen.any()

    level = GREY_LEVEL / pixel_std(case, key)  # one grey level, per channel
    limit = {"uint8": level + 1e-6, "float": np.full(3, FLOAT_TOLERANCE), "decoded": DECODER_GREY_LEVELS * level}[kind]
    flat = pixels.reshape(-1)
    index = np.arange(0, flat.size, recorded["stride"])
    kept = chosen[index // pixels[0].size]
    difference = np.abs(flat[index].astype(np.float64) - case.tensors[f"{key}_sub"])[kept]
    worst = np.argmax(difference - limit[index[kept] % 3])
    assert difference[worst] <= limit[index[kept][worst] % 3], (
        f"{key}: value {index[kept][worst]} is {flat[index[kept][worst]]}, off by {difference[worst]:.6f}"
    )

    means = pixels.reshape(len(pixels), -1).mean(axis=1, dtype=np.float64)
    mean_limit = limit.max()
    if kind == "uint8":
        if crops is None and "sha256_one_thread" in recorded:
            assert hashlib.sha256(pixels.tobytes()).hexdigest() == recorded["sha256_one_thread"]
        assert np.mean(difference > FLOAT_TOLERANCE) <= MAX_SHARE_OF_TIES
        mean_limit = MAX_SHARE_OF_TIES * limit.max()
    np.testing.assert_allclose(means[chosen], case.tensors[f"{key}_crop_mean"][chosen], rtol=0, atol=mean_limit)
    if crops is None:
        extremes = [flat.min(), flat.max()]
        np.testing.assert_allclose(extremes, [recorded["min"], recorded["max"]], rtol=0, atol=limit.max())
