"""From conversations to training examples: one row of tokens with labels, and the pictures it is about.

    <bos> <pictures> <|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n A ship. <|im_end|>
    labels                                                                            ^^^^^^^^^^^^^^^^^

What the template puts between `{% generation %}` and `{% endgeneration %}` is learnt: the answers and their closing
tokens. Several conversations about the same pictures make a tree: their rows are written as ever, and what they have
in common at the beginning is kept once (see `molmo2.model.packing`), so that a tree is what its rows are apart.
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
from molmo2.processing.chat import ConversationMedia, find_media, is_batch, media_arguments, messages_of, picture_kind
from molmo2.processing.prompt_tokens import timed_grids, truncate
from molmo2.training.weighting import TokenWeighting, is_answer, message_weights, role_of
from molmo2.video.loading import is_one_video


@dataclass(frozen=True)
class LabelledRow:
    """One conversation as tokens.

    Attributes:
        ids: With BOS.
        labels: The ids that are learnt, -100 elsewhere.
        weights: One for each label, 0 elsewhere; None without weights.
    """

    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None

    def cut(self, max_length: int | None, visual_ids: frozenset[int]) -> "LabelledRow":
        """The first `max_length` tokens; see `molmo2.processing.prompt_tokens.truncate`."""
        if max_length is None or len(self.ids) <= max_length:
            return self
        ids = truncate(self.ids, max_length, "right", visual_ids)
        return LabelledRow(ids, self.labels[: len(ids)], None if self.weights is None else self.weights[: len(ids)])

    def first_label(self) -> int:
        """Place of the first label.

        Raises:
            ValueError: If nothing is learnt.
        """
        place = next((place for place, label in enumerate(self.labels) if label != IGNORED), None)
        if place is None:
            raise ValueError(
                f"There is nothing to learn in a conversation of {len(self.ids)} tokens: it needs an assistant "
                "message, with a `loss_weight` above 0, within `max_length`."
            )
        return place


def build_training_example(
    processor: Any,
    messages: Any,
    *,
    weighting: TokenWeighting | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """A conversation, or a tree of them, as one row; see `TrainingTools.build_training_example`."""
    conversations = [
        _without_null_styles(messages_of(own)) for own in (messages if is_batch(messages) else [messages])
    ]
    for own in conversations:
        _require_texts(own)
    media = find_media(conversations[0])
    conversations = [conversations[0], *(_about(own, conversations[0], media) for own in conversations[1:])]
    for own in conversations:
        if not any(is_answer(message) for message in own):
            raise ValueError(
                f"A conversation of {len(own)} message(s) has none from the assistant, so there is nothing to "
                "learn. Put the answer into it, as a message with the role `assistant`."
            )
    pictures = _pictures(processor, media, options)
    encoded = _encode(processor, conversations, pictures, chat_template)
    pictures.pop("video_metadata", None)
    visual = frozenset(processor.image_token_ids)
    rows = [
        _labelled(own, ids, mask, visual, weighting).cut(max_length, visual)
        for own, ids, mask in zip(conversations, *encoded)
    ]
    tensors = {name: torch.as_tensor(value) for name, value in pictures.items()}
    return {**_row_tensors(rows, visual), **tensors}


def _require_texts(messages: list[Mapping[str, Any]]) -> None:
    """Refuse what the template would write as an empty turn. An answer that is "" on purpose is one.

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


def _without_null_styles(messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Data sets fill keys that a part lacks with null, and the template, as the original's, would write "None: "."""

    def cleaned(part: Any) -> Any:
        is_null = isinstance(part, Mapping) and "style" in part and part["style"] is None
        return {key: value for key, value in part.items() if key != "style"} if is_null else part

    return [
        {**message, "content": [cleaned(part) for part in _parts(message)]} if _parts(message) else message
        for message in messages
    ]


def _pictures(processor: Any, media: ConversationMedia, options: dict[str, Any]) -> dict[str, Any]:
    """Arrays of the pictures, and `video_metadata` with videos."""
    if not media.images and not media.videos:
        return {}
    videos = {**(options.get("videos_kwargs") or {}), "return_metadata": True}
    options = {**options, "videos_kwargs": videos, "return_tensors": None}
    return dict(processor(**media_arguments([media], options)))


def _encode(
    processor: Any, conversations: list[Any], pictures: Mapping[str, Any], template: str | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of each conversation, and 1 where the assistant wrote them; all are about the same pictures."""
    prompts, spans = processor.render_conversations(conversations, template, return_assistant_tokens_mask=True)
    encoded = processor.encode_prompts(
        prompts,
        [*pictures.get("image_grids", [])] * len(conversations),
        timed_grids(pictures.get("video_grids", []), pictures.get("video_metadata", [])) * len(conversations),
        assistant_spans=spans,
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def _labelled(
    messages: list[Mapping[str, Any]],
    ids: list[int],
    mask: list[int],
    visual_ids: frozenset[int],
    weighting: TokenWeighting | None,
) -> LabelledRow:
    """Labels and weights of a conversation; answers are runs of ones in the mask, headers stand between them."""
    edges = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
    answers = list(zip(edges[::2], edges[1::2]))
    num_messages = sum(is_answer(message) for message in messages)
    if len(answers) != num_messages:
        raise ValueError(
            f"The chat template marks {len(answers)} answer(s) of {num_messages} message(s) from the assistant. Use "
            "a template that encloses what the assistant writes in `{% generation %}` and `{% endgeneration %}`."
        )
    labels = [token if learnt and token not in visual_ids else IGNORED for token, learnt in zip(ids, mask)]
    weights = message_weights(messages, [end - start for start, end in answers], weighting)
    if weights is None:
        return LabelledRow(ids, labels)
    token_weights = [0.0] * len(ids)
    for (start, end), weight in zip(answers, weights):
        token_weights[start:end] = [weight] * (end - start)
    labels = [label if weight else IGNORED for label, weight in zip(labels, token_weights)]
    return LabelledRow(ids, labels, token_weights)


def _row_tensors(rows: list[LabelledRow], visual_ids: frozenset[int]) -> dict[str, Tensor]:
    """One row of tokens; several become branches behind what they have in common."""
    first_labels = [row.first_label() for row in rows]
    shared = shared_length([row.ids for row in rows], min(first_labels) - 1) if len(rows) > 1 else 0

    def joined(values: list[list[Any]]) -> list[Any]:
        return [*values[0][:shared], *(entry for row in values for entry in row[shared:])]

    ids = joined([row.ids for row in rows])
    example = {"input_ids": torch.tensor(ids), "labels": torch.tensor(joined([row.labels for row in rows]))}
    example["token_type_ids"] = torch.tensor([token in visual_ids for token in ids])
    if any(row.weights is not None for row in rows):
        weights = joined([[1.0] * len(row.ids) if row.weights is None else row.weights for row in rows])
        unlearnt = example["labels"] == IGNORED
        example["loss_weights"] = torch.tensor(weights, dtype=torch.float32).masked_fill(unlearnt, 0.0)
    if len(rows) > 1:
        lengths = torch.tensor([shared, *(len(row.ids) - shared for row in rows)])
        example["branch_ids"] = torch.arange(len(lengths)).repeat_interleave(lengths)
    return example


def shared_length(rows: Sequence[Sequence[int]], most: int) -> int:
    """How many tokens at the beginning branches share: all that are equal, up to `most`.

    `most` leaves out the labels and the token before the first one, because the first token of a branch has no label
    (see `molmo2.model.loss.shift_labels`). So each branch learns all of its own answers.
    """
    first = np.asarray(rows[0][:most])
    for row in rows[1:]:
        differs = np.flatnonzero(first != np.asarray(row[: len(first)]))
        first = first[: differs[0]] if len(differs) else first
    return len(first)


# --- pictures of conversations ---------------------------------------------------------------------------------------


def _picture_parts(messages: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The parts of a conversation that stand for pictures."""
    parts = [part for message in messages for part in _parts(message)]
    return [part for part in parts if isinstance(part, Mapping) and picture_kind(part) is not None]


def _same(one: Any, other: Any) -> bool:
    """Whether two pictures are one, also where a data set decoded it twice."""
    compared = (str, bytes, os.PathLike, PIL.Image.Image)
    return one is other or (isinstance(one, compared) and type(one) is type(other) and one == other)


def _about(messages: list[Mapping[str, Any]], first: list[Mapping[str, Any]], media: ConversationMedia) -> list[Any]:
    """A branch with the pictures of the first one.

    Raises:
        ValueError: If it names others.
    """
    own = find_media(messages)
    if own.images or own.videos:
        pairs = [*zip(own.images, media.images), *zip(own.videos, media.videos)]
        counts = (len(own.images), len(own.videos)), (len(media.images), len(media.videos))
        if counts[0] != counts[1] or not all(_same(*pair) for pair in pairs):
            raise ValueError(
                f"The first conversation is about {counts[1][0]} image(s) and {counts[1][1]} video(s), another one "
                f"about {counts[0][0]} and {counts[0][1]}, or about others. All branches of a tree are about the same "
                "pictures: name them in the first conversation alone, or pass the conversations one by one."
            )
        return messages
    return with_pictures(messages, _picture_parts(first))


def with_pictures(messages: list[Mapping[str, Any]], parts: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The conversation with picture parts in its first message from the user."""
    place = next((number for number, message in enumerate(messages) if role_of(message) == "user"), None)
    if place is None or not parts:
        return messages
    content = messages[place].get("content")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
    return [*messages[:place], {**messages[place], "content": [*parts, *texts]}, *messages[place + 1 :]]


def training_example(processor: Any, feature: Any, **options: Any) -> Mapping[str, Any]:
    """What is learnt from an item of a data set: a built example, or a row that becomes one (see `messages_of_row`).

    Data sets fill columns that an example lacks with null; such columns are left out.

    Args:
        options: Of `build_training_example`, for rows.
    Raises:
        ValueError: If the item is neither, an example has no labels, and whatever building raises.
    """
    if not isinstance(feature, Mapping):
        raise ValueError(
            f"A training example is a mapping; found {type(feature).__name__}. Pass what "
            "`processor.build_training_example` returns, or rows with `messages`."
        )
    if feature.get("input_ids") is None:
        return processor.build_training_example(messages_of_row(feature), **options)
    if feature.get("labels") is None:
        raise ValueError(
            f"An example with {sorted(feature)} has no `labels`. Build it with `processor.build_training_example`."
        )
    return {name: value for name, value in feature.items() if value is not None}


def messages_of_row(row: Mapping[str, Any]) -> Any:
    """The conversation, or the tree of conversations, of a row of a data set.

    Args:
        row: `messages`; or `prompt` and `completion`, of which only the second is learnt. Columns `images`, `image`,
            `videos`, `video` hold the pictures of parts that have none, in their order (a list of frames is one
            video); without such parts the pictures go into the first message from the user.
    Raises:
        ValueError: If there are no messages, or not as many pictures as parts that wait for one.
    """
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        given, answer = (
            [{"role": role, "content": row[name]}] if isinstance(row[name], str) else list(row[name])
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        )
        messages = [*({**message, "loss_weight": 0} if is_answer(message) else message for message in given), *answer]
    else:
        removed = " A `Trainer` removes the columns of rows unless its arguments say `remove_unused_columns=False`."
        raise ValueError(
            f"A row with the columns {sorted(row)} holds no conversation: expected `messages`, `prompt` and "
            f"`completion`, or the result of `processor.build_training_example`.{'' if row else removed}"
        )
    conversations = list(messages) if is_batch(messages) else [messages]
    first = messages_of(conversations[0])
    for kind in ("image", "video"):
        given = row.get(f"{kind}s") if row.get(f"{kind}s") is not None else row.get(kind)
        is_list = isinstance(given, (list, tuple)) and not (kind == "video" and is_one_video(given))
        pictures = [] if given is None else list(given) if is_list else [given]
        first = _filled(first, kind, pictures)
    return [first, *conversations[1:]] if is_batch(messages) else first


def _filled(messages: list[Any], kind: str, pictures: list[Any]) -> list[Any]:
    """The conversation with these pictures in the parts that wait for them."""

    def waits(part: Any) -> bool:
        sources = (kind, f"{kind}_url", "url", "path", "base64")
        return isinstance(part, Mapping) and part.get("type") == kind and all(part.get(key) is None for key in sources)

    waiting = sum(waits(part) for message in messages for part in _parts(message))
    if pictures and not waiting:
        return with_pictures(messages, [{"type": kind, kind: picture} for picture in pictures])
    if len(pictures) != waiting:
        raise ValueError(
            f"The messages have {waiting} {kind} part(s) without a source, and the row has {len(pictures)} {kind}(s). "
            f"Pass one {kind} for each such part."
        )
    source = iter(pictures)
    return [
        {**message, "content": [{**part, kind: next(source)} if waits(part) else part for part in _parts(message)]}
        if any(waits(part) for part in _parts(message))
        else message
        for message in messages
    ]


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return list(content) if isinstance(content, (list, tuple)) else []
