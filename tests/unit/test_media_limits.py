"""Limits on media: what is over one is refused before it takes memory, by name, and can be let in."""

import base64
import copy
import io
import re
import struct
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from molmo2 import MediaLimitError, MediaLimits, plan
from molmo2.data.media import image_size
from molmo2.image import loading
from molmo2.image.limits import checked_limits
from molmo2.image.loading import fetch_images, load_images
from molmo2.image.measuring import measure_images
from molmo2.image.opening import orientation as orientation_of
from molmo2.image.processing import Molmo2ImageProcessor
from molmo2.tools.draw import to_rgb
from molmo2.video.processing import Molmo2VideoProcessor
from molmo2.video.sampling import SamplingSettings, sample_indices, sample_times
from support.clips import load_video
from support.hostile_media import (
    POSTSCRIPT,
    clip,
    gif_of_size,
    image_bytes,
    png_of_size,
    tiff_of_size,
    webp_of_size,
)
from support.model_inputs import processor

BOMBS = {
    "png": png_of_size(13000, 13000),
    "png with one bit a pixel": png_of_size(13000, 13000, bits=1, colour=0),
    "gif": gif_of_size(13000, 13000),
    "webp": webp_of_size(16383, 10900),
    "tiff": tiff_of_size(13000, 13000),
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_refused_by_their_header(content, tmp_path):
    file = tmp_path / "image"
    file.write_bytes(content)
    for reference in (content, file, io.BytesIO(content), base64.b64encode(content).decode()):
        with pytest.raises(
            MediaLimitError, match=r"over the limit image_pixels=100,000,000\. .*MediaLimits\(image_pix"
        ):
            load_images([reference])
    with pytest.raises(MediaLimitError, match="image_pixels"):
        measure_images(file)
    if content[:4] != b"RIFF":
        with pytest.raises(MediaLimitError, match="image_pixels"):
            load_images([Image.open(file)])


def test_the_limit_on_pixels_can_be_set_anywhere():
    image = np.zeros((30, 50, 3), np.uint8)
    narrow = MediaLimits(image_pixels=1499)
    for given in (image, Image.fromarray(image), image_bytes("PNG")):
        with pytest.raises(MediaLimitError, match="image_pixels=1,499"):
            Molmo2ImageProcessor(limits=narrow)(given)
        with pytest.raises(MediaLimitError, match="image_pixels=1,499"):
            Molmo2ImageProcessor()(given, limits=narrow)
        assert Molmo2ImageProcessor(limits=narrow)(given, limits=MediaLimits())["pixel_values"].shape[0] == 2
    processor = Molmo2ImageProcessor()
    processor.limits = narrow
    with pytest.raises(MediaLimitError):
        processor(image)


@pytest.mark.parametrize("processor_class", [Molmo2ImageProcessor, Molmo2VideoProcessor])
def test_limits_are_neither_saved_nor_taken_from_files(processor_class, tmp_path):
    processor_class(limits=MediaLimits(image_pixels=5)).save_pretrained(tmp_path)
    assert "limits" not in "".join(path.read_text() for path in tmp_path.iterdir())
    config = {**processor_class().to_dict(), "limits": {"image_pixels": 10**12}}
    assert processor_class.from_dict(config).limits == MediaLimits()
    assert processor_class.from_pretrained(tmp_path, limits=MediaLimits(redirects=1)).limits.redirects == 1


def test_limits_are_checked_themselves():
    with pytest.raises(ValueError, match="redirects is -1"):
        MediaLimits(redirects=-1)
    for name, value in (("fetch_bytes", 1.5), ("image_pixels", float("inf")), ("redirects", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} is .*Pass a"):
            MediaLimits(**{name: value})
    for value in (float("inf"), float("nan"), "3", True, None):
        with pytest.raises(ValueError, match=r"total_seconds is .*Pass a finite number"):
            MediaLimits(total_seconds=value)
    whole = MediaLimits(fetch_bytes=1e9, read_seconds=0.5)
    assert (whole.fetch_bytes, type(whole.fetch_bytes), whole.read_seconds) == (10**9, int, 0.5)
    for value in ("PNG", None, 5, [1], b"PNG"):
        for name in ("image_formats", "sources"):
            with pytest.raises(ValueError, match=f"MediaLimits: {name} is {re.escape(repr(value))}. Pass a tuple"):
                MediaLimits(**{name: value})
    assert MediaLimits(sources=(name for name in ["data", "https"])).sources == ("data", "https")
    with pytest.raises(ValueError, match=r"unknown source\(s\) \['ftp'\]"):
        MediaLimits(sources=("ftp",))
    with pytest.raises(TypeError, match=r"limits is 5 of type int. Pass a MediaLimits"):
        load_images([], limits=5)


def test_open_videos_are_copied_up_to_a_limit():
    class Endless:
        num_bytes = 0

        def read(self, size):
            self.num_bytes += size
            return bytes(size)

    endless = Endless()
    for file in (endless, io.BytesIO(clip())):
        with pytest.raises(MediaLimitError, match=r"bytes or more, over the limit fetch_bytes=1,000\."):
            load_video(file, limits=MediaLimits(fetch_bytes=1000))
    assert endless.num_bytes < 10_000_000
    assert len(load_video(clip(), limits=MediaLimits(fetch_bytes=1000))[0])  # bytes are in memory anyway


def test_limits_of_the_processor_are_those_of_both_parts(tmp_path):
    both = copy.deepcopy(processor())
    limits = MediaLimits(image_pixels=100, video_frames=11)
    both.limits = limits
    assert both.limits is both.image_processor.limits is both.video_processor.limits is limits
    with pytest.raises(MediaLimitError, match="image_pixels=100"):
        both(images=np.zeros((30, 50, 3), np.uint8))
    with pytest.raises(MediaLimitError, match="video_frames=11"):
        both(videos=clip())
    both.save_pretrained(tmp_path)
    assert not any("video_frames" in path.read_text() or "limits" in path.read_text() for path in tmp_path.iterdir())
    with pytest.raises(TypeError, match="Pass a MediaLimits"):
        both.limits = {"image_pixels": 5}
    both.limits = None
    assert both.limits == MediaLimits()


def test_plans_obey_the_limits_of_the_call():
    narrow, wide = MediaLimits(image_pixels=10, video_frames=11), MediaLimits()
    for media in ({"images": image_bytes("PNG")}, {"videos": clip()}):
        both = copy.deepcopy(processor())
        with pytest.raises(MediaLimitError):
            plan(both, **media, limits=narrow)
        both.limits = narrow
        assert plan(both, **media, limits=wide).visual_tokens[0]
        with pytest.raises(MediaLimitError):
            plan(both, **media)


def test_formats_come_from_a_list():
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        assert load_images(image_bytes(kind))[0].shape == (40, 60, 3)
    for content in (POSTSCRIPT, image_bytes("PPM"), image_bytes("ICO"), b"not an image at all"):
        with pytest.raises(ValueError, match=r"cannot be decoded as an image .*one of the formats PNG, JPEG"):
            load_images(content)
    assert load_images(image_bytes("PPM"), limits=MediaLimits(image_formats=("PPM",)))[0].shape == (40, 60, 3)


def test_servers_take_no_paths(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(image_bytes("PNG"))
    limits = MediaLimits(sources=("data",))
    for reference in (file, str(file), file.as_uri(), "/etc/passwd", "https://example.org/a.png"):
        with pytest.raises(MediaLimitError, match="not among the accepted sources"):
            load_images(reference, limits=limits)
        with pytest.raises(MediaLimitError, match="not among the accepted sources"):
            load_video(reference, limits=limits)
    url = "data:image/png;base64," + base64.b64encode(image_bytes("PNG")).decode()
    assert load_images([url, image_bytes("PNG")], limits=limits)[0].shape == (40, 60, 3)
    with pytest.raises(MediaLimitError, match="fetch_bytes=9"):
        load_images(url, limits=MediaLimits(fetch_bytes=9))


def test_clips_have_limits():
    with pytest.raises(MediaLimitError, match=r"video_frame_pixels=36,000,000"):
        load_video(gif_of_size(10_000, 10_000, num_frames=300))
    with pytest.raises(MediaLimitError, match=r"pixels per byte\), over the limit video_pixels_per_byte=250,000"):
        load_video(gif_of_size(5_000, 5_000, num_frames=300))
    for backend in ("decord", "pyav", None):
        with pytest.raises(MediaLimitError, match="has 12 frames, over the limit video_frames=11"):
            load_video(clip(), video_backend=backend, limits=MediaLimits(video_frames=11))
        with pytest.raises(MediaLimitError, match="frames of 48 x 64 pixels, over the limit video_frame_pixels=3,071"):
            load_video(clip(), video_backend=backend, limits=MediaLimits(video_frame_pixels=3071))


def test_visual_tokens_have_a_limit():
    limits = MediaLimits(visual_tokens=200)
    with pytest.raises(
        MediaLimitError, match=r"Image 0 would take .* visual tokens, over the limit visual_tokens=200"
    ):
        Molmo2ImageProcessor()(np.zeros((50, 50, 3), np.uint8), limits=limits)
    with pytest.raises(MediaLimitError, match="would take 324 visual tokens in 4 frames"):
        Molmo2VideoProcessor()(clip(), limits=limits)
    assert Molmo2VideoProcessor()(clip(), num_frames=2, limits=limits)["video_grids"].tolist() == [[2, 9, 9]]


def test_absurd_options_do_not_loop():
    with pytest.raises(ValueError, match="sampling_fps is 1e-09, but it has to be at least 1e-05"):
        Molmo2VideoProcessor(sampling_fps=1e-9)
    with pytest.raises(ValueError, match=r"max_crops is 1000000000000, but must be .*up to 10,000"):
        Molmo2ImageProcessor(max_crops=10**12)
    many = SamplingSettings(num_frames=10**12, frame_sample_mode="fps", sampling_fps=2)
    assert sample_times(3.0, 25.0, many).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert sample_indices(25, 25.0, many).tolist() == [0, 12]


@pytest.mark.parametrize(
    ("settings", "fps"),
    [
        ({}, 25.0),
        ({"max_fps": 1e9}, 25.0),
        ({"max_fps": 1e308}, 25.0),
        ({"frame_sample_mode": "fps", "sampling_fps": 1e9}, 1e9),
        ({"frame_sample_mode": "fps", "sampling_fps": 0.7e9}, 1e9),
    ],
    ids=["spread", "max_fps", "as high as goes", "sampling_fps", "sampling_fps that does not divide"],
)
def test_more_frames_than_memory_holds_are_refused(settings, fps):
    many = SamplingSettings(num_frames=10**12, **settings)
    message = r"num_frames is 1,000,000,000,000, and [\d,]+ frames would be sampled\. Use at most 10,000,000"
    with pytest.raises(ValueError, match=message):
        sample_times(60.0, fps, many)
    with pytest.raises(ValueError, match=message):
        sample_indices(60 * 10**9, fps, many)
    few = SamplingSettings(num_frames=8, **settings)
    assert len(sample_times(60.0, fps, few)) <= 8
    assert len(sample_indices(60 * 10**9, fps, few)) <= 8


def jpeg(size, orientation=None, **options):
    """A smooth JPEG file of (height, width)."""
    rows, cols = np.mgrid[0 : size[0], 0 : size[1]]
    image = Image.fromarray(np.stack([rows * 255 // size[0], cols * 255 // size[1], 0 * rows], -1).astype(np.uint8))
    exif, file = Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    image.save(file, "JPEG", exif=exif, quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [None, 3, 6])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(scale, orientation):
    height, width = 805, 1203
    content, processor = jpeg((height, width), orientation), Molmo2ImageProcessor()
    limits = MediaLimits(image_pixels=-(-height // scale) * -(-width // scale), reduce_jpeg=True)
    (reduced,) = load_images(content, limits=limits)
    assert reduced.shape[0] * reduced.shape[1] == limits.image_pixels
    assert measure_images(content, limits=limits) == measure_images(content)
    found, expected = processor(content, limits=limits), processor(content)
    assert [info.sizes for info in found.media] == [info.sizes for info in expected.media]  # points are in its pixels
    for name in ("image_grids", "image_num_crops", "image_token_pooling"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert np.abs(found["pixel_values"] - expected["pixel_values"]).mean() < 0.02  # of -1..1
    assert np.abs(found["pixel_values"] - expected["pixel_values"]).max() > 0  # why it is no default


@pytest.mark.parametrize("exif", [b"Exif\0\0junkjunk", b"Exif\0\0II*\0"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_keep_no_image_from_being_read(exif, kind, tmp_path):
    """Nor do they turn it."""
    image, plain, path = Image.effect_noise((8, 4), 50).convert("RGB"), io.BytesIO(), tmp_path / "damaged"
    image.save(plain, kind)
    image.save(path, kind, exif=exif, dpi=(72, 72))  # without a density, Pillow passes over it for a JPEG
    with pytest.warns(UserWarning, match=r"EXIF data of .*damaged cannot be read .*; it is taken as upright"):
        assert measure_images(path) == [(4, 8)]
    with pytest.warns(UserWarning, match="it is taken as upright"):
        np.testing.assert_array_equal(load_images(path)[0], load_images(plain.getvalue())[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_upright_whatever_its_other_tags_are(kind, orientation):
    """One of them has a type that Pillow cannot write again."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, orientation) + struct.pack("<HHI4s", 0x0111, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = orientation
    image, damaged, sound = Image.effect_noise((8, 4), 50).convert("RGB"), io.BytesIO(), io.BytesIO()
    image.save(sound, kind, exif=tag)
    image.save(damaged, kind, exif=tag if kind == "TIFF" else exif, dpi=(72, 72))  # its tags are those of the file
    if orientation > 1 and kind != "TIFF":
        with pytest.raises(struct.error):
            ImageOps.exif_transpose(Image.open(damaged))
    expected = ImageOps.exif_transpose(Image.open(sound))
    assert measure_images(damaged.getvalue()) == [expected.size[::-1]]
    np.testing.assert_array_equal(load_images(damaged.getvalue())[0], expected)
    np.testing.assert_array_equal(to_rgb(damaged), expected)
    (turned,) = fetch_images([damaged.getvalue()])
    np.testing.assert_array_equal(load_images(turned)[0], expected)
    assert orientation_of(turned) == 1  # so that nobody turns it again


def test_a_cut_image_has_no_size():
    """Where the tag of a PNG stands behind its pixels, these are read first."""
    file = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(file, "PNG")
    cut = file.getvalue()[:300]
    with pytest.raises(ValueError, match="cannot be decoded"):
        measure_images(cut)
    assert image_size(cut) is None


def test_frames_that_are_reduced_keep_their_size(tmp_path):
    (tmp_path / "frame.jpg").write_bytes(jpeg((800, 480)))
    frames = [str(tmp_path / "frame.jpg")] * 2
    limits = MediaLimits(image_pixels=100 * 60, reduce_jpeg=True)
    options = {"video_metadata": {"fps": 1.0}, "return_metadata": True, "limits": limits}
    (metadata,) = Molmo2VideoProcessor()(frames, **options)["video_metadata"]
    assert metadata.frame_size == (800, 480)


def test_files_of_several_jpegs_are_reduced_too():
    file, image = io.BytesIO(), Image.open(io.BytesIO(jpeg((800, 480))))
    image.save(file, "MPO", save_all=True, append_images=[image])
    limits = MediaLimits(image_pixels=100 * 60, reduce_jpeg=True)
    (reduced,) = load_images(file.getvalue(), limits=limits)
    assert Image.open(file).format == "MPO"
    assert reduced.shape == (100, 60, 3)
    assert loading.original_size(reduced) == (800, 480)


def test_very_narrow_jpegs_are_refused_by_name():
    limits = MediaLimits(image_pixels=1000, reduce_jpeg=True)
    for width in (1, 3):  # Pillow reduces no side below one pixel
        with pytest.raises(MediaLimitError, match="over the limit image_pixels=1,000"):
            load_images(jpeg((8000, width)), limits=limits)


def test_arrays_made_of_a_reduced_one_have_their_own_size():
    (reduced,) = load_images(jpeg((800, 480)), limits=MediaLimits(image_pixels=6000, reduce_jpeg=True))
    assert loading.original_size(reduced) == (800, 480)
    assert loading.original_size(reduced[10:30, 20:30]) == (20, 10)
    assert loading.original_size(reduced.copy()) == (100, 60)


def test_what_cannot_be_reduced_is_refused():
    limits = MediaLimits(image_pixels=100 * 60, reduce_jpeg=True)
    assert load_images(jpeg((800, 480)), limits=limits)[0].shape == (100, 60, 3)
    for content in (jpeg((808, 480)), jpeg((800, 480), progressive=True), png_of_size(480, 800)):
        with pytest.raises(MediaLimitError, match=r"over the limit image_pixels=6,000"):
            load_images(content, limits=limits)
    with pytest.raises(MediaLimitError, match="image_pixels"):
        load_images(jpeg((800, 480)), limits=MediaLimits(image_pixels=6000))
    with pytest.raises(ValueError, match=r"reduce_jpeg is 1\. Pass True or False"):
        MediaLimits(reduce_jpeg=1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "PA", "CMYK", "YCbCr", "1", "I", "F", "I;16", "HSV"])
def test_large_images_are_converted_in_strips_to_the_same_values(mode, monkeypatch):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (37, 23, 3), dtype=np.uint8))
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    monkeypatch.setattr(loading, "MAX_WHOLE_PIXELS", 36 * 23)
    monkeypatch.setattr(loading, "STRIP_PIXELS", 5 * 23)
    np.testing.assert_array_equal(load_images(image)[0], expected)


def test_limits_of_remote_code_are_taken():
    """A processor of remote code brings a class of its own, which `track_long` and others pass on."""
    names = [field.name for field in fields(MediaLimits)]
    values = {name: getattr(MediaLimits(image_pixels=7), name) for name in names}
    assert checked_limits(SimpleNamespace(**values)) == MediaLimits(image_pixels=7)
