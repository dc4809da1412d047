"""Vectors of images, videos, frames and texts, and the nearest of them.

    rows = embed(model, processor, images=paths, pooling="last", prompt="What colour is the object?")   # (n, D)
    best = nearest(rows[0], rows).indices

    rows, times = embed(model, processor, videos="clip.mp4", per_frame=True)   # (frames, D), seconds

They are pooled hidden states of a model that was trained to answer, not to compare: `docs/embeddings.md` says what
they are good for.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from molmo2.grounding import prompts
from molmo2.model.vision_inputs import joined_features
from molmo2.tools.ask import as_list, prepare_inputs, user_turn
from molmo2.video.processing import clips_per_video

POOLINGS = ("mean", "max", "last")
FIRST_TOKEN = ("cls", "first")  # names of a pooling that other kinds of models have
FRAME_SECONDS = 0.0  # printed before every single frame, so that equal frames have equal vectors at any time


class FrameEmbeddings(NamedTuple):
    """The vectors of the sampled frames of one video.

    Attributes:
        rows: (frames, D) float32, of length 1.
        times: (frames,) float64, seconds, as a prompt with the whole clip prints them.
    """

    rows: np.ndarray
    times: np.ndarray


class Neighbours(NamedTuple):
    """The rows that are nearest to one query, or to each of several; the nearest first.

    Attributes:
        indices: (k,) or (queries, k) int64.
        similarities: Cosines, -1..1, of the same shape, float32.
    """

    indices: np.ndarray
    similarities: np.ndarray


def check_pooling(pooling: Any) -> str:
    """The pooling, if there is such a one.

    Raises:
        ValueError: There is not, or it is that of the first token.
    """
    if pooling in FIRST_TOKEN:
        raise ValueError(
            f"There is no pooling {pooling!r}: Molmo2 is causal, so its first token sees nothing of the image or "
            'video and has the same vector for all. Use "last", the token that sees the whole prompt, "mean" or "max".'
        )
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` is {pooling!r}; expected one of {POOLINGS}.")
    return pooling


def embed(
    model: Any,
    processor: Any,
    *,
    images: Any = None,
    videos: Any = None,
    texts: Any = None,
    pooling: str = "mean",
    per_frame: bool = False,
    prompt: Any = None,
    batch_size: int = 8,
    processor_kwargs: dict[str, Any] | None = None,
) -> Any:
    """Vectors of images, of videos or of texts.

    Args:
        model: In `eval` mode.
        images: An image or a list, in any form that the processor accepts; a list in the list is one row of several
            images.
        videos: A video or a list.
        texts: A text or a list.
        pooling: Of the last hidden states of the language model. "last": of the last token, which sees the whole
            prompt; the question decides what it is about. "mean", "max": over all tokens from the first visual one to
            the end; of a text, over all but the first token, which is the same for all.
        per_frame: A vector for each sampled frame of the videos. Each frame is read alone: it knows neither its
            neighbours nor its time.
        prompt: Question beside each image, video or frame, as text or `Prompt`; None for "Describe this image.".
        batch_size: Rows in one call of the model, or frames.
        processor_kwargs: Options of the processor: num_frames, max_crops, clip, ...
    Returns:
        (n, D) float32, rows of length 1 in the order of the items. With `per_frame` a `FrameEmbeddings`, for a list of
        videos a list of them.
    Raises:
        ValueError: Not exactly one of images, videos and texts; unknown pooling; frames of something else than videos;
            a prompt for texts; vectors that are not finite.
    """
    given = {"images": images, "videos": videos, "texts": texts}
    kinds = [name for name, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise ValueError(f"Pass exactly one of `images`, `videos` and `texts`; found {kinds or 'none'}.")
    (kind,) = kinds
    check_pooling(pooling)
    if per_frame and kind != "videos":
        raise ValueError(f"`per_frame` is for videos; found `{kind}`.")
    if prompt is not None and kind == "texts":
        raise ValueError("`prompt` is the question beside images and videos; texts stand alone. Put it into `texts`.")
    items, options = as_list(given[kind]), dict(processor_kwargs or {})
    question = str(prompts.describe("video" if kind == "videos" else "image") if prompt is None else prompt)
    if kind == "texts":
        conversations = [user_turn(text, [], []) for text in items]
    elif kind == "images":
        if empty := [place for place, image in enumerate(items) if isinstance(image, (list, tuple)) and not image]:
            raise ValueError(f"`images[{empty[0]}]` is an empty list; a row needs an image. Leave it out.")
        conversations = [user_turn(question, as_list(image), []) for image in items]
    else:
        clips = clips_per_video(options.pop("clip", None), len(items))
        conversations = [video_turn(question, video, clip) for video, clip in zip(items, clips)]
    if not per_frame:
        return embed_conversations(
            model, processor, conversations, pooling=pooling, batch_size=batch_size, processor_kwargs=options
        )
    found = [_embed_frames(model, processor, turn, pooling, batch_size, options) for turn in conversations]
    return found if isinstance(videos, list) else found[0]


def embed_conversations(
    model: Any,
    processor: Any,
    conversations: Sequence[Any],
    *,
    pooling: str = "mean",
    batch_size: int = 8,
    processor_kwargs: dict[str, Any] | None = None,
) -> np.ndarray:
    """`embed` for conversations of any form, in batches: (n, D) float32."""
    check_pooling(pooling)
    rows = [
        pooled_states(model, prepare_inputs(model, processor, batch, processor_kwargs), pooling)
        for batch in _batches(list(conversations), batch_size)
    ]
    return np.concatenate(rows) if rows else np.empty((0, _width(model)), dtype=np.float32)


def pooled_states(model: Any, inputs: Any, pooling: str) -> np.ndarray:
    """The vector of each row of a batch, (B, D) float32, of length 1.

    Args:
        inputs: As the processor returns them for prompts, padded on either side; all rows with media, or none.
    Raises:
        ValueError: A vector is not finite, or a row has no media beside rows with some.
    """
    inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with torch.inference_mode():
        hidden = _backbone(model)(**inputs, use_cache=False).last_hidden_state  # (B, S, D)
        is_token, is_visual = inputs["attention_mask"].bool(), inputs["token_type_ids"].bool()
        # (B, S): from the first visual token on; texts have none, and start behind the first token
        started = is_visual.cumsum(1) > 0 if bool(is_visual.any()) else is_token.cumsum(1) > 1
        is_kept = (is_token & started).to(hidden.device)  # the last of several devices
        if not bool(is_kept.any(1).all()):
            raise ValueError(
                "A row has no image or video beside rows that have one. Embed rows without any as `texts`."
            )
        rows = torch.stack([_pool(own[kept], pooling) for own, kept in zip(hidden, is_kept)])
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"Some vectors are not finite in {hidden.dtype}. Load the model in bfloat16 or float32: "
            '`load(folder, dtype="bfloat16")`.'
        )
    return torch.nn.functional.normalize(rows, dim=-1).cpu().numpy()


def nearest(query: Any, rows: Any, k: int = 10) -> Neighbours:
    """The rows with the largest cosine similarity to a query, or to each of several.

    Args:
        query: (D,) or (queries, D), of any length.
        rows: (n, D), as `embed` returns them, or of any length.
        k: How many; all, if there are fewer. Rows of equal similarity keep their order.
    Raises:
        ValueError: Widths that differ, rows that are zero or not finite, `k` below 1.
    """
    if k < 1:
        raise ValueError(f"`k` is {k}; it has to be at least 1.")
    queries, table = _unit_rows(query, "query"), _unit_rows(rows, "rows")
    if np.ndim(rows) != 2:
        raise ValueError(f"`rows` has the shape {np.shape(rows)}; expected (n, D).")
    if queries.shape[1] != table.shape[1]:
        raise ValueError(
            f"`query` has the width {queries.shape[1]} and `rows` {table.shape[1]}: they come from different models."
        )
    similarities = queries @ table.T
    indices = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    found = Neighbours(indices, np.take_along_axis(similarities, indices, axis=1))
    return found if np.ndim(query) == 2 else Neighbours(found.indices[0], found.similarities[0])


def video_turn(question: Any, video: Any, clip: tuple[float, float | None] | None = None) -> list[dict[str, Any]]:
    """One user turn with a video, or with its part from start to end in seconds."""
    (turn,) = user_turn(question, [], [video])
    if clip is not None:
        turn["content"][0]["clip"] = clip
    return [turn]


def _embed_frames(
    model: Any, processor: Any, conversation: Any, pooling: str, batch_size: int, options: dict[str, Any]
) -> FrameEmbeddings:
    """Each sampled frame of the conversation's video as a clip of one frame."""
    inputs = prepare_inputs(model, processor, [conversation], {**options, "return_metadata": True})
    (metadata,) = inputs["video_metadata"]
    if "video_features" in inputs:
        features = joined_features(inputs["video_features"])
    else:
        names = ("pixel_values_videos", "video_token_pooling", "video_grids")
        with torch.inference_mode():
            output = model.get_video_features(**{name: inputs[name].to(model.device) for name in names})
        features = joined_features(output)
    grids = [(1, rows, cols) for frames, rows, cols in inputs["video_grids"].tolist() for _ in range(frames)]
    vectors = features.split([rows * cols for _, rows, cols in grids])  # type: ignore[union-attr]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    rows = []
    for batch in _batches(list(zip(grids, vectors)), batch_size):
        frames = processor.encode_prompts(
            [text] * len(batch),
            videos=[([grid], [FRAME_SECONDS]) for grid, _ in batch],
            return_tensors="pt",
            padding=True,
            allow_special_tokens=options.get("allow_special_tokens"),
        )
        frames["video_features"] = torch.cat([own for _, own in batch])
        rows.append(pooled_states(model, frames, pooling))
    return FrameEmbeddings(np.concatenate(rows), np.array(metadata.timestamps, dtype=np.float64))


def _backbone(model: Any) -> Any:
    """The model without its output matrix, which nothing here needs; adapters stay in it."""
    adapted = getattr(model, "get_base_model", None)  # PEFT
    return (model if adapted is None else adapted()).base_model


def _width(model: Any) -> int:
    return model.config.get_text_config().hidden_size


def _pool(states: Tensor, pooling: str) -> Tensor:
    """(D,) float32 of (tokens, D)."""
    if pooling == "last":
        return states[-1].float()
    return states.float().mean(0) if pooling == "mean" else states.float().amax(0)


def _unit_rows(vectors: Any, name: str) -> np.ndarray:
    """(n, D) float32 of length 1, of one vector or several.

    Raises:
        ValueError: One cannot be scaled to length 1.
    """
    table = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(wrong):
        raise ValueError(f"`{name}` has no direction in row(s) {wrong[:8].tolist()}: they are zero or not finite.")
    return table / lengths


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    if size < 1:
        raise ValueError(f"`batch_size` is {size}; it has to be at least 1.")
    return (items[start : start + size] for start in range(0, len(items), size))
