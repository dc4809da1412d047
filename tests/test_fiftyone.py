"""The FiftyOne model and labels, on real datasets of a real database (`make test-fiftyone`).

Answers that a random model can't give are scripted: the processor, its inputs and everything around `generate` stay
real. The rest runs the tiny model itself.
"""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

pytest.importorskip("fiftyone", reason="`make test-fiftyone` installs it")
if not os.environ.get("FIFTYONE_DATABASE_URI"):
    pytest.skip("no database: run scripts/with_mongod", allow_module_level=True)

import fiftyone as fo
import fiftyone.zoo as foz

from checkpoints import picture, write_checkpoint
from molmo2_remote.grounding_format_molmo2 import format_points, format_tracks
from molmo2_remote.grounding_molmo2 import parse_grounding

REPOSITORY = Path(__file__).resolve().parent.parent
CLIP = REPOSITORY / "examples" / "data" / "nasa_clip.mp4"
SHARED_CLIPS = [
    path
    for name in ("vfr.mp4", "start_at_5s.mkv", "h265_video.mp4")
    if (path := REPOSITORY.parent / "shared" / "media" / name).is_file()
]
NAME = "allenai/Molmo2-4B"
FPS = 10


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The zoo's folder with our source in it, as registering it leaves it, and a tiny checkpoint as the download."""
    source = Path(fo.config.model_zoo_dir) / "molmo2-transformers"
    shutil.copytree(REPOSITORY / "integrations" / "fiftyone", source)
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
    """Different clips; the first has 20 frames at 10 a second."""
    folder = tmp_path_factory.mktemp("clips")
    paths = []
    for seed in range(3):
        path = folder / f"clip{seed}.mp4"
        frames = [np.asarray(picture(96, 128, seed=seed * 100 + index)) // (1 + seed) for index in range(20)]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        paths.append(path)
    return [*paths, CLIP, *SHARED_CLIPS]


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


class Scripted:
    """A model whose `generate` writes what `answer` says for each row's prompt, and counts its calls."""

    def __init__(self, model, processor, answer):
        self.device, self.model = model.device, model.model
        self.tokenizer, self.answer, self.calls = processor.tokenizer, answer, []

    def generate(self, input_ids, attention_mask, **options):
        prompts = self.tokenizer.batch_decode(input_ids)
        self.calls.append(prompts)
        answers = [self.tokenizer(self.answer(prompt), add_special_tokens=False).input_ids for prompt in prompts]
        width = max(map(len, answers))
        padded = [ids + [self.tokenizer.eos_token_id] * (width - len(ids)) for ids in answers]
        return torch.cat([input_ids, torch.tensor(padded)], 1)


@pytest.fixture
def scripted(loaded, ours):
    def build(answer, **settings):
        model = Scripted(loaded.model, loaded.processor, answer if callable(answer) else lambda prompt: answer)
        return ours.Molmo2FiftyOneModel(model, loaded.processor, ours.Molmo2Settings(**settings))

    return build


def generated(dataset):
    """The first sample, whose clip has frames at tenths of a second."""
    return dataset.first()


# --- the operations on videos ----------------------------------------------------------------------------------------


def test_describe(dataset, scripted):
    dataset.apply_model(scripted("Two people talk.", operation="describe"), label_field="text", skip_failures=False)
    assert dataset.values("text.label") == ["Two people talk."] * len(dataset)


def test_pointing(dataset, scripted):
    answer = format_points({0.0: [(0.25, 0.5), (0.75, 0.125)], 0.8: [(0.1, 0.9)]}, "cup")
    model = scripted(answer, operation="pointing", prompt="cup")
    dataset.apply_model(model, label_field="cups", skip_failures=False)
    assert "Point to the cup." in model.model.calls[0][0]
    sample = generated(dataset)
    found = {number: frame.cups for number, frame in sample.frames.items() if frame.cups is not None}
    assert sorted(found) == [1, 9]
    assert [keypoint.points[0] for keypoint in found[1].keypoints] == [[0.25, 0.5], [0.75, 0.125]]
    assert [keypoint.label for keypoint in found[9].keypoints] == ["cup"]


def test_pointing_at_nothing(dataset, scripted):
    dataset.apply_model(
        scripted("There are none.", operation="pointing", prompt="cup"), label_field="cups", skip_failures=False
    )
    assert dataset.count("frames.cups.keypoints") == 0


def test_tracking_links_objects(dataset, scripted):
    tracks = {1: {0.0: (0.1, 0.2), 0.4: (0.2, 0.2), 0.8: (0.3, 0.2)}, 2: {0.4: (0.9, 0.9), 0.8: (0.8, 0.9)}}
    model = scripted(format_tracks(tracks, "ball"), operation="tracking", prompt="ball")
    dataset.apply_model(model, label_field="balls", skip_failures=False)
    sample = generated(dataset)
    keypoints = {
        (number, keypoint.index): keypoint
        for number, frame in sample.frames.items()
        for keypoint in frame.balls.keypoints
    }
    assert sorted(keypoints) == [(1, 1), (5, 1), (5, 2), (9, 1), (9, 2)]
    instances = {key: keypoint.instance.id for key, keypoint in keypoints.items()}
    assert instances[1, 1] == instances[5, 1] == instances[9, 1] != instances[5, 2] == instances[9, 2]


def test_temporal_localization(dataset, scripted):
    answer = '```json\n{"events": [{"start": "00:00", "end": "00:00.8", "description": "lift-off"}]}\n```'
    model = scripted(answer, operation="temporal_localization")
    dataset.apply_model(model, label_field="events", skip_failures=False)
    (event,) = generated(dataset).events.detections
    assert (event.label, event.support) == ("lift-off", [1, 9])


def test_comprehensive(dataset, scripted):
    answer = (
        '{"summary": "A launch.", "events": [{"start": 0, "end": 0.4, "description": "smoke"}], '
        '"objects": [{"name": "rocket"}], "text": ["NASA"], "scene": {"setting": "outdoors"}}'
    )
    dataset.apply_model(scripted(answer, operation="comprehensive"), label_field="all", skip_failures=False)
    sample = generated(dataset)
    assert sample.all_summary.label == "A launch."
    assert sample.all_events.detections[0].support == [1, 5]
    assert [found.label for found in sample.all_objects.classifications] == ["rocket"]
    assert [found.label for found in sample.all_text.classifications] == ["NASA"]
    assert [found.label for found in sample.all_scene.classifications] == ["setting: outdoors"]


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
    ours.apply_in_batches(dataset, model, "found", batch_size=3)
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
    assert images.values("all_summary.label") == ["Noise."] * 3
    assert not images.has_field("all_events")


# --- the model itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["describe", "pointing", "tracking", "temporal_localization", "comprehensive"])
def test_every_operation_runs_the_model(dataset, loaded, ours, operation):
    settings = ours.Molmo2Settings(operation=operation, prompt="cup", max_new_tokens=3)
    model = ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, settings)
    dataset[:2].apply_model(model, label_field="out", skip_failures=False)
    if operation == "describe":
        assert all(isinstance(text, str) for text in dataset[:2].values("out.label"))


def test_batches_answer_as_single_samples_do(clips, loaded):
    paths = [str(path) for path in clips[:3]]
    single = [loaded.predict(path).label for path in paths]
    assert [found.label for found in loaded.predict_all(paths)] == single


@pytest.mark.parametrize("pooling", ["vision", "last_token"])
def test_embeddings_tell_clips_apart(dataset, loaded, ours, pooling):
    model = ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, ours.Molmo2Settings(pooling=pooling))
    assert model.has_embeddings
    vectors = dataset.compute_embeddings(model, skip_failures=False)
    assert vectors.shape == (len(dataset), 40)
    assert vectors.dtype == np.float32
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    assert distances[~np.eye(len(dataset), dtype=bool)].min() > 1e-3
    ours.embed_in_batches(dataset, model, "vector", batch_size=2)
    np.testing.assert_allclose(np.stack(dataset.values("vector")), vectors, atol=1e-4)


def test_embeddings_of_images(images, loaded, ours):
    model = ours.Molmo2FiftyOneModel(loaded.model, loaded.processor, ours.Molmo2Settings(media_type="image"))
    images.compute_embeddings(model, embeddings_field="vector", batch_size=3, skip_failures=False)
    vectors = np.stack(images.values("vector"))
    inputs = loaded.processor(images=[picture(70, 60, seed=1)], return_tensors="pt")
    expected = loaded.model.model.get_image_features(**inputs).mean(0).detach().numpy()
    np.testing.assert_allclose(vectors[1], expected, atol=1e-5)


# --- labels alone, settings ------------------------------------------------------------------------------------------


def test_labels_return_to_text(ours):
    answer = format_points([(0.25, 0.5), (0.75, 0.125)], "cup")
    keypoints = ours.model.labels.image_keypoints(parse_grounding(answer, [(200, 100)]))
    assert format_points(ours.model.labels.image_positions(keypoints), "cup") == answer


def test_tracks_return_to_text(ours):
    answer = format_tracks({1: {0.0: (0.1, 0.2), 0.5: (0.2, 0.2)}, 2: {0.5: (0.9, 0.9)}}, "ball")
    frames = ours.model.labels.frame_keypoints(
        parse_grounding(answer, {"timestamps": [0.0, 0.5], "frames_indices": [0, 15], "width": 20, "height": 10})
    )
    assert sorted(frames) == [1, 16]
    assert format_tracks(ours.model.labels.track_positions(frames, {1: 0.0, 16: 0.5}), "ball") == answer


def test_frames_have_to_be_known(ours):
    with pytest.raises(ValueError, match="unknown which frame"):
        ours.model.labels.frame_keypoints(parse_grounding('<points coords="1.0 1 500 500">cup</points>'))


def test_events_without_start_or_with_ends_exchanged(ours):
    events = [
        SimpleNamespace(start=start, end=end, description="x") for start, end in ((None, 1), (0.5, None), (1, 0))
    ]
    media = parse_grounding("", {"timestamps": [0.0, 0.5, 1.0], "frames_indices": [0, 15, 30]}).media
    found = ours.model.labels.temporal_detections(events, media).detections
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


def test_clips_of_videos_are_refused(dataset, scripted, ours):
    sample = dataset.first()
    sample["parts"] = fo.TemporalDetections(detections=[fo.TemporalDetection(label="x", support=[2, 5])])
    sample.save()
    view = dataset.to_clips("parts")
    with pytest.raises(ValueError, match="whole"):
        view.apply_model(scripted("x"), label_field="text", skip_failures=False)
    with pytest.raises(ValueError, match="whole"):
        ours.apply_in_batches(view, scripted("x"), "text")


def test_something_to_look_for_is_needed(dataset, scripted):
    with pytest.raises(ValueError, match="needs to know what to look for"):
        dataset.apply_model(scripted("x", operation="pointing"), label_field="text", skip_failures=False)


def test_the_app_can_ask_for_settings(ours):
    form = ours.resolve_input(NAME, None)
    assert set(form.type.properties) <= set(ours.Molmo2Settings.__dataclass_fields__)
