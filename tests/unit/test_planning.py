"""`plan`: the counts of a call without its pixels, and options that make a request fit."""

import io
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from molmo2 import plan
from molmo2.tools.plan import Budget, RequestPlan, fit_to_budget
from molmo2.video import probing
from support.checkpoints import build_model, make_image
from support.model_inputs import MIXED, ROWS, clip, processor

CLIP = Path(__file__).resolve().parent.parent.parent / "examples" / "data" / "nasa_clip.mp4"
PHOTO = CLIP.with_name("nasa_frame.jpg")


def lengths(inputs) -> tuple[list[int], list[int]]:
    """Tokens and visual tokens of each row of unpadded inputs."""
    return [len(row) for row in inputs["input_ids"]], [sum(row) for row in inputs["token_type_ids"]]


@pytest.mark.parametrize(
    "options", [{}, {"max_crops": 3, "num_frames": 2}, {"max_crops": 12, "key_frame_interval": 2}]
)
def test_counts_are_those_of_the_call(options):
    prompts = [ROWS[name][0] for name in MIXED]
    arguments = {
        "text": prompts,
        "images": [image for name in MIXED for image in ROWS[name][1]],
        "videos": [video for name in MIXED for video in ROWS[name][2]],
    }
    arguments["video_metadata"] = [{"fps": 2.0}] * len(arguments["videos"])
    planned = plan(processor(), **arguments, **options)
    inputs = processor()(**arguments, **options)
    assert (list(planned.row_tokens), list(planned.visual_tokens)) == lengths(inputs)
    assert list(planned.image_crops) == inputs["image_num_crops"].tolist()
    assert sum(planned.num_frames) == len(inputs["pixel_values_videos"])
    assert planned.num_crops == len(inputs["pixel_values"]) + len(inputs["pixel_values_videos"])


@pytest.mark.parametrize(
    "options", [{}, {"num_frames": 4}, {"clip": (1.0, 3.0)}, {"frame_sample_mode": "fps", "sampling_fps": 1}]
)
def test_files_are_counted_from_their_headers(options, monkeypatch):
    """No image is resized, and the times are those of the call."""
    from molmo2.image import pixels

    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(PHOTO)},
                {"type": "video", "path": str(CLIP)},
                {"type": "text", "text": "What happens?"},
            ],
        }
    ]
    call = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_metadata": True}
    inputs = processor().apply_chat_template(messages, **call, **options)
    monkeypatch.setattr(pixels, "write_patches", None)
    planned = plan(processor(), messages, **options)
    assert (list(planned.row_tokens), list(planned.visual_tokens)) == lengths(inputs)
    assert list(planned.timestamps[0]) == inputs["video_metadata"][0].timestamps


def test_options_of_a_video_part_win():
    content = [{"type": "video", "path": str(CLIP), "num_frames": 3}, {"type": "text", "text": "?"}]
    planned = plan(processor(), [{"role": "user", "content": content}], num_frames=6)
    assert planned.num_frames == (3,)


def test_options_for_each_video_of_a_call():
    """Beside prompts and beside messages, whose parts override them."""
    parts = [{"type": "video", "path": str(CLIP), "max_fps": 1}, {"type": "video", "video": clip(8), "clip": None}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]
    own = [{"num_frames": 3, "max_fps": 2}, {"num_frames": 2}]
    for options in (
        {"per_video_options": own, "video_metadata": [None, {"fps": 4.0}]},
        {"videos_kwargs": {"per_video_options": own, "video_metadata": [None, {"fps": 4.0}]}},
    ):
        call = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        inputs = processor().apply_chat_template(messages, **call, **options)
        planned = plan(processor(), messages, **options)
        assert planned.num_frames == (3, 2)
        assert (list(planned.row_tokens), list(planned.visual_tokens)) == lengths(inputs)
        assert planned.timestamps[1][1] == 1.75
        beside = plan(processor(), "<|video|><|video|>", videos=[str(CLIP), clip(8)], **options)
        assert beside.num_frames == (3, 2)


def test_headers_are_read_by_the_decoder_that_the_call_asks_for(monkeypatch):
    asked = []
    decode = probing.decode_video
    monkeypatch.setattr(probing, "decode_video", lambda source, read, name: asked.append(name) or decode(source, read))
    call = {"videos": [str(CLIP), str(CLIP)], "video_backend": "pyav"}
    plan(processor(), "<|video|><|video|>", **call, per_video_options=[{"backend": "decord"}, None])
    assert set(asked) == {"decord", "pyav"}
    asked.clear()
    plan(processor(), "<|video|>", videos=str(CLIP))
    assert asked == [None]  # once, whatever is planned


def test_sizes_are_those_after_turning_upright():
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    make_image(40, 200).save(turned, "JPEG", exif=exif)
    upright, flat = plan(processor(), images=[turned.getvalue()]), plan(processor(), images=[make_image(40, 200)])
    assert upright.row_tokens == plan(processor(), images=[np.zeros((200, 40, 3), np.uint8)]).row_tokens
    assert upright.row_tokens != flat.row_tokens


@pytest.mark.parametrize("max_tokens", [60, 100, 200, 400, 10_000])
def test_a_token_limit_is_kept_and_used(max_tokens):
    arguments = {"text": "<|image|><|video|>What?", "images": [make_image(300, 500)], "videos": [clip(20)]}
    arguments["video_metadata"] = [{"fps": 2.0}]
    full = plan(processor(), **arguments, num_frames=20, max_crops=12)
    planned = plan(processor(), **arguments, num_frames=20, max_crops=12, max_tokens=max_tokens)
    inputs = processor()(**arguments, **planned.options)
    assert len(inputs["input_ids"][0]) == planned.num_tokens <= max_tokens
    assert planned.reduced is (full.num_tokens > max_tokens)
    if planned.reduced:
        assert f"reduced to fit: num_frames={planned.options['num_frames']}" in str(planned)
        more_frames = plan(
            processor(),
            **arguments,
            max_crops=planned.options["max_crops"],
            num_frames=planned.options["num_frames"] + 1,
        )
        assert more_frames.num_tokens > max_tokens or more_frames.num_frames == planned.num_frames
    else:
        assert planned.options == {"num_frames": 20, "max_crops": 12}


def test_what_cannot_fit_is_refused():
    with pytest.raises(ValueError, match=r"takes at least \d+ tokens, but max_tokens is 10\. Raise the limit"):
        plan(processor(), "<|image|>What?", images=[make_image()], max_tokens=10)
    with pytest.raises(ValueError, match="`max_memory` needs `model`"):
        plan(processor(), "<|image|>What?", images=[make_image()], max_memory=1000)
    with pytest.raises(ValueError, match="pass them without `images` and `videos`"):
        plan(processor(), [{"role": "user", "content": "Hi"}], images=[make_image()])


def test_the_processor_comes_first():
    own, model = processor(), torch.nn.Identity()
    for call in ((model, own), (model, "What?"), (own.tokenizer, "What?")):
        with pytest.raises(TypeError, match=f"The processor comes first.*'{type(call[0]).__name__}' is none"):
            plan(*call)


def test_frames_shrink_with_crops_and_take_what_is_left():
    """A made-up price list: a frame costs 10 tokens, a crop 7."""

    def plan_for(chosen):
        tokens = 10 * chosen["num_frames"] + 7 * chosen["max_crops"]
        return RequestPlan((tokens,), (tokens,), (), (), chosen)

    chosen = fit_to_budget(plan_for, 40, 8, Budget(max_tokens=200)).options
    assert chosen == {"num_frames": 17, "max_crops": 4}  # 198; one more of either is too much
    assert fit_to_budget(plan_for, 40, 8, Budget(max_tokens=17)).options == {"num_frames": 1, "max_crops": 1}


def test_a_memory_limit_is_kept():
    model = build_model("qwen3")
    arguments = {"text": "<|video|>What?", "videos": [clip(20)], "video_metadata": [{"fps": 2.0}], "model": model}
    full = plan(processor(), **arguments, num_frames=20, max_new_tokens=50)
    half = plan(processor(), **arguments, num_frames=20, max_new_tokens=50, max_memory=full.memory.total // 2)
    assert half.memory.total <= full.memory.total // 2
    assert 1 < half.num_frames[0] < full.num_frames[0]
    assert "besides the weights" in str(full)


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations read or make, the weights aside, while they are alive."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.weights = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves([args, result]):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in self.weights:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(("images", "frames"), [(1, 0), (4, 0), (0, 6), (3, 20)])
@torch.no_grad()
def test_estimated_memory_is_what_is_allocated(images, frames):
    """Enough, and at most two and a half times what really lives at once."""
    model = build_model("qwen3")
    arguments = {"text": "<|image|>" * images + "<|video|>" * bool(frames) + "What?"}
    arguments["images"] = [make_image(300, 500)] * images or None
    if frames:
        arguments.update(videos=[clip(frames)], video_metadata=[{"fps": 2.0}])
    options = {"num_frames": 64, "max_crops": 12}
    planned = plan(processor(), **arguments, **options, model=model, max_new_tokens=4)
    inputs = processor()(**arguments, **options, return_tensors="pt")
    pixels = sum(inputs[name].nbytes for name in ("pixel_values", "pixel_values_videos") if name in inputs)
    assert planned.memory.pixels == pixels
    with LiveBytes(model) as live:
        model.generate(**inputs, max_new_tokens=4)
    assert live.peak <= planned.memory.total <= 2.5 * live.peak
