"""The command `molmo2`: what it asks, what it prints, how it ends. Answers come from a stand-in."""

import csv
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from molmo2.batch import WorkerPool
from molmo2.cli import batches, commands, doctor, main, models, printing, serving
from molmo2.grounding import prompts
from molmo2.grounding.parse import parse_grounding
from molmo2.tools.answer import Answer, Timings
from support.checkpoints import write_checkpoint
from support.fake_openai import serve
from support.model_inputs import processor

TESTS = Path(__file__).resolve().parents[1]

ANSWERS = {
    "Point to the boats.": '<points coords="1 1 250 500 2 750 500">boats</points>',
    "How many boats are there?": 'Counting the <points coords="1 1 250 500">boats</points> shows a total of 1.',
    "Say it.": "Füße",
}


class Stand:
    """Knows its answers by question; refuses files called broken."""

    def __init__(self):
        self.calls, self.answers = [], ANSWERS

    def ask(self, question, images=None, videos=None, **options):
        self.calls.append((str(question), images, videos, options))
        if any("broken" in path for path in images or []):
            raise ValueError("the image is damaged")
        text = self.answers.get(str(question), "Well.")
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
    assert main(["count", "boats", str(photos), str(photos / "a.png"), "--format", "json", "--max-crops", "4"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["files"] for record in records] == [[str(photos / "a.png")], [str(photos / "b.png")]]
    assert records[0]["count"] == 1
    assert records[0]["points"] == [{"label": "boats", "id": 1, "x": 25.0, "y": 40.0, "image": 0}]
    assert stand.calls[0][3] == {"processor_kwargs": {"max_crops": 4}, "max_new_tokens": 512}
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
        (["ask", "Say it.", "{photos}/a.png", "-o", "{photos}/new/a.json"], "there is no folder '{photos}/new'"),
        (
            ["ask", "Say it.", "{photos}", "--clip", "1:2"],
            "--clip is for videos, and the files are none. Leave it out",
        ),
        (["count", "boats", "{photos}/a.png", "--num-frames", "4"], "--num-frames is for videos, and the files are"),
        (["track", "dog", "https://host/a.mp4", "--max-crops", "4"], "--max-crops is for images, and the files are"),
        (["plan", "{photos}/a.png", "--clip", "1:2"], "--clip is for videos, and the files are none"),
        (["batch", "{photos}", "{photos}/a.jsonl", "--clip", "1:2"], "--clip is for videos, and the files are none"),
        (["long", "ask", "What?", "a.mp4", "--overwrite"], "--overwrite is for a journal, and none is named"),
        (["paint", "{photos}/a.png"], "No such command 'paint'"),
    ],
)
def test_wrong_arguments(stand, photos, capsys, arguments, message):
    assert main([argument.format(photos=photos) for argument in arguments]) == 2
    assert message.format(photos=photos) in " ".join(capsys.readouterr().err.split())
    assert stand.calls == []


def test_an_answer_that_cannot_be_drawn_stays_an_answer(stand, photos, capsys, monkeypatch):
    def fail(*arguments):
        raise LookupError("no pen")

    monkeypatch.setattr(printing, "save_marks", fail)
    assert main(["point", "boats", str(photos / "a.png"), "-f", "json", "--draw", str(photos / "marked")]) == 1
    out, err = capsys.readouterr()
    (record,) = (json.loads(line) for line in out.splitlines())
    assert len(record["points"]) == 2
    assert err == f"error: {photos / 'a.png'}: not drawn: no pen\n"


def test_ray_that_is_missing_is_said(stand, photos, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["batch", str(photos), str(photos / "out.jsonl"), "-q", "Say it.", "--engine", "ray"]) == 3
    assert "pip install" in capsys.readouterr().err


def test_without_a_model_it_says_how_to_name_one(stand, photos, capsys, monkeypatch):
    monkeypatch.delenv("MOLMO2_MODEL")
    assert main(["ask", "Say it.", str(photos / "a.png")]) == 2
    assert "allenai/Molmo2-4B" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded(photos, capsys):
    assert main(["ask", "Say it.", str(photos / "a.png"), "-m", str(photos)]) == 3
    assert f"'{photos}' cannot be loaded as a Molmo2 model" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["ask", "Say it."], ["plan"]])
def test_a_model_that_is_not_there(photos, capsys, command):
    assert main([*command, str(photos / "a.png"), "-m", str(photos / "none")]) == 3
    assert f"There is no folder '{photos / 'none'}'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(photos, capsys, tmp_path):
    folder = write_checkpoint(tmp_path / "model", "qwen3", remote_code=False)
    assert main(["ask", "Say it.", str(photos / "a.png"), "-m", str(folder), "--device", "cuda"]) == 3
    assert "cannot be loaded as a Molmo2 model" in capsys.readouterr().err


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


@pytest.mark.parametrize("group", [[], ["long"]])
def test_lists_of_commands_have_whole_sentences(capsys, group):
    assert main([*group, "--help"]) == 0
    listed = capsys.readouterr().out.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    assert len(listed) >= 4
    assert [line for line in listed if line.endswith("...")] == []


def test_convert_is_the_converter(capsys):
    assert main(["convert", "nowhere", "out", "--dry-run"]) == 3
    assert "nowhere" in capsys.readouterr().err


def test_without_click_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "click", None)
    assert main(["--help"]) == 2
    assert "pip install 'molmo2-transformers[cli]'" in capsys.readouterr().err


def test_prompts_of_the_other_commands(stand, photos, monkeypatch, capsys):
    """`track` and `describe` ask as the model was taught, by the kind of the file."""
    clip = photos / "clip.mp4"
    clip.write_bytes(b"")
    monkeypatch.setattr(stand, "answers", {})
    asked = [
        (["track", "red car", str(clip), "--fps", "1", "--clip", "1:2.5"], prompts.track("red car", fps=1.0)),
        (["describe", str(photos / "a.png")], prompts.describe("image")),
        (["describe", str(photos / "*.png"), "--together"], prompts.describe("images")),
        (["describe", str(clip)], prompts.describe("video")),
        (["describe", str(clip), "--structured"], prompts.describe_structured()),
    ]
    for arguments, prompt in asked:
        assert main(arguments) == 0
        assert stand.calls[-1][0] == str(prompt)
    assert stand.calls[0][2] == [str(clip)]
    assert stand.calls[0][3]["processor_kwargs"] == {"clip": (1.0, 2.5)}
    assert len({question for question, *_ in stand.calls}) == len(asked)
    assert capsys.readouterr().out == "Well.\n" * len(asked)


def test_addresses_are_passed_on_as_they_are(stand, capsys):
    addresses = ["https://host/a.png?size=2", "http://host/clip.mp4", "https://host/image"]
    assert main(["ask", "Say it.", *addresses[:2]]) == 0
    assert [call[1:3] for call in stand.calls] == [([addresses[0]], None), (None, [addresses[1]])]
    assert main(["ask", "Say it.", addresses[2]]) == 2
    assert "--kind image or --kind video" in capsys.readouterr().err
    assert main(["ask", "Say it.", addresses[2], "--kind", "image"]) == 0


@pytest.mark.parametrize(
    ("is_terminal", "seconds", "is_shown"), [(True, 1.5, True), (True, 0.1, False), (False, 9, False)]
)
def test_progress_is_shown_on_terminals_and_after_two_seconds(
    stand, photos, monkeypatch, capsys, is_terminal, seconds, is_shown
):
    now, ask = [0.0], stand.ask
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)

    def take_time(*arguments, **options):
        now[0] += seconds
        return ask(*arguments, **options)

    monkeypatch.setattr(stand, "ask", take_time)
    assert main(["ask", "Say it.", "-r", str(photos), "-f", "json"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert ("asking" in err) is is_shown
    assert is_shown or err == ""


class Terminal(io.StringIO):
    """Notes when a word is written."""

    def __init__(self, word):
        super().__init__()
        self.word, self.has_word = word, threading.Event()

    def isatty(self):
        return True

    def write(self, text):
        if self.word in text:
            self.has_word.set()
        return super().write(text)


def test_one_long_answer_shows_its_seconds(stand, photos, monkeypatch, capsys):
    terminal, ask = Terminal("asking"), stand.ask
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(printing, "as_text", lambda answer: terminal.write("|") and "Füße")
    monkeypatch.setattr(commands, "PATIENCE_SECONDS", 0.01)

    def take_long(*arguments, **options):
        assert terminal.has_word.wait(60)
        return ask(*arguments, **options)

    monkeypatch.setattr(stand, "ask", take_long)
    assert main(["ask", "Say it.", str(photos / "a.png")]) == 0
    assert capsys.readouterr().out == "Füße\n"
    assert terminal.getvalue().startswith("\rasking: 0 s")
    assert terminal.getvalue().endswith("\r\033[K|")  # nothing is left when the answer is written


# --- plan, batch and app ---------------------------------------------------------------------------------------------


def test_plan_reads_no_weights(photos, tmp_path, capsys):
    folder = tmp_path / "processor"
    processor().save_pretrained(folder)
    assert main(["plan", str(photos / "a.png"), "-m", str(folder), "-f", "json"]) == 0
    (record,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert record["files"] == [str(photos / "a.png")]
    wanted = record["tokens"] - 1
    assert main(["plan", str(photos), "-m", str(folder), "--max-tokens", str(wanted), "-f", "json"]) == 0
    less = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(entry["tokens"] <= wanted and entry["options"] for entry in less)
    assert len(less) == 2
    assert main(["plan", str(photos / "a.png"), "-m", str(folder)]) == 0
    assert str(record["tokens"]) in capsys.readouterr().out
    assert main(["plan", str(photos / "a.png"), "-m", str(photos)]) == 3
    assert "has no processor of a Molmo2 model" in capsys.readouterr().err


def test_batch_from_a_folder_to_a_table(photos, monkeypatch, capsys):
    """The arguments become a source, a run and an exit code; the workers have no model here."""
    command = (sys.executable, str(TESTS / "support" / "batch_worker.py"))
    made = []

    def pool(settings, workers, **options):
        made.append((settings, workers, options))
        return WorkerPool(settings, workers, command=command)

    monkeypatch.setattr(batches, "WorkerPool", pool)
    arguments = ["batch", str(photos), str(photos / "out.jsonl"), "-q", "Say it.", "-m", "some", "--max-crops", "3"]
    arguments += ["--batch-size", "2", "--workers", "2", "--ordered", "-r"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert (out, "3 rows in" in err, "0 with an error" in err, "rows:" in err) == ("", True, True, False)
    results = [json.loads(line) for line in (photos / "out.jsonl").read_text().splitlines()]
    assert [(result["row"], result["text"]) for result in results] == [(place, "SAY IT.") for place in range(3)]
    settings, workers, options = made[0]
    assert (settings.model, settings.batch_size, settings.window, workers) == ("some", 2, 8, 2)
    assert settings.processor_kwargs == {"max_crops": 3}
    assert options == {"row_seconds": 1800.0}
    assert main([*arguments[:4], "Another?", *arguments[5:]]) == 2
    assert "started with other settings or another source (question)" in " ".join(capsys.readouterr().err.split())
    assert main([*arguments[:4], "die", *arguments[5:], "--overwrite"]) == 1
    assert "3 with an error" in capsys.readouterr().err
    assert main(["batch", str(photos), str(photos / "out.txt"), "-q", "Say it.", "-m", "some"]) == 2
    assert main(["batch", str(photos), str(photos / "new.jsonl"), "-q", "a", "-m", "some", "--workers", "4:2"]) == 2
    assert main(["batch", str(photos), str(photos / "new.jsonl"), "-q", "a", "-m", "missing"]) == 3
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--engine", "ray", "--server", "http://127.0.0.1:1/v1"]])
def test_workers_per_gpu_are_rays(more, photos, capsys):
    arguments = ["batch", str(photos), str(photos / "out.jsonl"), "-q", "a", "-m", "some", "--workers-per-gpu", "3"]
    assert main([*arguments, *more]) == 2
    assert "--workers-per-gpu is of --engine ray" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough():
    """As of `molmo2 ... | head`: silent, and no failure."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "molmo2.cli", "doctor"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_app_is_that_of_the_checkout(monkeypatch, tmp_path, capsys):
    ran = []
    done = type("Done", (), {"returncode": 5})
    monkeypatch.setattr(commands.subprocess, "run", lambda command, **options: ran.append((command, options)) or done)
    assert main(["app", "--server", "http://host/v1", "--share"]) == 5
    command, options = ran[0]
    assert command[1:] == ["-m", "app", "--server", "http://host/v1", "--share"]
    assert options["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(TESTS.parent)
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "a" / "b" / "c" / "commands.py"))
    assert main(["app"]) == 2
    assert "Clone it" in capsys.readouterr().err


# --- serve and doctor ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "molmo2", "dtype": "float32"}')
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    return folder


def test_serving_takes_the_dtype_that_is_stored(checkpoint):
    command = serving.serve_command("vllm", serving.ServeOptions(str(checkpoint), max_model_len=2048, videos=2))
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)]
    flags = dict(itertools.pairwise(command))
    assert (flags["--dtype"], flags["--max-model-len"], flags["--host"]) == ("float32", "2048", "127.0.0.1")
    assert json.loads(flags["--limit-mm-per-prompt"]) == {"image": 16, "video": 2}
    command = serving.serve_command(
        "transformers", serving.ServeOptions("me/model", port=81, more=["--device", "cpu"])
    )
    assert command[2:5] == ["molmo2.cli.serving", "serve", "me/model"]
    assert command[5:] == ["--host", "127.0.0.1", "--port", "81", "--dtype", "auto", "--device", "cpu"]
    with pytest.raises(serving.ServeError, match="no --max-model-len"):
        serving.serve_command("transformers", serving.ServeOptions("me/model", max_model_len=1))


def test_serving_prefers_vllm_and_says_what_is_missing(checkpoint, monkeypatch, capsys):
    installed = {"vllm", "transformers", serving.TRANSFORMERS_CLI, *serving.SERVE_PACKAGES}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert serving.choose_engine() == "vllm"
    assert serving.choose_engine("transformers") == "transformers"
    installed.remove("vllm")
    assert serving.choose_engine() == "transformers"
    with pytest.raises(serving.ServeError, match=r"molmo2-transformers\[vllm\]"):
        serving.choose_engine("vllm")
    installed.remove("uvicorn")
    with pytest.raises(serving.ServeError, match=r"lacks uvicorn: pip install 'transformers\[serving\]'"):
        serving.choose_engine()


def test_serve_shows_its_command(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(commands, "choose_engine", lambda wanted: "transformers")
    assert main(["serve", "-m", str(checkpoint), "--dry-run", "--port", "81", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith(
        f"serve {checkpoint} --host 127.0.0.1 --port 81 --dtype float32 --device cpu\n"
    )


@pytest.fixture
def found(monkeypatch):
    """What doctor finds about a checkpoint, without importing decoders."""
    monkeypatch.setattr(doctor, "_import_problem", lambda module: "")
    return lambda folder: {
        (finding.level, part)
        for finding in doctor.examine(str(folder))
        for part in (finding.text, finding.mend)
        if str(folder) in finding.text or "chat_template" in finding.text or "weights take" in finding.text
    }


def test_doctor_knows_sick_checkpoints(checkpoint, found, monkeypatch):
    assert {level for level, _ in found(checkpoint)} == {"ok"}
    (checkpoint / "chat_template.jinja").write_text("{% for part in message['content'] or [] %}")
    assert ("wrong", "convert it again, or replace the file by that of this release") in found(checkpoint)
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: 50)
    assert any("weights take" in text for level, text in found(checkpoint) if level == "wrong")
    (checkpoint / "model.safetensors").unlink()
    assert any("has no weights" in text for level, text in found(checkpoint) if level == "wrong")
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    assert any("of the type 'llama'" in text for level, text in found(checkpoint) if level == "wrong")
    (checkpoint / "config.json").unlink()
    assert any("has no config.json" in text for level, text in found(checkpoint) if level == "wrong")
    nowhere = checkpoint / "nowhere"
    assert ("wrong", f"there is no folder '{nowhere}'") in found(nowhere)


def test_doctor_reports(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_import_problem", lambda module: "it crashes")
    assert main(["doctor", "-f", "json"]) == 1
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wrong = [finding for finding in findings if finding["level"] == "wrong"]
    assert [finding["mend"] for finding in wrong if "no video decoder" in finding["text"]] == ["pip install decord2"]
    monkeypatch.setattr(doctor, "_range_of", lambda name: "<1" if name == "transformers" else "")
    assert main(["doctor"]) == 1
    assert "-> pip install 'transformers<1'" in capsys.readouterr().out


def test_doctor_asks_the_server(capsys):
    with serve(kind="vllm", models=("mini",)) as server:
        texts = [finding.text for finding in doctor._server(server.url, "other")]
    assert texts == [f"{server.url} answers; it is of the kind vllm", "it has no model 'other' but ['mini']"]
