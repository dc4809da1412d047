"""Finding the images of messages, and what their parts say about them."""

import re
from types import SimpleNamespace

import pytest
from transformers.video_utils import VideoMetadata

from molmo2.processing.chat import find_media, is_batch, media_arguments, media_kind, messages_of
from support.model_inputs import processor


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "http://host/a.png"}, "http://host/a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "base64": "aGVsbG8="}, "aGVsbG8="),
        ({"type": "image", "image": {"url": "a.png"}}, "a.png"),
        ({"type": "image", "image": None, "path": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "a.png"),
        ({"image": "a.png"}, "a.png"),
        ({"image_url": {"url": "a.png"}}, "a.png"),
        ({"type": "text", "text": "look", "image": "a.png"}, "a.png"),
    ],
)
def test_image_sources(part, source):
    media = find_media(user({"type": "text", "text": "What is this?"}, part))
    assert (media.images, media.videos) == ([source], [])


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "video", "video": "a.mp4"}, "a.mp4"),
        ({"type": "video", "url": "http://host/a.mp4"}, "http://host/a.mp4"),
        ({"type": "video", "path": "a.mp4"}, "a.mp4"),
        ({"type": "video", "video": ["0.png", "1.png"]}, ["0.png", "1.png"]),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "a.mp4"),
        ({"video": "a.mp4"}, "a.mp4"),
        ({"video_url": "a.mp4"}, "a.mp4"),
    ],
)
def test_video_sources(part, source):
    media = find_media(user(part, {"type": "text", "text": "What is this?"}))
    assert (media.images, media.videos) == ([], [source])
    assert (media.video_metadata, media.video_options) == ([None], [{}])


PARTS = [
    {"type": type, key: value} if type else {key: value}
    for type in (None, "text", "image", "image_url", "video", "video_url", "picture")
    for key in ("image", "image_url", "video", "video_url", "url", "path", "text")
    for value in ("a", {"url": "a"}, None, "")
]
PARTS += [
    {"image": "a", "video": "b"},
    {"type": "video", "image": "a"},
    {"type": "text", "image_url": "a", "video": "b"},
]


def test_the_template_sees_media_in_the_same_parts():
    for part in PARTS:
        part = {"text": "b", **part}
        prompt = processor().apply_chat_template(user(part))
        placeholders = {"image": prompt.count("<|image|>"), "video": prompt.count("<|video|>")}
        assert placeholders == {kind: int(media_kind(part) == kind) for kind in ("image", "video")}, part


def test_media_become_arguments_of_the_call():
    video = {"type": "video", "video": "a.mp4", "num_frames": 4, "timestamps": [0.0]}
    media = [find_media(user({"image": "0"}, video)), find_media(user("text")), find_media(user({"video": "1.mp4"}))]
    assert media_arguments(media, {"padding": True}) == {
        "padding": True,
        "images": ["0"],
        "videos": ["a.mp4", "1.mp4"],
        "video_metadata": [{"timestamps": [0.0]}, None],
        "per_video_options": [{"num_frames": 4}, {}],
    }
    assert media_arguments(media, {"video_metadata": "own"})["video_metadata"] == "own"
    assert media_arguments(media[1:2], {}) == {"images": None, "videos": None}
    with pytest.raises(ValueError, match=r"\['images'\] given as a keyword argument, beside messages"):
        media_arguments(media, {"images": ["1"]})


def test_what_messages_say_of_videos_and_what_the_call_says():
    """Metadata of the call override those of messages, options of parts those of the call; null is nothing said."""
    known, own = {"fps": 30}, {"num_frames": 4}
    parts = {"type": "video", "video": "a.mp4", **own, "timestamps": [0.0]}, {"type": "video", "video": "b.mp4"}
    media = [find_media(user(*parts))]
    alone = media_arguments(media, {})
    of_call = [{"num_frames": 8, "max_fps": 1}, {"max_fps": 2}]
    for name, said, expected in (
        ("video_metadata", None, [{"timestamps": [0.0]}, None]),
        ("video_metadata", [known, None], [known, None]),
        ("video_metadata", [None, known], [{"timestamps": [0.0]}, known]),
        ("per_video_options", None, [own, {}]),
        ("per_video_options", [None, {"max_fps": 2}], [own, {"max_fps": 2}]),
        ("per_video_options", of_call, [{"num_frames": 4, "max_fps": 1}, {"max_fps": 2}]),
    ):
        assert media_arguments(media, {name: said}) == {**alone, name: expected}
        nested = {"videos_kwargs": {name: said, "clip": (0, 1)}}
        found = media_arguments(media, nested)
        assert found == {**alone, name: expected, "videos_kwargs": {"clip": (0, 1)}}
        assert nested == {"videos_kwargs": {name: said, "clip": (0, 1)}}
        if said is not None:
            with pytest.raises(ValueError, match=f"`{name}` is given twice: in `videos_kwargs` and beside it"):
                media_arguments(media, {name: said, **nested})
    with pytest.raises(ValueError, match=r"2 video\(s\), but 1 entries in `per_video_options`"):
        media_arguments(media, {"per_video_options": [{}]})


def test_images_of_all_turns_in_order():
    conversation = [
        {"role": "subtitle", "content": "said"},
        {"role": "system", "content": ({"type": "image", "image": "0"},)},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "1"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "video", "video": "2"}, {"type": "image", "image": "3"}, "bare text"]},
        {"role": "assistant", "content": None},
        {"role": "user"},
    ]
    media = find_media(conversation)
    assert (media.images, media.videos) == (["0", "1", "3"], ["2"])


def test_options_of_a_video_part():
    part = {
        "type": "video",
        "video": "a.mp4",
        "clip": [1, 2],
        "num_frames": 4,
        "max_fps": 3,
        "frame_sample_mode": "fps",
        "sampling_fps": 1,
        "backend": "pyav",
        "unknown": 1,
    }
    media = find_media(user(part, {"type": "video", "video": "b.mp4", "video_backend": "decord"}))
    first = {name: part[name] for name in ("clip", "num_frames", "max_fps", "frame_sample_mode", "sampling_fps")}
    assert media.video_options == [{**first, "video_backend": "pyav"}, {"video_backend": "decord"}]


def test_keys_that_a_data_set_filled_with_null_are_not_there():
    filled = {
        "image": None,
        "image_url": None,
        "video": None,
        "text": None,
        "clip": None,
        "max_fps": None,
        "fps": None,
    }
    media = find_media(
        user({**filled, "type": "text", "text": "x"}, {**filled, "type": "image", "image": "a.png"})
        + user({**filled, "type": "video", "video": "a.mp4"})
    )
    assert media.images == ["a.png"]
    assert media.videos == ["a.mp4"]
    assert media.video_metadata == [None]
    assert media.video_options == [{}]


def test_a_rate_beside_a_file_asks_for_that_sampling_and_beside_frames_tells_theirs():
    frames = [[[0]]]
    media = find_media(
        user({"type": "video", "video": "a.mp4", "fps": 1}, {"type": "video", "video": frames, "fps": 2})
    )
    assert media.video_options == [{"fps": 1}, {}]
    assert media.video_metadata == [None, {"fps": 2}]


@pytest.mark.parametrize("conversation", ["hello", {"role": "user"}, ["hello"], None])
def test_what_is_no_conversation(conversation):
    with pytest.raises(ValueError, match=r"A conversation is a list of messages such as .* found "):
        find_media(conversation)


@pytest.mark.parametrize(
    ("said", "metadata"),
    [
        ({}, None),
        ({"video_metadata": {"fps": 5.0}}, {"fps": 5.0}),
        ({"metadata": {"fps": 5.0}}, {"fps": 5.0}),
        ({"fps": 5.0}, {"fps": 5.0}),
        ({"timestamps": [0.0, 0.5]}, {"timestamps": [0.0, 0.5]}),
        ({"timestamps": None, "fps": None}, None),
        ({"fps": 4.0, "video_metadata": {"fps": 5.0, "duration": 2.0}}, {"fps": 4.0, "duration": 2.0}),
    ],
)
def test_metadata_of_a_video_part(said, metadata):
    part = {"type": "video", "video": [[[0]]], **said}
    assert find_media(user(part)).video_metadata == [metadata]


def test_null_metadata_hide_no_others():
    for empty, key in (("video_metadata", "metadata"), ("metadata", "video_metadata")):
        part = {"type": "video", "video": [[[0]]], empty: None, key: {"fps": 30}}
        assert find_media(user(part)).video_metadata == [{"fps": 30}]


def test_metadata_object_of_a_video_part():
    known = VideoMetadata(total_num_frames=10, fps=5.0)
    assert find_media(user({"type": "video", "video": "a", "metadata": known})).video_metadata == [known]
    (merged,) = find_media(user({"type": "video", "video": [[[0]]], "metadata": known, "fps": 2.0})).video_metadata
    assert (merged["total_num_frames"], merged["fps"]) == (10, 2.0)
    assert known.fps == 5.0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "image"},
            "Part 1 of message 2, an image, has no source; expected one of the keys ['image', 'image_url', 'url', "
            "'path', 'base64']. To pass images separately, render with `tokenize=False` and call the processor with "
            "`images=`.",
        ),
        ({"type": "image", "image": None}, "Part 1 of message 2, an image, has no source;"),
        ({"type": "video"}, "Part 1 of message 2, a video, has no source; expected one of the keys ['video', "),
    ],
)
def test_images_without_a_source(part, message):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        find_media([*turns, *user({"type": "text", "text": "c"}, part)])


CONVERSATION = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("conversation", "batch"),
    [
        (CONVERSATION, False),
        (tuple(CONVERSATION), False),
        ([], False),
        ([CONVERSATION], True),
        ((CONVERSATION, CONVERSATION), True),
        ([tuple(CONVERSATION)], True),
        (SimpleNamespace(messages=CONVERSATION), False),
        ([SimpleNamespace(messages=CONVERSATION)], True),
    ],
)
def test_one_conversation_or_several(conversation, batch):
    assert is_batch(conversation) == batch


def test_objects_that_hold_messages():
    """Pipelines wrap a conversation in an object."""
    assert messages_of(SimpleNamespace(messages=CONVERSATION)) == CONVERSATION
    wrapped = SimpleNamespace(messages=user({"type": "image", "image": "a.png"}))
    assert find_media(wrapped).images == ["a.png"]


def test_messages_are_left_as_they_were():
    part = {"type": "video", "video": "a.mp4", "fps": 2.0, "video_metadata": {"duration": 1.0}}
    conversation = user(part)
    find_media(conversation)
    assert conversation == user({"type": "video", "video": "a.mp4", "fps": 2.0, "video_metadata": {"duration": 1.0}})


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, r"^The content of message 1, from 'user', is 5; expected text or a list of parts\."),
        ([5], r"^Part 0 of message 1, from 'user', is 5; expected text or \{'type': 'text', 'text': \.\.\.\}, "),
        (["a", None], r"^Part 1 of message 1, from 'user', is None;"),
        ([["a"]], r"^Part 0 of message 1, from 'user', is \['a'\];"),
        ([{"type": "audio", "audio": "a.mp3"}], r"^Part 0 of message 1 is of type 'audio' with the keys \['type', 'a"),
        ([{"type": "document", "text": "a"}], r"^Part 0 of message 1 is of type 'document'"),
        ([{"type": "text"}], r"^Part 0 of message 1 is of type 'text' with the keys \['type'\]; expected"),
        ([{"type": "text", "text": None}], r"^Part 0 of message 1 is of type 'text' with the keys \['type'\]"),
        ([{}], r"^Part 0 of message 1 is of type None"),
        (
            [{"image": "a.png", "max_crops": 2}],
            r"^Part 0 of message 1 has the option 'max_crops', which image parts do",
        ),
        (
            [{"image": "a.png", "num_frames": 2}],
            r"^Part 0 of message 1 has the option 'num_frames', which image parts",
        ),
        (
            [{"video": "a.mp4", "max_crops": 2}],
            r"^Part 0 of message 1 has the option 'max_crops', which video parts do",
        ),
        (
            [{"video": "a.mp4", "nframes": 8}],
            r"^Part 0 of message 1 has the key 'nframes', which nothing reads; did you mean 'num_frames'\?",
        ),
        ([{"video": "a.mp4", "num_frame": 8}], r"has the key 'num_frame', .* did you mean 'num_frames'\?"),
        ([{"video": "a.mp4", "video_start": 1.0}], r"has the key 'video_start', .* did you mean 'clip'\?"),
        (
            [{"image": "a.png", "min_pixels": 50}],
            r"key 'min_pixels', .* mean 'max_crops', as an option of the call\?",
        ),
        ([{"text": "a", "fps": 2}], r"^Part 0 of message 1 has the option 'fps', which text parts do not have\."),
    ],
)
def test_parts_that_would_vanish(content, message):
    conversation = [{"role": "system", "content": "a"}, {"role": "user", "content": content}]
    with pytest.raises(ValueError, match=message):
        processor().apply_chat_template(conversation, tokenize=True)


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_a_template_has_to_read_what_it_is_given(name):
    with pytest.raises(ValueError, match=rf"^`{name}` was given, but the chat template has no place for it\."):
        processor().apply_chat_template(user({"text": "a"}), **{name: [{"text": "b"}]})
    assert processor().apply_chat_template(user({"text": "a"}), **{name: []}) == "<|im_start|>user\na<|im_end|>\n"
