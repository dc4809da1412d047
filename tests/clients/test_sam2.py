"""The package sam2 takes our prompts: its predictors of images and of videos, with small random weights.

Masks mean nothing then; that the points arrive where they are, and masks come back in the size of the image, does not
depend on weights. Runs in the environment of the tools (`constraints/tools.txt`, `constraints/sam2.txt`).
"""

# ruff: noqa: E402  (sam2 wants torchvision importable first)

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sam2", reason="tools have an environment of their own")

from benchmarks.torchvision_peer import make_importable

make_importable()

from sam2.build_sam import build_sam2, build_sam2_video_predictor
from sam2.sam2_image_predictor import SAM2ImagePredictor

from molmo2.interop import sam2_prompts
from unit.test_interop import IMAGES, TRACKS

CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
SIDE = 256  # of what the model sees, in the place of 1024
SMALL = [
    f"++model.image_size={SIDE}",
    "++model.image_encoder.trunk.embed_dim=16",
    "++model.image_encoder.trunk.stages=[1,1,2,1]",
    "++model.image_encoder.trunk.global_att_blocks=[3]",
    "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]",
    "++model.memory_attention.num_layers=1",
]
OPTIONS = {"ckpt_path": None, "device": "cpu", "hydra_overrides_extra": SMALL, "apply_postprocessing": False}


@contextmanager
def seen_points(model):
    """Collects the (x, y), of 0..1, and labels that reach the encoder of prompts."""
    seen = []

    def record(_module, _arguments, named):
        if named["points"] is not None:
            coordinates, labels = named["points"]
            seen.append(((coordinates / SIDE).flatten().tolist(), labels.flatten().tolist()))

    hook = model.sam_prompt_encoder.register_forward_pre_hook(record, with_kwargs=True)
    yield seen
    hook.remove()


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_the_image_predictor_gets_the_points_and_gives_masks_of_the_image():
    torch.manual_seed(0)
    predictor = SAM2ImagePredictor(build_sam2(CONFIG, **OPTIONS))
    predictor._bb_feat_sizes = [(SIDE // 4, SIDE // 4), (SIDE // 8, SIDE // 8), (SIDE // 16, SIDE // 16)]
    prompts, points = sam2_prompts(IMAGES), sorted(IMAGES.points, key=lambda point: point.image_index)
    assert [prompt.index for prompt in prompts] == [point.image_index for point in points] == [0, 0, 1, 1]
    for prompt, point in zip(prompts, points, strict=True):
        width, height = IMAGES.media.sizes[prompt.index]
        predictor.set_image(noise((width, height)))
        with seen_points(predictor.model) as seen:
            masks, scores, logits = predictor.predict(**prompt.predictor_arguments(), multimask_output=False)
        ((place, label),) = seen
        assert label == [1]
        assert place == pytest.approx([point.x / width, point.y / height], abs=1e-6)
        assert place == pytest.approx([point.x_norm, point.y_norm], abs=1e-6)
        assert masks.shape == (1, height, width)
        assert scores.shape == (1,)
        assert logits.shape == (1, SIDE // 4, SIDE // 4)


def test_the_video_predictor_gets_each_object_in_its_frame(tmp_path):
    torch.manual_seed(0)
    predictor = build_sam2_video_predictor(CONFIG, **OPTIONS)
    (width, height), last = TRACKS.media.sizes[0], 45
    for number in range(last + 1):
        noise((width, height), number).save(tmp_path / f"{number:05}.jpg")
    state = predictor.init_state(str(tmp_path))
    prompts = sam2_prompts(TRACKS)
    expected = {(point.frame.source_index, point.id): (point.x_norm, point.y_norm) for point in TRACKS.points}
    assert {(prompt.index, prompt.object_id) for prompt in prompts} == set(expected)
    for prompt in prompts:
        with seen_points(predictor) as seen:
            frame, objects, masks = predictor.add_new_points_or_box(state, **prompt.video_predictor_arguments())
        assert frame == prompt.index
        assert prompt.object_id in objects
        assert masks.shape == (len(objects), 1, height, width)
        ((place, label),) = seen
        assert label == [1]
        assert place == pytest.approx(expected[frame, prompt.object_id], abs=1e-5)
    assert state["obj_ids"] == [1, 2]
    found = list(predictor.propagate_in_video(state, start_frame_idx=0, max_frame_num_to_track=2))
    assert [frame for frame, _, _ in found] == [0, 1, 2]
    for _, objects, masks in found:
        assert objects == [1, 2]
        assert masks.shape == (2, 1, height, width)
