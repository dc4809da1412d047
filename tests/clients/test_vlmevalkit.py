"""VLMEvalKit's own runner asks the miniature, on local tables and clips: the scores are ours."""

# ruff: noqa: E402 - what is imported needs what comes before
import base64
import functools
import importlib.util
import io
import json
import os
import sys

import numpy as np
import pytest

if importlib.util.find_spec("vlmeval") is None:
    pytest.skip("VLMEvalKit has an environment of its own", allow_module_level=True)

from benchmarks.torchvision_peer import make_importable

make_importable()  # before VLMEvalKit imports it

import pandas
from PIL import Image
from vlmeval.dataset.video_base import VideoBaseDataset
from vlmeval.dataset.video_dataset_config import supported_video_datasets
from vlmeval.smp import load as load_table

from molmo2 import evaluate, load
from molmo2.recipes.scoring import answer_conversations
from molmo2.vlmevalkit.__main__ import main
from molmo2.vlmevalkit.model import Molmo2, message_part, messages_of
from support.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples"))

from miniature import native
from miniature.bundle import write_clip
from miniature.questions import noun
from miniature.rows import even_sides
from miniature.world import make_clip, make_image

NUM_ROWS = 8
GREEDY = {"do_sample": False, "max_new_tokens": 192}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return native.to_transformers(native.CHECKPOINT, tmp_path_factory.mktemp("asked") / "miniature")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The folder of VLMEvalKit's tables."""
    monkeypatch.setenv("LMUData", str(tmp_path / "data"))
    monkeypatch.setenv("PRED_FORMAT", "tsv")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def run(checkpoint, folder, *options):
    """Let VLMEvalKit ask; where it wrote."""
    work = folder / "results"
    model_args = f"pretrained={checkpoint},device=cpu,max_new_tokens={GREEDY['max_new_tokens']}"
    main(["--model_args", model_args, "--model", "mini", "--work-dir", str(work), *options])
    return work / "mini"


def image_rows():
    """Images with their things, and a table of how many there are of the first thing's kind."""
    images = [make_image(np.random.default_rng([71, number])) for number in range(NUM_ROWS)]
    table = []
    for number, drawn in enumerate(images):
        first = drawn.things[0]
        same = [thing for thing in drawn.things if (thing.colour, thing.kind) == (first.colour, first.kind)]
        buffer = io.BytesIO()
        Image.fromarray(drawn.pixels).save(buffer, "PNG")
        question = f"How many {noun((first.colour, first.kind), True)} are there?"
        image = base64.b64encode(buffer.getvalue()).decode()
        table.append({"index": number, "image": image, "question": question, "answer": len(same)})
    return images, table


def ours(checkpoint, conversations):
    """Answers of this package, one question at a time."""
    model, processor = load(checkpoint)
    return [answer_conversations(model, processor, [messages], {}, **GREEDY)[0] for messages in conversations]


def asked(text, **media):
    parts = [{"type": kind, kind: value} for kind, value in media.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_free_answers_are_scored_as_ours(checkpoint, data, tmp_path):
    images, table = image_rows()
    pandas.DataFrame(table).to_csv(data / "mini_openended.tsv", sep="\t", index=False)
    folder = run(checkpoint, tmp_path, "--data", "mini_openended", "--mode", "infer")
    found = load_table(str(folder / "mini_mini_openended.tsv"))
    expected = ours(checkpoint, [asked(row["question"], image=each.pixels) for row, each in zip(table, images)])
    assert list(found["prediction"]) == expected
    scores = [evaluate.image_counting(answer, row["answer"])["correct"] for answer, row in zip(expected, table)]
    assert np.mean(scores) > 0.7  # the miniature knows its world


class CountedClips(VideoBaseDataset):
    """Clips with a question each, in the form in which VLMEvalKit's own data sets of videos are written."""

    TYPE = "VQA"

    def prepare_dataset(self, dataset):
        root = os.environ["LMUData"]  # noqa: SIM112 - its name
        return {"root": root, "data_file": os.path.join(root, f"{dataset}.tsv")}

    def build_prompt(self, line, video_llm):
        assert video_llm  # the model takes videos, not frames
        row = self.data.iloc[line]
        video = {"type": "video", "value": os.path.join(self.data_root, f"{row['video']}.mp4")}
        return [video, {"type": "text", "value": row["question"]}]

    def evaluate(self, eval_file, **judge):
        rows = load_table(eval_file)
        return {"correct": float(np.mean([count_of(*each) for each in zip(rows["prediction"], rows["answer"])]))}


def count_of(answer, count):
    return evaluate.video_counting(answer, int(count))["correct"]


def test_videos_are_scored_as_ours(checkpoint, data, tmp_path, monkeypatch):
    table = []
    for number in range(NUM_ROWS):
        clip = even_sides(make_clip(np.random.default_rng([72, number])))
        write_clip(clip, data / f"clip_{number}.mp4")
        thing = clip.movers[0].thing
        same = [each for each in clip.movers if (each.thing.colour, each.thing.kind) == (thing.colour, thing.kind)]
        question = f"How many {noun((thing.colour, thing.kind), True)} are there?"
        table.append({"index": number, "video": f"clip_{number}", "question": question, "answer": len(same)})
    pandas.DataFrame(table).to_csv(data / "mini_clips.tsv", sep="\t", index=False)
    monkeypatch.setitem(
        supported_video_datasets, "mini_clips", functools.partial(CountedClips, dataset="mini_clips", fps=2)
    )
    config = tmp_path / "config.json"  # this release of VLMEvalKit cannot take video sets from --data
    config.write_text(json.dumps({"model": {"mini": {}}, "data": {"mini_clips": {}}}))
    folder = run(checkpoint, tmp_path, "--config", str(config))
    found = load_table(str(folder / "mini_mini_clips.tsv"))
    videos = [str(data / f"{row['video']}.mp4") for row in table]
    expected = ours(checkpoint, [asked(row["question"], video=path) for row, path in zip(table, videos)])
    assert list(found["prediction"]) == expected
    score = np.mean([count_of(answer, row["answer"]) for answer, row in zip(expected, table)])
    status = json.loads((folder / "status.json").read_text())
    assert f'"correct": {score}' in json.dumps(status), status
    assert score > 0.5


def test_parts():
    image, text = {"type": "image", "value": "a.png"}, {"type": "text", "value": "What?"}
    assert messages_of([{"type": "text", "value": "Be brief.", "role": "system"}, image, text]) == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
    ]
    assert message_part({"type": "video", "value": "a.mp4", "nframes": 8}) == {"type": "video", "video": "a.mp4"}
    with pytest.raises(ValueError, match="no input for a part of type 'audio'"):
        message_part({"type": "audio", "value": "a.wav"})
    with pytest.raises(ValueError, match="the role 'tool'; expected one of system, user, assistant"):
        messages_of([{**text, "role": "tool"}])


@pytest.mark.parametrize("model_args", ["pretrained", "max_crops=3"])
def test_arguments_that_name_no_model(model_args, capsys):
    with pytest.raises(SystemExit):
        main(["--model_args", model_args, "--data", "MMStar"])
    assert f"--model_args is {model_args!r}; expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24", 24), ("0.5", 0.5), ("true", True), ("null", None), ("a: b: c", "a: b: c"), ("Be: brief", "Be: brief")],
)
def test_values_of_arguments(text, expected, monkeypatch):
    """Numbers are numbers; a prompt or a folder that looks like one is text."""
    registered, started = {}, []
    monkeypatch.setattr("molmo2.vlmevalkit.__main__.register", lambda name, **options: registered.update(options))
    monkeypatch.setattr("vlmeval.run.main", lambda: started.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    main(["--model_args", f"pretrained=2026,system_prompt={text},max_crops={text}", "--config=sets.json"])
    main(["--model_args", "pretrained=2026", "--data", "MMStar"])
    assert registered == {"pretrained": "2026", "system_prompt": text, "max_crops": expected}
    assert started == [["--config=sets.json"], ["--model", "molmo2", "--data", "MMStar"]]


def test_turns_of_a_conversation(checkpoint):
    """VLMEvalKit's `chat` gives each turn a role; images may stand in any of them."""
    images, table = image_rows()
    model = Molmo2(str(checkpoint), device="cpu", max_new_tokens=40)
    contents = [
        ("system", [("text", "Be brief.")]),
        ("user", [("image", images[0].pixels), ("text", table[0]["question"])]),
        ("assistant", [("text", "There are none.")]),
        ("user", [("image", images[1].pixels), ("text", table[1]["question"])]),
    ]
    turns = [
        {"role": role, "content": [{"type": kind, "value": value} for kind, value in parts]}
        for role, parts in contents
    ]
    ours = [
        {"role": role, "content": [{"type": kind, kind: value} for kind, value in parts]} for role, parts in contents
    ]
    (expected,) = model.asked.answers([ours], **model.generation)
    assert expected
    assert model.chat_inner(turns) == expected
    with pytest.raises(ValueError, match="the role 'tool'; expected one of system, user, assistant"):
        model.chat_inner([*turns, {"role": "tool", "content": []}])
