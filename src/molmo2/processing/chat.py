"""Finds the pictures in chat messages, by the rule of the chat template: a part counts as a picture by its type, or by
carrying a value under one of the keys `image`, `image_url`, `video`, `video_url`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molmo2.image.loading import is_encoded

IMAGE_SOURCES = ("image", "image_url", "url", "path", "base64")
VIDEO_SOURCES = ("video", "video_url", "url", "path")
# Options that a video part may carry for itself, and what the video processor calls them.
VIDEO_OPTIONS = {
    "num_frames": "num_frames",
    "max_fps": "max_fps",
    "frame_sample_mode": "frame_sample_mode",
    "sampling_fps": "sampling_fps",
    "clip": "clip",
    "backend": "video_backend",
    "video_backend": "video_backend",
}


@dataclass
class ConversationMedia:
    """Pictures of one conversation in the order of its messages, as they were given: paths, URLs, arrays, ...

    Attributes:
        video_metadata: For each video what its part says about it (`video_metadata`, `timestamps`, `fps`), or None.
        video_options: For each video the options of the video processor that its part carries.
    """

    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    video_metadata: list[Any] = field(default_factory=list)
    video_options: list[dict[str, Any]] = field(default_factory=list)


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations rather than one."""
    if not isinstance(conversation, (list, tuple)) or not conversation:
        return False
    return isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")


def messages_of(conversation: Any) -> list[Mapping[str, Any]]:
    """The messages of a list or of an object that holds them, such as a pipeline's chat.

    Raises:
        ValueError: If there are no messages in it.
    """
    messages = getattr(conversation, "messages", conversation)
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f"A conversation is a list of messages such as {{'role': 'user', 'content': ...}}; found {messages!r:.80}."
        )
    return list(messages)


def picture_kind(part: Mapping[str, Any]) -> str | None:
    """What a part stands for: "image", "video" or None."""

    def carries(key: str) -> bool:
        return part.get(key) is not None  # data sets fill keys that a part lacks with null

    if part.get("type") in ("image", "image_url") or carries("image") or carries("image_url"):
        return "image"
    if part.get("type") in ("video", "video_url") or carries("video") or carries("video_url"):
        return "video"
    return None


def _source(part: Mapping[str, Any], keys: Sequence[str], kind: str, where: str) -> Any:
    for key in keys:
        value = part.get(key)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if value is not None:
            return value
    raise ValueError(
        f"{where}, {'an' if kind == 'image' else 'a'} {kind}, has no source; expected one of the keys {list(keys)}. "
        f"To pass {kind}s separately, render with `tokenize=False` and call the processor with `{kind}s=`."
    )


def _metadata(part: Mapping[str, Any], video: Any) -> Any:
    given = part.get("video_metadata", part.get("metadata"))
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
    """Collect the pictures of one conversation.

    Raises:
        ValueError: For a picture part without a source, naming the message and the keys that are looked for.
    """
    media = ConversationMedia()
    for number, message in enumerate(messages_of(conversation)):
        content = message.get("content")
        parts = content if isinstance(content, (list, tuple)) else []
        for place, part in enumerate(parts):
            kind = picture_kind(part) if isinstance(part, Mapping) else None
            where = f"Part {place} of message {number}"
            if kind == "image":
                media.images.append(_source(part, IMAGE_SOURCES, kind, where))
            elif kind == "video":
                video = _source(part, VIDEO_SOURCES, kind, where)
                media.videos.append(video)
                media.video_metadata.append(_metadata(part, video))
                media.video_options.append(_options(part, video))
    return media


def media_arguments(conversations: Sequence[ConversationMedia], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Molmo2Processor.__call__`: the media of conversations, and options of the call.

    `video_metadata` among the options counts before what the messages say; of other options the messages count.

    Raises:
        ValueError: If the options name media too.
    """
    twice = sorted({"images", "videos"} & set(options))
    if twice:
        raise ValueError(
            f"{twice} given as a keyword argument, beside messages that name their own. Keep one of them."
        )
    arguments = {
        **options,
        "images": [image for media in conversations for image in media.images] or None,
        "videos": [video for media in conversations for video in media.videos] or None,
    }
    metadata = [entry for media in conversations for entry in media.video_metadata]
    per_video_options = [entry for media in conversations for entry in media.video_options]
    if any(entry is not None for entry in metadata):
        arguments.setdefault("video_metadata", metadata)
    if any(per_video_options):
        arguments["per_video_options"] = per_video_options
    return arguments
