"""The whole processor: any mix of text, images and videos in, rows and tensors that belong together out."""

import base64
import copy
import io
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy
from transformers.video_utils import VideoMetadata

from molmo2.image.limits import MediaLimits
from molmo2.model.vision_inputs import token_groups
from molmo2.processing import processor as processing
from molmo2.processing.processor import Molmo2Processor
from molmo2.processing.prompt_tokens import VisualTokenFormat
from support.golden_cases import GOLDEN, default_settings, pattern, to_numpy
from support.golden_processor import build_processor, decode, encode, tokenizer, with_bos
from support.model_inputs import owners_of

CLIP = GOLDEN / "media" / "cfr30.mp4"  # 95 frames, 30 per second

# Crops of 98 pixels: images of few tokens, which keeps these tests fast.
SMALL = {
    "image_processor_init": {"size": {"height": 98, "width": 98}, "overlap_margins": [2, 2], "max_crops": 4},
    "video_processor_init": {"size": {"height": 98, "width": 98}, "num_frames": 4},
}
IMAGE_KEYS = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
VIDEO_KEYS = ("pixel_values_videos", "video_token_pooling", "video_grids")
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids")
VISUAL_TOKENS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
)
METADATA = {"fps": 5.0, "total_num_frames": 10}


def image(height=100, width=150, seed=1):
    return pattern({"kind": "pattern", "height": height, "width": width, "seed": seed})


def video(frames=10, seed=1):
    return pattern({"kind": "pattern_video", "height": 40, "width": 60, "frames": frames, "seed": seed})


@pytest.fixture
def processor():
    return build_processor(SMALL)


@pytest.fixture
def warnings_logged(caplog):
    """The text of all warnings so far; warnings that are shown once are shown again."""
    type(processing.logger).warning_once.cache_clear()
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def assert_same(output, expected, keys=None):
    assert sorted(output) == sorted(expected)
    for key in expected if keys is None else keys:
        np.testing.assert_array_equal(to_numpy(output[key]), to_numpy(expected[key]), err_msg=key)


def times_of(output, row=0):
    """The times printed in front of the frames of a row."""
    return re.findall(r"(\d+\.\d) <frame_start>", decode(list(output["input_ids"][row])))


# --- rows ------------------------------------------------------------------------------------------------------------

# (prompt, number of images, number of videos)
ROWS = [
    ("Only text.", 0, 0),
    ("<|image|>What is this?", 1, 0),
    ("Image 1<|image|>Image 2<|image|>Which one?", 2, 0),
    ("<|video|>What happens?", 0, 1),
    ("<|image|><|video|>Is it in there?", 1, 1),
    ("First <|video|> then <|video|>, and <|image|>?", 1, 2),
]


def media_of_rows():
    """For each of ROWS its images, its videos and the metadata of these, all different."""
    images, videos, seed = [], [], 0
    for _prompt, num_images, num_videos in ROWS:
        seed += 3
        images.append([image(60 + 40 * seed, 90 + 7 * n, seed + n) for n in range(num_images)])
        videos.append([video(6 + seed + n, seed + n) for n in range(num_videos)])
    metadata = [[{"fps": 4.0 + len(clip) % 3, "total_num_frames": len(clip)} for clip in row] for row in videos]
    return images, videos, metadata


def flat(lists, rows):
    return [item for row in rows for item in lists[row]]


def call_rows(processor, images, videos, metadata, rows, **options):
    """The processor's output for some of the ROWS, media flat."""
    return processor(
        text=[ROWS[row][0] for row in rows],
        images=flat(images, rows),
        videos=flat(videos, rows),
        video_metadata=flat(metadata, rows) or None,
        return_tensors="pt",
        **options,
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_what_they_are_alone(processor, side):
    """Ids, marks and media of every row, padded to the longest, equal those of a call with this row alone."""
    media = media_of_rows()
    whole = call_rows(processor, *media, rows=range(len(ROWS)), padding=True, padding_side=side)
    alone = [call_rows(processor, *media, rows=[row]) for row in range(len(ROWS))]

    width = whole["input_ids"].shape[1]
    assert whole["input_ids"].shape == (len(ROWS), max(row["input_ids"].shape[1] for row in alone))
    for row, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        real = slice(width - length, width) if side == "left" else slice(0, length)
        attended = torch.zeros(width, dtype=torch.int64)
        attended[real] = 1
        assert torch.equal(whole["attention_mask"][row], attended)
        assert torch.equal(whole["input_ids"][row, real], single["input_ids"][0])
        assert torch.equal(whole["token_type_ids"][row, real], single["token_type_ids"][0])
        assert (whole["input_ids"][row][attended == 0] == tokenizer().pad_token_id).all()
        assert not whole["token_type_ids"][row][attended == 0].any()
    for key in (*IMAGE_KEYS, *VIDEO_KEYS):
        assert torch.equal(whole[key], torch.cat([single[key] for single in alone if key in single])), key


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_has_one_bos(processor, side):
    bos = tokenizer().bos_token_id
    prompts = ["a", "<|im_end|>b and more", "<|image|>c"]
    output = processor(text=prompts, images=[image()], padding=True, padding_side=side, return_tensors="np")
    for ids, mask in zip(output["input_ids"], output["attention_mask"], strict=True):
        row = ids[mask == 1].tolist()
        assert row[0] == bos
        assert row.count(bos) == 1


def test_rows_are_the_prompts_written_out(processor):
    """Placeholders become the tokens of their images, and nothing else changes."""
    output = processor(
        text="See <|image|> and <|video|>.",
        images=[image()],
        videos=[video()],
        video_metadata=[METADATA],
        return_metadata=True,
    )
    timestamps = output["video_metadata"][0].timestamps
    expected = "See {} and {}.".format(
        "".join(processor.get_image_tokens(output["image_grids"][0])),
        processor.get_video_string(output["video_grids"][0], timestamps),
    )
    assert output["input_ids"] == [with_bos(expected)]
    visual = set(tokenizer().convert_tokens_to_ids(list(VISUAL_TOKENS)))
    assert output["token_type_ids"] == [[token in visual for token in output["input_ids"][0]]]


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("return_tensors", "kind"), [("pt", torch.Tensor), ("np", np.ndarray)])
def test_all_outputs_are_tensors(processor, return_tensors, kind):
    output = processor(
        text=["<|image|>a", "<|video|>b"],
        images=[image()],
        videos=[video()],
        video_metadata=[METADATA],
        padding=True,
        return_tensors=return_tensors,
    )
    assert sorted(output) == sorted((*TEXT_KEYS, *IMAGE_KEYS, *VIDEO_KEYS))
    dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in output.items()}
    assert all(isinstance(value, kind) for value in output.values())
    assert dtypes.pop("token_type_ids") == "bool"
    assert {dtypes.pop(key) for key in ("pixel_values", "pixel_values_videos")} == {"float32"}
    assert set(dtypes.values()) == {"int64"}


def test_without_return_tensors_rows_are_lists(processor):
    output = processor(text=["a", "<|image|>b"], images=[image()])
    assert [len(row) for row in output["input_ids"]] == [len(row) for row in output["attention_mask"]]
    for key in TEXT_KEYS:
        assert all(isinstance(row, list) for row in output[key]), key
    for key in IMAGE_KEYS:
        assert isinstance(output[key], np.ndarray), key


def test_output_names_are_announced(processor):
    assert processor.model_input_names == [*TEXT_KEYS, *IMAGE_KEYS, *VIDEO_KEYS]


def test_without_visual_marks(processor):
    output = processor(text="<|image|>a", images=[image()], return_mm_token_type_ids=False)
    assert sorted(output) == sorted(("input_ids", "attention_mask", *IMAGE_KEYS))


def test_metadata_on_request(processor):
    call = partial(processor, text="<|video|>", videos=[video()], video_metadata=[METADATA])
    assert "video_metadata" not in call()
    (metadata,) = call(return_metadata=True)["video_metadata"]
    assert (metadata.total_num_frames, metadata.fps) == (10, 5.0)
    assert list(metadata.frames_indices) == [0, 3, 6, 9]


# --- how media may be passed -----------------------------------------------------------------------------------------

TWO_ROWS = ["<|image|>a<|image|>", "<|image|>b"]


def test_a_path_alone_is_an_image_and_other_text_alone_a_prompt(processor, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(image()).save(path)
    alone = processor(images=str(path))
    assert set(alone) == {"pixel_values", "image_token_pooling", "image_grids", "image_num_crops"}
    assert "input_ids" in processor("no such file.png")
    assert "input_ids" in processor("a" * 300 + ".png")  # no file can be called this


def test_options_of_tokenizers_without_a_use_are_warned_about(processor, warnings_logged):
    processor(text="x", return_length=True)
    assert "has no use for the option 'return_length'" in warnings_logged()


@pytest.mark.parametrize(
    "arrange",
    [
        lambda a, b, c: [a, b, c],
        lambda a, b, c: [[a, b], [c]],
        lambda a, b, c: ([a, b], (c,)),
        lambda a, b, c: [Image.fromarray(a), torch.from_numpy(b), c],
        lambda a, b, c: np.stack([a, b, c]),
    ],
    ids=["flat", "per row", "tuples", "mixed types", "array"],
)
def test_images_flat_or_per_row(processor, arrange):
    images = [image(seed=seed) for seed in range(3)]
    expected = processor(text=TWO_ROWS, images=images)
    assert_same(processor(text=TWO_ROWS, images=arrange(*images)), expected, IMAGE_KEYS)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda a, b: {"videos": [a, b], "video_metadata": [METADATA, METADATA]},
        lambda a, b: {"videos": [[a], [b]], "video_metadata": [[METADATA], [METADATA]]},
        lambda a, b: {"videos": [(a, METADATA), (b, METADATA)]},
        lambda a, b: {"videos": np.stack([a, b]), "video_metadata": [METADATA, METADATA]},
        lambda a, b: {"videos": [list(a), [Image.fromarray(frame) for frame in b]], "video_metadata": [METADATA] * 2},
        lambda a, b: {"videos": [torch.from_numpy(a), b], "video_metadata": [VideoMetadata(**METADATA), METADATA]},
    ],
    ids=["flat", "per row", "pairs", "array", "lists of frames", "metadata objects"],
)
def test_videos_flat_or_per_row(processor, arrange):
    clips = [video(seed=seed) for seed in range(2)]
    prompts = ["<|video|>a", "<|video|>b"]
    expected = processor(text=prompts, videos=clips, video_metadata=[METADATA] * 2)
    assert_same(processor(text=prompts, **arrange(*clips)), expected, VIDEO_KEYS)


def test_one_image_needs_no_list(processor):
    in_lists = processor(
        text=["<|image|><|video|>"], images=[image()], videos=[video()], video_metadata=[METADATA], return_tensors="np"
    )
    bare = processor(
        text="<|image|><|video|>", images=image(), videos=video(), video_metadata=METADATA, return_tensors="np"
    )
    assert_same(bare, in_lists)


def test_text_may_come_first(processor):
    expected = processor(text="<|image|>a", images=[image()], return_tensors="np")
    assert_same(processor("<|image|>a", [image()], return_tensors="np"), expected)
    assert_same(processor([image()], "<|image|>a", return_tensors="np"), expected)
    assert processor("just text")["input_ids"] == [with_bos("just text")]


@pytest.mark.parametrize("empty", [{"images": []}, {"videos": []}, {"images": [], "videos": []}])
def test_empty_lists_are_no_media(processor, empty):
    assert_same(processor(text="Hi", return_tensors="np", **empty), processor(text="Hi", return_tensors="np"))


def test_rows_without_images_have_empty_lists(processor):
    output = processor(text=["a", "<|image|>b", "c"], images=[[], [image()], []])
    assert output["image_num_crops"].tolist() == [processor.image_processor.plan(100, 150).num_crops]


def test_images_alone(processor):
    """Without text the tensors of the images come out, the same as with it."""
    media = {"images": [image()], "videos": [video()], "video_metadata": [METADATA], "return_tensors": "pt"}
    output = processor(**media)
    assert sorted(output) == sorted((*IMAGE_KEYS, *VIDEO_KEYS))
    with_text = processor(text="<|image|><|video|>", **media)
    for key in output:
        assert torch.equal(output[key], with_text[key])


def test_arguments_are_left_as_they_were(processor, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(image()).save(path)
    arguments = {
        "text": ["<|image|>a", "<|video|><|video|>b"],
        "images": [[str(path)], []],
        "videos": [str(CLIP), str(CLIP)],
        "per_video_options": [{"num_frames": 2}, {"clip": (0, 1)}],
        "images_kwargs": {"max_crops": 2},
        "videos_kwargs": {"num_frames": 3},
        "text_kwargs": {"padding": True},
        "common_kwargs": {"return_tensors": "pt"},
    }
    before = copy.deepcopy(arguments)
    processor(**arguments)
    assert arguments == before

    messages = [{"role": "user", "content": [{"type": "video", "video": str(CLIP), "clip": [0, 1], "num_frames": 2}]}]
    before, options = copy.deepcopy(messages), {"videos_kwargs": {"max_fps": 1}}
    processor.apply_chat_template(messages, tokenize=True, return_dict=True, processor_kwargs=options)
    assert messages == before
    assert options == {"videos_kwargs": {"max_fps": 1}}


# --- sources of images in messages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory):
    """A folder with image.png and clip.mp4."""
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(image()).save(folder / "image.png")
    (folder / "clip.mp4").write_bytes(CLIP.read_bytes())
    return folder


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server(media_folder):
    """Serves the folder; gives its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=media_folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy_for_the_server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


def ask(processor, *parts, **options):
    """The output for one user turn with these parts and a question."""
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", **options
    )


def as_base64(path):
    return base64.b64encode(path.read_bytes()).decode()


IMAGE_PARTS = {
    "array": lambda folder, url: {"type": "image", "image": image()},
    "tensor": lambda folder, url: {"type": "image", "image": torch.from_numpy(image())},
    "pil": lambda folder, url: {"type": "image", "image": Image.fromarray(image())},
    "path": lambda folder, url: {"type": "image", "path": str(folder / "image.png")},
    "path object": lambda folder, url: {"type": "image", "image": folder / "image.png"},
    "path as url": lambda folder, url: {"type": "image", "url": str(folder / "image.png")},
    "file url": lambda folder, url: {"type": "image", "url": (folder / "image.png").as_uri()},
    "http url": lambda folder, url: {"type": "image", "url": f"{url}/image.png"},
    "http image": lambda folder, url: {"type": "image", "image": f"{url}/image.png"},
    "image_url": lambda folder, url: {"type": "image_url", "image_url": {"url": f"{url}/image.png"}},
    "bare image_url": lambda folder, url: {"type": "image_url", "image_url": f"{url}/image.png"},
    "data url": lambda folder, url: {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{as_base64(folder / 'image.png')}"},
    },
    "base64": lambda folder, url: {"type": "image", "base64": as_base64(folder / "image.png")},
    "bytes": lambda folder, url: {"type": "image", "image": (folder / "image.png").read_bytes()},
    "open file": lambda folder, url: {"type": "image", "image": io.BytesIO((folder / "image.png").read_bytes())},
    "no type": lambda folder, url: {"image": str(folder / "image.png")},
}


@pytest.mark.parametrize("name", IMAGE_PARTS)
def test_images_in_messages(processor, media_folder, server, name):
    part = IMAGE_PARTS[name](media_folder, server)
    expected = processor(
        text="<|image|><|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n",
        images=[image()],
        return_tensors="pt",
    )
    assert_same(ask(processor, part, limits=MediaLimits(allow_private_hosts=True)), expected)


VIDEO_PARTS = {
    "path object": lambda folder, url: {"type": "video", "video": folder / "clip.mp4"},
    "path": lambda folder, url: {"type": "video", "path": str(folder / "clip.mp4")},
    "file url": lambda folder, url: {"type": "video", "url": (folder / "clip.mp4").as_uri()},
    "http url": lambda folder, url: {"type": "video", "url": f"{url}/clip.mp4"},
    "video_url": lambda folder, url: {"type": "video_url", "video_url": {"url": f"{url}/clip.mp4"}},
    "bytes": lambda folder, url: {"type": "video", "video": (folder / "clip.mp4").read_bytes()},
    "open file": lambda folder, url: {"type": "video", "video": io.BytesIO((folder / "clip.mp4").read_bytes())},
    "no type": lambda folder, url: {"video": str(folder / "clip.mp4")},
}


@pytest.mark.parametrize("name", VIDEO_PARTS)
def test_videos_in_messages(processor, media_folder, server, name):
    part = VIDEO_PARTS[name](media_folder, server)
    expected = processor(
        text="<|video|><|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n",
        videos=[str(CLIP)],
        return_tensors="pt",
    )
    output = ask(processor, part, limits=MediaLimits(allow_private_hosts=True))
    assert times_of(output) == ["0.0", "1.1", "2.1", "3.2"]
    assert_same(output, expected)


def test_string_content_is_tokenized(processor):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    output = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert output["input_ids"] == [with_bos(processor.apply_chat_template(messages))]


def test_images_of_several_turns_and_conversations(processor):
    images = [image(60 + 50 * seed, seed=seed) for seed in range(3)]
    parts = [{"type": "image", "image": image} for image in images]
    several = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, parts[0]]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [parts[1]]},
    ]
    conversations = [several, [{"role": "user", "content": "c"}], [{"role": "user", "content": [parts[2]]}]]
    output = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
    )
    expected = processor(
        text=processor.apply_chat_template(conversations), images=images, padding=True, return_tensors="pt"
    )
    assert_same(output, expected)


def test_ids_alone(processor):
    messages = [{"role": "user", "content": "Hello"}]
    ids = processor.apply_chat_template(messages, tokenize=True)
    assert ids == [with_bos(processor.apply_chat_template(messages))]


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_crops": 1, "num_frames": 2, "return_tensors": "np"},
        {"images_kwargs": {"max_crops": 1}, "videos_kwargs": {"num_frames": 2}, "return_tensors": "np"},
        {"images_kwargs": {"max_crops": 1}, "num_frames": 2, "text_kwargs": {"return_tensors": "np"}},
        {"max_crops": 1, "num_frames": 2, "common_kwargs": {"return_tensors": "np"}},
    ],
    ids=["flat", "nested", "mixed", "common"],
)
def test_options_flat_and_nested(processor, options):
    settings_of_call = {
        "image_processor_init": {**SMALL["image_processor_init"], "max_crops": 1},
        "video_processor_init": {**SMALL["video_processor_init"], "num_frames": 2},
    }
    arguments = {"text": "<|image|><|video|>", "images": [image()], "videos": [str(CLIP)]}
    expected = build_processor(settings_of_call)(**arguments, return_tensors="np")
    assert expected["image_num_crops"].tolist() == [2]
    assert expected["video_grids"][:, 0].tolist() == [2]
    assert_same(processor(**arguments, **options), expected)
    part = ({"type": "image", "image": image()}, {"type": "video", "video": str(CLIP)})
    for chat_options in (options, {"processor_kwargs": options}):
        output = processor.apply_chat_template(
            [{"role": "user", "content": list(part)}], tokenize=True, return_dict=True, **chat_options
        )
        for key in (*IMAGE_KEYS, *VIDEO_KEYS):
            np.testing.assert_array_equal(output[key], expected[key], err_msg=key)


@pytest.mark.parametrize(
    ("flat", "nested", "message"),
    [
        ({"max_crops": 2}, {"images_kwargs": {"max_crops": 3}}, "['max_crops'] given twice: in `images_kwargs` and"),
        (
            {"num_frames": 2},
            {"videos_kwargs": {"num_frames": 2}},
            "['num_frames'] given twice: in `videos_kwargs` and",
        ),
        ({"padding": True}, {"text_kwargs": {"padding": True}}, "['padding'] given twice: in `text_kwargs` and as a"),
    ],
)
def test_an_option_given_twice(processor, flat, nested, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        processor(text="a", **flat, **nested)


def test_resample_as_a_keyword_reaches_images_only(processor):
    """As in the original; frames take another filter through `videos_kwargs`."""
    arguments = {
        "text": "<|image|><|video|>",
        "images": [image()],
        "videos": [video()],
        "video_metadata": [METADATA],
        "return_tensors": "np",
    }
    default = processor(**arguments)
    nearest = processor(**arguments, resample=0)
    assert not np.array_equal(nearest["pixel_values"], default["pixel_values"])
    np.testing.assert_array_equal(nearest["pixel_values_videos"], default["pixel_values_videos"])
    nearest = processor(**arguments, videos_kwargs={"resample": 0})
    np.testing.assert_array_equal(nearest["pixel_values"], default["pixel_values"])
    assert not np.array_equal(nearest["pixel_values_videos"], default["pixel_values_videos"])


@pytest.mark.parametrize(
    "option",
    [{"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 0.5}, {"image_mean": [0.1, 0.2, 0.3]}],
    ids=lambda option: next(iter(option)),
)
def test_steps_of_pixels_in_every_place(option, processor, tmp_path):
    """In a call, for images or videos alone, in a message, at loading, and after saving."""
    names = ("pixel_values", "pixel_values_videos")
    media = {"images": [image()], "videos": [video()], "video_metadata": [METADATA]}
    call = {"text": "<|image|><|video|>", **media, "return_tensors": "np"}
    plain, changed = processor(**call), processor(**call, **option)
    assert not any(np.array_equal(plain[name], changed[name]) for name in names)
    for part, kwargs in ((0, "images_kwargs"), (1, "videos_kwargs")):
        found = processor(**call, **{kwargs: option})
        np.testing.assert_array_equal(found[names[part]], changed[names[part]])
        np.testing.assert_array_equal(found[names[1 - part]], plain[names[1 - part]])
    asked = ask(processor, {"type": "image", "image": image()}, **option)
    np.testing.assert_array_equal(asked["pixel_values"].numpy(), changed["pixel_values"])
    processor.save_pretrained(tmp_path / "plain")
    loaded = Molmo2Processor.from_pretrained(tmp_path / "plain", **option)
    loaded.save_pretrained(tmp_path / "changed")
    for own in (loaded, Molmo2Processor.from_pretrained(tmp_path / "changed")):
        found = own(**call)
        for name in names:
            np.testing.assert_array_equal(found[name], changed[name])


def test_unknown_options_are_warned_about(processor, warnings_logged):
    output = processor(text="Hi", max_corps=3)
    assert output["input_ids"] == [with_bos("Hi")]
    assert "Molmo2Processor ignores the unknown option 'max_corps'." in warnings_logged()


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({}, "0.0 1.1 2.1 3.2"),
        ({"num_frames": 2}, "0.0 3.2"),
        ({"clip": [1, 2]}, "1.0 1.5 2.0"),
        ({"clip": (2.0, None), "num_frames": 3}, "2.0 2.6 3.2"),
        ({"max_fps": 1, "num_frames": 8}, "0.0 1.0 2.0 3.0 3.2"),
        ({"max_fps": None, "num_frames": 3}, "0.0 1.6 3.2"),
        ({"frame_sample_mode": "fps", "sampling_fps": 4}, "0.0 0.2 0.5 0.8"),
    ],
)
def test_options_of_a_video_part(processor, options, printed):
    """A clip of 3.17 seconds, at most 4 frames and 2 per second; times of a cut are those of the whole video."""
    assert times_of(ask(processor, {"type": "video", "video": str(CLIP), **options})) == printed.split()


def test_options_of_a_part_hold_against_those_of_the_call(processor):
    part = {"type": "video", "video": str(CLIP), "fps": 1}
    expected = times_of(ask(processor, part, num_frames=8))
    assert expected == ["0.0", "1.0", "2.0", "3.0", "3.2"]
    for name in ("fps", "max_fps", "sampling_fps"):
        assert times_of(ask(processor, part, num_frames=8, **{name: 2})) == expected
    of_call = [{"num_frames": 2}] * 2
    output = ask(processor, {**part, "fps": None, "clip": [0, 1]}, part, per_video_options=of_call)
    assert output["video_grids"][:, 0].tolist() == [2, 2]


def test_every_video_part_has_its_own_options(processor):
    """Options of the call hold where a part has none of its own; metadata stay with their video."""
    frames = {"type": "video", "video": video(), "video_metadata": METADATA}
    parts = [{"type": "video", "video": str(CLIP), "num_frames": 2}, {**frames, "clip": [0, 1]}, frames]
    output = ask(processor, *parts, num_frames=3, return_metadata=True)
    assert output["video_grids"][:, 0].tolist() == [2, 3, 3]
    assert times_of(output) == ["0.0", "3.2", "0.0", "0.4", "1.0", "0.0", "0.8", "1.8"]
    assert [metadata.fps for metadata in output["video_metadata"]] == [30.0, 5.0, 5.0]
    alone = [ask(processor, part, num_frames=3) for part in parts]
    for key in VIDEO_KEYS:
        assert torch.equal(output[key], torch.cat([single[key] for single in alone])), key


@pytest.mark.parametrize(
    ("said", "printed"),
    [
        ({"fps": 5.0}, "0.0 0.6 1.2 1.8"),
        ({"fps": 2.5}, "0.0 1.2 2.4 3.6"),
        ({"timestamps": [n / 4 for n in range(10)]}, "0.0 0.8 1.5 2.2"),
        ({"video_metadata": {"fps": 5.0}}, "0.0 0.6 1.2 1.8"),
    ],
)
def test_what_a_part_says_about_frames(processor, said, printed):
    assert times_of(ask(processor, {"type": "video", "video": video(), **said})) == printed.split()


def test_options_per_video_of_a_call(processor):
    arguments = {"text": ["<|video|>a", "<|video|>b"], "videos": [str(CLIP), str(CLIP)]}
    output = processor(**arguments, per_video_options=[{"num_frames": 2}, {"clip": (1, 2)}])
    assert output["video_grids"][:, 0].tolist() == [2, 3]
    assert [times_of(output, row) for row in (0, 1)] == [["0.0", "3.2"], ["1.0", "1.5", "2.0"]]
    clips = processor(**arguments, clip=[(0, 1), (1, 2)])
    assert [times_of(clips, row) for row in (0, 1)] == [["0.0", "0.5", "1.0"], ["1.0", "1.5", "2.0"]]
    both = processor(**arguments, clip=[(0, 1), (1, 2)], per_video_options=[{"num_frames": 2}, {}])
    assert [times_of(both, row) for row in (0, 1)] == [["0.0", "1.0"], ["1.0", "1.5", "2.0"]]


@pytest.mark.parametrize("images", ["/absent/a.png", ["/absent/a.JPG", "b.webp"]])
def test_the_name_of_an_absent_image_is_no_prompt(processor, images):
    with pytest.raises((FileNotFoundError, ValueError), match="absent"):
        processor(images=images)


def test_a_prompt_may_come_first(processor):
    expected = processor(text="Is it in a.png?")["input_ids"]
    assert processor("Is it in a.png?")["input_ids"] == expected
    assert processor("Is it in a.png?", [])["input_ids"] == expected
    with pytest.raises(ValueError, match="`text` holds nothing"):
        processor(images=["a.png"], text=[])


@pytest.mark.parametrize(
    "arguments",
    [
        {"text": "<|video|>", "videos": str(CLIP), "per_video_options": [{"num_frames": 2}]},
        {"text": "<|video|>", "videos": video(), "video_metadata": METADATA, "per_video_options": [{"num_frames": 2}]},
        {
            "text": ["<|video|><|video|>", "<|video|>"],
            "videos": [[video(), video()], [video()]],
            "video_metadata": [[METADATA, METADATA], [METADATA]],
            "per_video_options": [{"num_frames": 2}] * 3,
        },
    ],
    ids=["one file", "one array", "per row"],
)
def test_options_per_video_however_videos_are_passed(processor, arguments):
    frames = processor(**arguments)["video_grids"][:, 0]
    assert set(frames.tolist()) == {2}


def test_number_of_options_per_video(processor):
    message = "There are 2 video(s), but 1 entries in `per_video_options`. Pass one dictionary per video, an empty one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        processor(text="<|video|><|video|>", videos=[str(CLIP)] * 2, per_video_options=[{"num_frames": 2}])


def test_options_of_all_videos_may_be_told_for_each(processor):
    """What the arrays are made of comes from the options of the videos, not from those of the call."""
    arguments = {"text": "<|video|><|video|>", "videos": [str(CLIP)] * 2, "num_frames": 2, "return_tensors": "pt"}
    for own in ({"pixel_dtype": "uint8"}, {"size": {"height": 84, "width": 84}}, {"device": "cpu"}):
        expected = processor(**arguments, **own)
        found = processor(**arguments, per_video_options=[own, own])
        assert found["pixel_values_videos"].dtype == expected["pixel_values_videos"].dtype
        assert torch.equal(found["pixel_values_videos"], expected["pixel_values_videos"])
        assert torch.equal(found["input_ids"], expected["input_ids"])
    nested = processor(**arguments, videos_kwargs={"per_video_options": [{"pixel_dtype": "uint8"}] * 2})
    assert nested["pixel_values_videos"].dtype == torch.uint8
    with pytest.raises(ValueError, match="`per_video_options` is given twice"):
        processor(**arguments, videos_kwargs={"per_video_options": [{}] * 2}, per_video_options=[{}] * 2)


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ([{"pixel_dtype": "uint8"}, {}], "pixel_dtype=uint8"),
        ([None, {"size": {"height": 84, "width": 84}}], "patches_per_frame=49 for one video and patches_per_frame=36"),
        ([{"frame_encoder": lambda pixels, pooling, grids: torch.zeros(0, 4)}, {}], "frame_encoder=True"),
    ],
)
def test_videos_whose_outputs_cannot_be_joined(processor, own, name):
    message = f"`per_video_options` leads to {name} .* whose outputs cannot be joined. Pass the same for all videos"
    with pytest.raises(ValueError, match=message):
        processor(text="<|video|><|video|>", videos=[str(CLIP)] * 2, per_video_options=own)


def test_videos_whose_outputs_can_be_joined(processor):
    """None stands for no options, "cpu" for where pixels are in any case, and sizes may differ in their form alone."""
    arguments = {"text": "<|video|><|video|>", "videos": [str(CLIP)] * 2, "num_frames": 2, "return_tensors": "pt"}
    expected = processor(**arguments)["pixel_values_videos"]
    for own in ([{"device": "cpu"}, None], [{}, {"device": torch.device("cpu")}], None):
        nested = processor(**arguments, per_video_options=own, videos_kwargs={"per_video_options": None})
        assert torch.equal(nested["pixel_values_videos"], expected)
    sizes = [{"size": {"height": 84, "width": 168}}, {"size": {"height": 168, "width": 84}}]
    assert len(processor(**arguments, per_video_options=sizes)["pixel_values_videos"]) == 4


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([{"video_metadata": {"fps": 2.0}}, {}], "has 'video_metadata', which holds for a whole call"),
        ([{}, "fast"], "has 'fast' at place 1. Pass a dictionary of options"),
    ],
)
def test_entries_that_are_no_options_of_a_video(processor, own, message):
    with pytest.raises(ValueError, match=message):
        processor(text="<|video|><|video|>", videos=[str(CLIP)] * 2, per_video_options=own)


def test_counts_know_options_of_each_video_wherever_they_are_given(processor):
    own = [{"pooling_size": 1}, {}]
    sizes = [(4, 50, 70)] * 2
    expected = processor._get_num_multimodal_tokens(None, sizes, per_video_options=own).num_video_tokens
    nested = processor._get_num_multimodal_tokens(None, sizes, videos_kwargs={"per_video_options": own})
    assert nested.num_video_tokens == expected
    assert expected[0] > expected[1]


# --- callers of other libraries --------------------------------------------------------------------------------------

SAMPLED = {
    "total_num_frames": 100,
    "fps": 29.97,
    "frames_indices": np.array([0.0, 10.5, 20.25, 99.0]),
    "height": 40,
    "width": 60,
    "duration": 3.3,
    "video_backend": "decord",
}


def test_frames_sampled_by_a_helper_package(processor, warnings_logged):
    """Frames that are sampled already, with fractional indices and options of other models' processors."""
    output = processor(
        text="<|video|>What?",
        videos=[video(4)],
        video_metadata=[SAMPLED],
        do_sample_frames=False,
        return_tensors="pt",
        padding=True,
        fps=None,
        return_video_kwargs=True,
        image_patch_size=14,
        min_frames=2,
        use_audio_in_video=False,
    )
    assert times_of(output) == ["0.0", "0.4", "0.7", "3.3"]
    assert output["video_grids"].tolist() == [[4, 3, 3]]
    logged = warnings_logged()
    for option in ("return_video_kwargs", "image_patch_size", "min_frames", "use_audio_in_video"):
        assert f"ignores the unknown option '{option}'" in logged
    assert "'fps'" not in logged


def test_frames_sampled_by_an_inference_server(processor):
    """Nested lists, and the library's metadata objects."""
    output = processor(
        text="<|video|>What?",
        videos=[[video(4)]],
        video_metadata=[[VideoMetadata(**SAMPLED)]],
        do_sample_frames=False,
        return_tensors="pt",
    )
    flat = processor(
        text="<|video|>What?",
        videos=[video(4)],
        video_metadata=[SAMPLED],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert times_of(output) == ["0.0", "0.4", "0.7", "3.3"]
    assert_same(output, flat)


def test_settings_that_inference_servers_read(processor):
    images, videos = processor.image_processor, processor.video_processor
    assert (images.max_crops, images.overlap_margins, images.patch_size, images.pooling_size) == (
        4,
        [2, 2],
        14,
        [2, 2],
    )
    assert (images.size["height"], images.size["width"]) == (98, 98)
    assert (videos.size["height"], videos.size["width"], videos.patch_size, videos.pooling_size) == (
        98,
        98,
        14,
        [3, 3],
    )
    assert (videos.num_frames, videos.max_fps, videos.sampling_fps) == (4, 2, 2)
    assert videos.frame_sample_mode == "uniform_last_frame"
    options = default_settings("processor")
    assert {name: getattr(processor, name) for name in options} == options


# --- truncation and padding ------------------------------------------------------------------------------------------


def test_truncation(processor, monkeypatch):
    """BOS stays on either side; without `max_length` the tokenizer's own limit counts."""
    (ids,) = processor(text="one two three four")["input_ids"]
    assert processor(text="one two three four", truncation=True, max_length=5)["input_ids"] == [ids[:5]]
    monkeypatch.setattr(tokenizer(), "truncation_side", "left")
    assert processor(text="one two three four", truncation=True, max_length=5)["input_ids"] == [[ids[0], *ids[-4:]]]
    monkeypatch.setattr(tokenizer(), "model_max_length", 3)
    assert processor(text="one two three four", truncation=True)["input_ids"] == [[ids[0], *ids[-2:]]]
    assert processor(text="one two three four")["input_ids"] == [ids]


@pytest.mark.parametrize("truncation", [False, None, "do_not_truncate", TruncationStrategy.DO_NOT_TRUNCATE])
def test_no_truncation(processor, truncation):
    text = "one two three four"
    assert processor(text=text, truncation=truncation, max_length=5)["input_ids"] == [with_bos(text)]


@pytest.mark.parametrize("truncation", ["longest_first", "only_first", TruncationStrategy.ONLY_FIRST])
def test_truncation_by_name(processor, truncation):
    text = "one two three four"
    assert processor(text=text, truncation=truncation, max_length=5)["input_ids"] == [with_bos(text)[:5]]


def test_truncation_refuses_to_cut_images(processor):
    (ids,) = processor(text="<|image|>What is this?", images=[image()])["input_ids"]
    question = encode("What is this?")
    cut = processor(text="<|image|>What is this?", images=[image()], truncation=True, max_length=len(ids) - 2)
    assert cut["input_ids"] == [ids[:-2]]
    excess = len(question) + 5
    message = (
        f"Truncating a prompt of {len(ids)} tokens to `max_length` = {len(ids) - excess} would cut 5 visual token(s). "
        f"Raise `max_length` by {excess} or more, lower `max_crops` (images) or `num_frames` (videos)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        processor(text="<|image|>What is this?", images=[image()], truncation=True, max_length=len(ids) - excess)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"padding": True}, 8),
        ({"padding": "longest"}, 8),
        ({"padding": PaddingStrategy.LONGEST}, 8),
        ({"padding": True, "pad_to_multiple_of": 5}, 10),
        ({"padding": "max_length", "max_length": 12}, 12),
        ({"padding": PaddingStrategy.MAX_LENGTH, "max_length": 12, "pad_to_multiple_of": 8}, 16),
        ({"padding": "max_length", "max_length": 3}, 8),
        ({"padding": "max_length", "max_length": 3, "truncation": True}, 3),
    ],
)
def test_padding_strategies(processor, options, length):
    texts = ["x", "1234567"]
    rows = [with_bos(text) for text in texts]
    assert [len(row) for row in rows] == [2, 8]
    output = processor(text=texts, return_tensors="np", **options)
    assert output["input_ids"].shape == (2, length)
    for row, ids, mask in zip(rows, output["input_ids"], output["attention_mask"], strict=True):
        assert ids[mask == 1].tolist() == row[:length]
        assert mask[-1] == 1


@pytest.mark.parametrize("padding", [False, "do_not_pad", PaddingStrategy.DO_NOT_PAD])
def test_no_padding(processor, padding):
    texts = ["x", "1234567"]
    assert processor(text=texts, padding=padding)["input_ids"] == [with_bos(text) for text in texts]
    message = (
        "The prompts have [2, 8] tokens, which make no tensor. Pass `padding=True`, or leave `return_tensors` out to "
        "get lists."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        processor(text=texts, padding=padding, return_tensors="pt")


def test_padding_side_of_the_tokenizer_and_of_the_call(processor):
    texts = ["x", "x x x x"]
    for side, first in (("left", 0), ("right", 1)):
        processor.tokenizer.padding_side = side
        output = processor(text=texts, padding=True, return_tensors="np")
        assert output["attention_mask"][0, 0] == first
        other = {"left": "right", "right": "left"}[side]
        output = processor(text=texts, padding=True, padding_side=other, return_tensors="np")
        assert output["attention_mask"][0, 0] == 1 - first
        assert processor.tokenizer.padding_side == side


# --- numbers and notation --------------------------------------------------------------------------------------------

NOTATIONS = {
    "default": {},
    "as published": {"use_frame_special_tokens": False, "use_single_crop_col_tokens": False},
    "web": {
        "use_frame_special_tokens": False,
        "use_single_crop_col_tokens": None,
        "use_single_crop_start_token": False,
    },
    "no columns": {"image_use_col_tokens": False, "use_single_crop_col_tokens": None},
    "all columns": {"use_single_crop_col_tokens": True, "video_use_col_tokens": True},
    "low-res patches": {"use_low_res_token_for_global_crops": True, "use_frame_special_tokens": False},
}
each_notation = pytest.mark.parametrize("notation", NOTATIONS.values(), ids=NOTATIONS)


@each_notation
def test_notation_of_the_checkpoint(notation):
    """The options of the processor decide how images are written, and are kept as attributes."""
    processor = build_processor({**SMALL, "processor_init": notation})
    full = {**default_settings("processor"), **notation}
    assert {name: getattr(processor, name) for name in full} == full
    assert processor.visual_token_format == VisualTokenFormat(**full)
    output = processor(text="<|image|><|video|>", images=[image()], videos=[video()], video_metadata=[METADATA])
    low_start = "<low_res_im_start>" if full["use_single_crop_start_token"] else "<im_start>"
    frame_start = "<frame_start>" if full["use_frame_special_tokens"] else "<im_start>"
    written = decode(output["input_ids"][0]).removeprefix("<|im_end|>")
    assert written.startswith(low_start)
    assert written.count(f" {frame_start}") == 4
    columns = full["image_use_col_tokens"]
    low_columns = columns if full["use_single_crop_col_tokens"] is None else full["use_single_crop_col_tokens"]
    low_rows, _, high_rows, _ = output["image_grids"][0]
    in_images = written.partition("0.0 ")[0].count("<im_col>")
    assert in_images == columns * high_rows + low_columns * low_rows
    assert written.count("<im_col>") - in_images == (4 * 3 if full["video_use_col_tokens"] else 0)
    assert written.count("<im_low>") == (16 if full.get("use_low_res_token_for_global_crops") else 0)


@each_notation
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_crops": 1},
        {"images_kwargs": {"max_crops": 2}, "pooling_size": 2},
        {"videos_kwargs": {"pooling_size": [1, 2], "key_frame_interval": 2, "between_pooling_size": 4}},
        {"per_video_options": [{"pooling_size": 2}, {"pooling_size": [1, 3]}]},
    ],
)
def test_numbers_of_tokens_without_reading_media(notation, options):
    """What servers ask for ahead of time equals what is written later; times are text and not counted."""
    processor = build_processor({**SMALL, "processor_init": notation})
    sizes = [(100, 150), (20, 700), (98, 98)]
    planned = processor._get_num_multimodal_tokens(
        image_sizes=sizes, video_sizes=[(4, 40, 60), (2, 40, 60)], **options
    )
    output = processor(
        text=["<|image|>"] * 3 + ["<|video|>"] * 2,
        images=[image(*size) for size in sizes],
        videos=[video(4), video(2)],
        video_metadata=[{"fps": 2.0, "frames_indices": list(range(number))} for number in (4, 2)],
        do_sample_frames=False,
        **options,
    )
    marked = [sum(row) for row in output["token_type_ids"]]
    assert planned["num_image_tokens"] == marked[:3]
    assert planned["num_video_tokens"] == marked[3:]
    assert planned["num_image_patches"] == output["image_num_crops"].tolist()


def test_options_that_choose_frames_are_refused_where_their_number_is_given(processor):
    for options in (
        {"num_frames": 2},
        {"videos_kwargs": {"num_frames": 2}},
        {"per_video_options": [{"num_frames": 2}]},
    ):
        with pytest.raises(ValueError, match=r"\['num_frames'\] cannot be applied to `video_sizes`"):
            processor._get_num_multimodal_tokens(video_sizes=[(4, 40, 60)], **options)
    assert processor._get_num_multimodal_tokens(image_sizes=[(4, 4)], num_frames=2).num_image_tokens


def test_the_tokenizer_stays_the_callers(processor):
    own = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    own.chat_template = None
    built = Molmo2Processor(processor.image_processor, processor.video_processor, own, chat_template="own")
    assert built.tokenizer is own
    assert own.chat_template is None
    assert built.chat_template == "own"


def test_numbers_are_given_for_what_was_asked(processor):
    numbers = processor._get_num_multimodal_tokens(image_sizes=[])
    assert (numbers.num_image_tokens, numbers.num_image_patches, numbers.num_video_tokens) == ([], [], None)


def test_tokens_of_images(processor):
    tokens = processor.get_image_tokens(np.array([1, 2, 1, 1]))
    assert tokens == [
        *["<low_res_im_start>", "<im_patch>", "<im_patch>", "<im_col>", "<im_end>"],
        *["<im_start>", "<im_patch>", "<im_col>", "<im_end>"],
    ]
    text = processor.get_video_string(np.array([2, 1, 1]), np.array([0.0, 0.5]))
    assert text == "0.0 <frame_start><im_patch><frame_end> 0.5 <frame_start><im_patch><frame_end>"


def test_ids_of_special_tokens(processor):
    vocabulary = tokenizer().get_vocab()
    assert sorted(processor.image_token_ids) == sorted(vocabulary[token] for token in VISUAL_TOKENS)
    assert (processor.image_token, processor.image_token_id) == ("<|image|>", vocabulary["<|image|>"])
    assert (processor.video_token, processor.video_token_id) == ("<|video|>", vocabulary["<|video|>"])
    assert processor.bos_token_id == vocabulary["<|im_end|>"]


def test_bos_falls_back_to_eos(processor):
    fresh = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    fresh.bos_token = None
    without_bos = Molmo2Processor(processor.image_processor, processor.video_processor, fresh)
    assert fresh.bos_token_id is None
    assert without_bos.bos_token_id == fresh.eos_token_id
    assert without_bos(text="Hi")["input_ids"] == [[fresh.eos_token_id, *encode("Hi")]]


# --- ids back to text ------------------------------------------------------------------------------------------------


def test_decoding(processor):
    output = processor(text=["<|image|>A cat", "Two words"], images=[image()], padding=True, return_tensors="pt")
    assert processor.batch_decode(output["input_ids"], skip_special_tokens=True) == ["A cat", "Two words"]
    assert processor.decode(output["input_ids"][1], skip_special_tokens=True) == "Two words"
    assert processor.post_process_image_text_to_text(output["input_ids"]) == ["A cat", "Two words"]
    (kept,) = processor.post_process_image_text_to_text(output["input_ids"][:1], skip_special_tokens=False)
    assert kept.startswith("<|im_end|><low_res_im_start><im_patch>")
    assert kept.endswith("<im_end>A cat")


# --- errors ----------------------------------------------------------------------------------------------------------

IMAGE_ADVICE, VIDEO_ADVICE = (
    f"The number of `<|{noun}|>` tokens in the prompts should be the same as the number of {noun}s. Put one "
    f"`<|{noun}|>` where each {noun} belongs, or let `apply_chat_template` write the prompt."
    for noun in ("image", "video")
)
TWO_FRAMES = {"total_num_frames": 2, "fps": 5.0}
ONE_VIDEO = {"videos": [video(2)], "video_metadata": [TWO_FRAMES]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Nothing to process: pass `text`, and `images` or `videos` with it."),
        ({"text": "a", "audio": [0.0]}, "Molmo2 has no audio input: `audio` must be None."),
        ({"text": [["a"], ["b"]]}, "`text` holds list; expected a string or a list of strings."),
        ({"text": []}, "`text` holds nothing; expected a string or a list of strings."),
        ({"text": 5}, "`text` holds int; expected a string or a list of strings."),
        ({"text": ["a", None]}, "`text` holds NoneType; expected a string or a list of strings."),
        (
            {"text": "a", "images": [image()]},
            f"0 `<|image|>` in the text, but 1 image(s) were passed. {IMAGE_ADVICE}",
        ),
        ({"text": "a", **ONE_VIDEO}, f"0 `<|video|>` in the text, but 1 video(s) were passed. {VIDEO_ADVICE}"),
        ({"text": "<|image|>a"}, f"1 `<|image|>` in the text, but 0 image(s) were passed. {IMAGE_ADVICE}"),
        (
            {"text": ["<|video|>a", "<|video|>b"]},
            f"2 `<|video|>` in the text, but 0 video(s) were passed. {VIDEO_ADVICE}",
        ),
        (
            {"text": ["<|image|>a", "<|image|>b"], "images": [image()] * 3},
            f"2 `<|image|>` in the text, but 3 image(s) were passed. {IMAGE_ADVICE}",
        ),
        (
            {"text": ["<|image|>a", "<|image|>b"], "images": [[image()] * 2, []]},
            f"Prompt 0 has 1 `<|image|>`, but 2 image(s) were passed for it. {IMAGE_ADVICE}",
        ),
        (
            {"text": ["a", "<|video|>b"], "videos": [[video(2)], []], "video_metadata": [TWO_FRAMES]},
            f"Prompt 0 has 0 `<|video|>`, but 1 video(s) were passed for it. {VIDEO_ADVICE}",
        ),
        ({"text": "<|image|>a", "images": [image()], **ONE_VIDEO}, "0 `<|video|>` in the text, but 1 video(s)"),
        (
            {"text": "<|video|>a", "videos": [video(2)], "video_metadata": [{"fps": 0}]},
            "videos[0]: The video has no usable frame rate (fps is 0)",
        ),
        ({"text": "a", "padding": "short"}, "`padding` is 'short'; expected True, 'longest', 'max_length' or False."),
        ({"text": "a", "padding": "max_length"}, '`padding="max_length"` needs `max_length`'),
        ({"text": ["a", "b c"], "padding": True, "padding_side": "up"}, "`padding_side` is 'up'; expected 'left' or"),
    ],
)
def test_calls_that_make_no_sense(processor, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        processor(**arguments)


def test_what_placeholders_were_replaced_by(processor):
    """The places count characters of the row as it is decoded, with its BOS; the hooks give the same texts."""
    call = {"videos": [video(2)], "video_metadata": [TWO_FRAMES], "return_tensors": "pt", "return_metadata": True}
    outputs = processor(text=["a<|image|>b<|video|>"], images=[image()], return_text_replacement_offsets=True, **call)
    (row,) = outputs["text_replacement_offsets"]
    assert [(own["type"], own["text"]) for own in row] == [("image", "<|image|>"), ("video", "<|video|>")]
    assert [own["span"] for own in row] == [(1, 10), (11, 20)]
    decoded = processor.tokenizer.decode(outputs["input_ids"][0])
    assert [decoded[slice(*own["new_span"])] for own in row] == [own["replacement"] for own in row]
    hooks = [processor.replace_image_token(outputs, 0), processor.replace_video_token(outputs, 0)]
    assert hooks == [own["replacement"] for own in row]


def test_options_of_the_tokenizer_s_construction_hold_for_every_call(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.init_kwargs.update(padding="max_length", max_length=9)
    own = Molmo2Processor(processor.image_processor, processor.video_processor, tokenizer)
    assert own(text="a", return_tensors="pt")["input_ids"].shape == (1, 9)
    assert own(text="a", return_tensors="pt", max_length=11)["input_ids"].shape == (1, 11)
    assert len(own(text="a", padding=False)["input_ids"][0]) < 9


def test_a_placeholder_that_counts_needs_its_image(processor):
    """It would shift all images after it."""
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image()}, {"type": "text", "text": "<|image|>"}]}
    ]
    with pytest.raises(ValueError, match=re.escape("2 `<|image|>` in the text, but 1 image(s) were passed.")):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, allow_special_tokens=True)


def test_parts_that_are_missing(processor):
    with pytest.raises(ValueError, match=r"^Molmo2Processor needs a `video_processor`; found None\."):
        Molmo2Processor(processor.image_processor, None, processor.tokenizer)


@pytest.mark.parametrize("unknown", [None, "<|im_end|>"], ids=["no unknown token", "an unknown token"])
def test_a_tokenizer_without_the_tokens_is_refused(processor, unknown):
    backend = (GOLDEN / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    backend = backend.replace('"<im_low>"', '"<other>"').replace('"<|video|>"', '"<another>"')
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), unk_token=unknown)
    message = "The tokenizer lacks ['<|video|>', '<im_low>']. Use that of a Molmo2 checkpoint, whose vocabulary ends "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Molmo2Processor(processor.image_processor, processor.video_processor, plain)


def test_building_a_processor_does_not_copy_the_vocabulary(processor, monkeypatch):
    """Copying it takes 50 ms with the vocabulary of published checkpoints."""
    plain = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    monkeypatch.setattr(plain, "get_vocab", lambda: pytest.fail("the vocabulary was copied"))
    built = Molmo2Processor(processor.image_processor, processor.video_processor, plain)
    assert built.image_token_ids == processor.image_token_ids


def test_padding_side_of_a_new_processor(processor):
    """Left, unless the tokenizer's files say otherwise."""
    parts = processor.image_processor, processor.video_processor
    fresh = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    fresh.init_kwargs.pop("padding_side", None)
    fresh.padding_side = "right"
    assert Molmo2Processor(*parts, fresh).tokenizer.padding_side == "left"
    stated = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer", padding_side="right")
    assert Molmo2Processor(*parts, stated).tokenizer.padding_side == "right"


def test_a_processor_without_a_template(processor):
    fresh = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    fresh.chat_template = None
    bare = Molmo2Processor(processor.image_processor, processor.video_processor, fresh)
    with pytest.raises(ValueError, match=r"^The processor has no chat template\. Put `chat_template\.jinja` beside"):
        bare.apply_chat_template([{"role": "user", "content": "a"}])
    assert (
        bare.apply_chat_template([{"role": "user", "content": "a"}], chat_template="{{ messages[0].role }}") == "user"
    )


# --- any images in any rows ------------------------------------------------------------------------------------------

PIL_MODES = ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16", "F")
SIDES = st.integers(1, 700)
IMAGES = st.tuples(st.just("image"), SIDES, SIDES, st.sampled_from(PIL_MODES))
VIDEOS = st.tuples(st.just("video"), st.integers(1, 40), st.sampled_from([0.5, 1.0, 7.5, 23.976, 30.0]))


@given(
    rows=st.lists(st.lists(st.one_of(st.just(("text",)), IMAGES, VIDEOS), max_size=3), min_size=1, max_size=3),
    notation=st.sampled_from(list(NOTATIONS.values())),
    max_crops=st.integers(1, 24),
    num_frames=st.integers(1, 6),
    side=st.sampled_from(["left", "right"]),
)
@settings(max_examples=200)
def test_planned_tokens_are_emitted_and_found_again(rows, notation, max_crops, num_frames, side):
    """Tokens planned == tokens in the prompt == pooling rows, and the model finds out which row owns what."""
    processor = build_processor({**SMALL, "processor_init": notation})
    plans, expected_owners, prompts = [], [], []
    images, videos, metadata = [], [], []
    for row in rows:
        plan, owners, prompt = [], [], "a "
        for kind, *media in row:
            if kind == "image":
                height, width, mode = media
                owners.append(("image", len(images)))
                images.append(Image.new(mode, (width, height)))
                plan.append(processor.image_processor.plan(height, width, max_crops=max_crops).num_pooled_tokens)
            elif kind == "video":
                total, fps = media
                owners.append(("video", len(videos)))
                videos.append(np.zeros((total, 9, 16, 3), dtype=np.uint8))
                metadata.append({"total_num_frames": total, "fps": fps})
                frames = len(processor.video_processor.sample_frames(metadata[-1], num_frames=num_frames))
                plan.append(processor.video_processor.plan(frames).num_pooled_tokens)
            prompt += {"image": "<|image|>", "video": "<|video|>", "text": "some text "}[kind]
        plans.append(plan)
        expected_owners.append(owners)
        prompts.append(prompt)

    output = processor(
        text=prompts,
        images=images,
        videos=videos,
        video_metadata=metadata or None,
        max_crops=max_crops,
        num_frames=num_frames,
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    vocabulary = tokenizer().get_vocab()
    patches = [vocabulary["<im_patch>"], vocabulary["<im_low>"]]
    emitted = torch.isin(output["input_ids"], torch.tensor(patches)).sum(dim=1).tolist()
    assert emitted == [sum(plan) for plan in plans]
    pooled = sum(len(output[key]) for key in ("image_token_pooling", "video_token_pooling") if key in output)
    assert pooled == sum(emitted)

    config = SimpleNamespace(
        image_patch_id=patches[0],
        image_low_res_id=patches[1],
        image_end_token_id=vocabulary["<im_end>"],
        frame_end_token_id=vocabulary["<frame_end>"],
        low_res_image_start_token_id=vocabulary["<low_res_im_start>"],
    )
    groups = token_groups(output["input_ids"], config)
    assert owners_of(groups, output.get("image_grids"), output.get("video_grids")) == expected_owners


def test_names_of_inputs_are_shown_without_their_tensors(processor):
    inputs = processor(text="What is this?", return_tensors="pt")
    assert str(inputs.keys()) == f"dict_keys({list(inputs)})"
