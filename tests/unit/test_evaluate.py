"""The metrics, on cases computed by hand. Equality with public packages: tests/clients/test_trackeval.py."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from molmo2 import evaluate
from molmo2.evaluate.answers import by_first_letter, by_letter_or_text, by_lone_letter, by_text
from molmo2.evaluate.masks import run_lengths
from molmo2.evaluate.tracking import boundary_f, region_iou

SIZE = (100, 50)


def box(left, top, right, bottom, size=SIZE):
    """A mask that is true for left <= x < right, top <= y < bottom."""
    mask = np.zeros(size[::-1], dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def points(*places, kind="points"):
    """An answer with these (key, id, x, y), on a grid of thousandths."""
    groups = "\t".join(f"{key} {number} {x:03d} {y:03d}" for key, number, x, y in places)
    return f'<{kind} coords="{groups}">cup</{kind}>'


def rounded(scores):
    return {name: round(value, 6) for name, value in scores.items()}


def prf(precision, recall, f1):
    return {"precision": precision, "recall": recall, "f1": f1}


# --- assignment and masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 4), (4, 2), (4, 4)])
def test_no_other_assignment_costs_less(shape):
    rng = np.random.default_rng(shape)
    for number in range(30):
        costs = rng.integers(-3, 4, shape) if number % 2 else rng.normal(size=shape)
        pairs = evaluate.assign(costs)
        few, many = sorted(shape)
        by_few = costs if shape[0] == few else costs.T
        best = min(
            sum(by_few[row, column] for row, column in enumerate(columns))
            for columns in itertools.permutations(range(many), few)
        )
        assert sum(costs[pair] for pair in pairs) == pytest.approx(best)
        assert [len({pair[side] for pair in pairs}) for side in (0, 1)] == [few, few]
        assert pairs == sorted(pairs)


def test_equal_costs_are_assigned_in_order():
    assert evaluate.assign(np.zeros((3, 3))) == [(0, 0), (1, 1), (2, 2)]
    assert evaluate.assign(np.zeros((0, 3))) == []


@pytest.mark.parametrize("costs", [[1, 2], [[1, np.nan]], [[np.inf]]])
def test_costs_that_are_none(costs):
    with pytest.raises(ValueError, match="matrix of finite numbers"):
        evaluate.assign(costs)


# COCO's run lengths of a 3x4 mask, columns 1 and 2 of rows 1 and 2: 4 out, 2 in, 1 out, 2 in, 3 out.
RUNS = {"size": (3, 4), "counts": [4, 2, 1, 2, 3]}
TEXTS = [{**RUNS, "counts": "42102"}, {**RUNS, "counts": b"42102"}]


@pytest.mark.parametrize("mask", [RUNS, *TEXTS, box(1, 1, 3, 3, (4, 3)), box(1, 1, 3, 3, (4, 3)).tolist()])
def test_every_form_of_a_mask(mask):
    expected = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    assert evaluate.mask_array(mask).astype(int).tolist() == expected
    for y, row in enumerate(expected):
        assert [evaluate.contains(mask, x, y) for x in range(4)] == [bool(value) for value in row]
    assert not any(evaluate.contains(mask, x, y) for x, y in [(-1, 1), (1, -1), (4, 1), (1, 3)])


def test_no_mask_contains_nothing():
    assert not evaluate.contains(None, 0, 0)


@pytest.mark.parametrize(
    ("counts", "message"),
    [([4, 2], "add up to 6; expected 12"), ("4\x7f", "no digit"), ("4R", "ends within a number")],
)
def test_damaged_run_lengths(counts, message):
    with pytest.raises(ValueError, match=message):
        run_lengths({"size": (3, 4), "counts": counts})


# --- points ----------------------------------------------------------------------------------------------------------

CUPS = {"points": [(10, 10), (60, 20)], "masks": [box(5, 5, 15, 15), box(55, 15, 65, 25)]}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (points((1, 1, 100, 200), (1, 2, 600, 400)), prf(1, 1, 1)),
        (points((1, 1, 100, 200)), prf(1, 0.5, 0.666667)),
        (points((1, 1, 100, 200), (1, 2, 600, 400), (1, 3, 900, 900)), prf(0.666667, 1, 0.8)),
        (points((1, 1, 110, 200), (1, 2, 100, 200)), prf(0.5, 0.5, 0.5)),  # one of two in the same mask is the other's
        (points((1, 1, 900, 900)), prf(0, 0, 0)),
        ("There are none.", prf(0, 0, 0)),
    ],
)
def test_pointing(answer, expected):
    assert rounded(evaluate.pointing(answer, SIZE, **CUPS)) == expected


def test_pointing_at_nothing():
    assert evaluate.pointing("There are none.", SIZE, [], []) == prf(1, 1, 1)
    assert evaluate.pointing(points((1, 1, 100, 200)), SIZE, [], []) == prf(0, 0, 0)


def test_the_matched_object_counts_not_any_object():
    """The point lies in the second mask, but the assignment gives it to the first object."""
    masks = [box(0, 0, 1, 1), box(8, 8, 12, 12)]
    assert evaluate.point_scores([(10, 10)], [(10, 10), (90, 40)], masks)["f1"] == 0
    assert evaluate.point_scores([(10, 10)], [(90, 40), (10, 10)], masks)["f1"] > 0


@pytest.mark.parametrize(("x", "hits"), [(14.4, 1), (14.5, 1), (14.6, 0), (-0.4, 0), (100.0, 0)])
def test_points_are_rounded_and_may_miss_the_image(x, hits):
    """14.5 rounds to the even 14, the last column of the mask."""
    assert evaluate.point_scores([(x, 10)], CUPS["points"][:1], CUPS["masks"][:1])["precision"] == hits


def test_points_and_masks_come_in_pairs():
    with pytest.raises(ValueError, match="2 true points and 1 masks"):
        evaluate.point_scores([], CUPS["points"], CUPS["masks"][:1])


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        (points((1, 1, 149, 200)), 1),  # 14.9 is truncated, not rounded
        (points((1, 1, 150, 200)), 0),
        (points((1, 1, 100, 200), (1, 2, 900, 900)), 0),  # every point has to lie in the mask
        ("The cup is on the left.", 0),
    ],
)
def test_pointbench(answer, correct):
    assert evaluate.pointbench(answer, SIZE, CUPS["masks"][0]) == {"correct": correct}


VIDEO = {
    "size": SIZE,
    "duration": 10.0,
    "points": [(1.0, 10, 10), (1.5, 60, 20)],
    "masks": [{1.0: CUPS["masks"][0], 2.0: box(0, 0, 100, 50)}, {1.5: CUPS["masks"][1]}],
}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (points((1.0, 1, 100, 200), (1.5, 2, 600, 400)), prf(1, 1, 1)),
        (points((2.0, 1, 100, 200)), prf(1, 0.5, 0.666667)),  # the object has a mask at this other time
        (points((1.1, 1, 100, 200)), prf(0, 0, 0)),  # there is no mask at exactly this time
        ("There are none.", prf(0, 0, 0)),
    ],
)
def test_video_pointing(answer, expected):
    is_valid = float("<points" in answer)
    assert rounded(evaluate.video_pointing(answer, **VIDEO)) == {**expected, "valid": is_valid}


def test_time_counts_as_much_as_place():
    """A tenth of the duration is as far as a tenth of the width: the point goes to the object at its time."""
    both = {"points": [(1.0, 10, 10), (9.0, 10, 10)], "masks": [{1.0: box(0, 0, 100, 50)}, {9.0: box(0, 0, 1, 1)}]}
    answer = points((1.0, 1, 300, 200))
    assert evaluate.video_pointing(answer, SIZE, 10.0, **both)["precision"] == 1
    with pytest.raises(ValueError, match="duration is 0"):
        evaluate.video_pointing(answer, SIZE, 0, [], [])


def test_distances_are_neither_squared_nor_exact():
    """Published: Euclidean distances are summed, and places in a video are first rounded to a tenth of a per cent."""
    predicted, true = [(0, 0), (10, 0)], [(10, 0), (20, 5)]  # 20.6 + 0 is less than 10 + 11.2, but not squared
    assert evaluate.point_scores(predicted, true, [box(9, 0, 12, 2), box(90, 40, 91, 41)])["precision"] == 0.5
    both = {"points": [(1.0, 100.4, 20), (1.0, 99.8, 20)], "masks": [{1.0: box(99, 19, 102, 22, (1000, 50))}, {}]}
    answer = points((1.0, 1, 100, 400))  # nearer to the second, and as near to the first after rounding
    assert evaluate.video_pointing(answer, (1000, 50), 10.0, **both)["precision"] == 1


def test_nothing_to_point_at_in_a_video():
    expected = {**prf(1, 1, 1), "valid": 0}
    assert evaluate.video_pointing("There are none.", SIZE, 10.0, [], []) == expected
    assert evaluate.video_pointing(points((1.0, 1, 1, 1)), SIZE, 10.0, [], []) == {**prf(0, 0, 0), "valid": 1}


# --- counts ----------------------------------------------------------------------------------------------------------


def count(correct, close, valid=1):
    return {"correct": correct, "close": close, "valid": valid}


TWO_POINTS = points((1, 1, 100, 200), (1, 2, 600, 400))


@pytest.mark.parametrize(
    ("answer", "true", "expected", "strict"),
    [
        (TWO_POINTS, 2, count(1, 1), count(1, 1)),
        (f"Counting the {TWO_POINTS} shows a total of 4.", 4, count(1, 1), count(0, 0)),  # first defect
        (f"Counting the {TWO_POINTS} shows a total of 4.", 2, count(0, 0), count(1, 1)),
        ("3", 4, count(0, 1), count(0, 0)),
        ("There are none.", 0, count(1, 1), count(1, 1)),
    ],
)
def test_image_counting(answer, true, expected, strict):
    assert evaluate.image_counting(answer, true) == expected
    assert evaluate.image_counting(answer, true, strict=True) == strict


@pytest.mark.parametrize(
    ("answer", "true", "expected", "strict"),
    [
        ("7", 7, count(1, 1), None),
        (" 7. ", 7, count(1, 1), None),
        ("7", 8, count(0, 1), None),
        ("7", 9, count(0, 0), None),
        ("18", 20, count(0, 1), None),  # within 1 + 1
        ("17", 20, count(0, 0), None),
        ("17", 19, count(0, 0), None),  # 5 % of 19 is rounded down to 0
        ("38", 40, count(0, 1), None),
        ("Counting the cups shows a Total of 5.", 5, count(1, 1), None),
        ("The total number of cups is: 5.", 5, count(1, 1), None),
        ("I see 5 cups.", 5, count(0, 0, 0), None),
        ("There are none.", 0, count(1, 1), count(0, 0, 0)),  # second defect
        ("There are none.", 3, count(0, 0), count(0, 0, 0)),
    ],
)
def test_video_counting(answer, true, expected, strict):
    assert evaluate.video_counting(answer, true) == expected
    assert evaluate.video_counting(answer, true, strict=True) == (expected if strict is None else strict)


@pytest.mark.parametrize(
    ("answer", "true", "expected", "strict"),
    [
        ("Seven dogs.", 7, count(1, 1), count(0, 0)),  # third defect: any number counts as 1
        ("7", 7, count(1, 1), count(0, 0)),
        ("7", 1, count(0, 0), count(1, 1)),
        ("I count a total of 8.", 7, count(0, 1), count(0, 0)),
        ("1,200 ants", 1200, count(1, 1), count(0, 0)),
        ("There are none.", 0, count(1, 1), count(0, 1)),
        ("Many dogs", 7, count(0, 0, 0), count(0, 0, 0)),
    ],
)
def test_countbench(answer, true, expected, strict):
    assert evaluate.countbench(answer, true) == expected
    assert evaluate.countbench(answer, true, strict=True) == strict


def test_bins_of_counts():
    assert [evaluate.count_bin(number) for number in (0, 4, 5, 24, 25, 99)] == [
        "0-4",
        "0-4",
        "5-9",
        "20-24",
        "25+",
        "25+",
    ]
    with pytest.raises(ValueError, match="found -1"):
        evaluate.count_bin(-1)


# --- tracks ----------------------------------------------------------------------------------------------------------

LEFT, RIGHT = CUPS["masks"]
TRUTH = {
    "points": {0: {"a": (10, 10), "b": (60, 20)}, 6: {"a": (10, 10), "b": (60, 20)}},
    "masks": {"a": {0: LEFT, 6: LEFT}, "b": {0: RIGHT, 6: RIGHT}},
}


def track(*groups):
    """An answer with these (seconds, {id: (x, y)})."""
    coords = "\t".join(
        " ".join([str(time), *(f"{number} {x:03d} {y:03d}" for number, (x, y) in at.items())]) for time, at in groups
    )
    return f'<tracks coords="{coords}">cup</tracks>'


BOTH, SWAPPED = {1: (100, 200), 2: (600, 400)}, {2: (100, 200), 1: (600, 400)}


@pytest.mark.parametrize(
    ("answer", "frames", "hota"),
    [
        (track((0.0, BOTH), (0.5, BOTH)), prf(1, 1, 1), (1, 1, 1)),
        (track((0.0, BOTH)), prf(0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (track((0.0, {1: (100, 200)}), (0.5, {1: (100, 200)})), prf(1, 0.5, 0.666667), (0.707107, 0.5, 1)),
        # Points are right in every frame, but the identities change: 4 matches, each pair seen once of 2 + 2 - 1.
        (track((0.0, BOTH), (0.5, SWAPPED)), prf(1, 1, 1), (0.57735, 1, 0.333333)),
        ("No tracks available.", prf(0, 0, 0), (0, 0, 0)),
        # A frame without truth counts 0: two of three frames are right. DetA 4 / (4 + 1).
        (
            track((0.0, BOTH), (0.5, BOTH), (1.0, {1: (100, 200)})),
            prf(0.666667, 0.666667, 0.666667),
            (0.816497, 0.8, 0.833333),
        ),
    ],
)
def test_tracking(answer, frames, hota):
    """At 12 frames per second 0.5 s is frame 6."""
    expected = {**frames, **dict(zip(("hota", "deta", "assa"), hota))}
    assert rounded(evaluate.tracking(answer, SIZE, 12, **TRUTH)) == expected


def test_nothing_to_track():
    assert set(evaluate.tracking("No tracks available.", SIZE, 12, {}, {}).values()) == {1.0}
    assert set(evaluate.tracking(track((0.0, BOTH)), SIZE, 12, {}, {}).values()) == {0.0}


def test_hidden_objects_are_in_the_denominator_of_recall():
    """As published: the frame's recall divides by all objects, visible or not. HOTA does not."""
    points_seen = {0: TRUTH["points"][0], 6: {"a": (10, 10)}}
    scores = evaluate.track_scores({0: {1: (10, 10), 2: (60, 20)}, 6: {1: (10, 10)}}, points_seen, TRUTH["masks"])
    assert (scores["precision"], scores["recall"], scores["hota"]) == (1, 0.75, 1)


def test_two_times_in_one_frame():
    """Of two positions of an object the first counts; a new object is added."""
    answer = track((0.0, {1: (100, 200)}), (0.1, {1: (900, 900), 2: (600, 400)}))
    assert evaluate.frames_of(answer, SIZE, 2) == {0: {1: (10, 10), 2: (60, 20)}}
    with pytest.raises(ValueError, match="fps is 0"):
        evaluate.frames_of(answer, SIZE, 0)


def test_hota_wants_every_id_once():
    with pytest.raises(ValueError, match="Frame 0 has an id twice"):
        evaluate.hota([(["a", "a"], [1], [[1], [1]])], [0.5])


def test_j_and_f():
    """A segmenter that returns the mask under the point; the track of "b" misses, so "b" has J = F = 0."""

    def segment(track):
        return {frame: LEFT if LEFT[y, x] else np.zeros_like(LEFT) for frame, (x, y) in track.items()}

    predicted = {frame: {7: (90, 40), 8: (10, 10)} for frame in (0, 6)}
    assert evaluate.j_and_f(predicted, TRUTH["masks"], segment) == {"j": 0.5, "f": 0.5, "j_and_f": 0.5}
    assert evaluate.j_and_f({}, TRUTH["masks"], segment)["j_and_f"] == 0
    with pytest.raises(ValueError, match="no true masks"):
        evaluate.j_and_f(predicted, {"a": {0: None}}, segment)


def test_region_and_boundary():
    """Boxes of 10x10 pixels that lie 2 pixels apart; the tolerance in an image of 100x50 is 1 pixel, rounded up."""
    shifted = box(7, 5, 17, 15)
    assert region_iou(LEFT, shifted) == 80 / 120
    assert region_iou(np.zeros_like(LEFT), np.zeros_like(LEFT)) == 1
    assert boundary_f(LEFT, box(6, 5, 16, 15)) == 1
    assert 0 < boundary_f(LEFT, shifted) < 1
    assert boundary_f(LEFT, box(40, 30, 50, 40)) == 0
    assert boundary_f(np.ones((2, 900), dtype=bool), np.ones((2, 900), dtype=bool)) == 1


# --- answers ---------------------------------------------------------------------------------------------------------

OPTIONS = ["a red car", "a car", "the blue bus"]


@pytest.mark.parametrize(
    ("rule", "answer", "chosen"),
    [
        (by_text, "A car", 1),
        (by_text, "a car, clearly", 1),  # the answer begins with it
        (by_text, "the blue", 2),  # begins with the answer
        (by_text, "bus", 2),  # contains the answer
        (by_text, "a tar", 1),  # edit distance 1
        (by_text, "", 1),  # nothing fits: the shortest
        (by_first_letter, " B. a car", 1),
        (by_first_letter, "b", None),
        (by_first_letter, "D", None),
        (by_lone_letter, "The answer is B.", 1),
        (by_lone_letter, "CAB or C", 2),
        (by_lone_letter, "D", None),
        (by_letter_or_text, "A thing: (C)", 2),
        (by_letter_or_text, "A man, so B.", 1),
        (by_letter_or_text, "it is C", 2),
        (by_letter_or_text, "surely a red car", 0),
        (by_letter_or_text, "no idea", None),
    ],
)
def test_options(rule, answer, chosen):
    assert rule(answer, OPTIONS) == chosen


def test_multiple_choice():
    assert evaluate.multiple_choice("a car", OPTIONS, 1) == {"correct": 1, "valid": 1}
    assert evaluate.multiple_choice("E", OPTIONS, 1, rule="first_letter") == {"correct": 0, "valid": 0}
    guesses = [evaluate.multiple_choice("?", OPTIONS, 1, rule="letter_or_text", guess_seed=n) for n in range(300)]
    assert 70 < sum(guess["correct"] for guess in guesses) < 130
    assert all(guess["valid"] == 0 for guess in guesses)
    with pytest.raises(ValueError, match="no rule 'letter'"):
        evaluate.multiple_choice("a", OPTIONS, 1, rule="letter")
    with pytest.raises(ValueError, match="number 3, but there are 3"):
        evaluate.multiple_choice("a", OPTIONS, 3)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Boats", ["boats"], 1),
        ("boat", ["boats"], 0.8),
        ("boat", ["ship", "boats"], 0.8),
        ("ab", ["ax"], 0),  # half is too far
        ("abc", ["abx"], 2 / 3),
        ("", [""], 1),
        ("a  b", ["a b"], 1),
    ],
)
def test_anls(answer, references, score):
    assert evaluate.anls(answer, references)["anls"] == pytest.approx(score)


def test_anls_needs_references():
    with pytest.raises(ValueError, match="at least one reference"):
        evaluate.anls("a", [])


@pytest.mark.parametrize(
    ("answer", "reference", "correct"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("50%", "0.5", 1),
        ("1,000", "1000", 1),
        ("0.0", "0", 1),
        ("0.01", "0", 0),
        ("1e3", "1000", 1),
        ("Blue", "blue", 1),
        ("blue", "5", 0),
        ("e5", "E5", 1),  # a name, no number
    ],
)
def test_relaxed_accuracy(answer, reference, correct):
    assert evaluate.relaxed_accuracy(answer, reference) == {"correct": correct}


# --- summaries -------------------------------------------------------------------------------------------------------


def test_intervals():
    values = [0.0] * 30 + [1.0] * 70
    found = evaluate.estimate(values)
    assert (found.mean, found.num_examples) == (0.7, 100)
    assert (found.low, found.high) == pytest.approx((0.61, 0.79), abs=0.02)  # 0.7 -+ 1.96 * sqrt(0.21 / 100)
    assert evaluate.estimate(values) == found
    assert evaluate.estimate(values, evaluate.Interval(seed=1)) != found
    wider = evaluate.estimate(values, evaluate.Interval(confidence=0.99))
    assert wider.low < found.low < found.high < wider.high
    assert str(evaluate.estimate([0.5])) == "0.500 [0.500, 0.500] of 1"


def test_large_sets_are_drawn_in_parts(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = evaluate.estimate(values)
    monkeypatch.setattr("molmo2.evaluate.summary.MAX_DRAWN", 120)
    assert evaluate.estimate(values) == whole


def test_summaries_by_group():
    rows = [count(1, 1), count(0, 1), count(0, 0)]
    found = evaluate.summarize(rows, groups=["animal", "object", "object"])
    assert list(found) == ["animal", "object"]
    assert (found["animal"]["correct"].mean, found["object"]["close"].mean) == (1, 0.5)
    assert evaluate.summarize(rows)["close"].mean == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate.summarize([]), "no examples"),
        (lambda: evaluate.summarize([{"a": 1.0}, {"b": 1.0}]), "different scores"),
        (lambda: evaluate.summarize([{"a": 1.0}], groups=[]), "1 examples and 0 groups"),
        (lambda: evaluate.estimate([]), "finite values"),
        (lambda: evaluate.estimate([np.nan]), "finite values"),
        (lambda: evaluate.Interval(confidence=1), "found 1 and 1000"),
    ],
)
def test_what_cannot_be_summarized(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_it_needs_neither_torch_nor_transformers():
    script = "import sys, molmo2.evaluate; print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
