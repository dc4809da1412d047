"""Uploads of the app: deleted with the last page that shows them, and nothing else is."""

from pathlib import Path

import pytest

from app.samples import SAMPLES
from app.uploads import Uploads

SAMPLE = SAMPLES[0].paths[0]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    return folder


@pytest.fixture
def uploads(folder):
    return Uploads([SAMPLE], lambda: str(folder))


def stored(folder, name, content=b"private"):
    file = folder / name
    file.write_bytes(content)
    return str(file)


def test_files_go_with_their_session(uploads, folder):
    first, second = stored(folder, "a.png"), stored(folder, "b.png")
    uploads.keep("one", [first, second])
    uploads.keep("one", [second])  # other files in the place of the first
    assert {file.name for file in folder.iterdir()} == {"b.png"}
    uploads.keep("one", [])
    uploads.keep("one", [])
    uploads.keep("unknown", [])
    assert not list(folder.iterdir())


def test_a_file_of_two_sessions_stays_for_the_other(uploads, folder):
    file = stored(folder, "a.png")
    uploads.keep("one", [file])
    uploads.keep("two", [file])
    uploads.keep("one", [])
    assert [entry.name for entry in folder.iterdir()] == ["a.png"]
    uploads.keep("two", [])
    assert not list(folder.iterdir())


def test_a_file_that_another_visitor_is_about_to_open_stays(uploads, folder):
    file = stored(folder, "a.png")
    uploads.keep("one", [file])
    Path(stored(folder, "new")).replace(file)  # as gradio stores what "two" uploads; its page has not yet opened it
    uploads.keep("one", [])
    assert [entry.name for entry in folder.iterdir()] == ["a.png"]
    uploads.keep("two", [file])
    uploads.keep("one", [file])
    uploads.keep("two", [])
    uploads.keep("one", [])
    assert not list(folder.iterdir())


def test_a_page_that_is_left_while_it_opens_files_keeps_none(uploads, folder):
    first, second, common = (stored(folder, name) for name in ("a.png", "b.png", "c.png"))
    uploads.keep("one", [first])
    uploads.keep("two", [common])
    with uploads.opening("one"), uploads.opening("two"):
        uploads.leave("one")
        assert {file.name for file in folder.iterdir()} == {"b.png", "c.png"}
        uploads.keep("one", [second, common])
        uploads.keep("two", [common])
    assert [file.name for file in folder.iterdir()] == ["c.png"]
    uploads.leave("two")
    assert not list(folder.iterdir())
    uploads.keep("two", [stored(folder, "d.png")])  # it is there again: only the connection was lost
    assert [file.name for file in folder.iterdir()] == ["d.png"]


def test_examples_and_files_elsewhere_stay(uploads, folder, tmp_path):
    example = stored(folder, SAMPLE.name, SAMPLE.read_bytes())
    namesake = tmp_path / "uploads" / "x"
    namesake.mkdir()
    other = stored(namesake, SAMPLE.name)  # of an example's name, and not that example
    outside = stored(tmp_path, "settings.txt")
    (folder / "link").symlink_to(tmp_path)
    uploads.keep("one", [example, other, outside, str(folder / "link" / "settings.txt"), str(folder / "gone")])
    uploads.keep("one", [])
    assert (folder / SAMPLE.name).exists()
    assert not (namesake / SAMPLE.name).exists()
    assert (tmp_path / "settings.txt").read_bytes() == b"private"
