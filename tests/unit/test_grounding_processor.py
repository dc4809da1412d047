"""Answers read with what the processor's output remembers: sizes of images, sampled frames of videos."""

import copy
import importlib.util
import pickle
import sys
from collections import UserDict
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from molmo2.grounding import parse as grounding
from molmo2.grounding.parse import GroundingStream, MediaInfo, SampledFrame, media_info, parse_grounding
from support.golden_processor import build_processor, encode

SMALL = {
    "image_processor_init": {"size": {"height": 98, "width": 98}, "overlap_margins": [2, 2], "max_crops": 4},
    "video_processor_init": {"size": {"height": 98, "width": 98}, "num_frames": 8},
}
CENTRE = '<points coords="1 1 500 500">cup</points>'
SECOND = '<points coords="2 1 500 250">cup</points>'


@pytest.fixture(scope="module")
def processor():
    return build_processor(SMALL)


def make_image(width, height):
    return Image.new("RGB", (width, height), (80, 120, 160))


def frames(count=10, width=60, height=40):
    return np.zeros((count, height, width, 3), dtype=np.uint8)


def at(grounding):
    return [(point.x, point.y) for point in grounding]


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


# --- media travels with the inputs -----------------------------------------------------------------------------------


def test_one_image(processor):
    inputs = processor(images=make_image(300, 200), text="<|image|>Point to the cups.", return_tensors="pt")
    assert inputs.media == [MediaInfo("image", ((300, 200),))]
    assert "media" not in inputs  # no key, so that `generate(**inputs)` works
    found = processor.post_process_grounding(CENTRE, inputs)
    assert at(found) == [(150, 100)]
    assert found.kind == "image"


def test_rows_of_different_kinds(processor):
    inputs = processor(
        text=["<|image|><|image|>a", "b", "<|video|>c", "<|image|>d"],
        images=[make_image(300, 200), make_image(100, 50), make_image(20, 10)],
        videos=[frames()],
        video_metadata=[{"fps": 5.0}],
        padding=True,
        return_tensors="pt",
    )
    assert [row.kind for row in inputs.media] == ["multi_image", "image", "video", "image"]
    assert [row.sizes for row in inputs.media] == [((300, 200), (100, 50)), (), ((60, 40),), ((20, 10),)]
    video = '<tracks coords="1.0 7 500 500">dog</tracks>'
    found = processor.post_process_grounding([SECOND, CENTRE, video, CENTRE], inputs)
    assert [at(one) for one in found] == [[(50, 12.5)], [(None, None)], [(30, 20)], [(10, 5)]]
    frame = found[2].points[0].frame
    assert frame == SampledFrame(1.0, inputs.media[2].sampled_frames.index(frame), 5, 1.0)


def test_several_answers_per_row(processor):
    inputs = processor(
        text=["<|image|>a", "<|image|>b"], images=[make_image(100, 100), make_image(200, 400)], padding=True
    )
    found = processor.post_process_grounding([CENTRE] * 6, inputs)
    assert [at(one)[0] for one in found] == [(50, 50)] * 3 + [(100, 200)] * 3
    with pytest.raises(ValueError, match=r"5 answer\(s\) for 2 row\(s\)"):
        processor.post_process_grounding([CENTRE] * 5, inputs)


def test_images_beside_a_video(processor):
    inputs = processor(
        text="<|image|><|video|>a", images=make_image(300, 200), videos=[frames()], video_metadata=[{"fps": 5.0}]
    )
    found = processor.post_process_grounding(CENTRE + '<points coords="1.0 2 500 500">cup</points>', inputs)
    assert at(found) == [(150, 100), (30, 20)]
    assert [point.image_index for point in found] == [0, None]
    assert [point.time for point in found] == [None, 1.0]


def test_times_are_read_against_the_first_of_several_videos(processor):
    inputs = processor(
        text="<|video|><|video|>a",
        videos=[frames(), frames(20, 30, 20)],
        video_metadata=[{"fps": 5.0}, {"fps": 2.0}],
    )
    answer = '<points coords="1.0 1 500 500">cup</points>'
    (media,) = inputs.media
    assert at(processor.post_process_grounding(answer, inputs)) == [(30, 20)]
    assert at(processor.post_process_grounding(answer, media.more_videos[0])) == [(15, 10)]


def test_images_without_text(processor):
    inputs = processor(images=[make_image(30, 20), make_image(10, 20)], videos=None)
    assert inputs.media == [MediaInfo("multi_image", ((30, 20), (10, 20)))]


COPIES = {
    "to": lambda inputs: inputs.to("cpu"),
    "to dtype": lambda inputs: inputs.to(torch.bfloat16),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda inputs: pickle.loads(pickle.dumps(inputs)),
    "method": lambda inputs: inputs.copy(),
}


@pytest.mark.parametrize("name", COPIES)
def test_media_survives(processor, name):
    inputs = processor(images=make_image(300, 200), text="<|image|>a", return_tensors="pt")
    expected = list(inputs.media)
    assert COPIES[name](inputs).media == expected
    assert COPIES[name](inputs)["input_ids"].shape == inputs["input_ids"].shape


def test_chat(processor):
    conversation = user(
        {"type": "image", "image": make_image(300, 200)},
        {"type": "image", "image": make_image(100, 50)},
        {"type": "text", "text": "Point to the cups."},
    )
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    assert at(processor.post_process_grounding(SECOND, inputs)) == [(50, 12.5)]


def test_sizes_are_those_of_the_upright_image(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    make_image(60, 20).save(tmp_path / "turned.jpg", exif=exif)
    inputs = processor(images=str(tmp_path / "turned.jpg"), text="<|image|>a")
    assert inputs.media[0].sizes == ((20, 60),)


def test_nothing_is_kept_on_the_processor(processor):
    before = dict(vars(processor))
    processor.post_process_grounding(CENTRE, processor(images=make_image(300, 200), text="<|image|>a"))
    assert vars(processor) == before
    assert at(processor.post_process_grounding(CENTRE)) == [(None, None)]


# --- what answers and media may be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("media", "expected"),
    [
        (None, (None, None)),
        ((200, 100), (100, 50)),
        ([(200, 100)], (100, 50)),
        (np.array([200, 100]), (100, 50)),
        ([np.array([200, 100])], (100, 50)),
        (torch.tensor([[200, 100]]), (100, 50)),
        ([[(200, 100)]], (100, 50)),
        (make_image(200, 100), (100, 50)),
        ([make_image(200, 100)], (100, 50)),
        (MediaInfo("image", ((200, 100),)), (100, 50)),
        ([MediaInfo("image", ((200, 100),))], (100, 50)),
        (VideoMetadata(total_num_frames=10, fps=5.0, width=200, height=100), (100, 50)),
        ({"fps": 5.0, "width": 200, "height": 100, "total_num_frames": 10}, (100, 50)),
        ([{"fps": 5.0, "width": 200, "height": 100}], (100, 50)),
        (MappingProxyType({"fps": 5.0, "width": 200, "height": 100}), (100, 50)),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_media_of_one_answer(processor, media, expected):
    assert at(processor.post_process_grounding(CENTRE, media)) == [expected]
    assert [at(one) for one in processor.post_process_grounding([CENTRE], media)] == [[expected]]


class AttributeDict(dict):
    """Its entries are attributes too, also one that it lacks."""

    frames_indices = None


def test_metadata_whose_entries_are_attributes():
    assert media_info(AttributeDict(fps=10.0, frames_indices=[0, 5])) == media_info(
        {"fps": 10.0, "frames_indices": [0, 5]}
    )


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
def test_inputs_in_any_mapping(processor, kind):
    """What is left of the processor's output once it is copied into a dictionary."""
    about = VideoMetadata(total_num_frames=10, fps=5.0, width=200, height=100)
    inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    (found,) = processor.post_process_grounding([CENTRE], kind({**inputs, "video_metadata": [about]}))
    assert at(found) == [(100, 50)]
    for lacking in (inputs, {**inputs, "video_metadata": None}):
        with pytest.raises(ValueError, match="plain dictionary, without the sizes"):
            processor.post_process_grounding([CENTRE], kind(lacking))


def test_media_of_a_batch(processor):
    answers = [CENTRE, CENTRE]

    def read(media):
        return [at(one)[0] for one in processor.post_process_grounding(answers, media)]

    assert read([(200, 100), (20, 10)]) == [(100, 50), (10, 5)]
    assert read([[(200, 100)], [(20, 10), (5, 5)]]) == [(100, 50), (10, 5)]
    for sizes in (np.array([[200, 100], [20, 10]]), [np.array([200, 100]), torch.tensor([20, 10])]):
        assert read(sizes) == [(100, 50), (10, 5)]
    assert read((200, 100)) == [(100, 50)] * 2
    assert read(np.array([200, 100])) == [(100, 50)] * 2
    assert read([{"fps": 1, "width": 200, "height": 100}, {"fps": 1, "width": 20, "height": 10}]) == [
        (100, 50),
        (10, 5),
    ]


def test_plain_dictionaries_of_inputs_are_refused(processor):
    inputs = processor(images=make_image(300, 200), text="<|image|>a")
    with pytest.raises(ValueError, match=r"processor's own output"):
        processor.post_process_grounding(CENTRE, dict(inputs))


@pytest.mark.parametrize("media", ["640x480", 5, [1, 2, 3], [(1, 2), "x"], object], ids=repr)
def test_media_that_describes_nothing(processor, media):
    with pytest.raises(TypeError, match=r"does not describe images or a video"):
        processor.post_process_grounding(CENTRE, media)


def test_media_of_another_copy_of_the_module(processor):
    """Loaders of remote code may run a file more than once, which makes classes of the same name."""
    path = Path(grounding.__file__)
    spec = importlib.util.spec_from_file_location("grounding_alone", path)
    alone = importlib.util.module_from_spec(spec)
    sys.modules["grounding_alone"] = alone
    spec.loader.exec_module(alone)
    inputs = processor(images=make_image(300, 200), text="<|image|>a")
    assert at(alone.parse_grounding(CENTRE, inputs.media[0])) == [(150, 100)]
    assert at(processor.post_process_grounding(CENTRE, alone.MediaInfo("image", ((200, 100),)))) == [(100, 50)]
    assert at(processor.post_process_grounding([CENTRE], [alone.MediaInfo("image", ((200, 100),))])[0]) == [(100, 50)]


def test_a_stream_of_a_row(processor):
    inputs = processor(
        text=["<|image|>a", "<|image|>b"], images=[make_image(100, 100), make_image(200, 400)], padding=True
    )
    assert at(GroundingStream(inputs.media[1]).feed(CENTRE)) == [(100, 200)]
    assert at(GroundingStream((200, 100)).feed(CENTRE)) == [(100, 50)]
    assert at(GroundingStream().feed(CENTRE)) == [(None, None)]


def test_ids(processor):
    ids = [*encode(CENTRE), processor.tokenizer.eos_token_id]
    expected = processor.post_process_grounding(CENTRE, (200, 100))
    assert processor.post_process_grounding(ids, (200, 100)) == expected
    assert processor.post_process_grounding(torch.tensor(ids), (200, 100)) == expected
    assert processor.post_process_grounding(np.array(ids), (200, 100)) == expected
    assert processor.post_process_grounding(list(np.array(ids)), (200, 100)) == expected
    assert processor.post_process_grounding([-100, *ids, -100], (200, 100)) == expected
    padded = torch.nn.functional.pad(torch.tensor([ids, ids]), (2, 3), value=-100)
    for batch in ([ids, ids], torch.tensor([ids, ids]), [torch.tensor(ids)] * 2, [list(np.array(ids))] * 2, padded):
        assert processor.post_process_grounding(batch, (200, 100)) == [expected, expected]


def test_no_answers(processor):
    """Not an answer without text, of which there is one."""
    nothing = processor.post_process_grounding("", (200, 100))
    for batch in ([], (), torch.empty((0, 5), dtype=torch.int64), np.empty((0, 5), np.int64)):
        assert processor.post_process_grounding(batch) == []
        assert processor.post_process_grounding(batch, (200, 100)) == []
    for row in (torch.empty(0, dtype=torch.int64), np.empty(0, np.int64)):
        assert processor.post_process_grounding(row, (200, 100)) == nothing
        assert processor.post_process_grounding([row], (200, 100)) == [nothing]
    assert processor.post_process_grounding([[]], (200, 100)) == [nothing]


def test_ids_lose_the_prompt_that_generate_returns_with_them(processor):
    prompts = ["<|image|>Point to <points coords='1 1 000 000'>this</points>", "<|image|>a"]
    inputs = processor(text=prompts, images=[make_image(300, 200)] * 2, padding=True, return_tensors="pt")
    answer = torch.tensor([encode(CENTRE)] * 4)
    output = torch.cat([inputs["input_ids"].repeat_interleave(2, dim=0), answer], dim=1)
    assert [at(one) for one in processor.post_process_grounding(output, inputs)] == [[(150, 100)]] * 4
    assert [at(one) for one in processor.post_process_grounding(answer, inputs)] == [[(150, 100)]] * 4


@pytest.mark.parametrize("answers", [5, None, [1.5], [None], {"a": 1}], ids=repr)
def test_answers_that_are_none(processor, answers):
    with pytest.raises(TypeError, match="cannot be read"):
        processor.post_process_grounding(answers)


# --- times -----------------------------------------------------------------------------------------------------------

RATES = {"30": Fraction(30), "29.97": Fraction(30000, 1001), "23.976": Fraction(24000, 1001), "12.5": Fraction(25, 2)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of one grey level per frame: constant rates, a late start, uneven frames."""
    folder = tmp_path_factory.mktemp("clips")
    for name, rate in RATES.items():
        write_clip(folder / f"{name}.mp4", [Fraction(n) / rate for n in range(100)], rate)
    write_clip(folder / "late.mkv", [5 + Fraction(n, 30) for n in range(100)], Fraction(30))
    gaps = np.tile([1, 3, 6, 1, 1], 20).cumsum()
    write_clip(folder / "vfr.mp4", [Fraction(int(n), 30) for n in (0, *gaps)], Fraction(30))
    return folder


def write_clip(path, times, rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 2 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def assert_round_trip(media):
    """Every sampled frame is found by the time that the prompt prints for it, except for one printed like a nearer."""
    assert media.sampled_frames
    for frame in media.sampled_frames:
        answer = f'<points coords="{frame.time:.1f} 1 500 500">cup</points>'
        (point,) = parse_grounding(answer, media)
        rivals = [other for other in media.sampled_frames if f"{other.time:.1f}" == f"{frame.time:.1f}"]
        assert point.frame == min(rivals, key=lambda other: abs(other.time - point.key))
        assert point.time == point.frame.time
        if len(rivals) == 1:
            assert point.frame == frame


NAMES = [*(f"{name}.mp4" for name in RATES), "late.mkv", "vfr.mp4"]
OPTIONS = {
    "spread": {},
    "2 per second": {"max_fps": 2, "num_frames": 64},
    "fps mode": {"frame_sample_mode": "fps", "num_frames": 64},
    "clip": {"clip": (1.03, 2.71)},
    "dense": {"num_frames": 64, "max_fps": 30},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", OPTIONS)
def test_time_to_key_to_frame(processor, clips, name, option):
    inputs = processor(
        text="<|video|>Track the cup.", videos=str(clips / name), return_metadata=True, **OPTIONS[option]
    )
    (media,), (metadata,) = inputs.media, inputs["video_metadata"]
    assert media.sizes == ((64, 48),)
    assert [frame.time for frame in media.sampled_frames] == metadata.timestamps
    assert media_info(metadata) == media
    assert_round_trip(media)
    with av.open(str(clips / name)) as container:
        stamps = sorted(frame.time for frame in container.decode(video=0))
    for frame in media.sampled_frames:
        around = (frame.time - 1e-4, frame.time + 1e-4)  # at the start of a frame the clock's rounding decides
        before, after = (sum(stamp - stamps[0] <= time for stamp in stamps) - 1 for time in around)
        shown = frame.source_index
        assert shown in (max(before, 0), after)
        assert frame.source_time == pytest.approx(stamps[shown] - stamps[0], abs=1e-3)
        if frame.file_time is not None:
            assert frame.file_time == pytest.approx(stamps[shown], abs=1e-3)


def test_late_start_on_the_clock_of_the_file(processor, clips):
    (media,) = processor(text="<|video|>a", videos=str(clips / "late.mkv"), video_backend="pyav").media
    assert media.sampled_frames[0].time == media.sampled_frames[0].source_time == 0
    assert media.sampled_frames[0].file_time == pytest.approx(5.0)


@pytest.mark.parametrize("name", ["nasa_13013.mp4", "vfr.mp4", "start_at_5s.mkv", "flipping_a_pancake.mkv"])
@pytest.mark.parametrize("option", OPTIONS)
def test_time_to_key_to_frame_of_real_clips(processor, shared, name, option):
    inputs = processor(text="<|video|>a", videos=str(shared / "media" / name), **OPTIONS[option])
    assert_round_trip(inputs.media[0])


@pytest.mark.parametrize(
    ("times", "key", "expected"),
    [
        ([0.0, 0.5, 1.0], 0.5, 1),
        ([0.0, 0.25, 0.5], 0.2, 1),  # 0.25 is printed as 0.2
        ([0.0, 0.35, 0.5], 0.3, 1),  # and 0.35 as 0.3
        ([0.46, 0.5, 0.54], 0.5, 1),  # all printed alike: the nearest
        ([0.48, 0.52], 0.5, 0),  # equally near: the first
        ([0.46, 0.52], 0.5, 1),
        ([0.5, 0.5], 0.5, 0),
        ([1.0, 2.0], 1.4, 0),  # printed by none: the nearest
        ([1.0, 2.0], 1.6, 1),
        ([1.0, 2.0], 1.5, 0),
        ([1.0, 2.0], 99.0, 1),
        ([5.0, 6.0], 0.0, 0),
        ([0.0, 0.53], 0.53, 1),
    ],
)
def test_the_frame_a_time_means(times, key, expected):
    media = media_info(SimpleNamespace(frames_indices=None, timestamps=times, fps=None))
    assert media.frame_at(key).sampled_index == expected


@pytest.mark.parametrize("kind", [dict, MappingProxyType, UserDict, lambda given: VideoMetadata(6, **given)])
def test_metadata_of_any_kind_of_mapping(kind):
    media = media_info(kind({"fps": 10.0, "frames_indices": [0, 5]}))
    assert media.sampled_frames == (SampledFrame(0.0, 0, 0, 0.0), SampledFrame(0.5, 1, 5, 0.5))


def test_metadata_of_the_library(processor):
    metadata = VideoMetadata(
        total_num_frames=300, fps=30000 / 1001, width=640, height=360, frames_indices=[0, 15, 30, 299]
    )
    (point,) = processor.post_process_grounding('<points coords="10.0 1 500 500">cup</points>', metadata)
    assert point.frame.source_index == 299
    assert point.frame.source_time == pytest.approx(299 * 1001 / 30000)
    assert (point.x, point.y) == (320, 180)


def test_frames_of_fetch_videos_know_their_source(processor, clips):
    fetched = processor.video_processor.fetch_videos(str(clips / "29.97.mp4"))
    video, metadata = fetched if isinstance(fetched, tuple) else fetched[0]
    inputs = processor(text="<|video|>a", videos=video, video_metadata=metadata, do_sample_frames=False)
    direct = processor(text="<|video|>a", videos=str(clips / "29.97.mp4"))
    frames, expected = inputs.media[0].sampled_frames, direct.media[0].sampled_frames
    assert [(f.source_index, f.file_time) for f in frames] == [(f.source_index, f.file_time) for f in expected]


def test_an_attribute_may_end_with_a_backslash():
    """Only in an escaped answer does it belong to the quote."""
    plain = '<points alt="C:\\" coords="1 1 100 100">b</points>'
    assert parse_grounding(plain).tags[0].alt == "C:\\"
    assert parse_grounding(plain.replace('"', '\\"').replace("\\\\", "\\")).tags[0].alt == "C:"


def test_frames_of_an_answer_without_a_size_are_fractions():
    answer = parse_grounding('<tracks coords="0.5 1 500 250">a</tracks>')
    assert answer.frames(fps=4) == [{"time": 0.5, "frame": 2, "points": {1: (0.5, 0.25)}}]
