"""The FiftyOne model and labels, on real datasets of a real database (`make test-fiftyone`).

Answers that a random model can't give are scripted: the processor, its inputs and everything around `generate` stay
real. The rest runs the tiny model itself.
"""

import json
import os
import re
import shutil
import sys
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote
from urllib.request import Request, urlopen

import av
import numpy as np
import pytest

# With a database FiftyOne has to be there: an import that fails is no reason to skip.
if not os.environ.get("FIFTYONE_DATABASE_URI"):
    pytest.skip("needs FiftyOne and a database: `make test-fiftyone`", allow_module_level=True)

import eta.core.video as etav
import fiftyone as fo
import fiftyone.brain as fob
import fiftyone.core.models as fom
import fiftyone.zoo as foz

import molmo2
import molmo2_fiftyone.loops
from clients.test_readme import python_blocks
from molmo2.grounding.format import format_points, format_tracks
from molmo2.grounding.parse import parse_grounding
from molmo2.tools.embedding import POOLINGS
from support.checkpoints import make_image, read_json, write_checkpoint, write_json
from support.cookbook import check, cookbook
from support.fake_hub import fake_hub
from support.fresh_process import run
from support.ports import free_port
from support.scripted_model import ScriptedModel

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SHARED_CLIPS = [
    path
    for name in ("vfr.mp4", "start_at_5s.mkv", "h265_video.mp4", "h264_10bits.mp4")
    if (path := REPOSITORY.parent / "shared" / "media" / name).is_file()
]
NAME = "allenai/Molmo2-4B"
RATES = (10, 24, Fraction(30000, 1001))  # frames a second of the written clips
FRAMES = (20, 31, 40)


@pytest.fixture(scope="module")
def zoo():
    """The zoo's folder with our source in it, and a tiny checkpoint as the download."""
    source = molmo2_fiftyone.register()
    write_checkpoint(source / "Molmo2-4B", "qwen3")
    yield source
    shutil.rmtree(source)


@pytest.fixture(scope="module")
def loaded(zoo):
    return foz.load_zoo_model(NAME, max_new_tokens=4)


@pytest.fixture(scope="module")
def ours(loaded):
    """The integration as the zoo imported it."""
    return sys.modules[type(loaded).__module__.rpartition(".")[0]]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Different clips of different frame rates, and those of the shared media that are there."""
    folder = tmp_path_factory.mktemp("clips")
    paths = []
    for seed, (rate, frames) in enumerate(zip(RATES, FRAMES)):
        path = folder / f"clip{seed}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            for index in range(frames):
                pixels = np.asarray(make_image(96, 128, seed=seed * 100 + index)) // (1 + seed)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        paths.append(path)
    return [*paths, *SHARED_CLIPS]


@pytest.fixture
def dataset(clips):
    made = fo.Dataset()
    made.add_samples([fo.Sample(filepath=str(path), what=f"thing {place}") for place, path in enumerate(clips)])
    yield made
    made.delete()


@pytest.fixture
def images(tmp_path):
    made = fo.Dataset()
    for place, size in enumerate([(90, 130), (70, 60), (50, 200)]):
        path = tmp_path / f"{place}.png"
        make_image(*size, seed=place).save(path)
        made.add_sample(fo.Sample(filepath=str(path), what=f"thing {place}"))
    yield made
    made.delete()


@pytest.fixture
def scripted(loaded, ours):
    """A model that answers what `answer` says for each prompt; all around `generate` is real."""

    def build(answer, **settings):
        model = ScriptedModel(loaded.processor, answer if callable(answer) else lambda prompt: answer)
        return ours.Molmo2FiftyOneModel(model, loaded.processor, **settings)

    return build


def begins(path):
    """When each frame of a file begins, in seconds from the first, as its decoder tells."""
    with av.open(str(path)) as container:
        stamps = sorted(frame.pts * frame.time_base for frame in container.decode(video=0))
    return [float(stamp - stamps[0]) for stamp in stamps]


# --- the operations on videos ----------------------------------------------------------------------------------------


def test_describe(dataset, scripted):
    dataset.apply_model(scripted("Two people talk.", operation="describe"), label_field="text", skip_failures=False)
    assert dataset.values("text") == ["Two people talk."] * len(dataset)
    assert isinstance(dataset.get_field("text"), fo.StringField)


def test_pointing(dataset, scripted):
    answer = format_points({0.0: [(0.25, 0.5), (0.75, 0.125)], 1.0: [(0.1, 0.9)]}, "cup")
    model = scripted(answer, operation="pointing", prompt="cup")
    dataset.apply_model(model, label_field="cups", skip_failures=False)
    assert "Point to the cup." in model.model.calls[0][0]
    found = {number: frame.cups for number, frame in dataset.first().frames.items()}
    assert sorted(found) == [1, 11]
    assert [keypoint.points[0] for keypoint in found[1].keypoints] == [[0.25, 0.5], [0.75, 0.125]]
    assert [[keypoint.label for keypoint in found[number].keypoints] for number in (1, 11)] == [["cup"] * 2, ["cup"]]
    assert [keypoint.index for number in (1, 11) for keypoint in found[number].keypoints] == [1, 2, 3]
    assert dataset.get_field("frames.cups").document_type is fo.Keypoints


def test_the_app_serves_what_was_found(dataset, scripted):
    """The page's `session = fo.launch_app(dataset)`: its server has the media and the points of a frame."""
    answer = format_points({0.0: [(0.25, 0.5)]}, "cup")
    dataset.apply_model(scripted(answer, operation="pointing", prompt="cup"), label_field="cups", skip_failures=False)
    sample, port = dataset.first(), free_port()
    session = fo.launch_app(dataset, port=port, address="127.0.0.1", auto=False)
    try:
        about = {"dataset": dataset.name, "sampleId": str(sample.id), "view": []}
        wanted = {"frameNumber": 1, "numFrames": 1, "frameCount": 20, **about}
        headers = {"Content-Type": "application/json"}
        request = Request(f"http://127.0.0.1:{port}/frames", json.dumps(wanted).encode(), headers)
        (frame,) = json.load(urlopen(request, timeout=60))["frames"]
        media = urlopen(f"http://127.0.0.1:{port}/media?filepath={quote(sample.filepath)}", timeout=60)
        assert media.read() == Path(sample.filepath).read_bytes()
    finally:
        session.close()
    (keypoint,) = frame["cups"]["keypoints"]
    assert (keypoint["label"], keypoint["points"], keypoint["index"]) == ("cup", [[0.25, 0.5]], 1)


def test_metadata_changes_no_frame(dataset, scripted):
    """The page computes metadata first, which takes ffprobe; points land in the same frames with it and without."""
    if shutil.which("ffprobe") is None:
        pytest.skip("ffprobe is not installed")
    answer = format_points({0.0: [(0.25, 0.5)], 1.0: [(0.1, 0.9)]}, "cup")
    model = scripted(answer, operation="pointing", prompt="cup")
    dataset.apply_model(model, label_field="before", skip_failures=False)
    dataset.compute_metadata()
    assert dataset.first().metadata.total_frame_count == FRAMES[0]
    dataset.apply_model(model, label_field="after", skip_failures=False)
    for sample in dataset:
        frames = {
            field: [number for number, frame in sample.frames.items() if frame[field] and frame[field].keypoints]
            for field in ("before", "after")
        }
        assert len(frames["after"]) == 2
        assert frames["after"] == frames["before"]


def test_pointing_at_nothing(dataset, scripted):
    dataset.apply_model(
        scripted("There are none.", operation="pointing", prompt="cup"), label_field="cups", skip_failures=False
    )
    assert dataset.count("frames.cups.keypoints") == 0


def test_tracking_links_objects(dataset, scripted):
    tracks = {1: {0.0: (0.1, 0.2), 0.5: (0.2, 0.2), 1.0: (0.3, 0.2)}, 2: {0.5: (0.9, 0.9), 1.0: (0.8, 0.9)}}
    model = scripted(format_tracks(tracks, "ball"), operation="tracking", prompt="ball")
    dataset.apply_model(model, label_field="balls", skip_failures=False)
    sample = dataset.first()
    keypoints = {
        (number, keypoint.index): keypoint
        for number, frame in sample.frames.items()
        for keypoint in frame.balls.keypoints
    }
    assert sorted(keypoints) == [(1, 1), (6, 1), (6, 2), (11, 1), (11, 2)]
    assert dataset.get_field("frames.balls").document_type is fo.Keypoints
    assert {keypoint.label for keypoint in keypoints.values()} == {"ball"}
    assert [keypoints[11, number].points for number in (1, 2)] == [[[0.3, 0.2]], [[0.8, 0.9]]]
    instances = {key: keypoint.instance.id for key, keypoint in keypoints.items()}
    assert instances[1, 1] == instances[6, 1] == instances[11, 1] != instances[6, 2] == instances[11, 2]


def test_temporal_localization(dataset, scripted):
    answer = '```json\n{"events": [{"start": "00:00", "end": "00:01", "description": "lift-off"}]}\n```'
    model = scripted(answer, operation="temporal_localization")
    dataset.apply_model(model, label_field="events", skip_failures=False)
    (event,) = dataset.first().events.detections
    assert (event.label, event.support) == ("lift-off", [1, 11])


# Beside the summary, the fields of an answer with everything that is asked for, and their types.
COMPREHENSIVE = {
    **dict.fromkeys(("events", "objects", "text_content"), fo.TemporalDetections),
    **dict.fromkeys(("scene_info_setting", "scene_info_time_of_day", "scene_info_location_type"), fo.Classification),
    "activities_primary": fo.Classification,
    "activities_secondary": fo.Classifications,
}


def test_comprehensive(dataset, scripted, caplog):
    answer = (
        '{"summary": "A launch.", "events": [{"start": 0, "end": 0.5, "description": "smoke"}], '
        '"objects": [{"name": "rocket", "description": "white", "first_seen": "0:00", "last_seen": "0:01"}, "cloud"], '
        '"text": [{"text": "NASA", "start": 0.5, "end": 1}], '
        '"scene": {"setting": "outdoors", "time_of_day": "day", "location type": "launch pad"}, '
        '"activities": {"primary": "a launch", "secondary": ["filming", "waiting"]}}'
    )
    dataset.apply_model(scripted(answer, operation="comprehensive"), "all", skip_failures=False)
    sample = dataset.first()
    assert sample.all_summary == "A launch."
    found = {name: sample[f"all_{name}"].detections for name in ("events", "objects", "text_content")}
    assert {name: [(each.label, each.support) for each in own] for name, own in found.items()} == {
        "events": [("smoke", [1, 6])],
        "objects": [("rocket", [1, 11])],
        "text_content": [("NASA", [6, 11])],
    }
    assert found["objects"][0].description == "white"
    assert "no time for 'cloud': left out" in caplog.text
    scene = {name: sample[f"all_scene_info_{name}"].label for name in ("setting", "time_of_day", "location_type")}
    assert scene == {"setting": "outdoors", "time_of_day": "day", "location_type": "launch pad"}
    assert sample.all_activities_primary.label == "a launch"
    assert [each.label for each in sample.all_activities_secondary.classifications] == ["filming", "waiting"]
    kinds = {name: dataset.get_field(f"all_{name}").document_type for name in COMPREHENSIVE}
    assert kinds == COMPREHENSIVE
    assert isinstance(dataset.get_field("all_summary"), fo.StringField)
    assert {name for name in dataset.get_field_schema() if name.startswith("all_")} == {
        "all_summary",
        *(f"all_{name}" for name in COMPREHENSIVE),
    }


# --- frame numbers, clips, readers -----------------------------------------------------------------------------------


def track_at_every_time(prompt):
    """An answer with one object at each time that the prompt prints before a frame."""
    times = [float(time) for time in re.findall(r"(\d+\.\d)\s*<im_start>", prompt)]
    assert len(times) > 1
    return format_tracks({1: {time: (time / 10, 0.5) for time in times}}, "ball")


def test_frame_numbers_at_every_frame_rate(dataset, scripted):
    """The frame on display at each printed time, by the times that PyAV reads; a printed time is rounded to 0.1 s."""
    model = scripted(track_at_every_time, operation="tracking", prompt="ball")
    dataset.apply_model(model, label_field="balls", skip_failures=False)
    for sample in dataset:
        starts = [*begins(sample.filepath), float("inf")]
        found = {number: frame.balls.keypoints[0].points[0][0] * 10 for number, frame in sample.frames.items()}
        assert len(found) > 1
        for number, time in found.items():
            assert starts[number - 1] <= time + 0.051
            assert starts[number] >= time - 0.051


@pytest.fixture
def parts(dataset):
    """A view of clips: two of each video, the second of a single frame."""
    for sample in dataset:
        last = len(begins(sample.filepath)) - 1
        supports = [[3, last], [4, 4]]
        labels = [fo.TemporalDetection(label="part", support=support) for support in supports]
        sample["parts"] = fo.TemporalDetections(detections=labels)
        sample.save()
    return dataset.to_clips("parts")


@pytest.mark.parametrize("batch_size", [None, 3])
def test_clips_have_the_frame_numbers_of_the_whole_video(dataset, parts, scripted, ours, batch_size):
    def answer(prompt):
        times = [float(time) for time in re.findall(r"(\d+\.\d)\s*<im_start>", prompt)]
        return format_points({times[0]: [(0.1, 0.5)], times[-1] + 0.1: [(0.9, 0.5)]}, "ball")

    model = scripted(answer, operation="pointing", prompt="ball")
    parts.apply_model(model, label_field="found", batch_size=batch_size, skip_failures=False)
    for sample in dataset:
        first, last = sample.parts.detections[0].support
        found = {number: frame.found.keypoints for number, frame in sample.frames.items()}
        assert sorted(found) == sorted({first, 4, last})
        assert found[first][0].points[0] == [0.1, 0.5]


def test_clips_have_embeddings_of_their_own(dataset, parts, loaded, ours):
    vectors = parts.compute_embeddings(loaded, skip_failures=False)
    assert len(vectors) == 2 * len(dataset)
    assert np.linalg.norm(vectors[0] - vectors[1]) > 1e-3
    parts.compute_embeddings(loaded, embeddings_field="vector", batch_size=4, skip_failures=False)
    np.testing.assert_allclose(np.stack(parts.values("vector")), vectors, atol=1e-4)


def test_a_clip_has_to_be_within_the_video(clips, loaded, ours):
    with pytest.raises(ValueError, match=r"Frames 15 to 21 of .* but it has 20"):
        loaded.predict(ours.VideoPart(str(clips[0]), (15, 21)))


def test_neither_ffprobe_nor_ffmpeg_is_needed(dataset, scripted, loaded, monkeypatch):
    monkeypatch.setenv("PATH", "")
    dataset.apply_model(scripted("Two people talk."), label_field="text", skip_failures=False)
    assert dataset.count("text") == len(dataset)
    assert dataset[:1].compute_embeddings(loaded, skip_failures=False).shape == (1, 40)


def test_other_models_and_frames_take_the_usual_way(dataset, images, scripted, ours):
    """The hook in front of FiftyOne's loops is for collections of Molmo2's own kind of media, and is there once."""

    class Constant(fom.Model):
        media_type = "image"
        ragged_batches = False

        def predict(self, arg):
            return fo.Classification(label=str(arg.shape))

    for _ in range(2):
        molmo2_fiftyone.loops.register_loops()
    assert not hasattr(fom.apply_model.__wrapped__, "molmo2_method")
    images.apply_model(Constant(), "shape", skip_failures=False)
    assert images.first().shape.label == "(90, 130, 3)"
    with pytest.raises(ValueError, match="can only be applied to video collections"):
        images.apply_model(scripted("x"), "text", skip_failures=False)


@pytest.mark.parametrize(("frames", "support"), [(None, None), ("1-20", None), ("5-12", (5, 12))])
def test_the_usual_readers_name_their_part(ours, frames, support):
    class Reader(etav.VideoReader):
        total_frame_count = 20

    assert ours.VideoPart.from_reader(Reader("clip.mp4", frames)) == ours.VideoPart("clip.mp4", support)


# --- prompts, batches, images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["settings", "call"])
def test_prompts_of_samples(dataset, scripted, where):
    settings = {"prompt_field": "what"} if where == "settings" else {}
    model = scripted("There are none.", operation="pointing", **settings)
    options = {"prompt_field": "what"} if where == "call" else {}
    dataset.apply_model(model, label_field="found", skip_failures=False, **options)
    asked = [prompt for (prompt,) in model.model.calls]
    assert all(f"Point to the thing {place}." in prompt for place, prompt in enumerate(asked))
    assert len(asked) == len(dataset)


def test_a_prompt_of_an_earlier_operation_changes_no_fixed_question(dataset, scripted):
    model = scripted("There are none.", operation="pointing", prompt="cup")
    for operation in ("pointing", "comprehensive", "temporal_localization"):
        model.operation = operation
        dataset[:1].apply_model(model, label_field=operation, skip_failures=False)
    model.events = "the cup falls"
    dataset[:1].apply_model(model, label_field="falls", skip_failures=False)
    dataset[:1].apply_model(model, label_field="each", prompt_field="what", skip_failures=False)
    beginnings = ("Point to the cup.", "Describe this video. ", "List the events of this video. ")
    beginnings += ("Find every time when the cup falls. ", "Find every time when thing 0. ")
    assert all(beginning in prompt for (prompt,), beginning in zip(model.model.calls, beginnings, strict=True))
    assert ["cup" in prompt for (prompt,) in model.model.calls] == [True, False, False, True, False]
    model.operation = "comprehensive"
    with pytest.raises(ValueError, match="The question of 'comprehensive' is fixed"):
        dataset.apply_model(model, label_field="other", prompt_field="what")


def sizes_of_batches(number, size):
    return [size] * (number // size) + [number % size] * bool(number % size)


def numbered(prompt):
    """One point whose x tells which thing was asked for."""
    place = int(prompt.rpartition("thing ")[2][0])
    return format_points({0.0: [(place / 10, 0.5)]}, "thing")


@pytest.mark.parametrize("num_workers", [None, 0, 3])
def test_videos_in_batches(dataset, scripted, num_workers):
    model = scripted(numbered, operation="pointing", prompt_field="what")
    options = {"batch_size": 3, "num_workers": num_workers, "skip_failures": False}
    dataset.apply_model(model, "found", **options)
    assert [len(call) for call in model.model.calls] == sizes_of_batches(len(dataset), 3)
    found = [next(iter(sample.frames.values())).found.keypoints[0].points[0] for sample in dataset]
    assert found == [[place / 10, 0.5] for place in range(len(dataset))]


@pytest.fixture
def broken(dataset, tmp_path):
    """A view whose second video is no video."""
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"nothing")
    dataset.add_sample(fo.Sample(filepath=str(path), what="thing 1"))
    ids = dataset.values("id")
    return dataset.select([ids[0], ids[-1], ids[2]], ordered=True)


def test_a_failure_in_a_batch_costs_no_other_sample(broken, scripted, loaded, caplog):
    model = scripted(numbered, operation="pointing", prompt_field="what")
    broken.apply_model(model, "found", batch_size=3, skip_failures=True)
    assert [len(sample.frames) for sample in broken] == [1, 0, 1]
    assert "broken.mp4) is skipped" in caplog.text
    vectors = broken.compute_embeddings(loaded, batch_size=3, skip_failures=True)
    assert [vector is None for vector in vectors] == [False, True, False]
    broken.compute_embeddings(loaded, embeddings_field="vector", batch_size=2, skip_failures=True)
    assert [vector is None for vector in broken.values("vector")] == [False, True, False]
    for call in (broken.apply_model, broken.compute_embeddings):
        with pytest.raises(ValueError, match="broken"):
            call(model if call == broken.apply_model else loaded, "other", batch_size=3, skip_failures=False)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"num_workers": -1}, "`num_workers` is -1"),
        ({"pin_memory": True}, "'pin_memory'"),
        ({"output_dir": "x"}, "'output_dir'"),
        ({"confidence_thresh": 0.5}, "'confidence_thresh'"),
        ({"question_field": "what"}, "'question_field'"),
    ],
)
def test_options_are_honoured_or_refused(dataset, scripted, options, found):
    with pytest.raises(ValueError, match=found):
        dataset.apply_model(scripted("x"), "text", **options)


def test_images_in_batches(images, scripted):
    def answer(prompt):
        place = int(prompt.rpartition("thing ")[2][0])
        return format_points([(place / 10, 0.5)], "thing")

    model = scripted(answer, operation="pointing", media_type="image")
    images.apply_model(model, label_field="found", batch_size=3, prompt_field="what", skip_failures=False)
    assert [len(call) for call in model.model.calls] == [3]
    assert [sample.found.keypoints[0].points[0] for sample in images] == [[0.0, 0.5], [0.1, 0.5], [0.2, 0.5]]


def test_structured_answers_about_images_have_no_times(images, scripted):
    answer = '{"summary": "Noise.", "objects": [{"name": "dot"}], "text": ["GO"], "activities": "resting"}'
    model = scripted(answer, operation="comprehensive", media_type="image")
    images.apply_model(model, label_field="all", batch_size=2, skip_failures=False)
    assert "Describe this image." in model.model.calls[0][0]
    assert '"events"' not in model.model.calls[0][0]
    assert images.values("all_summary") == ["Noise."] * 3
    assert images.values("all_objects.classifications.label") == [["dot"]] * 3
    assert images.values("all_text_content.classifications.label") == [["GO"]] * 3
    assert images.values("all_activities_primary.label") == ["resting"] * 3
    assert not images.has_field("all_events")


# --- the model itself ------------------------------------------------------------------------------------------------


LABELS = {
    "describe": ("out", str),
    "pointing": ("frames.out", list),
    "tracking": ("frames.out", list),
    "temporal_localization": ("out.detections", list),
    "comprehensive": ("out_summary", str),
}


@pytest.mark.parametrize("operation", LABELS)
def test_every_operation_runs_the_model(dataset, loaded, ours, operation):
    settings = {"operation": operation, "prompt": "cup", "max_new_tokens": 3}
    model = ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, **settings)
    dataset.apply_model(model, label_field="out", skip_failures=False)
    field, kind = LABELS[operation]
    assert all(isinstance(value, kind) for value in dataset.values(field))


def test_batches_answer_as_single_samples_do(clips, loaded, monkeypatch):
    paths = [str(path) for path in clips]
    single = [loaded.predict(path) for path in paths]
    assert len(set(single)) > 1
    generate, sizes = loaded.model.generate, []

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(loaded.model, "generate", counted)
    assert loaded.predict_all(paths) == single
    assert sizes == [len(paths)]


@pytest.mark.parametrize("media_type", ["image", "video"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_are_those_of_the_package(images, dataset, loaded, ours, media_type, pooling):
    samples = images if media_type == "image" else dataset
    question = "What colour is it?"
    settings = {"media_type": media_type, "pooling_strategy": pooling, "embedding_prompt": question}
    model = ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, **settings)
    samples.compute_embeddings(model, embeddings_field="vector", batch_size=2, num_workers=2, skip_failures=False)
    vectors = np.stack(samples.values("vector"))
    kind = {f"{media_type}s": samples.values("filepath")}
    expected = molmo2.embed(loaded.model, loaded.processor, **kind, pooling=pooling, prompt=question)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert (vectors.shape, expected.dtype) == ((len(samples), 40), np.float32)
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    assert distances[~np.eye(len(samples), dtype=bool)].min() > 1e-3


def test_vectors_of_patches(images, loaded, ours):
    """FiftyOne's own loop over parts of images."""
    for sample in images:
        box = fo.Detection(label="part", bounding_box=[0.1, 0.1, 0.5, 0.5])
        sample["parts"] = fo.Detections(detections=[box])
        sample.save()
    model = ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, media_type="image")
    found = images.compute_patch_embeddings(model, "parts", batch_size=2, skip_failures=False)
    assert {vectors.shape for vectors in found.values()} == {(1, 40)}


# --- labels alone, settings ------------------------------------------------------------------------------------------


def test_labels_return_to_text(ours):
    answer = format_points([(0.25, 0.5), (0.75, 0.125)], "cup")
    keypoints = ours.labels.image_keypoints(parse_grounding(answer, [(200, 100)]))
    assert format_points(ours.labels.image_positions(keypoints), "cup") == answer


def test_tracks_return_to_text(ours):
    answer = format_tracks({1: {0.0: (0.1, 0.2), 0.5: (0.2, 0.2)}, 2: {0.5: (0.9, 0.9)}}, "ball")
    frames = ours.labels.frame_keypoints(
        parse_grounding(answer, {"timestamps": [0.0, 0.5], "frames_indices": [0, 15], "width": 20, "height": 10})
    )
    assert sorted(frames) == [1, 16]
    assert format_tracks(ours.labels.track_positions(frames, {1: 0.0, 16: 0.5}), "ball") == answer


def test_an_object_is_once_in_a_frame(ours):
    """Of two times that mean the same frame the nearer one counts."""
    answer = '<tracks coords="0.0 1 100 100\t0.2 1 200 200\t0.4 1 300 300\t0.5 1 400 400">ball</tracks>'
    frames = ours.labels.frame_keypoints(
        parse_grounding(answer, {"timestamps": [0.0, 0.5], "frames_indices": [0, 15], "width": 20, "height": 10})
    )
    found = {number: [tuple(*keypoint.points) for keypoint in frames[number].keypoints] for number in frames}
    assert found == {1: [(0.1, 0.1)], 16: [(0.4, 0.4)]}


def test_frames_have_to_be_known(ours):
    with pytest.raises(ValueError, match="unknown which frame"):
        ours.labels.frame_keypoints(parse_grounding('<points coords="1.0 1 500 500">cup</points>'))


def test_events_without_start_or_with_ends_exchanged(ours):
    events = [
        SimpleNamespace(start=start, end=end, description="x") for start, end in ((None, 1), (0.5, None), (1, 0))
    ]
    media = parse_grounding("", {"timestamps": [0.0, 0.5, 1.0], "frames_indices": [0, 15, 30]}).media
    found = ours.labels.temporal_detections(events, media).detections
    assert [event.support for event in found] == [[16, 16], [1, 31]]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"operation": "segment"}, "`operation` is 'segment'; expected one of"),
        ({"media_type": "audio"}, "'audio'"),
        ({"pooling_strategy": "median"}, "'median'"),
        ({"pooling_strategy": "cls"}, 'causal, so its first token sees nothing.*Use "last"'),
        ({"prompt": 3}, "`prompt` is 3; expected str or list or tuple, or None"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
    ],
)
def test_settings_are_checked(loaded, settings, found):
    ((name, value),) = settings.items()
    before = getattr(loaded, name)
    with pytest.raises(ValueError, match=found):
        setattr(loaded, name, value)
    assert getattr(loaded, name) == before
    with pytest.raises(ValueError, match=found):
        type(loaded)(loaded.model, loaded.processor, **settings)


def test_images_are_not_tracked(images, loaded, scripted, ours):
    with pytest.raises(ValueError, match="'tracking' needs videos"):
        ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, operation="tracking", media_type="image")
    model = scripted("x", operation="tracking", prompt="dog")
    model.media_type = "image"
    with pytest.raises(ValueError, match="'tracking' needs videos"):
        images.apply_model(model, "text")


def test_unknown_settings_are_refused_by_name(loaded, ours):
    with pytest.raises(AttributeError, match="no setting 'promt'; did you mean 'prompt'"):
        loaded.promt = "cup"
    with pytest.raises(AttributeError, match=r"no setting 'x'; it has operation, .*pooling_strategy"):
        ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, x=1)
    with pytest.raises(AttributeError, match=r"setter|can.t set"):
        loaded.processor = None


def test_something_to_look_for_is_needed(dataset, scripted):
    """What fails with every sample is raised, though failures are skipped."""
    model = scripted("x", operation="pointing")
    with pytest.raises(ValueError, match="'pointing' needs to know what to look for"):
        dataset.apply_model(model, label_field="text", skip_failures=True)
    with pytest.raises(ValueError, match="'pointing' needs to know what to look for"):
        model.predict(dataset.first().filepath)
    dataset.set_values("name", ["cup", None] + ["dog"] * (len(dataset) - 2))
    dataset.apply_model(model, label_field="text", prompt_field="name", batch_size=2, skip_failures=True)
    assert [len(sample.frames) for sample in dataset[:3]] == [1, 0, 1]


def test_a_checkpoint_is_downloaded_once(tmp_path, ours, monkeypatch):
    downloads = []

    def snapshot(name, local_dir):
        downloads.append(name)
        write_checkpoint(Path(local_dir), "qwen3")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    folder = tmp_path / "Molmo2-4B"
    for _ in range(2):
        ours.download_model(NAME, str(folder))
    assert downloads == [NAME]
    next(folder.glob("*.safetensors")).unlink()
    ours.download_model(NAME, str(folder))
    assert downloads == [NAME, NAME]


def test_no_code_of_a_checkpoint_is_executed(tmp_path, ours):
    write_checkpoint(tmp_path, "qwen3")
    for file in tmp_path.glob("*_molmo2.py"):
        file.write_text("raise RuntimeError('executed')")
    model = ours.load_model(NAME, str(tmp_path))
    assert type(model.processor).__module__ == "molmo2.processing.processor"


CHECKPOINTS = ("Molmo2-4B", "Molmo2-8B", "Molmo2-O-7B", "Molmo2-VideoPoint-4B")


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """An empty zoo, whose downloads are tiny checkpoints; the names of those downloaded."""
    names = []

    def snapshot(name, local_dir):
        names.append(name)
        write_quick_checkpoint(Path(local_dir))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(tmp_path / "zoo"))
    return names


def write_quick_checkpoint(folder):
    """Answers of random weights end anywhere or never: these end after a while."""
    write_checkpoint(folder, "qwen3")
    settings = folder / "generation_config.json"
    write_json(settings, {**read_json(settings), "max_time": 0.3})


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_checkpoint_is_in_the_zoo(downloads, checkpoint):
    molmo2_fiftyone.register()
    model = foz.load_zoo_model(f"allenai/{checkpoint}")
    assert downloads == [f"allenai/{checkpoint}"]
    assert (model.operation, model.prompt, model.pooling_strategy) == ("describe", None, "mean")


def test_the_package_as_a_source_of_models(downloads, tmp_path, monkeypatch):
    """`register_zoo_model_source` with the address of an archive; those of repositories need GitHub."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    package = Path(molmo2_fiftyone.__file__).parent
    shutil.make_archive(str(tmp_path / "served" / "source"), "zip", package.parent, package.name)
    handler = partial(QuietHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/source.zip"
        foz.register_zoo_model_source(url)
        server.shutdown()
    assert list(foz.list_zoo_model_sources()) == [url]
    assert {f"allenai/{name}" for name in CHECKPOINTS} <= set(foz.list_zoo_models())
    model = foz.load_zoo_model("allenai/Molmo2-VideoPoint-4B", operation="pointing", prompt="cup")
    assert (downloads, model.prompt) == (["allenai/Molmo2-VideoPoint-4B"], "cup")
    foz.delete_zoo_model_source(url)
    assert "allenai/Molmo2-4B" not in foz.list_zoo_models()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


ON_THE_HUB = "Voxel51/qualcomm-interactive-video-dataset"  # the name on the page


@pytest.fixture(scope="module")
def from_hub(clips, tmp_path_factory):
    """What the page's `load_from_hub` makes of a repository of 22 videos on a Hub of this machine.

    In a process of its own, which reads from its environment where the Hub is. Gives the data set, what the process
    told, and the paths that the Hub sent.
    """
    folder = tmp_path_factory.mktemp("published")
    (folder / "media").mkdir()
    made = fo.Dataset()
    for number in range(22):
        path = folder / "media" / f"clip{number:02}.mp4"
        shutil.copy(clips[number % len(RATES)], path)
        made.add_sample(fo.Sample(filepath=str(path), question=f"What is thing {number}?"))
    made.export(str(folder / "repository"), dataset_type=fo.types.FiftyOneDataset)
    made.delete()
    (folder / "repository" / "fiftyone.yml").write_text("name: interactive\nformat: FiftyOneDataset\ntags: [video]\n")
    files = {
        path.relative_to(folder / "repository").as_posix(): path.read_bytes()
        for path in (folder / "repository").rglob("*")
        if path.is_file()
    }
    online = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with fake_hub() as hub:
        hub.create(f"datasets/{ON_THE_HUB}", files=files)
        environment = {**online, "HF_ENDPOINT": hub.url}
        report = run("load_from_hub", tmp_path_factory.mktemp("cache"), env=environment, repository=ON_THE_HUB)
        assert [request for request in hub.unanswered if "/datasets/" in request] == []
    dataset = fo.load_dataset(report["name"])
    yield dataset, report, hub.downloads
    dataset.delete()


def test_load_from_hub(from_hub, clips):
    """The call of the page, with `max_samples=20` and `overwrite=True`: so many samples, each with its video."""
    dataset, report, sent = from_hub
    assert report == {"name": ON_THE_HUB, "numbers": [20, 20], "media_type": "video"}
    assert sorted(dataset.values("question")) == sorted(f"What is thing {number}?" for number in range(20))
    for sample in dataset:
        number = int(re.search(r"\d+", sample.question)[0])
        assert Path(sample.filepath).read_bytes() == clips[number % len(RATES)].read_bytes()
    videos = [path for path in sent if path.endswith(".mp4")]
    assert len(videos) == len(set(videos)) == 20


def test_every_call_of_the_plugin_page(from_hub, downloads):
    """The calls that users know from the page of the earlier plugin, in its form, and the fields that it names."""
    molmo2_fiftyone.register()
    dataset, _, _ = from_hub
    dataset = dataset.limit(5).clone()
    model = foz.load_zoo_model("allenai/Molmo2-4B")

    model.pooling_strategy = "mean"
    dataset.compute_embeddings(
        model, batch_size=8, num_workers=2, embeddings_field="molmo_embeddings", skip_failures=False
    )
    results = fob.compute_visualization(
        dataset, method="umap", brain_key="molmo_viz", embeddings="molmo_embeddings", num_dims=2
    )
    assert results.points.shape == (5, 2)

    model.operation = "describe"
    model.prompt = "Provide a short description for what is happening in the video"
    dataset.apply_model(model, "prompted_describe", batch_size=16, num_workers=4, skip_failures=False)

    model.operation = "describe"
    dataset.apply_model(
        model, prompt_field="question", label_field="answer_pred", batch_size=16, num_workers=1, skip_failures=False
    )

    model.operation = "pointing"
    model.prompt = "person's nose"
    dataset.apply_model(model, "point_pred", batch_size=16, num_workers=1, skip_failures=False)

    model.operation = "tracking"
    model.prompt = "person's hand"
    dataset.apply_model(model, "track_pred", batch_size=16, num_workers=1, skip_failures=False)

    model.operation = "comprehensive"
    dataset.apply_model(model, "comprehensive", batch_size=2, num_workers=1, skip_failures=False)

    model.operation = "temporal_localization"
    dataset.apply_model(model, "temporal_localization", batch_size=2, num_workers=1, skip_failures=False)

    for name in ("prompted_describe", "answer_pred", "comprehensive_summary"):
        assert isinstance(dataset.get_field(name), fo.StringField)
    for name in ("events", "objects", "text_content"):
        assert dataset.get_field(f"comprehensive_{name}").document_type is fo.TemporalDetections
    assert dataset.get_field("temporal_localization").document_type is fo.TemporalDetections
    for name in ("point_pred", "track_pred"):
        assert dataset.get_field(f"frames.{name}").document_type is fo.Keypoints
    assert dataset.count("molmo_embeddings") == dataset.count("comprehensive_summary") == 5
    dataset.delete()


def test_the_page_runs_as_written(clips, downloads, tmp_path, monkeypatch):
    write_quick_checkpoint(tmp_path / "Molmo2-4B")
    (tmp_path / "videos").mkdir()
    for path in clips[:3]:
        shutil.copy(path, tmp_path / "videos")
    monkeypatch.chdir(tmp_path)
    page, names = REPOSITORY / "docs" / "fiftyone.md", {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)
    assert names["dataset"].count("vector") == names["dataset"].count("story_summary") == 3
    names["dataset"].delete()


@pytest.mark.parametrize("name", cookbook.pages_of("fiftyone"))
def test_a_page_of_the_cookbook(name, tmp_path):
    check(name, cookbook.prepare(tmp_path))


def test_the_app_can_ask_for_settings(ours):
    form = ours.resolve_input(NAME, None)
    assert set(form.type.properties) <= set(ours.Molmo2FiftyOneModel.setting_names())
