"""From prompts with placeholders to rows of token ids: pure functions of strings and integers.

"<|image|>Hi"  -- expand -->  "<low_res_im_start><im_patch>...<im_end><im_start>...<im_end>Hi"
[ids], [ids]   -- insert_bos, truncate, pad -->  equal rows and their attention mask
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Strings that Molmo2 adds to a tokenizer; their ids are the tokenizer's business.
IMAGE_PLACEHOLDER = "<|image|>"
VIDEO_PLACEHOLDER = "<|video|>"

IMAGE_PATCH = "<im_patch>"
IMAGE_LOW_RES_PATCH = "<im_low>"
IMAGE_COLUMN = "<im_col>"
IMAGE_START = "<im_start>"
IMAGE_END = "<im_end>"
LOW_RES_IMAGE_START = "<low_res_im_start>"
FRAME_START = "<frame_start>"
FRAME_END = "<frame_end>"

# Tokens of images and video frames: marked in `token_type_ids`, and visible to each other in both directions.
VISUAL_TOKENS = (
    IMAGE_PATCH,
    IMAGE_COLUMN,
    IMAGE_START,
    LOW_RES_IMAGE_START,
    FRAME_START,
    IMAGE_END,
    FRAME_END,
    IMAGE_LOW_RES_PATCH,
)


@dataclass(frozen=True)
class VisualTokenFormat:
    """Which tokens a checkpoint writes images and frames with; part of each `processor_config.json`.

    Attributes:
        image_use_col_tokens: A column token after each row of the high-resolution crops.
        use_single_crop_col_tokens: The same for the low-resolution view; None means as for the high-resolution crops.
        use_single_crop_start_token: The low-resolution view opens with its own start token.
        video_use_col_tokens: A column token after each row of a frame.
        use_frame_special_tokens: Frames open and close with their own tokens.
        use_low_res_token_for_global_crops: The low-resolution view has its own patch token.
    """

    image_use_col_tokens: bool = True
    use_single_crop_col_tokens: bool | None = None
    use_single_crop_start_token: bool = True
    video_use_col_tokens: bool = False
    use_frame_special_tokens: bool = True
    use_low_res_token_for_global_crops: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and not (value is None and name == "use_single_crop_col_tokens"):
                raise ValueError(f"`{name}` is {value!r:.80}; expected true or false.")


def _grid_tokens(rows: int, cols: int, patch: str, has_columns: bool) -> list[str]:
    return ([patch] * cols + [IMAGE_COLUMN] * bool(has_columns)) * rows


def image_tokens(grid: Sequence[int], token_format: VisualTokenFormat) -> list[str]:
    """Tokens of one image: the low-resolution view, then the high-resolution crops.

    Args:
        grid: Rows, cols of the low-resolution view and rows, cols of the crops, in pooled tokens (a row of
            `image_grids`).
    """
    low_rows, low_cols, high_rows, high_cols = (int(side) for side in grid)
    low_columns = token_format.use_single_crop_col_tokens
    if low_columns is None:
        low_columns = token_format.image_use_col_tokens
    low_start = LOW_RES_IMAGE_START if token_format.use_single_crop_start_token else IMAGE_START
    low_patch = IMAGE_LOW_RES_PATCH if token_format.use_low_res_token_for_global_crops else IMAGE_PATCH
    return [
        low_start,
        *_grid_tokens(low_rows, low_cols, low_patch, low_columns),
        IMAGE_END,
        IMAGE_START,
        *_grid_tokens(high_rows, high_cols, IMAGE_PATCH, token_format.image_use_col_tokens),
        IMAGE_END,
    ]


def frame_tokens(rows: int, cols: int, token_format: VisualTokenFormat) -> list[str]:
    """Tokens of one video frame of `rows` by `cols` pooled tokens."""
    start, end = (FRAME_START, FRAME_END) if token_format.use_frame_special_tokens else (IMAGE_START, IMAGE_END)
    return [start, *_grid_tokens(rows, cols, IMAGE_PATCH, token_format.video_use_col_tokens), end]


def video_string(grid: Sequence[Any], timestamps: Sequence[float], token_format: VisualTokenFormat) -> str:
    """Text of one video: for each frame its time in seconds with one decimal, then its tokens.

    Args:
        grid: Frames, rows, cols in pooled tokens (a row of `video_grids`), or several such rows, one for each run of
            frames that are pooled alike.
        timestamps: Seconds, one for each frame.
    Raises:
        ValueError: The numbers of timestamps and frames differ.
    """
    frames: list[str] = []
    for num_frames, rows, cols in np.atleast_2d(grid).tolist():
        frames += ["".join(frame_tokens(rows, cols, token_format))] * num_frames
    if len(timestamps) != len(frames):
        raise ValueError(
            f"The video has {len(frames)} frame(s) and {len(timestamps)} timestamp(s); expected one for each frame."
        )
    return " ".join(f"{seconds:.1f} {frame}" for seconds, frame in zip(timestamps, frames))


def timed_grids(
    video_grids: Iterable[Sequence[int]], metadata: Iterable[Any]
) -> list[tuple[list[list[int]], Sequence[float]]]:
    """(rows of `video_grids`, timestamps) of each video; a slow-fast video has one row per run of frames.

    Args:
        video_grids: (runs, 3) frames, then rows and columns of tokens of each; lists, an array or a tensor.
        metadata: Of each video, with `timestamps` in seconds.
    Raises:
        ValueError: The frames of the runs do not add up to those of the videos.
    """
    rows = [[int(number) for number in row] for row in video_grids]
    times = [entry.timestamps for entry in metadata]
    run_ends = np.cumsum([0, *(row[0] for row in rows)]).tolist()
    video_ends = np.cumsum([0, *map(len, times)]).tolist()
    if run_ends[-1] != video_ends[-1] or not set(video_ends) <= set(run_ends):
        raise ValueError(
            f"video_grids has runs of {[row[0] for row in rows]} frames, which do not add up to videos of "
            f"{[len(own) for own in times]} sampled frames. Pass the grids and the metadata of the same call."
        )
    return [
        ([row for row, end in zip(rows, run_ends[1:]) if start < end <= stop], own)
        for start, stop, own in zip(video_ends, video_ends[1:], times)
    ]


@dataclass(frozen=True)
class ExpandedPrompt:
    """A prompt whose placeholders were replaced by visual tokens.

    Attributes:
        text: The expanded prompt.
        replacements: One for each placeholder, in the form of transformers: its type, "image" or "video", `span` and
            `text` in the original, `new_span` and `replacement` in the expanded prompt; spans count characters.
    """

    text: str
    replacements: tuple[dict[str, Any], ...] = ()

    def position(self, original: int) -> int:
        """Index in the expanded prompt of a character of the original one, outside of placeholders."""
        before = [one for one in self.replacements if one["span"][1] <= original]
        return original + sum(len(one["replacement"]) - len(one["text"]) for one in before)


def expand(prompt: str, waiting: Mapping[str, Iterator[str]]) -> ExpandedPrompt:
    """Replace placeholders by the texts of their images and videos, in order.

    Args:
        waiting: For each placeholder the texts of its next occurrences, in this prompt and those that follow.
    """
    pieces: list[str] = []
    replaced: list[dict[str, Any]] = []
    done = new_start = 0
    while found := [(start, mark) for mark in waiting if (start := prompt.find(mark, done)) >= 0]:
        start, mark = min(found)
        text = next(waiting[mark])
        pieces += [prompt[done:start], text]
        new_start += start - done
        done = start + len(mark)
        spans = {"span": (start, done), "new_span": (new_start, new_start + len(text))}
        replaced.append({"type": mark.strip("<|>"), **spans, "text": mark, "replacement": text})
        new_start += len(text)
    return ExpandedPrompt("".join([*pieces, prompt[done:]]), tuple(replaced))


def require_placeholders(prompts: Sequence[str], placeholder: str, number: int, given: Any = None) -> None:
    """Check that the prompts have one placeholder for each image or video.

    Args:
        number: Images or videos of all prompts.
        given: They as the caller passed them, perhaps grouped by prompt.
    Raises:
        ValueError: The numbers differ; the message names both, and the prompt where it is known.
    """
    noun = placeholder.strip("<|>")
    counts = [prompt.count(placeholder) for prompt in prompts]
    is_nested = isinstance(given, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in given)
    lengths = [len(row) for row in given] if is_nested else []
    advice = (
        f"The number of `{placeholder}` tokens in the prompts should be the same as the number of {noun}s. Put one "
        f"`{placeholder}` where each {noun} belongs, or let `apply_chat_template` write the prompt"
    )
    if len(lengths) == len(prompts) and sum(lengths) == number:
        for index, (count, length) in enumerate(zip(counts, lengths)):
            if count != length:
                raise ValueError(
                    f"Prompt {index} has {count} `{placeholder}`, but {length} {noun}(s) were passed for it. {advice}."
                )
    if sum(counts) != number:
        raise ValueError(f"{sum(counts)} `{placeholder}` in the text, but {number} {noun}(s) were passed. {advice}.")


def insert_bos(ids: list[int], bos_id: int) -> list[int]:
    """The row with exactly one leading BOS, as in training; the chat template writes none."""
    return ids if ids[:1] == [bos_id] else [bos_id, *ids]


def truncate(ids: list[int], max_length: int, side: str, visual_ids: frozenset[int]) -> list[int]:
    """The row cut to `max_length`; BOS is kept when the left side is cut.

    Raises:
        ValueError: The cut would remove visual tokens, so that images and videos no longer fit the prompt.
    """
    excess = len(ids) - max_length
    if excess <= 0:
        return ids
    cut = ids[1 : excess + 1] if side == "left" else ids[-excess:]
    num_visual = sum(token in visual_ids for token in cut)
    if num_visual:
        raise ValueError(
            f"Truncating a prompt of {len(ids)} tokens to `max_length` = {max_length} would cut {num_visual} visual "
            f"token(s). Raise `max_length` by {excess} or more, lower `max_crops` (images) or `num_frames` (videos)."
        )
    return ids[:1] + ids[excess + 1 :] if side == "left" else ids[:-excess]


def padded_length(lengths: Sequence[int], padding: Any, max_length: int | None, multiple: int | None) -> int:
    """Length that rows are padded to; 0 for no padding.

    Args:
        padding: True or "longest", "max_length", False or "do_not_pad" (or an enum with these values).
        multiple: Round up to a multiple of this.
    Raises:
        ValueError: For another strategy, and for "max_length" without a length.
    """
    strategy = getattr(padding, "value", padding)
    if strategy in (False, None, "do_not_pad"):
        return 0
    if strategy in (True, "longest"):
        length = max(lengths, default=0)
    elif strategy == "max_length":
        if max_length is None:
            raise ValueError('`padding="max_length"` needs `max_length`, the number of tokens to pad to.')
        length = max(max_length, *lengths)
    else:
        raise ValueError(f"`padding` is {padding!r}; expected True, 'longest', 'max_length' or False.")
    return length if not multiple else -(-length // multiple) * multiple


def pad(row: list[int], length: int, pad_value: int, side: str) -> list[int]:
    """The row padded to `length` on `side` ("left" or "right").

    Raises:
        ValueError: For another side.
    """
    if side not in ("left", "right"):
        raise ValueError(f"`padding_side` is {side!r}; expected 'left' or 'right'.")
    padding = [pad_value] * (length - len(row))
    return padding + row if side == "left" else row + padding
