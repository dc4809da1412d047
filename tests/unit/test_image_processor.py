"""The image processor: recorded cases, every way to pass an image, options, files, and the words of every error."""

import ast
import base64
import io
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image

from molmo2.image import loading as image_loading
from molmo2.image.bilinear import MAX_BLOCK_ELEMENTS, MAX_INLINE_ELEMENTS, BilinearTables, resize_rows
from molmo2.image.geometry import CropSettings
from molmo2.image.loading import fetch_images, load_images
from molmo2.image.pixels import (
    INTERPOLATION_MODES,
    Normalization,
    PixelOptions,
    _planes,
    _resized,
    frame_pixel_values,
    normalize,
    write_patches,
)
from molmo2.image.processing import Molmo2ImageProcessor
from support.generated import generated
from support.golden_cases import pattern, processor_cases, to_numpy

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SOURCES = REPOSITORY / "src" / "molmo2"
# The arguments of a recorded call that are the image processor's; the rest is for the tokenizer
OPTIONS = set(Molmo2ImageProcessor.valid_kwargs.__annotations__)

# Files as published, key by key; a processor that is loaded and saved must not change them.
PUBLISHED = {
    "auto_map": {
        "AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor",
        "AutoProcessor": "processing_molmo2.Molmo2Processor",
    },
    "do_convert_rgb": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Molmo2ImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_crops": 8,
    "overlap_margins": [4, 4],
    "patch_size": 14,
    "pooling_size": [2, 2],
    "processor_class": "Molmo2Processor",
    "resample": 2,
    "size": {"height": 378, "width": 378},
}


def small_processor(**options):
    """Crops of 28 x 28 pixels in 4 patches: fast, and small enough to look at."""
    settings = {"size": 28, "patch_size": 14, "overlap_margins": [0, 0], "pooling_size": 1, "max_crops": 2}
    return Molmo2ImageProcessor(**{**settings, **options})


@pytest.fixture
def rgb():
    """A 20 x 30 RGB array, no axis of which could be taken for channels."""
    return pattern({"kind": "pattern", "height": 20, "width": 30, "seed": 7})


@pytest.fixture
def warnings_logged(caplog):
    """The text of all warnings so far; warnings that are shown once are shown again."""
    type(image_loading.logger).warning_once.cache_clear()
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def assert_same_output(output, expected):
    assert sorted(output) == sorted(expected)
    for key in expected:
        np.testing.assert_array_equal(to_numpy(output[key]), to_numpy(expected[key]), err_msg=key)


# --- recorded cases --------------------------------------------------------------------------------------------------

# The original accepts these calls but leaves out what was asked for; here they have tests of their own.
IGNORED_BY_THE_ORIGINAL = {"resample_nearest", "image_max_crops_zero", "do_convert_rgb_false_kwarg_rgba"}
CASES = [
    case
    for case in processor_cases()
    if "pixel_values_sub" in case.tensors and case.name not in IGNORED_BY_THE_ORIGINAL
]


def test_sizes_of_recorded_cases_are_planned_without_pixels():
    for case in CASES:
        specs = [spec for spec in case.json["images"] if spec["kind"] == "pattern" and "layout" not in spec]
        if len(specs) != len(case.json["images"]):
            continue
        processor = Molmo2ImageProcessor(**case.json.get("image_processor_init", {}))
        options = {name: value for name, value in case.json["kwargs"].items() if name in OPTIONS}
        sizes = [(spec["height"], spec["width"]) for spec in specs]
        grids = [list(processor.plan(*size, **options).grid) for size in sizes]
        assert grids == case.tensors["image_grids"].tolist()
        crops = [processor.get_number_of_image_patches(*size, options) for size in sizes]
        assert crops == case.tensors["image_num_crops"].tolist()


def test_media_images(shared):
    """Every image of the media folder, by path and opened, whatever its mode."""
    processor = small_processor()
    files = sorted((shared / "media").glob("*.jpg")) + sorted((shared / "media").glob("*.png"))
    assert len(files) == 8
    for file in files:
        upright = processor(file)
        if file.name == "nasa_frame_exif6.jpg":
            assert processor(Image.open(file))["image_grids"].tolist() != upright["image_grids"].tolist()
            assert (
                upright["image_grids"].tolist() == processor(np.zeros((270, 480, 3), np.uint8))["image_grids"].tolist()
            )
        else:
            assert_same_output(processor(Image.open(file).convert("RGB")), upright)


# --- pixels ----------------------------------------------------------------------------------------------------------


def resize(image, height, width, resample):
    """The image as the processor resizes it, by gathering or by torch, in its own dtype."""
    if image.dtype == np.uint8 and resample == 2:
        pixels = torch.cat([rows for _, rows in resize_rows(image, (height, width), 1)])
    else:
        pixels = _resized(_planes(image), (height, width), INTERPOLATION_MODES[resample], image.dtype)
    return pixels.numpy().astype(image.dtype)


def resize_by_hand(image, height, width):
    """Bilinear with half-pixel centres and no antialiasing, straight from the definition, in float64."""

    def weights(source, target):
        centre = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        low = np.floor(centre).astype(int)
        matrix = np.zeros((target, source))
        matrix[np.arange(target), low] += 1 - (centre - low)
        matrix[np.arange(target), np.minimum(low + 1, source - 1)] += centre - low
        return matrix

    return np.einsum("yh,xw,hwc->yxc", weights(image.shape[0], height), weights(image.shape[1], width), image)


@pytest.mark.parametrize("size", [(7, 5), (40, 61), (20, 30), (1, 1), (39, 8)])
def test_uint8_is_resized_and_rounded(rgb, size):
    exact = resize_by_hand(rgb, *size)
    resized = resize(rgb, *size, resample=2)
    assert resized.dtype == np.uint8
    is_tie = np.abs(exact % 1 - 0.5) < 1e-4
    np.testing.assert_array_equal(resized[~is_tie], np.round(exact)[~is_tie])
    assert np.abs(resized - exact).max() < 0.5 + 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5), (np.float16, 1e-3)])
def test_floats_are_resized_in_their_precision_and_clipped(rgb, dtype, tolerance):
    values = (rgb.astype(np.float64) / 200 - 0.1).astype(dtype)
    resized = resize(values, 33, 17, resample=2)
    assert resized.dtype == dtype
    exact = resize_by_hand(values.astype(np.float64), 33, 17)
    assert exact.min() < 0
    assert exact.max() > 1
    np.testing.assert_allclose(resized, exact.clip(0, 1), rtol=0, atol=tolerance)


def test_bicubic_overshoot_is_clamped_and_nearest_invents_nothing():
    edge = np.zeros((4, 4, 3), np.uint8)
    edge[:, 2:] = 255
    bicubic = resize(edge, 4, 16, resample=3)
    assert {int(value) for value in bicubic[0, [0, 3, 12, 15], 0]} == {0, 255}
    assert bicubic.min() == 0
    assert len(np.unique(bicubic)) > 3
    assert resize(edge, 2, 8, resample=0)[0, :, 0].tolist() == [0, 0, 0, 0, 255, 255, 255, 255]


@pytest.mark.parametrize("change", ["read-only", "flipped", "transposed"])
def test_any_memory_layout_is_resized(rgb, change):
    values = rgb.astype(np.float32) / 255
    plain = resize(values, 9, 9, resample=2)
    if change == "read-only":
        values.flags.writeable = False
    elif change == "flipped":
        values = np.ascontiguousarray(values[::-1])[::-1]
    else:
        values = np.ascontiguousarray(values.transpose(2, 0, 1)).transpose(1, 2, 0)
    np.testing.assert_array_equal(resize(values, 9, 9, resample=2), plain)


@pytest.mark.parametrize("step", [-1, 2])
@pytest.mark.parametrize("resample", [0, 2, 3])
def test_an_axis_of_one_pixel_may_have_any_stride(rgb, step, resample):
    """numpy takes such an array as contiguous, torch does not."""
    for values in (rgb[:, :1], rgb[:, :1].astype(np.float32) / 255):
        own = np.repeat(values, abs(step), axis=1)[:, ::step]
        assert own.shape == values.shape
        np.testing.assert_array_equal(resize(own, 9, 9, resample=resample), resize(values.copy(), 9, 9, resample))


def test_patches_run_row_by_row_with_channels_last():
    """A 2 x 4 crop in 2 x 2 patches; every value says its row, column and channel."""
    row, col, channel = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(3), indexing="ij")
    out = torch.empty(2, 12, dtype=torch.int64)
    write_patches(100 * row + 10 * col + channel, out, 2)
    assert out.tolist() == [
        [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112],
        [20, 21, 22, 30, 31, 32, 120, 121, 122, 130, 131, 132],
    ]


def normalized_by_hand(pixels: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    """(..., 3) uint8 to float32, one operation of float32 after the other."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)


def patches_by_hand(crops: np.ndarray, patch_size: int) -> np.ndarray:
    """(C, H, W, 3) to (C, P, patch_size * patch_size * 3)."""
    count, height, width, channels = crops.shape
    rows = crops.reshape(count, height // patch_size, patch_size, width // patch_size, patch_size * channels)
    return rows.swapaxes(2, 3).reshape(count, -1, patch_size * patch_size * channels)


def test_normalize_is_per_channel_in_float32():
    pixels = np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    mean, std = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]
    values = torch.from_numpy(pixels).float()
    steps = Normalization(tuple(mean), tuple(std))
    normalized = normalize(values.clone(), steps, np.dtype(np.uint8))
    assert normalized.dtype == torch.float32
    np.testing.assert_array_equal(normalized, normalized_by_hand(pixels, mean, std))
    floats = normalize(values.double() / 255, steps, np.dtype(np.float64))
    np.testing.assert_allclose(floats, normalized, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(41, 97), (7, 200), (120, 33), (1, 1), (60, 80)])
def test_layout_in_memory_changes_no_number(mode, size):
    rgb = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    planes = torch.from_numpy(rgb).permute(2, 0, 1).float().contiguous()
    corners = {} if mode == "nearest" else {"align_corners": False}
    with threads(1):
        expected = torch.nn.functional.interpolate(planes[None], size=size, mode=mode, **corners)[0]
    resized = resize(rgb, *size, resample={"nearest": 0, "bilinear": 2, "bicubic": 3}[mode])
    np.testing.assert_array_equal(resized, expected.round().clamp(0, 255).permute(1, 2, 0))


@contextmanager
def threads(number):
    """torch's interpolate has two kernels: one for a single thread, one for several."""
    former = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def test_a_forked_process_waits_for_no_threads_of_its_parent():
    """As `datasets.map(num_proc=2)` starts them, after the parent has processed an image."""
    image = np.random.default_rng(0).integers(0, 256, (900, 1300, 3), dtype=np.uint8)
    with threads(2):
        expected = Molmo2ImageProcessor()(image)["pixel_values"]
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(120)  # ends a process that waits for ever
            try:
                os._exit(int(not np.array_equal(Molmo2ImageProcessor()(image)["pixel_values"], expected)))
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("seed", range(40))
def test_looking_up_neighbours_gives_the_numbers_of_interpolate(seed):
    """To the last bit before rounding, whatever the threads; sides up to 600, larger, smaller and equal ones."""
    rng = np.random.default_rng(seed)
    source, size = (tuple(int(side) for side in rng.integers(1, 600, 2)) for _ in range(2))
    size = {0: source, 1: (2 * source[0], source[1]), 2: (1 + source[0] // 2, 1 + source[1] // 3)}.get(seed % 8, size)
    rgb = rng.integers(0, 256, (*source, 3), dtype=np.uint8)
    planes = torch.from_numpy(rgb).permute(2, 0, 1).float()[None]
    with threads(1):
        expected = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    with threads(1 + seed % 3):
        found = BilinearTables(source, size).rows(rgb, 0, size[0])
    torch.testing.assert_close(found, expected[0].permute(1, 2, 0), atol=0, rtol=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("max_elements", [MAX_INLINE_ELEMENTS, MAX_BLOCK_ELEMENTS])
def test_pixels_are_gathered_from_any_memory_layout(max_elements):
    wide = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    read_only = wide[:, :150].copy()
    read_only.flags.writeable = False
    for rgb in (read_only, wide[:, :150], wide[::-1], wide[:, ::-1], wide[:, ::2], wide.transpose(1, 0, 2)):
        with threads(2):
            found = [list(resize_rows(own, (378, 378), 14, max_elements)) for own in (rgb, rgb.copy())]
        assert len(found[0]) == (14 if max_elements == MAX_INLINE_ELEMENTS else 2)
        torch.testing.assert_close(*found, atol=0, rtol=0)


def test_resized_blocks_are_whole_rows_of_patches():
    rgb = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    pieces = list(resize_rows(rgb, (378, 378), 14, MAX_INLINE_ELEMENTS))
    assert [row for row, _ in pieces] == list(range(0, 378, 28))
    assert max(pixels.numel() for _, pixels in pieces) <= MAX_INLINE_ELEMENTS
    expected = resize(rgb, 378, 378, resample=2)
    np.testing.assert_array_equal(torch.cat([pixels for _, pixels in pieces]), expected)


def pixel_options(*crops):
    steps = Normalization((0.5,) * 3, (0.5,) * 3)
    return PixelOptions(
        CropSettings(*crops), resample=2, steps=steps, do_resize=True, pixel_dtype=np.dtype("float32"), device=None
    )


def test_frames_are_one_crop_each(rgb):
    frames = [rgb, rgb[::-1], rgb[:7]]
    options = pixel_options(28, 42, 14, 3, 3)
    values = frame_pixel_values(frames, 3, options)
    assert values.shape == (3, 6, 588)
    for frame, found in zip(frames, values, strict=True):
        expected = normalized_by_hand(resize(frame, 28, 42, 2)[None], [0.5] * 3, [0.5] * 3)
        expected = patches_by_hand(expected, 14)[0]
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(frame_pixel_values(iter(frames), 3, options), values)
    with pytest.raises(ValueError, match=r"num_frames is 4, but the iterable gave 3"):
        frame_pixel_values(iter(frames), 4, options)
    with pytest.raises(ValueError, match=r"num_frames is 2, but the iterable gave more"):
        frame_pixel_values(iter(frames), 2, options)


def test_crops_are_cut_from_the_resized_image(rgb):
    """One low-resolution view, then two tiles side by side."""
    output = small_processor()(rgb)
    assert output["image_num_crops"].tolist() == [3]
    canvas = resize(rgb, 28, 56, resample=2)
    crops = np.stack([resize(rgb, 28, 28, resample=2), canvas[:, :28], canvas[:, 28:]])
    expected = patches_by_hand(normalized_by_hand(crops, [0.5] * 3, [0.5] * 3), 14)
    np.testing.assert_array_equal(output["pixel_values"], expected)


def test_tiles_overlap_by_their_margins():
    """Crops of 4 x 4 patches with margins of one patch: a tile starts two patches before the one beside it ends."""
    wide = pattern({"kind": "pattern", "height": 40, "width": 120, "seed": 7})
    crops = small_processor(size=56, overlap_margins=1)(wide)["pixel_values"].reshape(-1, 4, 4, 588)
    _low_res, left, right = crops
    np.testing.assert_array_equal(left[:, 2:], right[:, :2])
    assert not np.array_equal(left, right)


# --- every way to pass an image -------------------------------------------------------------------------------------


PIL_MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"]


@pytest.mark.parametrize("mode", PIL_MODES)
def test_pil_modes_become_rgb_by_pils_own_rule(rgb, mode):
    image = Image.fromarray(rgb)
    if mode in ("PA", "RGBa"):
        image = image.convert("RGBA" if mode == "RGBa" else "P").convert(mode)
    else:
        image = image.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    (loaded,) = load_images(image)
    np.testing.assert_array_equal(loaded, expected)


def test_transparency_is_dropped_not_blended(rgb):
    alpha = np.arange(600, dtype=np.uint8).reshape(20, 30, 1)
    rgba = np.concatenate([rgb, alpha], axis=2)
    for image in (rgba, Image.fromarray(rgba), torch.from_numpy(rgba).permute(2, 0, 1)):
        np.testing.assert_array_equal(load_images(image)[0], rgb)


def test_sixteen_bit_images_are_clipped_with_a_warning(warnings_logged):
    values = np.array([[0, 100, 255, 256, 65535]], np.uint16)
    (loaded,) = load_images(Image.fromarray(values))
    assert loaded[0, :, 0].tolist() == [0, 100, 255, 255, 255]
    assert (
        "A PIL image has mode 'I;16': converting it to RGB clips its values to 0..255. Scale them" in warnings_logged()
    )


def test_animations_show_their_first_frame(rgb, tmp_path):
    frames = [Image.fromarray(rgb).convert("P"), Image.fromarray(rgb[::-1].copy()).convert("P")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    first = np.asarray(Image.open(tmp_path / "two.gif").convert("RGB"))
    np.testing.assert_array_equal(load_images(tmp_path / "two.gif")[0], first)
    np.testing.assert_array_equal(load_images(Image.open(tmp_path / "two.gif"))[0], first)
    second = Image.open(tmp_path / "two.gif")
    second.seek(1)  # an opened animation shows the frame its owner chose
    assert not np.array_equal(load_images(second)[0], first)


ARRAY_FORMS = {
    "numpy": lambda rgb: rgb,
    "channels first": lambda rgb: rgb.transpose(2, 0, 1),
    "torch": torch.from_numpy,
    "torch channels first": lambda rgb: torch.from_numpy(rgb).permute(2, 0, 1),
    "int64": lambda rgb: rgb.astype(np.int64),
    "int16 torch": lambda rgb: torch.from_numpy(rgb).to(torch.int16),
    "uint16": lambda rgb: rgb.astype(np.uint16),
    "read-only view": lambda rgb: np.broadcast_to(rgb, rgb.shape),
    "with gradient": lambda rgb: torch.from_numpy(rgb / 255).requires_grad_(),
    "float64": lambda rgb: rgb / 255,
    "big-endian": lambda rgb: (rgb / 255).astype(">f8"),
}


@pytest.mark.parametrize("form", ARRAY_FORMS)
def test_array_forms_are_the_same_image(rgb, form):
    (loaded,) = load_images(ARRAY_FORMS[form](rgb))
    expected = rgb if loaded.dtype == np.uint8 else rgb / 255
    assert loaded.dtype == expected.dtype
    np.testing.assert_array_equal(loaded, expected)


def test_bfloat16_becomes_float32(rgb):
    (loaded,) = load_images(torch.from_numpy(rgb / 255).bfloat16())
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, rgb / 255, rtol=0, atol=2**-8)


def test_grey_and_bool_arrays(rgb):
    grey = rgb[:, :, 0]
    for form in (grey, grey[:, :, None], grey[None], torch.from_numpy(grey.copy())):
        np.testing.assert_array_equal(load_images(form)[0], np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(load_images(grey > 100)[0][:, :, 1], np.where(grey > 100, 255, 0))


def test_layout_of_three_axes(warnings_logged):
    """Channels last wins where both readings are possible; a warning says so, and an option decides otherwise."""
    assert load_images(np.zeros((3, 5, 7), np.uint8))[0].shape == (5, 7, 3)
    assert load_images(np.zeros((5, 7, 3), np.uint8))[0].shape == (5, 7, 3)
    assert load_images(np.zeros((1, 5, 7), np.uint8))[0].shape == (5, 7, 3)
    assert warnings_logged() == ""
    unclear = np.zeros((3, 7, 4), np.uint8)
    assert load_images(unclear)[0].shape == (3, 7, 3)
    assert "An array of shape (3, 7, 4) could be (height, width, channels) or" in warnings_logged()
    assert load_images(unclear, input_data_format="channels_first")[0].shape == (7, 4, 3)
    assert load_images(unclear, input_data_format="channels_last")[0].shape == (3, 7, 3)


def test_nested_lists_and_batches_are_flattened_in_order(rgb):
    first, second, third = rgb, rgb[::-1], rgb[:, ::-1]
    nested = [[first], [], (second, [Image.fromarray(third.copy())])]
    batch = np.stack([first, second, third])
    for images in (nested, batch, torch.from_numpy(batch), [batch[:2], batch[2]], batch.transpose(0, 3, 1, 2)):
        np.testing.assert_array_equal(np.stack(load_images(images)), batch)


@pytest.fixture
def png(rgb, tmp_path):
    path = tmp_path / "an image.png"
    Image.fromarray(rgb).save(path)
    return path


REFERENCES = {
    "text path": str,
    "path": lambda path: path,
    "file URL": lambda path: path.as_uri(),
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "bytes in memory": lambda path: io.BytesIO(path.read_bytes()),
    "a row of an undecoded column": lambda path: {"bytes": path.read_bytes(), "path": path.name},
    "such a row without bytes": lambda path: {"bytes": None, "path": str(path)},
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "base64 in lines": lambda path: base64.encodebytes(path.read_bytes()).decode(),
    "data URL": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    "numpy text": lambda path: np.str_(path),
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_references_are_opened(png, rgb, reference):
    item = REFERENCES[reference](png)
    np.testing.assert_array_equal(load_images([item])[0], rgb)
    fetched = fetch_images([[item]])
    assert isinstance(fetched[0][0], Image.Image)
    np.testing.assert_array_equal(np.asarray(fetched[0][0]), rgb)


def test_an_open_file_stays_open(png, rgb):
    with png.open("rb") as file:
        for _ in range(2):
            np.testing.assert_array_equal(load_images(file)[0], rgb)
        assert not file.closed


def test_an_open_file_may_be_read_only_forwards(png, rgb):
    """Answers of servers have `read` and no `seek`."""

    class Stream:
        def __init__(self, content):
            self.read = io.BytesIO(content).read

    np.testing.assert_array_equal(load_images([Stream(png.read_bytes())])[0], rgb)


def test_orientation_is_obeyed_in_files_only(rgb, tmp_path):
    stored = Image.fromarray(rgb)
    exif = stored.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    upright = np.rot90(rgb, k=-1)
    content = path.read_bytes()
    for reference in (path, content, base64.b64encode(content).decode(), fetch_images(path)):
        np.testing.assert_array_equal(load_images(reference)[0], upright)
    np.testing.assert_array_equal(load_images(Image.open(path))[0], rgb)


def test_fetching_changes_nothing_but_references(rgb, png):
    image, tensor = Image.fromarray(rgb), torch.from_numpy(rgb)
    fetched = Molmo2ImageProcessor().fetch_images([[image, rgb], [], (tensor, str(png))])
    assert [len(group) for group in fetched] == [2, 0, 2]
    assert fetched[0][0] is image
    assert fetched[0][1] is rgb
    assert fetched[2][0] is tensor
    assert Molmo2ImageProcessor().fetch_images(image) is image
    np.testing.assert_array_equal(np.asarray(fetched[2][1]), rgb)


def test_an_alpha_channel_survives_fetching(rgb, tmp_path):
    """Conversion is the processor's business: `do_convert_rgb` must still see what the file holds."""
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "alpha.png")
    assert fetch_images(tmp_path / "alpha.png").mode == "RGBA"
    with pytest.raises(ValueError, match="images is a PIL image of mode 'RGBA', but `do_convert_rgb` is False"):
        small_processor(do_convert_rgb=False)(tmp_path / "alpha.png")


# --- what is no image ----------------------------------------------------------------------------------------------


GREY = np.zeros((5, 6), np.uint8)
NO_IMAGES = {
    "none": (
        [GREY, None],
        TypeError,
        r"images\[1\] is None of type NoneType, which is no image. Pass a PIL image, a",
    ),
    "nothing": (None, TypeError, "images is None of type NoneType, which is no image"),
    "number": ([[GREY], [3]], TypeError, r"images\[1\]\[0\] is 3 of type int, which is no image"),
    "dict": ([{"path": "a"}], TypeError, r"images\[0\] is \{'path': 'a'\} of type dict, which is no image"),
    "missing path": ([GREY, "no/such.png"], FileNotFoundError, r"images\[1\] is 'no/such.png', but there is no such"),
    "missing Path": (Path("no/such.png"), FileNotFoundError, "images is 'no/such.png', but there is no such file"),
    "missing file URL": (
        ["file:///no/such"],
        FileNotFoundError,
        r"images\[0\] is 'file:///no/such', but there is no",
    ),
    "folder": ([REPOSITORY], FileNotFoundError, r"images\[0\] is '.*', which is a folder. Pass the images in it"),
    "word": (["image"], FileNotFoundError, r"images\[0\] is 'image', but there is no such file"),
    "bytes": ([b"no image"], ValueError, r"images\[0\]: 8 bytes cannot be decoded as an image \(UnidentifiedImage"),
    "no bytes": ([b""], ValueError, r"images\[0\]: 0 bytes cannot be decoded as an image"),
    "text in base64": (
        ["QUJD" * 20],
        ValueError,
        r"images\[0\]: 'QUJD.*', read as base64, cannot be decoded as an image",
    ),
    "data URL": (
        ["data:image/png;base64,?"],
        ValueError,
        r"images\[0\] is 'data:image.*', which is not valid base64",
    ),
    "no pixels": ([np.zeros((0, 5, 3))], ValueError, r"images\[0\] is empty: its shape is \(0, 5, 3\)"),
    "no PIL pixels": ([Image.new("RGB", (0, 5))], ValueError, r"images\[0\] is empty: 5 x 0 pixels"),
    "one axis": ([np.zeros(5)], ValueError, r"images\[0\] has shape \(5,\). Pass \(height, width\)"),
    "five axes": ([np.zeros((1, 1, 2, 2, 3))], ValueError, r"images\[0\] has shape \(1, 1, 2, 2, 3\). Pass"),
    "two channels": ([np.zeros((5, 6, 2))], ValueError, "neither its last nor its first axis has 1, 3 or 4 channels"),
    "in a batch": (
        [np.zeros((2, 5, 6, 2))],
        ValueError,
        r"images\[0\]\[0\] has shape \(5, 6, 2\): neither its last",
    ),
    "negative": (
        [np.full((5, 6), -1)],
        ValueError,
        "dtype int64 and values from -1 to -1, but integers must lie in 0",
    ),
    "16 bit": (
        [np.full((5, 6), 256, np.uint16)],
        ValueError,
        r"images\[0\] has dtype uint16 and values from 256 to 256, but integers must lie in 0..255. Scale them",
    ),
    "complex": ([np.zeros((5, 6), complex)], ValueError, r"images\[0\] has dtype complex128. Use uint8 \(0..255\)"),
    "NaN": ([np.full((5, 6), np.nan)], ValueError, r"images\[0\] holds values that are not finite"),
    "infinity": ([torch.full((5, 6), torch.inf)], ValueError, r"images\[0\] holds values that are not finite"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_no_image_is_an_error_that_says_which(name):
    images, error, message = NO_IMAGES[name]
    with pytest.raises(error, match=message):
        small_processor()(images)


def test_the_pixel_limit_of_pillow_is_named(png, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    message = (
        r"cannot be decoded .*exceeds limit of 200 pixels.*raise Pillow's own limit, PIL\.Image\.MAX_IMAGE_PIXELS"
    )
    with pytest.raises(ValueError, match=message):
        load_images(png)


@pytest.mark.parametrize("name", ["none", "missing path", "bytes"])
def test_fetching_says_which_too(name):
    images, error, message = NO_IMAGES[name]
    with pytest.raises(error, match=message):
        fetch_images(images)


def test_truncated_files_are_refused(png):
    content = png.read_bytes()[:-200]
    with pytest.raises(ValueError, match=r"images: .* bytes cannot be decoded as an image \(OSError: .*truncated"):
        load_images(content)
    with pytest.raises(ValueError, match=r"images\[0\] cannot be read as RGB \(.*truncated"):
        load_images([Image.open(io.BytesIO(content))])


def test_layout_errors():
    with pytest.raises(
        ValueError, match=r"input_data_format is 'hwc'. Use one of channels_last, channels_first, or None"
    ):
        load_images(GREY, input_data_format="hwc")
    with pytest.raises(
        ValueError, match=r"\(3, 5, 6\), which as 'channels_last' means 6 channels, but 1, 3 or 4 were"
    ):
        load_images(np.zeros((3, 5, 6), np.uint8), input_data_format="channels_last")


def test_float_values_outside_their_range_are_warned_about(warnings_logged):
    load_images(np.full((5, 6, 3), 1.005))
    assert warnings_logged() == ""
    load_images(np.full((5, 6, 3), 2.0))
    assert "values outside 0..1, which are clipped. Divide by 255" in warnings_logged()


@pytest.mark.parametrize("image", [GREY, np.zeros((5, 6, 4), np.uint8), Image.new("L", (2, 2))])
def test_without_conversion_only_rgb_is_accepted(image, rgb):
    processor = small_processor()
    with pytest.raises(
        ValueError, match=r"but `do_convert_rgb` is False. Set it to True, or convert the image to RGB"
    ):
        processor(image, do_convert_rgb=False)
    assert_same_output(processor(rgb, do_convert_rgb=False), processor(rgb))


# --- output and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("return_tensors", "kind"), [(None, np.ndarray), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_output_types(rgb, return_tensors, kind):
    output = Molmo2ImageProcessor()(rgb, return_tensors=return_tensors)
    assert {key: (type(value), tuple(value.shape)) for key, value in output.items()} == {
        "pixel_values": (kind, (2, 729, 588)),
        "image_token_pooling": (kind, (392, 4)),
        "image_grids": (kind, (1, 4)),
        "image_num_crops": (kind, (1,)),
    }
    assert sorted(output) == sorted(Molmo2ImageProcessor.model_input_names)


@pytest.mark.parametrize("images", [[], [[], []]])
def test_no_images_give_empty_arrays(images):
    output = Molmo2ImageProcessor()(images)
    assert {key: value.shape for key, value in output.items()} == {
        "pixel_values": (0, 729, 588),
        "image_token_pooling": (0, 4),
        "image_grids": (0, 4),
        "image_num_crops": (0,),
    }
    assert output["pixel_values"].dtype == np.float32
    assert output["image_token_pooling"].dtype == output["image_grids"].dtype == np.int64


def test_several_images_are_one_after_the_other(rgb):
    processor = small_processor()
    rgb_images = [rgb, rgb[:, :9], rgb[:3]]
    alone = [processor(image) for image in rgb_images]
    together = processor(rgb_images)
    for key in together:
        np.testing.assert_array_equal(together[key], np.concatenate([output[key] for output in alone]))


OVERRIDES = {
    "max_crops": 1,
    "size": {"height": 42, "width": 56},
    "patch_size": 7,
    "pooling_size": [2, 1],
    "overlap_margins": [0, 1],
    "resample": 0,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [1.0, 2.0, 3.0],
}


@pytest.mark.parametrize("option", OVERRIDES)
def test_options_of_a_call_equal_those_of_a_processor(rgb, option):
    override = {option: OVERRIDES[option]}
    base = small_processor()
    output = base(rgb, **override)
    assert_same_output(output, small_processor(**override)(rgb))
    default = base(rgb)
    assert any(not np.array_equal(output[key], default[key]) for key in output)
    assert_same_output(base(rgb), default)  # the processor itself has not changed
    assert_same_output(base(rgb, **{option: None}), default)
    plan = base.plan(*rgb.shape[:2], **override)
    assert [list(plan.grid)] == output["image_grids"].tolist()
    assert [plan.num_crops] == output["image_num_crops"].tolist()


def test_short_forms_of_options():
    processor = Molmo2ImageProcessor(
        size=np.int64(196), image_mean=0.25, image_std=1, pooling_size=3, overlap_margins=(2, 3), max_crops=np.int64(2)
    )
    assert processor.size == {"height": 196, "width": 196}
    assert processor.image_mean == [0.25, 0.25, 0.25]
    assert processor.image_std == [1.0, 1.0, 1.0]
    assert processor.pooling_size == [3, 3]
    assert processor.overlap_margins == [2, 3]
    assert json.loads(processor.to_json_string())["max_crops"] == 2
    assert Molmo2ImageProcessor(size=(196, 392)).size == {"height": 196, "width": 392}
    assert Molmo2ImageProcessor(size=MappingProxyType({"height": 196, "width": 392})).size == {
        "height": 196,
        "width": 392,
    }
    mean = processor(np.zeros((9, 9, 3), np.uint8), image_mean=0, image_std=2.0)["pixel_values"]
    assert np.unique(mean).tolist() == [0.0]


def test_an_option_list_is_not_shared_between_processors():
    first, second = Molmo2ImageProcessor(), Molmo2ImageProcessor()
    first.image_mean[0] = 9.0
    first.size["height"] = 14
    assert second.image_mean == Molmo2ImageProcessor().image_mean == [0.5, 0.5, 0.5]
    assert second.size == {"height": 378, "width": 378}


BAD_OPTIONS = {
    "max_crops 0": (
        {"max_crops": 0},
        "max_crops is 0, but must be a whole number of at least 1: the maximum number of tiles",
    ),
    "max_crops False": ({"max_crops": False}, "max_crops is False, but must be a whole number"),
    "lanczos": ({"resample": 1}, r"resample is 1 \(lanczos\), which is not supported. Use 2 \(bilinear"),
    "box": ({"resample": 4}, r"resample is 4 \(box\), which is not supported"),
    "hamming": ({"resample": 5}, r"resample is 5 \(hamming\), which is not supported"),
    "other filter": ({"resample": 9}, "resample is 9, which is not supported"),
    "filter True": ({"resample": True}, "resample is True, which is not supported"),
    "filters": ({"resample": [2]}, r"resample is \[2\], which is not supported"),
    "filter by name": ({"resample": "bicubic"}, r"resample is 'bicubic', which is not supported. Use 2 \(bilinear"),
    "size": ({"size": 384}, "Crops of height 384 cannot be cut into patches of 14 x 14 pixels"),
    "size by edge": (
        {"size": {"shortest_edge": 5}},
        "size is \\{'shortest_edge': 5\\}. Crops have a fixed size: pass",
    ),
    "margins": ({"overlap_margins": [20, 20]}, r"margins of 20 \+ 20 patches leave nothing of a crop of 27 x 27"),
    "three margins": (
        {"overlap_margins": [1, 2, 3]},
        "overlap_margins is \\[1, 2, 3\\]. Pass two whole numbers, \\(before",
    ),
    "pooling": (
        {"pooling_size": [2, 2, 2]},
        "pooling_size is \\[2, 2, 2\\]. Pass two whole numbers, \\(rows, cols\\)",
    ),
    "mean": ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\]. Use finite numbers, one for all channels or 3"),
    "std": ({"image_std": [0.5, 0.0, 0.5]}, r"image_std is \[0.5, 0.0, 0.5\], but pixels are divided by it"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_impossible_options_are_refused(name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        Molmo2ImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        Molmo2ImageProcessor()(GREY, **options)
    with pytest.raises(ValueError, match=message):
        Molmo2ImageProcessor().plan(5, 5, **options)
    with pytest.raises(ValueError, match=message):
        Molmo2ImageProcessor.from_dict(PUBLISHED, **options)


def test_options_of_other_processors_are_passed_over(rgb, warnings_logged):
    processor = small_processor(do_resize=True, use_fast=False, crop_size=5, num_additional_tokens=3)
    output = processor(
        rgb,
        device="cpu",
        use_fast=True,
        return_metadata=True,
        data_format="channels_first",
        trust_remote_code=True,
    )
    assert warnings_logged() == ""
    assert_same_output(output, small_processor()(rgb))


@pytest.mark.parametrize("at_init", [True, False])
def test_steps_of_pixels(rgb, at_init):
    """Each is obeyed, at construction and in a call; a floating point image is scaled as the same uint8 image."""

    def values(image=rgb, **options):
        processor = small_processor(**options) if at_init else small_processor()
        return processor(image, **({} if at_init else options))["pixel_values"]

    plain = values(do_rescale=False, do_normalize=False)
    assert plain.dtype == np.float32
    assert_array_equal = np.testing.assert_array_equal
    assert_array_equal(plain, plain.round())
    assert_array_equal(values(do_normalize=False), plain / 255)
    assert_array_equal(values(do_rescale=False), (plain - 0.5) / 0.5)
    assert_array_equal(values(do_normalize=False, rescale_factor=-1), -plain)
    assert_array_equal(values(image_mean=0, image_std=[1, 2, 4], do_normalize=False), plain / 255)
    floats = (rgb / 255).astype(np.float32)
    np.testing.assert_allclose(
        values(floats, do_normalize=False, rescale_factor=2), plain * 2, rtol=0, atol=1.01
    )  # not rounded
    assert values(floats, do_normalize=False, do_rescale=False).max() <= 1
    for options in ({"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1}):
        with pytest.raises(ValueError, match="pixel_dtype is uint8, which the model normalises"):
            small_processor(**options)(rgb, pixel_dtype="uint8")


def test_an_image_that_has_its_size(rgb):
    """`do_resize=False` gives what resizing to the same size gives, and refuses other sizes."""
    canvas = resize(rgb, 28, 56, 2)
    processor = small_processor(do_resize=False)
    assert_same_output(processor(canvas), small_processor()(canvas))
    with pytest.raises(ValueError, match=r"do_resize is False, but an image has 20 x 30 pixels .* needs 28 x 56"):
        processor(rgb)
    with pytest.raises(ValueError, match=r"rescale_factor is 0, but pixels are multiplied by it"):
        small_processor(rescale_factor=0)


def test_misspelt_and_pointless_options_are_warned_about(rgb, warnings_logged):
    assert small_processor(max_crop=1).max_crops == 2
    assert "ignores the unknown option 'max_crop'. Did you mean 'max_crops'?" in warnings_logged()
    processor = small_processor()
    assert_same_output(processor(rgb, overlap_margin=1, colour=3, do_pad=True), processor(rgb))
    assert "ignores the unknown option 'overlap_margin'. Did you mean 'overlap_margins'?" in warnings_logged()
    assert "ignores the unknown option 'colour'. It knows do_normalize, do_rescale," in warnings_logged()
    assert "do_pad=True has no effect: Molmo2 always works with do_pad=False" in warnings_logged()
    Molmo2ImageProcessor.from_dict(PUBLISHED, pooling_sizes=3, padding_side="left")
    assert "ignores the unknown option 'pooling_sizes'. Did you mean 'pooling_size'?" in warnings_logged()
    assert "padding_side" not in warnings_logged()


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_published_file_survives_loading_and_saving(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "preprocessor_config.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    processor = Molmo2ImageProcessor.from_pretrained(source)
    processor.save_pretrained(target)
    assert [file.name for file in target.iterdir()] == ["preprocessor_config.json"]
    assert json.loads((target / "preprocessor_config.json").read_text(encoding="utf-8")) == PUBLISHED
    assert Molmo2ImageProcessor.from_pretrained(target).to_dict() == processor.to_dict() == PUBLISHED


@pytest.mark.parametrize("repository", ["Molmo2-4B", "Molmo2-8B", "Molmo2-O-7B", "Molmo2-VideoPoint-4B"])
def test_published_repositories(shared, repository):
    file = shared / "published" / repository / "preprocessor_config.json"
    processor = Molmo2ImageProcessor.from_pretrained(file.parent)
    assert processor.to_dict() == json.loads(file.read_text(encoding="utf-8")) == PUBLISHED


STEPS = {"do_resize": False, "do_rescale": False, "do_normalize": False, "rescale_factor": 0.5}


def test_changed_options_are_saved(tmp_path):
    options = {**OVERRIDES, **STEPS, "do_convert_rgb": False, "size": 42, "overlap_margins": [0, 0]}
    processor = Molmo2ImageProcessor(**options)
    processor.max_crops = 5
    processor.save_pretrained(tmp_path)
    loaded = Molmo2ImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert {name: getattr(loaded, name) for name in STEPS} == STEPS
    assert loaded.max_crops == 5
    assert loaded.do_convert_rgb is False
    assert loaded.resample == 0
    assert loaded.size == {"height": 42, "width": 42}
    assert "auto_map" not in loaded.to_dict()


def test_options_beside_the_path_win(tmp_path):
    Molmo2ImageProcessor().save_pretrained(tmp_path)
    processor = Molmo2ImageProcessor.from_pretrained(
        tmp_path, max_crops=24, size=196, image_mean=0.25, do_convert_rgb=False, trust_remote_code=True
    )
    assert (processor.max_crops, processor.size["height"], processor.do_convert_rgb) == (24, 196, False)
    assert processor.image_mean == [0.25] * 3
    processor, unused = Molmo2ImageProcessor.from_pretrained(
        tmp_path, max_crops=3, something=1, return_unused_kwargs=True
    )
    assert processor.max_crops == 3
    assert "something" in unused
    assert not hasattr(processor, "something")


def test_a_registered_class_takes_its_code_along(tmp_path, monkeypatch):
    remote_class = generated("image_processing_molmo2").Molmo2ImageProcessor
    monkeypatch.setattr(remote_class, "_auto_class", None)
    remote_class.register_for_auto_class("AutoImageProcessor")
    remote_class().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor"}
    needed = {"image_processing_molmo2", "configuration_molmo2", "grounding_molmo2"}
    assert {file.stem for file in tmp_path.glob("*.py")} == needed


def test_an_owner_names_its_class():
    processor = Molmo2ImageProcessor()
    assert "processor_class" not in processor.to_dict()
    processor._set_processor_class("Molmo2Processor")
    assert processor.to_dict()["processor_class"] == "Molmo2Processor"


def test_nothing_imports_torchvision():
    imported = set()
    for path in [
        *(SOURCES / "image").rglob("*.py"),
        *(SOURCES / "video").rglob("*.py"),
        SOURCES / "media_features.py",
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names <= {"molmo2", "numpy", "torch", "PIL", "transformers"}
