"""Equality with public packages: TrackEval's HOTA, DAVIS' contours, pycocotools' masks, SciPy's assignment.

Runs in an environment of its own (`constraints/metrics.txt`).
"""

import numpy as np
import pytest

from molmo2 import evaluate
from molmo2.evaluate.tracking import boundary_f

trackeval = pytest.importorskip("trackeval", reason="metrics have an environment of their own")
pytest.importorskip("skimage", reason="metrics have an environment of their own")

from pycocotools import mask as coco  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_assignments_are_those_of_scipy(rng):
    """Also where several cost the same."""
    for number in range(1000):
        shape = rng.integers(0, 8, 2)
        costs = rng.integers(0, rng.integers(1, 6), shape) if number % 2 else -rng.random(shape)
        assert evaluate.assign(costs) == [
            (int(row), int(column)) for row, column in zip(*linear_sum_assignment(costs))
        ]


def sequence(rng, is_binary):
    """Frames with some of a few objects and tracks, and their similarities."""
    frames = []
    for _ in range(rng.integers(1, 8)):
        true, own = (rng.permutation(5)[: rng.integers(0, 6)].tolist() for _ in range(2))
        similarity = rng.random((len(true), len(own)))
        frames.append((true, own, (similarity > 0.5).astype(float) if is_binary else similarity))
    return frames


def trackeval_data(frames):
    names = [sorted({name for frame in frames for name in frame[side]}) for side in (0, 1)]
    ids = [[np.array([names[side].index(name) for name in frame[side]], int) for frame in frames] for side in (0, 1)]
    return {
        "gt_ids": ids[0],
        "tracker_ids": ids[1],
        "similarity_scores": [frame[2] for frame in frames],
        "num_gt_ids": len(names[0]),
        "num_tracker_ids": len(names[1]),
        "num_gt_dets": sum(map(len, ids[0])),
        "num_tracker_dets": sum(map(len, ids[1])),
    }


@pytest.mark.parametrize("is_binary", [True, False])
def test_hota_is_that_of_trackeval(rng, is_binary):
    metric = trackeval.metrics.HOTA()
    compared = 0
    for _ in range(200):
        frames = sequence(rng, is_binary)
        data = trackeval_data(frames)
        if data["num_gt_dets"] and data["num_tracker_dets"]:
            compared += 1
            expected, found = metric.eval_sequence(data), evaluate.hota(frames, metric.array_labels)
            for name, own in (("HOTA", "hota"), ("DetA", "deta"), ("AssA", "assa")):
                np.testing.assert_allclose(found[own], expected[name], rtol=0, atol=1e-12)
    assert compared > 150


def test_contours_are_those_of_davis(rng):
    def encoded(mask):
        return [[coco.encode(np.asfortranarray(mask.astype(np.uint8)))]]

    for _ in range(40):
        size = rng.integers(20, 160, 2)
        masks = np.zeros((2, *size), dtype=bool)
        for mask in masks:
            top, left = rng.integers(0, size - 5)
            mask[top : top + rng.integers(0, size[0]), left : left + rng.integers(0, size[1])] = True
        expected = trackeval.metrics.JAndF._compute_f(encoded(masks[1]), encoded(masks[0]), 0, 0, 0.008)
        assert boundary_f(*masks) == pytest.approx(expected[0], abs=1e-12)


def test_masks_are_those_of_pycocotools(rng):
    for number in range(100):
        height, width = rng.integers(1, 70, 2).tolist()
        mask = rng.random((height, width)) > (rng.random() if number % 2 else 0.999)
        encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert (evaluate.mask_array(encoded) == mask).all()
        x, y = int(rng.integers(width)), int(rng.integers(height))
        assert evaluate.contains(encoded, x, y) == mask[y, x]
