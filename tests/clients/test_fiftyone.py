"""The FiftyOne model and labels, on real datasets of a real database (`make test-fiftyone`).

Answers that a random model can't give are scripted: the processor, its inputs and everything around `generate` stay
real. The rest runs the tiny model itself.
"""

import os
import re
import shutil
import sys
import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

# With a database FiftyOne has to be there: an import that fails is no reason to skip.
if not os.environ.get("FIFTYONE_DATABASE_URI"):
    pytest.skip("needs FiftyOne and a database: `make test-fiftyone`", allow_module_level=True)

import eta.core.video as etav
import fiftyone as fo
import fiftyone.core.models
import fiftyone.zoo as foz

import molmo2_fiftyone
from clients.test_readme import python_blocks
from molmo2.grounding.format import format_points, format_tracks
from molmo2.grounding.parse import parse_grounding
from support.checkpoints import picture, read_json, write_checkpoint, write_json
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
                pixels = np.asarray(picture(96, 128, seed=seed * 100 + index)) // (1 + seed)
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
        picture(*size, seed=place).save(path)
        made.add_sample(fo.Sample(filepath=str(path), what=f"thing {place}"))
    yield made
    made.delete()


@pytest.fixture
def scripted(loaded, ours):
    """A model that answers what `answer` says for each prompt; all around `generate` is real."""

    def build(answer, **settings):
        model = ScriptedModel(loaded.processor, answer if callable(answer) else lambda prompt: answer)
        return ours.Molmo2FiftyOneModel(model, loaded.processor, ours.Molmo2Settings(**settings))

    return build


def begins(path):
    """When each frame of a file begins, in seconds from the first, as its decoder tells."""
    with av.open(str(path)) as container:
        stamps = sorted(frame.pts * frame.time_base for frame in container.decode(video=0))
    return [float(stamp - stamps[0]) for stamp in stamps]


# --- the operations on videos ----------------------------------------------------------------------------------------


def test_describe(dataset, scripted):
    dataset.apply_model(scripted("Two people talk.", operation="describe"), label_field="text", skip_failures=False)
    assert dataset.values("text.label") == ["Two people talk."] * len(dataset)


def test_pointing(dataset, scripted):
    answer = format_points({0.0: [(0.25, 0.5), (0.75, 0.125)], 1.0: [(0.1, 0.9)]}, "cup")
    model = scripted(answer, operation="pointing", prompt="cup")
    dataset.apply_model(model, label_field="cups", skip_failures=False)
    assert "Point to the cup." in model.model.calls[0][0]
    found = {number: frame.cups for number, frame in dataset.first().frames.items()}
    assert sorted(found) == [1, 11]
    assert [keypoint.points[0] for keypoint in found[1].keypoints] == [[0.25, 0.5], [0.75, 0.125]]
    assert [keypoint.label for keypoint in found[11].keypoints] == ["cup"]


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
    instances = {key: keypoint.instance.id for key, keypoint in keypoints.items()}
    assert instances[1, 1] == instances[6, 1] == instances[11, 1] != instances[6, 2] == instances[11, 2]


def test_temporal_localization(dataset, scripted):
    answer = '```json\n{"events": [{"start": "00:00", "end": "00:01", "description": "lift-off"}]}\n```'
    model = scripted(answer, operation="temporal_localization")
    dataset.apply_model(model, label_field="events", skip_failures=False)
    (event,) = dataset.first().events.detections
    assert (event.label, event.support) == ("lift-off", [1, 11])


def test_comprehensive(dataset, scripted):
    answer = (
        '{"summary": "A launch.", "events": [{"start": 0, "end": 0.5, "description": "smoke"}], '
        '"objects": [{"name": "rocket", "description": "white"}], "text": ["NASA"], "scene": {"setting": "outdoors"}}'
    )
    dataset.apply_model(scripted(answer, operation="comprehensive"), label_field="all", skip_failures=False)
    sample = dataset.first()
    assert sample.all_summary.label == "A launch."
    assert sample.all_events.detections[0].support == [1, 6]
    assert [(thing.label, thing.description) for thing in sample.all_objects.classifications] == [("rocket", "white")]
    assert [found.label for found in sample.all_text.classifications] == ["NASA"]
    assert [found.label for found in sample.all_scene.classifications] == ["setting: outdoors"]


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
    if batch_size is None:
        parts.apply_model(model, label_field="found", skip_failures=False)
    else:
        model.apply_in_batches(parts, "found", batch_size=batch_size)
    for sample in dataset:
        first, last = sample.parts.detections[0].support
        found = {number: frame.found.keypoints for number, frame in sample.frames.items()}
        assert sorted(found) == sorted({first, 4, last})
        assert found[first][0].points[0] == [0.1, 0.5]


def test_clips_have_embeddings_of_their_own(dataset, parts, loaded, ours):
    vectors = parts.compute_embeddings(loaded, skip_failures=False)
    assert len(vectors) == 2 * len(dataset)
    assert np.linalg.norm(vectors[0] - vectors[1]) > 1e-3
    loaded.embed_in_batches(parts, "vector", batch_size=4)
    np.testing.assert_allclose(np.stack(parts.values("vector")), vectors, atol=1e-4)


def test_a_clip_has_to_be_within_the_video(clips, loaded, ours):
    with pytest.raises(ValueError, match=r"Frames 15 to 21 of .* but it has 20"):
        loaded.predict(ours.VideoPart(str(clips[0]), (15, 21)))


def test_neither_ffprobe_nor_ffmpeg_is_needed(dataset, scripted, loaded, monkeypatch):
    monkeypatch.setenv("PATH", "")
    dataset.apply_model(scripted("Two people talk."), label_field="text", skip_failures=False)
    assert dataset.count("text") == len(dataset)
    assert dataset[:1].compute_embeddings(loaded, skip_failures=False).shape == (1, 40)


def test_only_the_loops_of_this_thread_get_another_reader(dataset, scripted):
    usual, found = etav.FFmpegVideoReader, []

    def answer(prompt):
        thread = threading.Thread(target=lambda: found.append(fiftyone.core.models.etav.FFmpegVideoReader))
        thread.start()
        thread.join()
        found.append(etav.FFmpegVideoReader)
        return "Two people talk."

    dataset[:1].apply_model(scripted(answer), label_field="text", skip_failures=False)
    assert found == [usual, usual]
    with pytest.raises(ValueError, match="needs to know what to look for"):
        dataset.apply_model(scripted("x", operation="pointing"), label_field="text", skip_failures=False)
    assert fiftyone.core.models.etav.FFmpegVideoReader is usual


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


def test_videos_in_batches(dataset, scripted, ours):
    def answer(prompt):
        place = int(prompt.rpartition("thing ")[2][0])
        return format_points({0.0: [(place / 10, 0.5)]}, "thing")

    model = scripted(answer, operation="pointing", prompt_field="what")
    model.apply_in_batches(dataset, "found", batch_size=3)
    size = len(dataset)
    assert [len(call) for call in model.model.calls] == [3] * (size // 3) + [size % 3] * bool(size % 3)
    found = [next(iter(sample.frames.values())).found.keypoints[0].points[0] for sample in dataset]
    assert found == [[place / 10, 0.5] for place in range(size)]


def test_images_in_batches(images, scripted):
    def answer(prompt):
        place = int(prompt.rpartition("thing ")[2][0])
        return format_points([(place / 10, 0.5)], "thing")

    model = scripted(answer, operation="pointing", media_type="image")
    images.apply_model(model, label_field="found", batch_size=3, prompt_field="what", skip_failures=False)
    assert [len(call) for call in model.model.calls] == [3]
    assert [sample.found.keypoints[0].points[0] for sample in images] == [[0.0, 0.5], [0.1, 0.5], [0.2, 0.5]]


def test_structured_answers_about_images_have_no_events(images, scripted):
    model = scripted('{"summary": "Noise."}', operation="comprehensive", media_type="image")
    images.apply_model(model, label_field="all", batch_size=2, skip_failures=False)
    assert "Describe this image." in model.model.calls[0][0]
    assert '"events"' not in model.model.calls[0][0]
    assert images.values("all_summary.label") == ["Noise."] * 3
    assert not images.has_field("all_events")


# --- the model itself ------------------------------------------------------------------------------------------------


LABELS = {
    "describe": ("out.label", str),
    "pointing": ("frames.out", list),
    "tracking": ("frames.out", list),
    "temporal_localization": ("out.detections", list),
    "comprehensive": ("out_summary.label", str),
}


@pytest.mark.parametrize("operation", LABELS)
def test_every_operation_runs_the_model(dataset, loaded, ours, operation):
    settings = ours.Molmo2Settings(operation=operation, prompt="cup", max_new_tokens=3)
    model = ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, settings)
    dataset.apply_model(model, label_field="out", skip_failures=False)
    field, kind = LABELS[operation]
    assert all(isinstance(value, kind) for value in dataset.values(field))


def test_batches_answer_as_single_samples_do(clips, loaded, monkeypatch):
    paths = [str(path) for path in clips]
    single = [loaded.predict(path).label for path in paths]
    assert len(set(single)) > 1
    generate, sizes = loaded.model.generate, []

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(loaded.model, "generate", counted)
    assert [found.label for found in loaded.predict_all(paths)] == single
    assert sizes == [len(paths)]


@pytest.mark.parametrize("pooling", ["vision", "last_token"])
def test_embeddings_tell_clips_apart(dataset, loaded, ours, pooling):
    model = ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, ours.Molmo2Settings(pooling=pooling))
    assert model.has_embeddings
    vectors = dataset.compute_embeddings(model, skip_failures=False)
    assert vectors.shape == (len(dataset), 40)
    assert vectors.dtype == np.float32
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    assert distances[~np.eye(len(dataset), dtype=bool)].min() > 1e-3
    model.embed_in_batches(dataset, "vector", batch_size=2)
    np.testing.assert_allclose(np.stack(dataset.values("vector")), vectors, atol=1e-4)


def test_the_first_token_knows_nothing_of_the_video(clips, loaded, ours):
    """Why there is no such pooling."""
    states = [
        loaded.model.model(**loaded._inputs([str(path)], ["Describe this video."])).last_hidden_state[0].detach()
        for path in clips[:2]
    ]
    assert torch.equal(states[0][0], states[1][0])
    assert not torch.allclose(states[0][-1], states[1][-1], atol=1e-3)


@pytest.mark.parametrize("media_type", ["image", "video"])
def test_embeddings_are_the_mean_of_the_visual_tokens(images, dataset, loaded, ours, media_type):
    samples = images if media_type == "image" else dataset
    model = ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, ours.Molmo2Settings(media_type=media_type))
    samples.compute_embeddings(model, embeddings_field="vector", batch_size=3, skip_failures=False)
    path = samples.values("filepath")[1]
    if media_type == "image":
        inputs = loaded.processor(images=[path], return_tensors="pt")
        tokens = torch.cat(loaded.model.model.get_image_features(**inputs).pooler_output)
    else:
        inputs = loaded.processor(videos=[path], return_tensors="pt")
        tokens = torch.cat(loaded.model.model.get_video_features(**inputs).pooler_output)
    np.testing.assert_allclose(samples.values("vector")[1], tokens.mean(0).detach().numpy(), atol=1e-5)


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
        ({"operation": "segment"}, "'segment'"),
        ({"media_type": "audio"}, "'audio'"),
        ({"pooling": "first_token"}, "'first_token'"),
        ({"operation": "tracking", "media_type": "image"}, "'tracking' needs videos"),
    ],
)
def test_settings_are_checked(ours, settings, found):
    with pytest.raises(ValueError, match=found):
        ours.Molmo2Settings(**settings)


def test_something_to_look_for_is_needed(dataset, scripted):
    with pytest.raises(ValueError, match="needs to know what to look for"):
        dataset.apply_model(scripted("x", operation="pointing"), label_field="text", skip_failures=False)


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


def test_the_page_runs_as_written(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(tmp_path / "zoo"))
    for folder in (tmp_path / "Molmo2-4B", tmp_path / "zoo" / "molmo2-transformers" / "Molmo2-4B"):
        write_checkpoint(folder, "qwen3")
        # Answers of random weights end anywhere or never; the page asks for hundreds of tokens.
        settings = folder / "generation_config.json"
        write_json(settings, {**read_json(settings), "max_time": 0.3})
    (tmp_path / "videos").mkdir()
    for path in clips[:3]:
        shutil.copy(path, tmp_path / "videos")
    monkeypatch.chdir(tmp_path)
    page, names = REPOSITORY / "docs" / "fiftyone.md", {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)
    assert names["dataset"].count("penguins_vector") == names["dataset"].count("story_summary") == 3
    names["dataset"].delete()


def test_the_app_can_ask_for_settings(ours):
    form = ours.resolve_input(NAME, None)
    assert set(form.type.properties) <= set(ours.Molmo2Settings.__dataclass_fields__)
