"""The package sam2 and transformers' `Sam2Model` take our prompts, with small random weights.

Masks mean nothing then; that the points arrive where they are, and masks come back in the size of the image, does not
depend on weights. Runs in the environment of the tools (`constraints/tools.txt`, `constraints/sam2.txt`).
"""

# ruff: noqa: E402  (sam2 wants torchvision importable first)

import re
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
from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

from molmo2.interop import sam2_prompts
from support.cookbook import cookbook
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


# --- transformers


def write_sam2(folder):
    """A checkpoint of `Sam2Model` in its published layout: small, weights from a seed."""
    torch.manual_seed(0)
    width, sides = 32, [[SIDE // 4] * 2, [SIDE // 8] * 2, [SIDE // 16] * 2]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [SIDE, SIDE],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 4],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": sides,
        "fpn_hidden_size": width,
    }
    decoder = {"hidden_size": width, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": width}
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": width, "image_size": SIDE},
        mask_decoder_config=decoder,
    )
    model = Sam2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # the usual start is so small that all masks are alike
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    Sam2Processor(Sam2ImageProcessor(size={"height": SIDE, "width": SIDE})).save_pretrained(folder)


def blocks(language: str) -> list[str]:
    page = (cookbook.PAGES / "masks.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def test_the_cookbook_with_transformers_sam2(tmp_path, monkeypatch):
    """The page with its block for real weights in the place of the stand-in: as typed, on the page's own answer."""
    write_sam2(cookbook.prepare(tmp_path) / "facebook" / "sam2.1-hiera-large")
    monkeypatch.chdir(tmp_path)
    asking, standing_in, drawing = blocks("python")
    (real,) = blocks("py")
    assert "class Spreading" in standing_in
    names = {}
    for block in (asking, real, drawing):
        exec(compile(block, "masks.md", "exec"), names)
    points, (width, height) = names["answer"].grounding.points, names["image"].size
    assert (len(points), names["masks"].shape, names["masks"].dtype) == (3, (3, height, width), bool)
    assert Image.open(tmp_path / "masks.webp").size == (550, 228)

    # Each object has the mask of its own point: asked for alone, it is the same, and no other.
    model, processor = names["sam2"], names["sam2_processor"]
    together = names["outputs"].pred_masks[0]
    for number, point in enumerate(points):
        inputs = processor(
            images=names["image"],
            input_points=[[[[point.x, point.y]]]],
            input_labels=[[[1]]],
            return_tensors="pt",
        )
        with torch.inference_mode():
            alone = model(**inputs, multimask_output=False).pred_masks[0, 0]
        gaps = [float((alone - mask).abs().max()) for mask in together]
        assert gaps[number] < 1e-4
        assert min(gap for place, gap in enumerate(gaps) if place != number) > 1e-2
