"""Images and videos of chat messages.

The rule is that of the chat template: a part is an image or a video by its type, or by a value under one of the keys
`image`, `image_url`, `video`, `video_url`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transformers.utils import logging

from molmo2.image.loading import is_encoded
from molmo2.video.processing import options_of_each

logger = logging.get_logger(__name__)

# Keys that may hold the source of a part, by its kind.
SOURCE_KEYS = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path", "base64"),
}
# Options that a video part may carry, and their names in the video processor.
VIDEO_OPTIONS = {
    "num_frames": "num_frames",
    "max_fps": "max_fps",
    "frame_sample_mode": "frame_sample_mode",
    "sampling_fps": "sampling_fps",
    "clip": "clip",
    "backend": "video_backend",
    "video_backend": "video_backend",
}
VIDEO_PART_OPTIONS = frozenset({*VIDEO_OPTIONS, "fps"})
PART_OPTIONS = VIDEO_PART_OPTIONS | {"max_crops", "overlap_margins", "pooling_size", "key_frame_interval"}
# Keys that image and video parts may have beside their sources and options.
DESCRIBING_KEYS = {"type", "text", "style", "video_metadata", "metadata", "timestamps"}
# What other models call such options, and where ours are: in the part, or in the call.
FOREIGN_OPTIONS = {
    **dict.fromkeys(("max_frames", "nframes", "num_sampled_frames"), "num_frames"),
    **dict.fromkeys(("video_start", "video_end", "start_time", "end_time", "start", "end"), "clip"),
    **dict.fromkeys(("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"), "max_crops"),
}
SIMILARITY = 0.8  # (0..1) from which an unknown key counts as a misspelt one
PART_EXAMPLES = "{'type': 'text', 'text': ...}, {'type': 'image', 'image': ...} or {'type': 'video', 'video': ...}"


@dataclass
class ConversationMedia:
    """Images and videos of one conversation in the order of its messages, as given: paths, URLs, arrays, ...

    Attributes:
        video_metadata: For each video the metadata in its part (`video_metadata`, `timestamps`, `fps`), or None.
        video_options: For each video the options of the video processor in its part.
    """

    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    video_metadata: list[Any] = field(default_factory=list)
    video_options: list[dict[str, Any]] = field(default_factory=list)


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations, not a single one."""
    if not isinstance(conversation, (list, tuple)) or not conversation:
        return False
    return isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")


def messages_of(conversation: Any) -> list[Mapping[str, Any]]:
    """The messages of a conversation: a list, or an object with `messages`, such as the `Chat` of a pipeline.

    Raises:
        ValueError: It is neither, or a message has content that is neither text nor a list of parts.
    """
    messages = getattr(conversation, "messages", conversation)
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f"A conversation is a list of messages such as {{'role': 'user', 'content': ...}}; found {messages!r:.80}."
        )
    for number, message in enumerate(messages):
        _require_content(message, f"message {number}, from {message.get('role')!r:.40},")
    return list(messages)


def _require_content(message: Mapping[str, Any], where: str) -> None:
    """Refuses content that a template would drop; what it says about null and single objects is more to the point."""
    content = message.get("content", "")
    if not isinstance(content, (str, list, tuple, Mapping)) and content is not None:
        raise ValueError(f"The content of {where} is {content!r:.80}; expected text or a list of parts.")
    for index, part in enumerate(content if isinstance(content, (list, tuple)) else []):
        if not isinstance(part, (str, Mapping)):
            raise ValueError(f"Part {index} of {where} is {part!r:.80}; expected text or {PART_EXAMPLES}.")


def _require_known(part: Mapping[str, Any], kind: str | None, where: str) -> None:
    """Refuses a part without text, image or video, and options that a part of its kind does not have."""
    if kind is None and (part.get("type") not in (None, "text") or part.get("text") is None):
        keys = [key for key in part if part[key] is not None]
        raise ValueError(
            f"{where} is of type {part.get('type')!r:.40} with the keys {keys!r:.80}; expected {PART_EXAMPLES}."
        )
    options = [key for key in PART_OPTIONS if key in part and part[key] is not None]
    misplaced = sorted(option for option in options if kind != "video" or option not in VIDEO_PART_OPTIONS)
    if misplaced:
        raise ValueError(
            f"{where} has the option {misplaced[0]!r}, which {kind or 'text'} parts do not have. Pass it to the call, "
            "where it holds for all images or videos."
        )
    if kind is not None:
        for key in (key for key in part if part[key] is not None):
            _require_read(key, where)


def _require_read(key: str, where: str) -> None:
    """Refuses a key of an image or video part that was meant for an option, and warns of others that are not read."""
    options = sorted(PART_OPTIONS | DESCRIBING_KEYS | {key for keys in SOURCE_KEYS.values() for key in keys})
    if key in options:
        return
    meant = [FOREIGN_OPTIONS[key]] if key in FOREIGN_OPTIONS else get_close_matches(str(key), options, 1, SIMILARITY)
    if meant:
        place = "" if meant[0] in VIDEO_PART_OPTIONS or meant[0] not in PART_OPTIONS else ", as an option of the call"
        raise ValueError(f"{where} has the key {key!r}, which nothing reads; did you mean {meant[0]!r}{place}?")
    logger.warning_once(f"Image and video parts of messages have no key {key!r}; it is ignored.")


def media_kind(part: Mapping[str, Any]) -> str | None:
    """Kind of media that a part stands for: "image", "video" or None."""

    def carries(key: str) -> bool:
        return part.get(key) is not None  # data sets fill keys that a part lacks with null

    if part.get("type") in ("image", "image_url") or carries("image") or carries("image_url"):
        return "image"
    if part.get("type") in ("video", "video_url") or carries("video") or carries("video_url"):
        return "video"
    return None


def media_source(part: Mapping[str, Any], kind: str) -> Any:
    """The image or video of a part: a path, URL, array, ...; None if the part has none.

    Args:
        kind: "image" or "video", as `media_kind` says.
    """
    for key in SOURCE_KEYS[kind]:
        value = part.get(key)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if value is not None:
            return value
    return None


def _metadata(part: Mapping[str, Any], video: Any) -> Any:
    given = part.get("video_metadata")
    given = part.get("metadata") if given is None else given
    keys = ("timestamps",) if is_encoded(video) else ("timestamps", "fps")
    said = {key: part[key] for key in keys if part.get(key) is not None}
    if not said:
        return given
    return {**(given if isinstance(given, Mapping) else vars(given) if given is not None else {}), **said}


def _options(part: Mapping[str, Any], video: Any) -> dict[str, Any]:
    options = {VIDEO_OPTIONS[key]: part[key] for key in VIDEO_OPTIONS if part.get(key) is not None}
    if is_encoded(video) and part.get("fps") is not None:
        options["fps"] = part["fps"]  # of frames it is their own rate, of a file the rate to sample at
    return options


def find_media(conversation: Any) -> ConversationMedia:
    """Collect the images and videos of one conversation.

    Raises:
        ValueError: An image or video part has no source, a part is neither text nor image nor video, or has an option
            that it cannot have; the message says where, and what was expected.
    """
    media = ConversationMedia()
    for number, message in enumerate(messages_of(conversation)):
        content = message.get("content")
        parts = content if isinstance(content, (list, tuple)) else []
        for index, part in enumerate(parts):
            if isinstance(part, str):
                continue
            kind = media_kind(part)
            _require_known(part, kind, f"Part {index} of message {number}")
            if kind is None:
                continue
            source = media_source(part, kind)
            if source is None:
                raise ValueError(
                    f"Part {index} of message {number}, {'an' if kind == 'image' else 'a'} {kind}, has no source; "
                    f"expected one of the keys {list(SOURCE_KEYS[kind])}. To pass {kind}s separately, render with "
                    f"`tokenize=False` and call the processor with `{kind}s=`."
                )
            if kind == "image":
                media.images.append(source)
            else:
                media.videos.append(source)
                media.video_metadata.append(_metadata(part, source))
                media.video_options.append(_options(part, source))
    return media


def media_arguments(conversations: Sequence[ConversationMedia], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Molmo2Processor.__call__`: the media of conversations, and options of the call.

    `video_metadata` among the options overrides that of the messages; the options of a video part override those of
    its video in `per_video_options`.

    Raises:
        ValueError: The options contain images or videos, or `per_video_options` of another number of videos.
    """
    twice = sorted({"images", "videos"} & set(options))
    if twice:
        raise ValueError(
            f"{twice} given as a keyword argument, beside messages that name their own. Keep one of them."
        )
    nested = dict(options.get("videos_kwargs") or {})
    arguments = {
        **options,
        **({"videos_kwargs": nested} if nested else {}),
        "images": [image for media in conversations for image in media.images] or None,
        "videos": [video for media in conversations for video in media.videos] or None,
    }
    metadata = [entry for media in conversations for entry in media.video_metadata]
    own_options = [entry for media in conversations for entry in media.video_options]
    if any(entry is not None for entry in metadata):
        given = option_of_call("video_metadata", options.get("video_metadata"), nested)
        if isinstance(given, (list, tuple)) and len(given) == len(metadata):
            given = [own if entry is None else entry for entry, own in zip(given, metadata)]
        arguments["video_metadata"] = metadata if given is None else given
    if any(own_options):
        given = option_of_call("per_video_options", options.get("per_video_options"), nested)
        of_each = (options_of_each(entries, len(own_options)) for entries in (given, own_options))
        arguments["per_video_options"] = [{**of_call, **own} for of_call, own in zip(*of_each)]
    return arguments


def option_of_call(name: str, beside: Any, videos_kwargs: dict[str, Any]) -> Any:
    """An option given beside `videos_kwargs` or, and then removed from there, in it; None where it is in neither.

    Raises:
        ValueError: It is given twice.
    """
    nested = videos_kwargs.pop(name, None)
    if nested is not None and beside is not None:
        raise ValueError(f"`{name}` is given twice: in `videos_kwargs` and beside it. Keep one of them.")
    return nested if beside is None else beside
