r"""Training examples: a conversation, or a tree of conversations, as one row of tokens with labels and its media.

    <bos> <image tokens> <|im_start|>user\\nWhat is it?<|im_end|>\\n<|im_start|>assistant\\n A ship. <|im_end|>
    labels                                                                                  ^^^^^^^^^^^^^^^^^

The labels are what the chat template puts between `{% generation %}` and `{% endgeneration %}`: the answers and their
closing tokens. Several conversations about the same images or videos form a tree: each is tokenized as if it were
alone, and their common prefix is stored once (see `molmo2.model.packing`), so a tree has the loss of its branches.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from molmo2.model.loss import IGNORED
from molmo2.processing.chat import (
    SOURCE_KEYS,
    ConversationMedia,
    find_media,
    is_batch,
    media_arguments,
    media_kind,
    media_source,
    messages_of,
)
from molmo2.processing.prompt_tokens import timed_grids, truncate
from molmo2.training.weighting import TokenWeighting, is_answer, message_weights, role_of
from molmo2.video.loading import is_one_video

Message = Mapping[str, Any]
Conversation = list[Message]


@dataclass(frozen=True)
class LabelledTokens:
    """The tokens of one conversation with their labels.

    Attributes:
        ids: Token ids, BOS included.
        labels: The ids of target tokens, -100 elsewhere.
        weights: Loss weight of each label, 0 elsewhere; None without weights.
    """

    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None

    def truncated(self, max_length: int | None, visual_ids: frozenset[int]) -> "LabelledTokens":
        """The first `max_length` tokens; see `molmo2.processing.prompt_tokens.truncate`."""
        if max_length is None or len(self.ids) <= max_length:
            return self
        ids = truncate(self.ids, max_length, "right", visual_ids)
        return LabelledTokens(ids, self.labels[: len(ids)], None if self.weights is None else self.weights[: len(ids)])

    def first_target(self) -> int:
        """Index of the first label that is not ignored.

        Raises:
            ValueError: If all labels are ignored.
        """
        index = next((index for index, label in enumerate(self.labels) if label != IGNORED), None)
        if index is None:
            raise ValueError(
                f"There is nothing to learn in a conversation of {len(self.ids)} tokens: it needs an assistant "
                "message, with a `loss_weight` above 0, within `max_length`."
            )
        return index


def build_training_example(
    processor: Any,
    messages: Any,
    *,
    weighting: TokenWeighting | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """A conversation, or a tree of conversations, as one row to train on.

    Args:
        processor: A `Molmo2Processor`.
        messages: A conversation as for `apply_chat_template`, answers included. Or a list of conversations about the
            same images or videos, which become branches that do not attend to each other; the first one contains the
            media, the others contain the same or none. An assistant message may carry `loss_weight`, the weight of
            its tokens (0: it is context only), and any message a `style`.
        weighting: Loss weights of answers; None weighs all tokens equally.
        max_length: Maximum number of tokens of a conversation; longer ones are truncated at the end.
        options: Of the image and the video processor: `max_crops`, `num_frames`, ...; `allow_special_tokens` as for
            `apply_chat_template`.
    Returns:
        (S,) `input_ids`, `labels` (-100 on tokens that are not targets) int64, `token_type_ids` bool; with weights
        `loss_weights` float32; for a tree `branch_ids` int64; and the media tensors that the processor's call
        returns. `DataCollator` makes batches of such examples.
    Raises:
        ValueError: No answer, messages without role or content, a template without `{% generation %}`, branches with
            other media, visual tokens past `max_length`, weights that are not finite numbers from 0, and
            whatever the processor raises.
    """
    conversations = [
        _without_null_styles(messages_of(branch)) for branch in (messages if is_batch(messages) else [messages])
    ]
    for branch in conversations:
        _check_contents(branch)
    media = find_media(conversations[0])
    conversations = [
        conversations[0],
        *(_with_media_of(conversations[0], media, branch) for branch in conversations[1:]),
    ]
    for branch in conversations:
        if not any(is_answer(message) for message in branch):
            raise ValueError(
                f"A conversation of {len(branch)} message(s) has none from the assistant, so there is nothing to "
                "learn. Add the answer, as a message with the role `assistant`."
            )
    text_options = {"chat_template": chat_template, "allow_special_tokens": options.pop("allow_special_tokens", False)}
    features = _process_media(processor, media, options)
    encoded = _encode(processor, conversations, features, **text_options)
    features.pop("video_metadata", None)
    visual_ids = frozenset(processor.image_token_ids)
    rows = [
        _with_labels(branch, ids, mask, visual_ids, weighting).truncated(max_length, visual_ids)
        for branch, ids, mask in zip(conversations, *encoded)
    ]
    tensors = {name: torch.as_tensor(value) for name, value in features.items()}
    return {**_join_branches(rows, visual_ids), **tensors}


def _check_contents(messages: Conversation) -> None:
    """Reject messages that the template would render as an empty turn. An answer of "" is deliberate.

    Raises:
        ValueError: For a message without role or content, and an answer none of whose parts has a text.
    """
    for number, message in enumerate(messages):
        role = role_of(message)
        if "content" not in message:
            raise ValueError(
                f"Message {number}, from the {role}, has the keys {sorted(message)} and no `content`; "
                "expected text or a list of parts."
            )
        if is_answer(message) and isinstance(message["content"], (list, tuple)):
            texts = [part.get("text") if isinstance(part, Mapping) else part for part in message["content"]]
            if all(text is None for text in texts):
                raise ValueError(
                    f"Message {number}, an answer, has no text in its {len(texts)} part(s); expected one such as "
                    "{'type': 'text', 'text': 'A boat.'}."
                )


def _without_null_styles(messages: Conversation) -> Conversation:
    """Messages whose parts have no `style: None`, which datasets add and the template would render as "None: "."""

    def cleaned(part: Any) -> Any:
        is_null = isinstance(part, Mapping) and "style" in part and part["style"] is None
        return {key: value for key, value in part.items() if key != "style"} if is_null else part

    return [
        {**message, "content": [cleaned(part) for part in _parts(message)]} if _parts(message) else message
        for message in messages
    ]


def _process_media(processor: Any, media: ConversationMedia, options: dict[str, Any]) -> dict[str, Any]:
    """Arrays of the images and videos, and `video_metadata` with videos."""
    if not media.images and not media.videos:
        return {}
    videos = {**(options.get("videos_kwargs") or {}), "return_metadata": True}
    options = {**options, "videos_kwargs": videos, "return_tensors": None}
    return dict(processor(**media_arguments([media], options)))


def _encode(
    processor: Any,
    conversations: list[Conversation],
    features: Mapping[str, Any],
    chat_template: str | None,
    allow_special_tokens: bool,
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each conversation, and a mask that is 1 on answers; all conversations have the same media."""
    prompts, spans = processor.render_conversations(conversations, chat_template, return_assistant_tokens_mask=True)
    repeats = len(conversations)
    encoded = processor.encode_prompts(
        prompts,
        [*features.get("image_grids", [])] * repeats,
        timed_grids(features.get("video_grids", []), features.get("video_metadata", [])) * repeats,
        assistant_spans=spans,
        allow_special_tokens=allow_special_tokens,
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def _with_labels(
    messages: Conversation,
    ids: list[int],
    mask: list[int],
    visual_ids: frozenset[int],
    weighting: TokenWeighting | None,
) -> LabelledTokens:
    """Labels and weights of a conversation; each answer is a run of ones in the mask, headers separate them."""
    edges = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
    answers = list(zip(edges[::2], edges[1::2]))
    num_answers = sum(is_answer(message) for message in messages)
    if len(answers) != num_answers:
        raise ValueError(
            f"The chat template marks {len(answers)} answer(s) of {num_answers} message(s) from the assistant. Use "
            "a template that encloses assistant messages in `{% generation %}` and `{% endgeneration %}`."
        )
    labels = [token if is_target and token not in visual_ids else IGNORED for token, is_target in zip(ids, mask)]
    weights = message_weights(messages, [end - start for start, end in answers], weighting)
    if weights is None:
        return LabelledTokens(ids, labels)
    token_weights = [0.0] * len(ids)
    for (start, end), weight in zip(answers, weights):
        token_weights[start:end] = [weight] * (end - start)
    labels = [label if weight else IGNORED for label, weight in zip(labels, token_weights)]
    return LabelledTokens(ids, labels, token_weights)


def _join_branches(rows: list[LabelledTokens], visual_ids: frozenset[int]) -> dict[str, Tensor]:
    """One row of tokens: the common prefix once, then the rest of each branch."""
    first_targets = [row.first_target() for row in rows]
    shared = common_prefix_length([row.ids for row in rows], min(first_targets) - 1) if len(rows) > 1 else 0

    def joined(values: list[list[Any]]) -> list[Any]:
        return [*values[0][:shared], *(entry for row in values for entry in row[shared:])]

    ids = joined([row.ids for row in rows])
    example = {"input_ids": torch.tensor(ids), "labels": torch.tensor(joined([row.labels for row in rows]))}
    example["token_type_ids"] = torch.tensor([token in visual_ids for token in ids])
    if any(row.weights is not None for row in rows):
        weights = joined([[1.0] * len(row.ids) if row.weights is None else row.weights for row in rows])
        is_ignored = example["labels"] == IGNORED
        example["loss_weights"] = torch.tensor(weights, dtype=torch.float32).masked_fill(is_ignored, 0.0)
    if len(rows) > 1:
        lengths = torch.tensor([shared, *(len(row.ids) - shared for row in rows)])
        example["branch_ids"] = torch.arange(len(lengths)).repeat_interleave(lengths)
    return example


def common_prefix_length(rows: Sequence[Sequence[int]], max_length: int) -> int:
    """Number of leading tokens that all rows have in common, at most `max_length`.

    `max_length` excludes the targets and the token before the first one, because the first token of a branch is never
    a target (see `molmo2.model.loss.shift_labels`). So each branch keeps all targets of its answers.
    """
    prefix = np.asarray(rows[0][:max_length])
    for row in rows[1:]:
        differs = np.flatnonzero(prefix != np.asarray(row[: len(prefix)]))
        prefix = prefix[: differs[0]] if len(differs) else prefix
    return len(prefix)


# --- media of conversations ------------------------------------------------------------------------------------------


def _media_parts(messages: Iterable[Message]) -> list[Any]:
    """The image and video parts of a conversation."""
    parts = [part for message in messages for part in _parts(message)]
    return [part for part in parts if isinstance(part, Mapping) and media_kind(part) is not None]


def _is_same_source(one: Any, other: Any) -> bool:
    """Whether two parts show the same image or video, also where a dataset decoded it twice."""
    compared = (str, bytes, os.PathLike, PIL.Image.Image)
    return one is other or (isinstance(one, compared) and type(one) is type(other) and one == other)


def _with_media_of(first: Conversation, media: ConversationMedia, messages: Conversation) -> Conversation:
    """A further branch of a tree, with the media of the first one.

    Raises:
        ValueError: If it has media of its own.
    """
    own = find_media(messages)
    if own.images or own.videos:
        pairs = [*zip(own.images, media.images), *zip(own.videos, media.videos)]
        counts = (len(own.images), len(own.videos)), (len(media.images), len(media.videos))
        if counts[0] != counts[1] or not all(_is_same_source(*pair) for pair in pairs):
            raise ValueError(
                f"The first conversation has {counts[1][0]} image(s) and {counts[1][1]} video(s), another one has "
                f"{counts[0][0]} and {counts[0][1]}, or different ones. All branches of a tree have the same media: "
                "name them in the first conversation only, or pass the conversations one by one."
            )
        return messages
    return with_media_parts(messages, _media_parts(first))


def with_media_parts(messages: Conversation, parts: Sequence[Any]) -> Conversation:
    """The conversation with image and video parts prepended to its first user message."""
    index = next((index for index, message in enumerate(messages) if role_of(message) == "user"), None)
    if index is None or not parts:
        return messages
    content = messages[index].get("content")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
    return [*messages[:index], {**messages[index], "content": [*parts, *texts]}, *messages[index + 1 :]]


# --- rows of datasets ------------------------------------------------------------------------------------------------


def example_from_feature(processor: Any, feature: Any, **options: Any) -> Mapping[str, Any]:
    """The training example of a dataset item: a built example as it is, or one built from a row.

    Columns that are null, as datasets have them where an example lacks a column, are dropped.

    Args:
        processor: A `Molmo2Processor`; None if all items are built examples.
        feature: What `build_training_example` returned, or a row as for `messages_from_row`.
        options: Of `build_training_example`, for rows.
    Raises:
        ValueError: If the item is neither, an example has no labels, and whatever building raises.
    """
    if not isinstance(feature, Mapping):
        raise ValueError(
            f"A training example is a mapping; found {type(feature).__name__}. Pass what "
            "`build_training_example` returns, or rows with `messages`."
        )
    if feature.get("input_ids") is None:
        messages = messages_from_row(feature)
        if processor is None:
            raise ValueError(
                f"A row with the columns {sorted(feature)} is not a built example. Pass `processor=` to build it."
            )
        return build_training_example(processor, messages, **options)
    if feature.get("labels") is None:
        raise ValueError(f"An example with {sorted(feature)} has no `labels`. Build it with `build_training_example`.")
    return {name: value for name, value in feature.items() if value is not None}


def messages_from_row(row: Mapping[str, Any]) -> Any:
    """The conversation, or the tree of conversations, of a dataset row.

    Args:
        row: `messages`; or `prompt` and `completion`, of which only the completion has labels. Columns `images`,
            `image`, `videos`, `video` hold the sources of media parts that have none, in order (a list of frames is
            one video); without such parts the media are prepended to the first user message.
    Raises:
        ValueError: If there are no messages, or not as many media as parts without a source.
    """
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = (
            [{"role": role, "content": row[name]}] if isinstance(row[name], str) else list(row[name])
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        )
        prompt = [{**message, "loss_weight": 0} if is_answer(message) else message for message in prompt]
        messages = [*prompt, *completion]
    else:
        removed = " A `Trainer` removes the columns of rows unless its arguments say `remove_unused_columns=False`."
        raise ValueError(
            f"A row with the columns {sorted(row)} holds no conversation: expected `messages`, `prompt` and "
            f"`completion`, or the result of `build_training_example`.{'' if row else removed}"
        )
    conversations = list(messages) if is_batch(messages) else [messages]
    first = messages_of(conversations[0])
    for kind in SOURCE_KEYS:
        column = row.get(f"{kind}s") if row.get(f"{kind}s") is not None else row.get(kind)
        is_list = isinstance(column, (list, tuple)) and not (kind == "video" and is_one_video(column))
        media = [] if column is None else list(column) if is_list else [column]
        first = _with_sources(first, kind, media)
    return [first, *conversations[1:]] if is_batch(messages) else first


def _with_sources(messages: Conversation, kind: str, media: list[Any]) -> Conversation:
    """The conversation with these images or videos in the parts of that kind that have no source."""

    def lacks_source(part: Any) -> bool:
        return isinstance(part, Mapping) and media_kind(part) == kind and media_source(part, kind) is None

    num_lacking = sum(lacks_source(part) for message in messages for part in _parts(message))
    if media and not num_lacking:
        return with_media_parts(messages, [{"type": kind, kind: source} for source in media])
    if len(media) != num_lacking:
        raise ValueError(
            f"The messages have {num_lacking} {kind} part(s) without a source, and the row has {len(media)} {kind}(s)."
            f" Pass one {kind} for each such part."
        )
    sources = iter(media)
    return [
        {
            **message,
            "content": [{**part, kind: next(sources)} if lacks_source(part) else part for part in _parts(message)],
        }
        if any(lacks_source(part) for part in _parts(message))
        else message
        for message in messages
    ]


def _parts(message: Message) -> list[Any]:
    content = message.get("content")
    return list(content) if isinstance(content, (list, tuple)) else []
