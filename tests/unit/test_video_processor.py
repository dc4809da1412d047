"""The video processor: what counts as a video, options, metadata, saving, and every error."""

import base64
import io
import json
import threading
import warnings
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from molmo2.image.limits import MediaLimits
from molmo2.video import loading
from molmo2.video.decoding.timeline import VideoDecodeError
from molmo2.video.processing import (
    FRAMES_AHEAD,
    Molmo2VideoProcessor,
    SampledVideoMetadata,
)
from support.golden_cases import GOLDEN, pattern, to_numpy

CLIPS = Path(__file__).resolve().parent.parent / "data" / "videos"
CFR30 = GOLDEN / "media" / "cfr30.mp4"  # 95 frames, 30 per second
ONE_FRAME = GOLDEN / "media" / "one_frame.mp4"
VFR = CLIPS / "vfr.mp4"
SMALL = {"size": 98}
FPS3 = {"fps": 3.0}


def clip(frames=6, height=40, width=50, seed=1, **spec):
    """A generated clip, (frames, height, width, 3) uint8 unless `spec` says otherwise."""
    return pattern({"kind": "pattern_video", "frames": frames, "height": height, "width": width, "seed": seed, **spec})


def processed(videos, **options):
    return Molmo2VideoProcessor(**SMALL)(videos, **{"return_metadata": True, **options})


def assert_same(actual, expected):
    for key in ("pixel_values_videos", "video_token_pooling", "video_grids"):
        np.testing.assert_array_equal(to_numpy(actual[key]), to_numpy(expected[key]), err_msg=key)


# --- options that count ----------------------------------------------------------------------------------------------


def test_resample_counts_in_a_call():
    by_call = processed(clip(), video_metadata=FPS3, resample=3)
    by_init = Molmo2VideoProcessor(**SMALL, resample=3)(clip(), video_metadata=FPS3)
    assert_same(by_call, by_init)
    assert np.abs(by_call["pixel_values_videos"] - processed(clip(), video_metadata=FPS3)["pixel_values_videos"]).max()


def test_fractional_rates_in_fps_mode():
    for fps, times in ((29.97, [0.0, 0.5, 1.0, 1.5]), (23.976, [0.0, 0.5, 1.0, 1.5, 2.0])):
        options = {"frame_sample_mode": "fps", "num_frames": 8, "video_metadata": {"fps": fps}}
        (metadata,) = processed(clip(60), **options)["video_metadata"]
        np.testing.assert_allclose(metadata.timestamps, times, rtol=2e-3)


# --- what counts as a video ------------------------------------------------------------------------------------------


def test_layouts_and_containers_of_frames(tmp_path):
    frames = clip()
    expected = processed(frames, video_metadata=FPS3)
    assert expected["video_grids"].tolist() == [[5, 3, 3]]
    assert expected["pixel_values_videos"].shape == (5, 49, 588)
    assert expected["pixel_values_videos"].dtype == np.float32
    assert expected["video_token_pooling"].dtype == expected["video_grids"].dtype == np.int64

    paths = [tmp_path / f"{index}.png" for index in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path)
    first = np.ascontiguousarray(np.moveaxis(frames, -1, 1))
    for video in (
        first,
        torch.from_numpy(frames),
        torch.from_numpy(first),
        list(frames),
        list(torch.from_numpy(first)),
        [Image.fromarray(frame) for frame in frames],
        paths,
        [str(path) for path in paths],
        frames.astype(np.int64),
    ):
        assert_same(processed(video, video_metadata=FPS3), expected)
        assert_same(processed([video], video_metadata=[FPS3]), expected)
        assert_same(processed([[video]], video_metadata=[[FPS3]]), expected)
        assert_same(processed((video, FPS3)), expected)
        assert_same(processed([(video, VideoMetadata(total_num_frames=6, fps=3.0))]), expected)


def test_float_frames_are_taken_as_0_to_1():
    frames = clip()
    floats = processed(frames.astype(np.float32) / 255, video_metadata=FPS3)
    ints = processed(frames, video_metadata=FPS3)
    assert np.abs(floats["pixel_values_videos"] - ints["pixel_values_videos"]).max() <= 1.01 / 255  # no rounding


def test_grey_and_transparent_frames_become_rgb():
    frames = clip()
    grey = frames[..., :1]
    expected = processed(np.repeat(grey, 3, axis=-1), video_metadata=FPS3)
    assert_same(processed(grey, video_metadata=FPS3), expected)
    assert_same(processed(list(grey[..., 0]), video_metadata=FPS3), expected)
    with_alpha = np.concatenate([frames, frames[..., :1]], axis=-1)
    assert_same(processed(with_alpha, video_metadata=FPS3), processed(frames, video_metadata=FPS3))


def test_several_videos_are_the_single_ones_in_a_row():
    videos, metadata = [clip(4), clip(5, seed=3)], [{"fps": 4.0}, {"fps": 2.0}]
    together = processed([*videos, str(CFR30)], video_metadata=[*metadata, None])
    single = [processed(video, video_metadata=entry) for video, entry in zip(videos, metadata, strict=True)]
    single.append(processed(CFR30))
    for key in ("pixel_values_videos", "video_token_pooling", "video_grids"):
        np.testing.assert_array_equal(together[key], np.concatenate([output[key] for output in single]))
    assert [m.timestamps for m in together["video_metadata"]] == [o["video_metadata"][0].timestamps for o in single]
    assert_same(
        processed(np.stack([clip(4), clip(4)]), video_metadata=[FPS3] * 2),
        processed([clip(4)] * 2, video_metadata=[FPS3] * 2),
    )


def test_no_videos():
    output = processed([])
    assert output["pixel_values_videos"].shape == (0, 49, 588)
    assert output["video_token_pooling"].shape == (0, 9)
    assert output["video_grids"].shape == (0, 3)


def test_forms_of_a_file():
    expected = processed(CFR30)
    assert expected["video_metadata"][0].timestamps == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 95 / 30]
    content = CFR30.read_bytes()
    row, encoded = {"bytes": content, "path": None}, base64.b64encode(content).decode()
    for video in (str(CFR30), CFR30.as_uri(), content, bytearray(content), io.BytesIO(content), row, encoded):
        assert_same(processed(video), expected)
    assert_same(processed([row, {"bytes": None, "path": str(CFR30)}]), processed([CFR30, CFR30]))
    with CFR30.open("rb") as file:
        assert_same(processed([file]), expected)


def test_a_long_text_that_is_no_file_makes_a_short_error():
    with pytest.raises(FileNotFoundError) as caught:
        processed("no file, " * 10_000)
    assert len(str(caught.value)) < 400


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(CFR30.parent))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_urls(server):
    limits = MediaLimits(allow_private_hosts=True)
    assert_same(processed(f"{server}/cfr30.mp4", limits=limits), processed(CFR30))
    with pytest.raises(ValueError, match=r"videos: http://127.*/gone.mp4 could not be downloaded \(it answered 404"):
        processed(f"{server}/gone.mp4", limits=limits)
    with pytest.raises(ValueError, match=r"videos\[0\]: http://127.*could not be downloaded \(Connection"):
        processed(["http://127.0.0.1:9/x.mp4"], limits=limits)


def test_full_frames_of_a_file_are_never_held(monkeypatch):
    """Frames become patches while a few more are decoded ahead: one in use, one on its way, the others waiting."""
    events = []
    original = loading.VideoReader.frames

    def watched(self, indices):
        for frame in original(self, indices):
            events.append("decoded")
            yield frame

    from molmo2.image import pixels

    normalize = pixels.normalize
    monkeypatch.setattr(loading.VideoReader, "frames", watched)
    monkeypatch.setattr(pixels, "normalize", lambda *a, **k: (events.append("cut"), normalize(*a, **k))[1])
    processed(CFR30)
    held = np.cumsum([1 if event == "decoded" else -1 for event in events])
    assert (len(events), held[-1]) == (16, 0)
    assert held.max() <= FRAMES_AHEAD + 2


# --- sampling, times and metadata ------------------------------------------------------------------------------------


def test_all_frames_without_sampling():
    output = processed(clip(4), video_metadata={"fps": 5.0}, do_sample_frames=False)
    (metadata,) = output["video_metadata"]
    assert metadata.timestamps == [0.0, 0.2, 0.4, 0.6]
    assert metadata.frames_indices == metadata.source_frame_indices == [0, 1, 2, 3]
    given = VideoMetadata(total_num_frames=40, fps=5.0, frames_indices=[0, 3, 7, 11])
    output = processed([[clip(4)]], video_metadata=[[given]], do_sample_frames=False)  # as serving adapters call it
    (metadata,) = output["video_metadata"]
    assert metadata.timestamps == [0.0, 0.6, 1.4, 2.2]
    assert metadata.source_frame_indices == [0, 3, 7, 11]
    assert metadata.total_num_frames == 40


def test_frames_that_were_picked_before_are_not_sampled_again():
    given = VideoMetadata(total_num_frames=40, fps=30.0, frames_indices=[0, 3, 7, 11])
    assert processed(clip(4), video_metadata=given)["video_grids"].tolist() == [[4, 3, 3]]


def test_metadata_that_lists_all_frames_is_no_sampling():
    given = {"fps": 10, "frames_indices": list(range(20))}
    assert_same(processed(clip(20), video_metadata=given), processed(clip(20), video_metadata={"fps": 10}))
    picked = {"fps": 10, "frames_indices": [0, 2, 4]}
    assert processed(clip(3), video_metadata=picked)["video_grids"].tolist() == [[3, 3, 3]]


def test_the_fps_mode_goes_by_the_declared_rate():
    """6.678 is declared, so 6 of it: 2 and 6 per second divide it; 7.27, which the frames say, would leave 7."""
    (metadata,) = processed(VFR, frame_sample_mode="fps", num_frames=64)["video_metadata"]
    np.testing.assert_allclose(metadata.timestamps, np.arange(38) / 6)


def test_files_are_sampled_whatever_do_sample_frames_says():
    assert_same(processed(CFR30, do_sample_frames=False), processed(CFR30))


def test_given_timestamps():
    times = [0.0, 0.1, 0.9, 1.0, 2.5]
    output = processed(clip(5), video_metadata={"timestamps": times}, do_sample_frames=False)
    (metadata,) = output["video_metadata"]
    assert metadata.timestamps == metadata.source_timestamps == times
    np.testing.assert_allclose(np.array(metadata.frames_indices) / metadata.fps, times)
    (metadata,) = processed(clip(5), video_metadata={"timestamps": times}, num_frames=3)["video_metadata"]
    assert metadata.timestamps == [0.0, 0.9, 2.5]
    assert metadata.source_frame_indices == [0, 2, 4]
    (metadata,) = processed(clip(1), video_metadata={"timestamps": [7.0]})["video_metadata"]
    assert metadata.timestamps == [7.0]


@pytest.mark.parametrize(
    ("indices", "expected"), [([0, 30, 60], [0, 30, 60]), ([0.0, 29.9999999, 60.5], [0, 30, 60])], ids=str
)
@pytest.mark.parametrize("times", [{"timestamps": [0.0, 1.0, 2.0]}, {"fps": 30.0}], ids=["times", "rate"])
@pytest.mark.parametrize("do_sample_frames", [False, True])
def test_given_indices_are_those_in_the_source(indices, expected, times, do_sample_frames):
    """Beside times too; fractions, as of a file that was sampled, stand for the frame that is shown then."""
    given = {**times, "frames_indices": indices}
    (metadata,) = processed(clip(3), video_metadata=given, do_sample_frames=do_sample_frames)["video_metadata"]
    assert metadata.source_frame_indices == expected
    np.testing.assert_allclose(metadata.timestamps, times.get("timestamps", np.array(indices) / 30))


@pytest.mark.parametrize("indices", [[None] * 3, [None, 1, 2], [float("nan")] * 3, [1e300] * 3, ["0", "1", "2"]])
def test_indices_that_are_none(indices):
    given = {"timestamps": [0.0, 1.0, 2.0], "frames_indices": indices}
    if any(index is not None for index in indices):
        with pytest.raises(ValueError, match=r"frames_indices of videos.* have to be finite numbers; found \["):
            processed(clip(3), video_metadata=given)
    else:
        (metadata,) = processed(clip(3), video_metadata=given, do_sample_frames=False)["video_metadata"]
        assert metadata.source_frame_indices == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "own", "expected"),
    [
        ({"max_fps": 8}, {"fps": 1}, {"max_fps": 1, "sampling_fps": 1}),
        ({"max_fps": 8}, {"fps": 1, "max_fps": 4}, {"max_fps": 4, "sampling_fps": 1}),
        ({"fps": 8}, {"max_fps": None}, {"max_fps": None, "sampling_fps": 8}),
        ({"num_frames": 3}, {"num_frames": None}, {"num_frames": 3}),
        ({"video_backend": "decord"}, {"backend": "pyav"}, {"video_backend": "pyav"}),
        ({"backend": "decord"}, {"video_backend": "pyav"}, {"video_backend": "pyav"}),
    ],
)
def test_options_of_a_video_override_those_of_the_call(call, own, expected):
    (found,) = processed([CFR30], **call, per_video_options=[own])["video_metadata"]
    (wanted,) = processed([CFR30], **expected)["video_metadata"]
    assert (found.timestamps, found.video_backend) == (wanted.timestamps, wanted.video_backend)


def test_a_clip_is_no_option_of_sample_frames():
    with pytest.raises(ValueError, match="`sample_frames` samples whole videos"):
        Molmo2VideoProcessor().sample_frames({"total_num_frames": 8, "fps": 4}, clip=(0, 1))


@pytest.mark.parametrize("rate", [np.float32("inf"), np.float16("inf"), np.float32("nan"), 0, -1, True, "2"])
def test_what_is_no_rate(rate):
    with pytest.raises(ValueError, match="max_fps"):
        Molmo2VideoProcessor(max_fps=rate)(CFR30)


def test_rates_may_be_fractions():
    processor = Molmo2VideoProcessor(max_fps=Fraction(1, 2), sampling_fps=Fraction(4))
    assert json.loads(processor.to_json_string())["max_fps"] == 0.5
    assert json.loads(Molmo2VideoProcessor(fps=Fraction(1, 2)).to_json_string())["fps"] == 0.5


@pytest.mark.parametrize("options", [{"fps": 10**400}, {"max_fps": 10**400}, {"num_frames": 10**400}])
def test_numbers_that_no_float_holds(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        processed([CFR30], **options)


def test_a_whole_number_may_be_a_float():
    assert len(processed([CFR30], num_frames=3.0)["video_metadata"][0].timestamps) == 3


def test_metadata_of_a_variable_rate_file():
    (metadata,) = processed(VFR, num_frames=8)["video_metadata"]
    assert isinstance(metadata, VideoMetadata)
    assert isinstance(metadata, SampledVideoMetadata)
    assert metadata.duration == pytest.approx(6.329)
    assert metadata.fps == pytest.approx(6.678, abs=1e-3)  # as the file declares it
    np.testing.assert_allclose(metadata.timestamps, np.linspace(0, 6.329, 8), atol=1e-9)
    np.testing.assert_allclose(np.array(metadata.frames_indices) / metadata.fps, metadata.timestamps, rtol=1e-12)
    assert metadata.source_frame_indices == [0, 5, 11, 15, 19, 29, 34, 45]
    starts = json.loads((CLIPS / "expected.json").read_text(encoding="utf-8"))["vfr.mp4"]["start_seconds"]
    assert metadata.source_timestamps == pytest.approx([starts[index] for index in metadata.source_frame_indices])
    assert all(shown <= asked for shown, asked in zip(metadata.source_timestamps, metadata.timestamps, strict=True))
    assert set(metadata) == set(VideoMetadata(total_num_frames=1))  # the library's own keys only


def test_clip_of_a_file():
    (metadata,) = processed(CFR30, clip=(1.0, 2.2))["video_metadata"]
    assert metadata.timestamps == [1.0, 1.5, 2.0, 2.2]
    assert metadata.source_frame_indices == [30, 45, 60, 66]
    assert metadata.total_num_frames == 95
    (metadata,) = processed(CFR30, clip=(2.5, None))["video_metadata"]
    assert metadata.timestamps == pytest.approx([2.5, 3.0, 95 / 30])
    (metadata,) = processed(CFR30, clip=(2.5, 99))["video_metadata"]
    assert metadata.timestamps == pytest.approx([2.5, 3.0, 95 / 30])
    whole, part = processed([CFR30, CFR30], clip=[None, (0, 0.5)])["video_metadata"]
    assert len(whole.timestamps) == 8
    assert part.timestamps == [0.0, 0.5]
    own = [{"clip": None}, {"num_frames": 3}]
    whole, part = processed([CFR30, CFR30], clip=(0, 0.5), per_video_options=own)["video_metadata"]
    assert len(whole.timestamps) == 8
    assert part.timestamps == [0.0, 0.5]
    assert Molmo2VideoProcessor().plan(4, clip=[None, (0, 0.5)]).num_frames == 4


def test_clip_of_an_array():
    (metadata,) = processed(clip(40), video_metadata={"fps": 10.0}, clip=(1.0, 2.25))["video_metadata"]
    assert metadata.source_frame_indices == [10, 15, 20, 22]
    assert metadata.timestamps == [1.0, 1.5, 2.0, 2.2]
    frames = clip(40)
    expected = processed(frames[10:23], video_metadata={"fps": 10.0})
    assert_same(processed(frames, video_metadata={"fps": 10.0}, clip=(1.0, 2.25)), expected)


def test_a_forced_decoder_is_named_in_the_metadata():
    for name in ("video_backend", "backend"):
        (metadata,) = processed(CFR30, **{name: "pyav"})["video_metadata"]
        assert metadata.video_backend == "pyav"


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 3},
        {"max_fps": 1},
        {"max_fps": None},
        {"frame_sample_mode": "fps"},
        {"frame_sample_mode": "fps", "sampling_fps": 1},
        {"size": 56},
        {"size": {"height": 56, "width": 84}},
        {"pooling_size": 2},
        {"pooling_size": [1, 2]},
        {"patch_size": 7},
        {"image_mean": 0.0, "image_std": [1, 2, 3]},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 0.5},
        {"resample": 0},
    ],
    ids=str,
)
def test_options_count_in_init_and_call(options):
    frames, metadata = clip(30), {"fps": 10.0}
    by_call = processed(frames, video_metadata=metadata, **options)
    by_init = Molmo2VideoProcessor(**{**SMALL, **options})(frames, video_metadata=metadata)
    assert_same(by_call, by_init)
    default = processed(frames, video_metadata=metadata)
    assert (
        by_call["pixel_values_videos"].shape != default["pixel_values_videos"].shape
        or np.any(by_call["pixel_values_videos"] != default["pixel_values_videos"])
        or np.any(by_call["video_token_pooling"].shape != default["video_token_pooling"].shape)
    )


def test_none_keeps_the_value_of_the_processor_except_for_max_fps():
    processor = Molmo2VideoProcessor(**SMALL, num_frames=4, max_fps=1.0)
    frames, metadata = clip(30), {"fps": 10.0}
    expected = processor(frames, video_metadata=metadata)
    assert_same(processor(frames, video_metadata=metadata, num_frames=None, size=None, resample=None), expected)
    assert expected["video_grids"][0, 0] == 4
    unlimited = processor(frames, video_metadata=metadata, max_fps=None, return_metadata=True)
    assert unlimited["video_metadata"][0].frames_indices == [0, 9, 19, 29]


def test_fps_of_other_processors_sets_the_sampling_rate():
    frames, metadata = clip(30), {"fps": 10.0}
    expected = processed(frames, video_metadata=metadata, max_fps=1)
    assert_same(processed(frames, video_metadata=metadata, fps=1), expected)
    assert_same(processed(frames, video_metadata=metadata, fps=4, max_fps=1), expected)


@pytest.mark.parametrize("fps", ["1", [1.0], True, 0, -1, float("nan"), {}])
def test_rates_that_are_none(fps):
    with pytest.raises(
        ValueError, match=r"^fps is .*\. Pass one positive number, frames per second, for all videos\."
    ):
        processed(clip(30), video_metadata={"fps": 10.0}, fps=fps)


def test_options_of_other_processors_do_not_stop_the_call():
    options = {"min_frames": 4, "image_patch_size": 14, "return_video_kwargs": True, "do_resize": True, "nonsense": 1}
    assert_same(processed(clip(), video_metadata=FPS3, **options), processed(clip(), video_metadata=FPS3))


def test_return_types():
    for return_tensors, kind in ((None, np.ndarray), ("np", np.ndarray), ("pt", torch.Tensor)):
        output = processed(clip(), video_metadata=FPS3, return_tensors=return_tensors, device="cpu")
        assert all(type(output[key]) is kind for key in Molmo2VideoProcessor.model_input_names)
    assert set(output) == {*Molmo2VideoProcessor.model_input_names, "video_metadata"}
    assert set(processed(clip(), video_metadata=FPS3, return_metadata=False)) == {
        *Molmo2VideoProcessor.model_input_names
    }


def test_plan_counts_the_tokens_that_preprocess_makes():
    processor = Molmo2VideoProcessor(size={"height": 98, "width": 70}, pooling_size=[2, 3])
    output = processor(clip(), video_metadata=FPS3)
    plan = processor.plan(5)
    assert output["video_grids"].tolist() == [list(grid) for grid in plan.grids] == [[5, 4, 2]]
    assert len(output["video_token_pooling"]) == plan.num_pooled_tokens == 40
    assert processor.get_num_of_video_patches(5, 480, 640) == 40
    assert processor.get_num_of_video_patches(5, videos_kwargs={"pooling_size": 1}) == 5 * 7 * 5


# --- decoding only ---------------------------------------------------------------------------------------------------


def test_fetch_videos_then_preprocess_equals_preprocess():
    processor = Molmo2VideoProcessor(**SMALL, num_frames=5)
    expected = processor([CFR30, VFR], return_metadata=True)
    frames, metadata = processor.fetch_videos([str(CFR30), str(VFR)])
    assert [video.shape for video in frames] == [(5, 96, 128, 3)] * 2
    for options in ({"do_sample_frames": False}, {}):
        output = processor(frames, video_metadata=metadata, return_metadata=True, **options)
        assert_same(output, expected)
        for actual, wanted in zip(output["video_metadata"], expected["video_metadata"], strict=True):
            assert actual == wanted
            for name in ("timestamps", "source_frame_indices", "source_timestamps"):
                assert getattr(actual, name) == getattr(wanted, name), name


def test_fetch_videos_keeps_the_nesting_and_decoded_videos():
    processor = Molmo2VideoProcessor()
    frames, metadata = processor.fetch_videos([[ONE_FRAME], [clip(), (clip(), FPS3), (clip(), {})]])
    assert [[len(video) for video in row] for row in frames] == [[2], [6, 6, 6]]
    assert metadata[0][0].timestamps == pytest.approx([0.0, 0.04])
    assert metadata[1] == [None, FPS3, {}]
    single, single_metadata = processor.fetch_videos(ONE_FRAME)
    assert single.shape == (2, 96, 128, 3)
    assert single_metadata.source_frame_indices == [0, 0]


def test_sample_timestamps_fn_replaces_the_sampling():
    seen = []

    def every_second(metadata, **options):
        seen.append(metadata)
        return np.arange(0, metadata.duration, 1.0)

    frames, metadata = Molmo2VideoProcessor().fetch_videos(
        CFR30, sample_timestamps_fn=every_second, video_backend="pyav"
    )
    assert frames.shape == (4, 96, 128, 3)
    assert metadata.timestamps == [0.0, 1.0, 2.0, 3.0]
    assert metadata.source_frame_indices == [0, 30, 60, 90]
    assert (seen[0].total_num_frames, seen[0].fps, seen[0].height, seen[0].width) == (95, 30.0, 96, 128)
    (_, fetched) = Molmo2VideoProcessor().fetch_videos([CFR30], sample_timestamps_fn=every_second)
    assert fetched[0].timestamps == metadata.timestamps
    _, by_index = Molmo2VideoProcessor().fetch_videos(CFR30, sample_indices_fn=lambda metadata: [3, 60])
    assert by_index.source_frame_indices == [3, 60]
    assert by_index.timestamps == [0.1, 2.0]


def test_fetched_frames_are_sampled_by_options():
    frames, metadata = Molmo2VideoProcessor().fetch_videos(CFR30, num_frames=3, clip=(1, 2), max_fps=None)
    assert metadata.timestamps == [1.0, 1.5, 2.0]
    assert frames.dtype == np.uint8


def test_sample_frames_tells_the_indices():
    processor = Molmo2VideoProcessor()
    assert processor.sample_frames(VideoMetadata(total_num_frames=11, fps=10.0)).tolist() == [0, 5, 10]
    assert processor.sample_frames(VideoMetadata(total_num_frames=11, fps=10.0), num_frames=2).tolist() == [0, 10]


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_published_settings_are_the_defaults(tmp_path):
    published = json.loads((GOLDEN / "tokenizer" / "video_preprocessor_config.json").read_text(encoding="utf-8"))
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "video_preprocessor_config.json").write_text(json.dumps(published), encoding="utf-8")
    for processor in (Molmo2VideoProcessor(), Molmo2VideoProcessor.from_pretrained(folder)):
        processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text(encoding="utf-8"))
        own = {name: value for name, value in published.items() if name not in ("auto_map", "processor_class")}
        assert {name: saved[name] for name in own} == own
        assert set(saved) - set(own) <= {"auto_map", "processor_class"}


def test_settings_survive_saving(tmp_path):
    settings = {
        "size": {"height": 98, "width": 112},
        "num_frames": 7,
        "max_fps": None,
        "sampling_fps": 0.5,
        "frame_sample_mode": "fps",
        "pooling_size": [2, 1],
        "patch_size": 7,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0, 2.0, 3.0],
        "resample": 3,
        "do_resize": False,
        "do_rescale": False,
        "do_normalize": False,
        "rescale_factor": 0.5,
        "video_backend": "pyav",
    }
    Molmo2VideoProcessor(**settings).save_pretrained(tmp_path)
    loaded = Molmo2VideoProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.to_dict() == Molmo2VideoProcessor(**settings).to_dict()
    changed = Molmo2VideoProcessor.from_pretrained(tmp_path, size=56, max_fps=3, pooling_size=2)
    assert (changed.size, changed.max_fps, changed.pooling_size) == ({"height": 56, "width": 56}, 3, [2, 2])


def test_attributes_that_serving_adapters_read():
    processor = Molmo2VideoProcessor()
    assert (processor.size["height"], processor.size["width"]) == (378, 378)
    assert (processor.patch_size, processor.pooling_size) == (14, [3, 3])
    assert (processor.num_frames, processor.frame_sample_mode) == (384, "uniform_last_frame")
    assert (processor.max_fps, processor.sampling_fps) == (2.0, 2)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"max_fps": -1}, "max_fps is -1"),
        ({"sampling_fps": 0}, "sampling_fps is 0"),
        ({"frame_sample_mode": "uniform"}, "Unknown frame_sample_mode 'uniform'"),
        ({"size": 100}, "height 100 cannot be cut into patches of 14"),
        ({"size": {"shortest_edge": 98}}, "size is .*'height'"),
        ({"pooling_size": [1, 2, 3]}, "pooling_size is .*Pass two whole numbers"),
        ({"image_mean": [1, 2]}, r"image_mean is \[1, 2\]. Use finite numbers"),
        ({"image_std": 0}, "image_std is .*other than 0"),
        ({"resample": 1}, "lanczos"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_in_init_and_call(options, message):
    with pytest.raises(ValueError, match=message):
        Molmo2VideoProcessor(**options)
    with pytest.raises(ValueError, match=message):
        processed(clip(), video_metadata=FPS3, **options)


@pytest.mark.parametrize(
    ("clip_option", "message"),
    [
        ((2, 1), r"clip is \(2.0, 1.0\) seconds.*end after the start"),
        ((-1, 1), "start has to be 0 or later"),
        ((float("nan"), 1), "start has to be 0 or later"),
        (3, r"clip is 3. Pass \(start_seconds, end_seconds\)"),
        ([(0, 1), (1, 2)], r"each of the 1 video\(s\)"),
        ((99, 100), "clip of videos starts at 99.0 s, but the video is 3.167 s long"),
    ],
    ids=str,
)
def test_impossible_clips(clip_option, message):
    with pytest.raises(ValueError, match=message):
        processed(CFR30, clip=clip_option)


def test_clip_outside_an_array():
    with pytest.raises(ValueError, match=r"clip of videos\[0\] starts at 9.0 s, but the video is 2.000 s long"):
        processed([clip()], video_metadata=FPS3, clip=(9, 10))


@pytest.mark.parametrize("metadata", [None, {}, {"fps": None}, VideoMetadata(total_num_frames=6)], ids=str)
@pytest.mark.parametrize("do_sample_frames", [True, False])
def test_frames_without_times_are_taken_as_24_per_second(metadata, do_sample_frames, monkeypatch):
    """As processors of transformers do, with a warning."""
    warnings = []
    monkeypatch.setattr(loading.logger, "warning_once", warnings.append)
    options = {"do_sample_frames": do_sample_frames, "return_metadata": True}
    found = processed([clip()], video_metadata=[metadata], **options)
    assert [text.partition(":")[0] for text in warnings] == ["videos[0] has no frame rate"]
    expected = processed([clip()], video_metadata=[{"fps": 24.0}], **options)
    assert len(warnings) == 1
    assert found["video_metadata"][0].timestamps == expected["video_metadata"][0].timestamps
    np.testing.assert_array_equal(found["pixel_values_videos"], expected["pixel_values_videos"])


@pytest.mark.parametrize("do_sample_frames", [True, False])
def test_frames_with_an_impossible_rate(do_sample_frames):
    message = r'videos\[0\]: The video has no usable frame rate .*video_metadata={"fps": 30.0}'
    for given in ({"fps": 0.0}, {"fps": 0.0, "timestamps": [0, 1, 2, 3, 4, 5]}):
        with pytest.raises(ValueError, match=message):
            processed([clip()], video_metadata=[given], do_sample_frames=do_sample_frames)


def test_steps_of_pixels():
    """The processor's options and those of a call; frames are cut as images are."""
    frames = [clip()]
    plain = {"do_normalize": False, "do_rescale": False}
    values = processed(frames, video_metadata=[{"fps": 3.0}], **plain)["pixel_values_videos"]
    assert values.dtype == np.float32
    assert values.max() > 1
    scaled = processed(frames, video_metadata=[{"fps": 3.0}], do_normalize=False, rescale_factor=2)
    np.testing.assert_array_equal(scaled["pixel_values_videos"], values * 2)
    with pytest.raises(ValueError, match=r"do_resize is False, but an image has \d+ x \d+ pixels"):
        processed(frames, video_metadata=[{"fps": 3.0}], do_resize=False)


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        (
            {"fps": 3.0, "total_num_frames": 50},
            {},
            r"of videos\[0\] says total_num_frames=50, but 6 frames were passed",
        ),
        ({"fps": 3.0, "total_num_frames": 0}, {}, "says total_num_frames=0, but 6 frames were passed"),
        ({"fps": 3.0, "total_num_frames": 0}, {"clip": (0, 1)}, "says total_num_frames=0, but 6 frames were passed"),
        ({"fps": 3.0, "total_num_frames": -1}, {"clip": (0, 1)}, "says total_num_frames=-1, but 6"),
        (
            {"fps": 3.0, "frames_indices": [0, 1]},
            {"do_sample_frames": False},
            r"videos\[0\] has 6 frames, but its metadata lists 2 frames_indices",
        ),
        ({"timestamps": [0.0, 1.0]}, {}, r"timestamps of videos\[0\] have to be 6 ascending seconds, .* found 2"),
        ({"timestamps": [0.0, 2.0, 1.0, 3.0, 4.0, 5.0]}, {}, "have to be 6 ascending seconds"),
    ],
    ids=[
        "total",
        "no total",
        "no total of a clip",
        "negative total",
        "indices",
        "number of timestamps",
        "order of timestamps",
    ],
)
def test_metadata_that_does_not_fit(metadata, options, message):
    with pytest.raises(ValueError, match=message):
        processed([clip()], video_metadata=[metadata], **options)


def test_number_of_metadata():
    with pytest.raises(ValueError, match=r"There are 1 video\(s\) but 2 entries in video_metadata"):
        processed([clip()], video_metadata=[FPS3, FPS3])
    with pytest.raises(TypeError, match="video_metadata has an entry of type int"):
        processed([clip()], video_metadata=[3])


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (3, "videos is a int, which is no video. Pass a path, a URL"),
        ([None], r"videos\[0\] is a NoneType"),
        ([[{"a": 1}]], r"videos\[0\]\[0\] is a dict"),
        (np.zeros((4, 4, 3), np.uint8), r"videos is a ndarray of shape \(4, 4, 3\)"),
    ],
    ids=["int", "None", "dict", "one image"],
)
def test_what_is_no_video(videos, message):
    with pytest.raises(TypeError, match=message):
        processed(videos, video_metadata=None)


def test_unusable_frames():
    with pytest.raises(ValueError, match=r"videos\[0\] has no frames"):
        processed([np.zeros((0, 4, 4, 3), np.uint8)], video_metadata=[FPS3])
    with pytest.raises(ValueError, match=r"Frame 0 of videos: .*neither its last"):
        processed(np.zeros((2, 8, 8, 5), np.uint8), video_metadata=FPS3)
    with pytest.raises(FileNotFoundError, match=r"Frame 0 of videos \('/a/0.png', ...\): .*'/a/0.png'"):
        processed(["/a/0.png", "/a/1.png"], video_metadata=FPS3)
    with pytest.raises(ValueError, match=r"videos \('/a/0.png', ...\): The video has no usable frame rate"):
        processed(["/a/0.png", "/a/1.png"], video_metadata={"fps": -1})


def test_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no video file '/nonexistent/video\.mp4'"):
        processed("/nonexistent/video.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb.png")
    with pytest.raises(VideoDecodeError, match=r"rgb.png' is an image \(PNG\), not a video. Pass it as an image"):
        processed([[str(tmp_path / "rgb.png")]])
    with pytest.raises(ValueError, match="Unknown video backend 'opencv'"):
        processed(CFR30, video_backend="opencv")


@pytest.mark.parametrize("times", [[], [float("nan")], [-1.0]], ids=str)
def test_unusable_sampled_times(times):
    with pytest.raises(ValueError, match=r"sample_timestamps_fn returned .* expected seconds >= 0"):
        Molmo2VideoProcessor().fetch_videos(CFR30, sample_timestamps_fn=lambda metadata: times)


def test_nothing_is_imported_from_torchvision(monkeypatch):
    """What the base class would do with torchvision must not be reached."""
    import sys

    monkeypatch.setitem(sys.modules, "torchvision", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processed([CFR30, clip()], video_metadata=[None, FPS3])
