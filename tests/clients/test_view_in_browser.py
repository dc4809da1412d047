"""The page of training examples in a real browser: images are decoded, points lie on them, tokens can be seen."""

import pytest

pytest.importorskip("playwright")

from molmo2.tools.view import view
from molmo2.training import TokenWeighting, build_training_example
from support.browser import browser, require_browser
from support.model_inputs import processor
from support.training_cases import CLIP, IMAGE, turn

pytestmark = pytest.mark.slow

POINTS = '<points coords="1 1 250 500 2 750 100">boats</points>'
TIMED = '<points coords="0.5 1 500 500">boats</points>'
GAPS = """figures => figures.map(figure => {
    const box = figure.querySelector("img").getBoundingClientRect();
    return [...figure.querySelectorAll("circle")].map(circle => {
        const disc = circle.getBoundingClientRect();
        return [disc.x + disc.width / 2 - box.x, disc.y + disc.height / 2 - box.y];
    });
})"""


def test_the_page_shows_what_it_says(tmp_path):
    examples = [
        build_training_example(processor(), messages, weighting=TokenWeighting())
        for messages in ([turn("Point.", POINTS, IMAGE), turn("What?", "A boat.")], turn("Point.", TIMED, CLIP))
    ]
    path = view(examples, processor(), tmp_path / "page.html", side=200)
    with browser(require_browser()) as running:
        page, requests, problems = running.new_page(), [], []
        page.on("request", lambda request: requests.append(request.url.partition(":")[0]))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(path.as_uri())
        widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
        assert min(widths) >= 98
        discs = page.eval_on_selector_all("figure", GAPS)
        crops = len(examples[0]["pixel_values"])
        assert discs[0] == [pytest.approx(at, abs=1) for at in ([50, 100], [150, 20])]
        assert [len(own) for own in discs[1:]] == [0] * (crops - 1) + [0, 1, 0, 0]
        assert page.locator(".target").first.is_visible()
        assert page.locator("#example-1 .branch").count() == 2
        assert set(requests) <= {"file", "data"}  # nothing comes from elsewhere
        assert problems == []
