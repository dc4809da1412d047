"""Reading ahead, pixels as uint8, features in place of pixels, and frames encoded while the next are decoded."""

import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from molmo2.image.processing import Molmo2ImageProcessor
from molmo2.tools.ask import MediaSession
from molmo2.video import frame_encoding
from molmo2.video import processing as video_processing
from molmo2.video.frame_encoding import read_ahead
from support.checkpoints import build_model, make_image
from support.model_inputs import MIXED, batch, clip, processor

VIDEO = Path(__file__).resolve().parent.parent / "data" / "videos" / "unordered.mov"
SLOW_FAST = {"key_frame_interval": 3, "between_pooling_size": 7}


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3")


@pytest.mark.parametrize("rows", [MIXED, ["image"], ["two videos"]], ids=["mixed", "image", "videos"])
@torch.no_grad()
def test_uint8_pixels_give_the_very_same_logits(model, rows):
    inputs, raw = batch(*rows), batch(*rows, pixel_dtype="uint8")
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            assert (inputs[name].dtype, raw[name].dtype) == (torch.float32, torch.uint8)
            assert inputs[name].shape == raw[name].shape
    assert torch.equal(model(**raw).logits, model(**inputs).logits)


def test_uint8_pixels_are_those_of_the_resized_image():
    raw = Molmo2ImageProcessor(size=14, overlap_margins=0, pooling_size=1, max_crops=1).preprocess(
        np.full((14, 14, 3), 200, np.uint8), pixel_dtype="uint8"
    )
    assert raw["pixel_values"].dtype == np.uint8
    assert (raw["pixel_values"] == 200).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_dtype": "int8"}, "pixel_dtype is 'int8'"),
        ({"pixel_dtype": "uint8", "image_mean": 0.4}, "the model normalises with mean 0.5"),
        ({"pixel_dtype": "uint8", "image_std": [0.5, 0.5, 0.2]}, "the model normalises with mean 0.5"),
    ],
)
def test_pixels_that_the_model_could_not_normalise(options, message):
    for arguments in ({"images": make_image()}, {"videos": [(clip(2), {"fps": 2.0})]}):
        with pytest.raises(ValueError, match=message):
            processor()(**arguments, images_kwargs=options, videos_kwargs=options)


def test_floats_are_not_cut_off_to_uint8():
    with pytest.raises(ValueError, match="there is an image of dtype float32"):
        processor()(images=np.zeros((20, 20, 3), np.float32), pixel_dtype="uint8")


@torch.no_grad()
def features_of(model, inputs):
    """The same inputs with vectors in place of pixels and pooling indices."""
    inputs = dict(inputs)
    vectors = {}
    if "pixel_values" in inputs:
        names = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
        vectors["image_features"] = model.get_image_features(*(inputs[name] for name in names))
        del inputs["pixel_values"], inputs["image_token_pooling"]
    if "pixel_values_videos" in inputs:
        names = ("pixel_values_videos", "video_token_pooling", "video_grids")
        vectors["video_features"] = model.get_video_features(*(inputs[name] for name in names))
        del inputs["pixel_values_videos"], inputs["video_token_pooling"]
    return {**inputs, **vectors}


@pytest.mark.parametrize("rows", [MIXED, ["image"], ["two videos"]], ids=["mixed", "image", "videos"])
@torch.no_grad()
def test_vectors_stand_in_for_pixels(model, rows):
    inputs = batch(*rows)
    assert torch.equal(model(**features_of(model, inputs)).logits, model(**inputs).logits)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}])
def test_vectors_in_generation(model, options):
    inputs = batch("image", "text", "two images")
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    assert torch.equal(model.generate(**features_of(model, inputs), **options), model.generate(**inputs, **options))


def test_vectors_and_pixels_at_once(model):
    inputs = batch("image")
    both = {**inputs, "image_features": features_of(model, inputs)["image_features"]}
    with pytest.raises(ValueError, match="either `image_features` or `pixel_values`: found both"):
        model(**both)


def test_vectors_of_both_kinds_need_the_grids(model):
    inputs = features_of(model, batch("image and video"))
    del inputs["video_grids"]
    with pytest.raises(ValueError, match="need `image_grids`, `image_num_crops` and `video_grids`"):
        model(**inputs)


# --- frames encoded as they come -------------------------------------------------------------------------------------


def prepared(**options):
    arguments = {"text": "<|video|>What?", "videos": [str(VIDEO)], "num_frames": 9, "max_fps": 30.0}
    return processor()(**arguments, return_tensors="pt", **options)


@pytest.mark.parametrize("slow_fast", [{}, SLOW_FAST], ids=["plain", "slow-fast"])
@pytest.mark.parametrize("frames_per_chunk", [1, 4, 100])
@torch.no_grad()
def test_encoding_on_the_way_changes_nothing(model, slow_fast, frames_per_chunk, monkeypatch):
    monkeypatch.setattr(frame_encoding, "FRAMES_PER_CHUNK", frames_per_chunk)
    expected = prepared(**slow_fast)
    inputs = prepared(**slow_fast, frame_encoder=model.encode_frames)
    assert {"pixel_values_videos", "video_token_pooling"}.isdisjoint(inputs)
    assert torch.equal(inputs["video_grids"], expected["video_grids"])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    torch.testing.assert_close(model(**inputs).logits, model(**expected).logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_several_videos_with_options_of_their_own(model):
    options = {
        "text": "<|video|><|video|>What?",
        "videos": [clip(5), clip(3)],
        "video_metadata": [{"fps": 2.0}] * 2,
        "per_video_options": [SLOW_FAST, {}],
        "return_tensors": "pt",
    }
    inputs = processor()(**options, frame_encoder=model.encode_frames)
    expected = model(**processor()(**options)).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=2e-5)
    each = [{**own, "frame_encoder": model.encode_frames} for own in options.pop("per_video_options")]
    inputs = processor()(**options, per_video_options=each)
    assert "video_features" in inputs
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=2e-5)


def test_chunks_are_decoded_one_ahead_in_another_thread(monkeypatch):
    """What is cut but not yet encoded is never more than one chunk besides the one at work."""
    monkeypatch.setattr(frame_encoding, "FRAMES_PER_CHUNK", 2)
    cut, encoded, threads, most_ahead = [], [], set(), 0
    frame_pixel_values = video_processing.frame_pixel_values

    def counted(frames, *args, **kwargs):
        pixels = frame_pixel_values(frames, *args, **kwargs)
        cut.append(len(pixels))
        threads.add(threading.current_thread())
        return pixels

    def encode(pixels, pooling, grids):
        nonlocal most_ahead
        most_ahead = max(most_ahead, len(cut) - len(encoded))
        assert (len(pixels), grids.tolist()) == (2, [[2, 3, 3]])
        assert pooling.max() < 2 * 49  # numbers start anew in each chunk
        encoded.append(pixels)
        return torch.zeros(len(pooling), 4)

    monkeypatch.setattr(video_processing, "frame_pixel_values", counted)
    inputs = processor()(
        text="<|video|>What?",
        videos=[clip(6)],
        video_metadata=[{"fps": 2.0}],
        return_tensors="pt",
        frame_encoder=encode,
    )
    assert inputs["video_features"].shape == (6 * 9, 4)
    assert (len(cut), len(encoded)) == (3, 3)
    assert most_ahead <= 2
    assert threading.main_thread() not in threads


def test_errors_of_the_encoder_and_of_the_file_arrive(model, tmp_path):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        prepared(frame_encoder=fail)
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ValueError, match="No video backend could read"):
        processor()(text="<|video|>What?", videos=[str(tmp_path / "noise.mp4")], frame_encoder=model.encode_frames)


def test_a_session_never_holds_the_pixels_of_a_clip(model, monkeypatch):
    """`MediaSession` encodes frames as they come, with unchanged answers."""
    video = [(clip(4), {"fps": 2.0})]
    asked = MediaSession(model, processor(), videos=video).ask("What happens?", max_new_tokens=5)
    seen = []
    encode_frames = type(model).encode_frames
    monkeypatch.setattr(
        type(model), "encode_frames", lambda self, *args: seen.append(len(args[0])) or encode_frames(self, *args)
    )
    assert MediaSession(model, processor(), videos=video).ask("What happens?", max_new_tokens=5).text == asked.text
    assert seen == [4]


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_pixels_are_made_on_the_device_that_is_asked_for(dtype):
    """The meta device computes nothing, but whatever was computed elsewhere could not end up on it by itself."""
    arguments = {"images": make_image(), "videos": [(clip(3), {"fps": 2.0})], "pixel_dtype": dtype}
    expected = processor()(**arguments, return_tensors="pt")
    for device in ("cpu", "meta"):
        found = processor()(**arguments, return_tensors="pt", device=device)
        for name in ("pixel_values", "pixel_values_videos"):
            assert found[name].device.type == device
            assert (found[name].shape, found[name].dtype) == (expected[name].shape, expected[name].dtype)
            assert device == "meta" or torch.equal(found[name], expected[name])


# --- reading ahead ---------------------------------------------------------------------------------------------------


def counted(made, number=5, error=None):
    for item in range(number):
        made.append(item)
        yield item
    if error is not None:
        raise error


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "It did not come to that within a minute."
        time.sleep(0.01)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("molmo2-read-ahead")]


def test_items_come_in_order():
    assert list(read_ahead(iter(range(100)), 3)) == list(range(100))
    assert list(read_ahead(iter([None, None]), 1)) == [None, None]
    assert list(read_ahead(iter([]), 1)) == []
    assert not reading_threads()


def test_up_to_count_items_are_made_ahead():
    made: list[int] = []
    items = read_ahead(counted(made, 20), 3)
    assert next(items) == 0
    wait_for(lambda: made == [0, 1, 2, 3])  # one in use, three ahead of it
    time.sleep(0.05)
    assert len(made) == 4
    assert list(items) == list(range(1, 20))


def test_an_error_comes_after_the_items_before_it():
    items = read_ahead(counted([], 2, ValueError("broken")), 5)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="broken"):
        next(items)
    assert not reading_threads()


@pytest.mark.parametrize("count", [1, 3])
def test_a_reader_that_leaves_stops_the_thread(count):
    made: list[int] = []
    items = read_ahead(counted(made, 10**6), count)
    next(items)
    items.close()
    found = len(made)
    assert not reading_threads()
    assert found == len(made) <= count + 1


def test_an_error_of_the_reader_stops_the_thread_at_once():
    """Also while the traceback keeps the frames of the reader alive."""
    made: list[int] = []

    def read():
        with closing(read_ahead(counted(made, 50), 3)) as items:
            for _ in items:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as raised:
        read()
    assert raised.tb is not None
    assert not reading_threads()
    assert len(made) <= 4


@pytest.mark.parametrize("encode", [False, True])
def test_a_failing_call_leaves_no_thread_behind(encode, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    if not encode:
        monkeypatch.setattr(video_processing, "frame_pixel_values", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        prepared(**({"frame_encoder": fail} if encode else {}))
    assert not reading_threads()
