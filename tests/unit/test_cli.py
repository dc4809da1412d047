"""The command `molmo2`: what it asks, what it prints, how it ends. Answers come from a stand-in."""

import csv
import io
import json
import sys

import pytest
from PIL import Image

from molmo2.cli import main, models
from molmo2.grounding.parse import parse_grounding
from molmo2.tools.answer import Answer, Timings

ANSWERS = {
    "Point to the boats.": '<points coords="1 1 250 500 2 750 500">boats</points>',
    "How many boats are there?": 'Counting the <points coords="1 1 250 500">boats</points> shows a total of 1.',
    "Say it.": "Füße",
}


class Stand:
    """Knows its answers by question; refuses files called broken."""

    def __init__(self):
        self.calls = []

    def ask(self, question, images=None, videos=None, **options):
        self.calls.append((str(question), images, videos, options))
        if any("broken" in path for path in images or []):
            raise ValueError("the image is damaged")
        text = ANSWERS[str(question)]
        size = (100, 80) if images and len(images) == 1 else [(100, 80)] * len(images or [])
        grounding = parse_grounding(text, size or None)
        return Answer(text, grounding, grounding, False, Timings(0.1, 0.2, 0.3, 10, 0, 5))


@pytest.fixture
def stand(monkeypatch):
    stand = Stand()
    monkeypatch.setattr(models, "open_asker", lambda *settings: stand)
    monkeypatch.setenv("MOLMO2_MODEL", "some/model")
    monkeypatch.delenv("MOLMO2_SERVER", raising=False)
    return stand


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("b.png", "a.png", "more/c.png"):
        Image.new("RGB", (100, 80)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_points_for_people(stand, photos, capsys):
    assert main(["point", "boats", str(photos / "a.png"), "--draw", str(photos / "marked")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["boats (2 points)", "  boats 1: x 25, y 40", "  boats 2: x 75, y 40"]
    drawn = photos / "marked" / "a_points.png"
    assert err == f"wrote {drawn}\n"
    assert Image.open(drawn).getpixel((25, 40)) != (0, 0, 0)


def test_every_file_of_a_folder_is_asked_about(stand, photos, capsys):
    assert main(["count", "boats", str(photos), str(photos / "a.png"), "--format", "json", "--num-frames", "4"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["files"] for record in records] == [[str(photos / "a.png")], [str(photos / "b.png")]]
    assert records[0]["count"] == 1
    assert records[0]["points"] == [{"label": "boats", "id": 1, "x": 25.0, "y": 40.0, "image": 0}]
    assert stand.calls[0][3] == {"processor_kwargs": {"num_frames": 4}, "max_new_tokens": 512}
    assert main(["count", "boats", "-r", str(photos)]) == 0
    assert [call[1] for call in stand.calls[2:]] == [[str(photos / name)] for name in ("a.png", "b.png", "more/c.png")]


def test_several_images_in_one_question(stand, photos, capsys):
    assert main(["point", "boats", str(photos / "*.png"), "--together", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["label"], row["x"], row["image"]) for row in rows] == [("boats", "25.0", "0"), ("boats", "75.0", "0")]
    assert stand.calls[0][1] == [str(photos / "a.png"), str(photos / "b.png")]


def test_files_that_fail_are_named_and_the_others_answered(stand, photos, capsys):
    (photos / "a_broken.png").write_bytes(b"")
    assert main(["ask", "Say it.", str(photos), "-f", "json"]) == 1
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record.get("text") for record in records] == ["Füße", None, "Füße"]
    assert records[1]["error"] == "the image is damaged"
    assert err == f"error: {photos / 'a_broken.png'}: the image is damaged\n"


def test_answers_into_a_file(stand, photos, capsys):
    target = photos / "answers.jsonl"
    assert main(["ask", "Say it.", str(photos / "a.png"), "-f", "json", "-o", str(target)]) == 0
    assert capsys.readouterr() == ("", "")
    assert json.loads(target.read_text(encoding="utf-8"))["text"] == "Füße"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "Say it.", "nowhere.png"], "There is no file or folder 'nowhere.png'"),
        (["ask", "Say it.", "{photos}/*.gif"], "has no images or videos"),
        (["ask", "Say it.", "{photos}/notes.txt"], "--kind image or --kind video"),
        (["ask", " ", "{photos}/a.png"], "The question is empty"),
        (["point", " . ", "{photos}/a.png"], "found an empty name"),
        (["track", "dog", "{photos}/a.png", "--fps", "-1"], "fps is -1.0"),
        (["ask", "Say it.", "{photos}/a.png", "--clip", "4:1"], "the start before the end"),
        (["ask", "Say it.", "{photos}/a.png", "--clip", "now"], "is not START:END in seconds"),
        (["ask", "Say it.", "{photos}/a.png", "clip.mp4", "--together"], "There is no file or folder 'clip.mp4'"),
        (["paint", "{photos}/a.png"], "No such command 'paint'"),
    ],
)
def test_wrong_arguments(stand, photos, capsys, arguments, message):
    assert main([argument.format(photos=photos) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert stand.calls == []


def test_without_a_model_it_says_how_to_name_one(stand, photos, capsys, monkeypatch):
    monkeypatch.delenv("MOLMO2_MODEL")
    assert main(["ask", "Say it.", str(photos / "a.png")]) == 2
    assert "allenai/Molmo2-4B" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded(photos, capsys):
    assert main(["ask", "Say it.", str(photos / "a.png"), "-m", str(photos)]) == 3
    assert f"'{photos}' cannot be loaded as a Molmo2 model" in capsys.readouterr().err


def test_interrupted(stand, photos, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(stand, "ask", interrupt)
    assert main(["ask", "Say it.", str(photos / "a.png")]) == 130


def test_every_command_explains_itself(capsys):
    assert main(["--help"]) == 0
    commands = [line.split()[0] for line in capsys.readouterr().out.split("Commands:")[1].splitlines() if line.strip()]
    for name in ("ask", "point", "count", "track", "describe", "plan"):
        assert name in commands
        assert main([name, "--help"]) == 0
        assert "example" in capsys.readouterr().out


def test_convert_is_the_converter(capsys):
    assert main(["convert", "nowhere", "out", "--dry-run"]) == 3
    assert "nowhere" in capsys.readouterr().err


def test_without_click_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "click", None)
    assert main(["--help"]) == 2
    assert "pip install 'molmo2-transformers[cli]'" in capsys.readouterr().err
