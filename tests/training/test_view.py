"""The page of training examples: its pixels, tokens, weights, branches, mask and points are those of the examples."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from molmo2.tools.view import render, view
from molmo2.training import Pack, TokenWeighting, build_training_example
from support.model_inputs import processor
from support.training_cases import CLIP, IMAGE, turn

POINTS = '<points coords="1 1 250 500 2 750 100">boats & <b></points>'
TREE = [turn("Point.", POINTS, IMAGE, style="pointing"), turn("What is it?", "A boat.")]


class Elements(HTMLParser):
    """The start tags of a page, as (name, attributes), and its text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag, **attributes):
        return [own for name, own in self.found if name == tag and attributes.items() <= own.items()]


def image_of(element):
    return Image.open(io.BytesIO(base64.b64decode(element["src"].split(",")[1])))


@pytest.fixture(scope="module")
def example():
    return build_training_example(processor(), TREE, weighting=TokenWeighting(), max_crops=2)


@pytest.fixture(scope="module")
def page(example):
    return Elements(render(example, processor()))


def test_facts(page, example):
    (facts,) = [text for text in page.text if " tokens, " in text]
    assert f"{len(example['input_ids'])} tokens" in facts
    assert f"{int((example['labels'] != -100).sum())} with a label" in facts
    assert f"sum of weights {float(example['loss_weights'].sum()):.3f}" in facts
    assert f"2 branch(es), {len(example['pixel_values'])} crops and frames, 2 points" in facts


def test_tokens(page, example):
    """Every text token has its span; those with a label their weight; equal visual tokens in a row share one."""
    spans = page.all("span")
    is_visual = example["token_type_ids"]
    assert sum("visual" not in span.get("class", "") for span in spans) == int((~is_visual).sum())
    targets = page.all("span", **{"class": "target"})
    places = (example["labels"] != -100).nonzero()[:, 0].tolist()
    assert [int(span["title"].split(":")[0]) for span in targets] == places
    for span, place in zip(targets, places):
        assert f"id {int(example['input_ids'][place])}, branch {int(example['branch_ids'][place])}" in span["title"]
        assert span["title"].endswith(f"weight {float(example['loss_weights'][place]):.4g}")
    assert [own["title"] for own in page.all("div", **{"class": "branch"})] == ["branch 1", "branch 2"]
    assert "<b>" in "".join(page.text)  # the label is text, not a tag
    assert not page.all("b")
    assert not page.all("script")


def test_pixels(page):
    """The first crop is the whole image."""
    crops = [element for element in page.all("img") if element.get("class") != "mask"]
    assert [crop["alt"] for crop in crops] == ["image 1, low resolution", "image 1, crop 1"] + [
        f"image 1, crop {number}" for number in range(2, len(crops))
    ]
    shown = np.asarray(image_of(crops[0]), dtype=float)
    expected = np.asarray(
        IMAGE["image"].convert("RGB").resize(shown.shape[:2], Image.Resampling.BILINEAR), dtype=float
    )
    assert np.abs(shown - expected).mean() < 12


def test_points(page):
    circles = page.all("circle")
    assert [(circle["cx"], circle["cy"]) for circle in circles] == [("250", "500"), ("750", "100")]
    assert len(page.all("svg")) == 1  # on the low-resolution view alone


def test_mask(page, example):
    """Drawn as it is defined: causal, visual tokens see each other, branches do not."""
    (mask,) = page.all("img", **{"class": "mask"})
    dark = np.asarray(image_of(mask)) < 128
    length = len(example["input_ids"])
    assert length <= 256
    visual, branch = example["token_type_ids"].numpy(), example["branch_ids"].numpy()
    allowed = np.tri(length, dtype=bool) | (visual[:, None] & visual[None])
    allowed &= (branch[None] == 0) | (branch[None] == branch[:, None])
    assert (dark == allowed).all()


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_frames(dtype):
    """Points lie on the frame with their time; of many frames some are shown, and the page says so."""
    answer = '<points coords="0.5 1 250 500\t1.5 2 750 100">boats</points>'
    example = build_training_example(processor(), turn("Point.", answer, CLIP), pixel_dtype=dtype)
    source = render([example], processor())
    figures = dict(re.findall(r'<figure><img alt="([^"]*)".*?</figure>()', source))
    assert list(figures) == [f"frame {number}, {number / 2:.1f} s" for number in range(4)]
    with_points = re.findall(r'<img alt="([^"]*)" src="[^"]*"><svg', source)
    assert with_points == ["frame 1, 0.5 s", "frame 3, 1.5 s"]
    few = render(example, processor(), max_crops=2)
    assert "2 of 4 crops and frames are shown" in few
    assert few.count("<figure>") == 2


def test_files_and_packs(example, tmp_path):
    text = build_training_example(processor(), turn("a", "b"))
    path = view([Pack((example, text), 0, 0), text], processor(), tmp_path / "page.html", title="A & B")
    page = Elements(path.read_text(encoding="utf-8"))
    assert [own["id"] for own in page.all("section")] == ["example-1", "example-2", "example-3"]
    assert "A & B" in page.text


def test_long_examples_have_a_small_mask():
    page = Elements(render(build_training_example(processor(), turn("a" * 400, "b")), processor()))
    (mask,) = page.all("img", **{"class": "mask"})
    assert image_of(mask).size == (256, 256)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([{"messages": []}], {}, r"Example 1 has \['messages'\]; expected `input_ids` and `labels`"),
        ([3], {}, "Example 1 has int"),
        ([], {"max_crops": 0}, "`max_crops` is 0"),
    ],
)
def test_what_is_refused(examples, options, message):
    with pytest.raises(ValueError, match=message):
        render(examples, processor(), **options)
